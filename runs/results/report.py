"""What the runs of results/grids showed: `python runs/results/report.py OUT` after they were launched with `--out OUT`.

Reads config.json, metrics.jsonl and evaluation.json of every run in OUT/{lr,main,equal-time,seeds,embedding}, writes an
extract of them (docs/figures/gpu/results.json), draws results.png and results-curves.png in docs/figures from it, and
prints the tables of docs/results.md. Without OUT it draws and prints from the extract; with --table it only prints.

GPU seconds are seconds of training steps. A step that took over three times the median (compilation, graph capture, the
first ones after a resume) counts as the median; what was taken off is in the column "start". Evaluation and saving are
not in it.

Runs that shared a GPU have no such times, unless each had it for itself for a while: OUT/GRID/alone.json says during
which steps, {"RUN": [[first, last], ...]}. Every step then counts as the median of these. Or it says how long a step
of the same model took in another run, {"RUN": {"step_s": SECONDS, "of": "which run"}}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurformer.report import COLOURS, MARKERS, Run, load_runs
from recurformer.units import short_number

DOCS = Path(__file__).parents[2] / "docs"
GRIDS = ("lr", "main", "equal-time", "seeds", "embedding")
LONG = GRIDS[1:]  # of runs that end with an evaluation
SLOW = 3.0  # times the median: a step that did not only train
WINDOW = 100  # steps before one, with which its loss is compared
SPIKE = 0.5  # nats above their median: a spike
TIMES = ("tokens_per_second", "step_s", "gpu_s", "start_s", "alone")
BLOCK = 40  # steps whose training losses are averaged for the picture
EARLY = 1  # which of these blocks the table has beside the last one
BASE = "transformer-8"  # with which the picture compares training losses

Alone = Sequence[Sequence[int]] | dict[str, Any]  # of one run in alone.json


def extract(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Grid -> its runs, each as the page needs it, ready for JSON.

    Raises:
        ValueError: when there is no run.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for grid in GRIDS:
        folders = sorted(path.parent for path in (out / grid).glob("*/metrics.jsonl"))
        file = out / grid / "alone.json"
        alone = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        runs = [describe(run, alone.get(run.folder.name, [])) for run in load_runs(folders)] if folders else []
        if grid == "lr":  # runs that are not timed, since they share the device
            runs = [run and {name: value for name, value in run.items() if name not in TIMES} for run in runs]
        if runs:
            found[grid] = [run for run in runs if run is not None]
    if not found:
        raise ValueError(f"{out} holds no run of {', '.join(GRIDS)}; launch them with --out {out}")
    return found


def describe(run: Run, alone: Alone = ()) -> dict[str, Any] | None:
    """One run; None before its first record.

    Args:
        alone: first and last steps during which it had the device for itself, if it shared it otherwise; or what
            "alone.json" says of another run.
    """
    records, evaluations = run.events("train"), run.events("evaluation")
    if not records:
        return None
    schedule, model = run.config["schedule"], run.model
    seconds, median = step_seconds(records, alone)
    at = dict(zip([0, *(record["step"] for record in records)], [0.0, *itertools.accumulate(seconds)], strict=True))
    final = run.folder / "evaluation.json"
    starts = run.events("start") + run.events("resume")
    return {
        "name": run.folder.name,
        "kind": model.kind,
        "layers": model.n_layers,
        "width": model.d_model,
        "parameters": model.num_parameters(),
        "lr": run.config["optimizer"]["lr"],
        "seed": run.config["seed"],
        "steps": schedule["steps"],
        "step": records[-1]["step"],
        "pieces": len(starts),
        "device": starts[-1]["device"] if starts else None,
        "versions": starts[-1]["versions"] if starts else None,
        "tokens": records[-1]["tokens"],
        "tokens_per_second": records[-1]["tokens"] / records[-1]["step"] / median,
        "step_s": median,
        "gpu_s": sum(seconds),
        "start_s": None if alone else records[-1]["seconds"] - sum(seconds),
        "alone": [alone]
        if isinstance(alone, dict)
        else [{"steps": list(window), "step_s": step_seconds(records, [window])[1]} for window in alone],
        "validation": [
            {"tokens": e["tokens"], "gpu_s": round(at[e["step"]], 3), "loss": e["validation_loss"]}
            for e in evaluations
            if e["step"] in at
        ],
        "training": training(records),
        **stability(records, run.config["optimizer"]["grad_clip"], schedule),
        "final": json.loads(final.read_text(encoding="utf-8")) if final.is_file() else None,
    }


def step_seconds(records: Sequence[dict[str, Any]], alone: Alone = ()) -> tuple[list[float], float]:
    """Seconds between the records of training, those of slow steps replaced, and the median of a step; with `alone`
    the median of these steps, or that of another run, for all."""
    counts, times = [], []
    for before, record in itertools.pairwise([{"step": 0, "seconds": 0.0}, *records]):
        counts.append(record["step"] - before["step"])
        times.append((record["seconds"] - before["seconds"]) / counts[-1])
    if isinstance(alone, dict):
        return [n * alone["step_s"] for n in counts], alone["step_s"]
    if alone:
        pairs = zip(times, records, strict=True)
        median = statistics.median(t for t, r in pairs if any(a <= r["step"] <= b for a, b in alone))
        return [n * median for n in counts], median
    median = statistics.median(times)
    return [n * (t if t <= SLOW * median else median) for n, t in zip(counts, times, strict=True)], median


def training(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean training losses of whole blocks of steps, and the tokens at their ends."""
    by: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by.setdefault((record["step"] - 1) // BLOCK, []).append(record)
    return [
        {"tokens": block[-1]["tokens"], "loss": round(statistics.fmean(r["loss"] for r in block), 5)}
        for block in by.values()
        if len(block) == BLOCK
    ]


def stability(records: Sequence[dict[str, Any]], grad_clip: float | None, schedule: dict[str, Any]) -> dict[str, Any]:
    """Statistics of gradient norms after the warm-up, and of losses that stand out."""
    first = schedule["warmup_steps"] or round(schedule["warmup_fraction"] * schedule["steps"])
    norms = sorted(r["grad_norm"] for r in records if r["step"] > first)
    losses, spikes, highest = [r["loss"] for r in records], 0, 0.0
    for n in range(WINDOW, len(losses)):
        above = losses[n] - statistics.median(losses[n - WINDOW : n])
        spikes += above > SPIKE
        highest = max(highest, above)
    return {
        "norm_median": statistics.median(norms) if norms else None,
        "norm_99": norms[min(len(norms) - 1, int(0.99 * len(norms)))] if norms else None,
        "norm_max": norms[-1] if norms else None,
        "clipped": sum(norm > (grad_clip or math.inf) for norm in norms) / len(norms) if norms else None,
        "spikes": spikes,
        "largest_rise": highest,
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, a table a grid."""
    parts = []
    if "lr" in found:
        rates = sorted({run["lr"] for run in found["lr"]})
        parts.append(["model", *(f"lr {rate:g}" for rate in rates)])
        for model, runs in groups(found["lr"]).items():
            losses = {run["lr"]: loss_of(run) for run in runs if run["step"] == run["steps"]}
            best = min(losses.values(), default=math.nan)
            cells = [f"{losses[r]:.3f}" if r in losses else "-" for r in rates]
            marked = [f"**{c}**" if c == f"{best:.3f}" else c for c in cells]
            parts.append([model, *marked])
        parts.append([])
    for grid in LONG:
        if grid not in found:
            continue
        parts.append([grid, "params", "lr", "tokens", "tokens/s", "GPU s", "start s", "loss", "all", "C4", "bits/byte"])
        parts += [row(run) for run in found[grid]]
        parts.append([])
        tokens = sorted({p["tokens"] for run in found[grid] for p in run["validation"] if p["tokens"]})
        parts.append(["loss after", *map(short_number, tokens)])
        for run in found[grid]:
            at = {p["tokens"]: f"{p['loss']:.4f}" for p in run["validation"] if p["tokens"]}
            if at:
                parts.append([run["name"], *(at.get(n, "-") for n in tokens)])
        parts.append([])
        apart = differences(found[grid])
        if apart:
            ends = sorted({sorted(blocks)[n] for blocks in apart.values() for n in (min(EARLY, len(blocks) - 1), -1)})
            parts.append([f"training loss less that of {BASE}, after", *map(short_number, ends)])
            for name, blocks in apart.items():
                parts.append([name, *(f"{blocks[n]:+.4f}" if n in blocks else "-" for n in ends)])
            parts.append([])
        parts.append([grid, "norm median", "99 %", "largest", "clipped", "spikes", "largest rise"])
        for run in found[grid]:
            if run["norm_median"] is None:  # stopped while warming up
                continue
            numbers = [f"{run[name]:.2f}" for name in ("norm_median", "norm_99", "norm_max")]
            parts.append([
                run["name"], *numbers, f"{100 * run['clipped']:.1f} %", str(run["spikes"]), f"{run['largest_rise']:.2f}"
            ])  # fmt: skip
        parts.append([])
    parts += compared(found)
    scored = [run for grid in LONG for run in found.get(grid, []) if run["final"] and "tasks" in run["final"]]
    if scored:
        names = [task["task"] for task in scored[0]["final"]["tasks"]]
        parts.append(["zero-shot, %", *(run["name"] for run in scored)])
        for n, name in enumerate(names):
            results = [run["final"]["tasks"][n] for run in scored]
            parts.append(
                [name, *(f"{100 * r['accuracy']:.1f} ± {100 * (r['standard_error'] or 0):.1f}" for r in results)]
            )
    lines, top = [], True
    for cells in parts:
        lines.append("| " + " | ".join(cells) + " |" if cells else "")
        if top:
            lines.append("|---" * len(cells) + "|")
        top = not cells
    return "\n".join(lines).strip() + "\n"


def row(run: dict[str, Any]) -> list[str]:
    """Cells of a run in the tables of long runs."""
    final = run["final"] or {}
    of = {name: final.get(name, {}) for name in ("validation", "validation-c4")}
    return [
        run["name"] if run["step"] == run["steps"] else f"{run['name']} (step {run['step']} of {run['steps']})",
        short_number(run["parameters"]),
        f"{run['lr']:g}",
        short_number(run["tokens"]),
        f"{run['tokens_per_second']:,.0f}",
        f"{run['gpu_s']:.0f}",
        "-" if run["start_s"] is None else f"{run['start_s']:.0f}",
        "-" if math.isnan(loss_of(run)) else f"{loss_of(run):.4f}",
        *(f"{values['loss']:.4f}" if values else "-" for values in of.values()),
        f"{of['validation']['bits_per_byte']:.4f}" if of["validation"] else "-",
    ]


def compared(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Rows of a table: losses on the whole text, less those of the same model in "main" and of BASE trained alike."""
    losses = {
        run["name"]: run["final"]["validation"]["loss"]
        for grid in ("main", "seeds", "embedding")
        for run in found.get(grid, [])
        if run["final"] and "validation" in run["final"]
    }
    models = sorted((run["name"] for run in found.get("main", [])), key=len, reverse=True)
    rows = [["whole text", "loss", "less that of the same model in main", f"less that of {BASE}, alike"]]
    for name, loss in losses.items():
        model = next((model for model in models if name.startswith(model)), name)
        others = (model, BASE + name.removeprefix(model))
        less = ["" if other == name or other not in losses else f"{loss - losses[other]:+.4f}" for other in others]
        rows.append([name, f"{loss:.4f}", *less])
    return [*rows, []] if len(rows) > 1 else []


def differences(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return, for each run but BASE, its mean training loss less that of BASE in the same block of steps, by tokens."""
    base = next((run["training"] for run in runs if run["name"] == BASE), [])
    return {
        run["name"]: {a["tokens"]: a["loss"] - b["loss"] for a, b in zip(run["training"], base, strict=False)}
        for run in runs
        if run["name"] != BASE and run["training"] and base
    }


def groups(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by their model."""
    by: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by.setdefault(f"{run['kind']}, {run['layers']} x {run['width']}", []).append(run)
    return by


def loss_of(run: dict[str, Any]) -> float:
    """The last validation loss while training; nan where only the fresh model was evaluated."""
    trained = [point["loss"] for point in run["validation"] if point["tokens"]]
    return trained[-1] if trained else math.nan


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw the last validation loss of every model twice: after the same tokens, and over GPU seconds.

    Filled marks are first seeds, empty marks second ones. On the right a line joins the runs of one model that differ
    in length.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharex=False)
    main, seeds = found.get("main", []), found.get("seeds", [])
    order = sorted((run for run in main if math.isfinite(loss_of(run))), key=loss_of, reverse=True)
    looks = {run["name"]: (COLOURS[n % 7], MARKERS[n % 7]) for n, run in enumerate(order)}
    for height, run in enumerate(order):
        colour, marker = looks[run["name"]]
        others = [loss_of(other) for other in seeds if other["name"].startswith(f"{run['name']}-seed")]
        losses = [loss_of(run), *others]
        by_tokens.plot([min(losses), max(losses)], [height, height], color=colour, linewidth=1.4, alpha=0.6)
        by_tokens.plot(losses[0], height, marker, color=colour, markersize=8)
        by_tokens.plot(others, [height] * len(others), marker, color=colour, markersize=8, fillstyle="none")
        same = [run, *(other for other in found.get("equal-time", []) if other["name"].startswith(f"{run['name']}-"))]
        same = [one for one in same if one.get("gpu_s") is not None]
        by_time.plot([one["gpu_s"] for one in same], [loss_of(one) for one in same], "--", color=colour, linewidth=1)
        for n, one in enumerate(same):
            by_time.plot(one["gpu_s"], loss_of(one), marker, color=colour, markersize=8)
            text = one["name"] if n == 0 else f"{run['name']}, {one['steps'] / run['steps']:.2f} times the steps"
            place, side = ((0, 9 if height % 2 else -17), "center") if n == 0 else ((9, 3), "left")
            by_time.annotate(
                text, (one["gpu_s"], loss_of(one)), xytext=place, textcoords="offset points", fontsize=8, ha=side
            )
    tokens = f", {1e-6 * order[0]['tokens']:.0f}M tokens each" if order else ""
    by_tokens.set_yticks(range(len(order)), [run["name"] for run in order])
    by_tokens.set_title(f"Equal tokens{tokens} (empty marks: second seeds)", fontsize=10)
    by_tokens.set_xlabel("validation loss, nats a token (left is better)")
    by_tokens.margins(y=0.15)
    by_time.set_title("The same models by GPU time", fontsize=10)
    by_time.set_xlabel("GPU seconds of training")
    by_time.set_ylabel("validation loss, nats a token")
    by_time.margins(x=0.16, y=0.16)
    save(figure, (by_tokens, by_time), file)


def draw_curves(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw training losses less those of `BASE` on the same batches, and validation losses over GPU seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    by_block, by_time = figure.subplots(1, 2)
    looks: dict[str, tuple[str, str]] = {}
    apart = differences(found.get("main", []))
    for grid, line in (("main", "-"), ("equal-time", "--")):
        for run in found.get(grid, []):
            points = [p for p in run["validation"] if p["tokens"]]
            model = run["name"].split("-as-long")[0]
            colour, marker = looks.setdefault(model, (COLOURS[len(looks) % 7], MARKERS[len(looks) % 7]))
            label = None if grid == "equal-time" else run["name"]
            if grid == "main" and run["step"] != run["steps"]:
                label = f"{run['name']}, stopped at {short_number(run['tokens'])}"
            by_time.plot(
                [p["gpu_s"] for p in points], [p["loss"] for p in points], line, color=colour, marker=marker,
                markersize=4, linewidth=1.4, label=label,
            )  # fmt: skip
            blocks = apart.get(run["name"], {}) if grid == "main" else {}
            by_block.plot([1e-6 * n for n in blocks], list(blocks.values()), color=colour, linewidth=1.4)
    shown = [p["loss"] for grid in ("main", "equal-time") for run in found.get(grid, []) for p in run["validation"][2:]]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        by_time.set_ylim(min(shown) - margin, max(shown) + margin)
    by_block.axhline(0.0, color="#777777", linewidth=0.8)
    by_block.set_xlabel("training tokens, millions")
    by_block.set_ylabel(f"training loss less that of {BASE}, nats")
    by_time.set_xlabel("GPU seconds of training (dashed: longer runs)")
    by_time.set_ylabel("validation loss, nats a token")
    by_time.legend(frameon=False, fontsize=8)
    for panel in (by_block, by_time):
        panel.set_xlim(left=0)
    save(figure, (by_block, by_time), file)


def save(figure: Any, panels: Sequence[Any], file: Path) -> None:
    """Write a picture, its panels in one style."""
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where figures/ is (default: docs)")
    parser.add_argument("--table", action="store_true", help="print the tables, and write nothing")
    given = parser.parse_args(arguments)
    stored = given.docs / "figures" / "gpu" / "results.json"
    try:
        if given.out is not None:
            found = extract(given.out)
        elif stored.is_file():
            found = json.loads(stored.read_text(encoding="utf-8"))
        else:
            raise ValueError(f"there is no {stored}; give the folder of the runs")
        if not given.table:
            if given.out is not None:
                stored.parent.mkdir(parents=True, exist_ok=True)
                stored.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            draw(found, given.docs / "figures" / "results.png")
            draw_curves(found, given.docs / "figures" / "results-curves.png")
        print(tables(found), end="")
    except (ValueError, OSError) as error:
        print(f"report.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
