"""What the runs of results/grids showed: `python runs/results/report.py OUT` after they were launched with `--out OUT`.

Reads config.json, metrics.jsonl and evaluation.json of every run in OUT/{lr,main,equal-time,seeds}, writes an extract
of them (docs/figures/gpu/results.json), draws docs/figures/results.png from it, and prints the tables of
docs/results.md. Without OUT it draws and prints from the extract; with --table it only prints.

GPU seconds are seconds of training steps. A step that took over three times the median (compilation, graph capture, the
first ones after a resume) counts as the median; what was taken off is in the column "start". Evaluation and saving are
not in it.
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

from recurformer.report import COLOURS, MARKERS, Run, kind_of, load_runs, parameters, short_number

DOCS = Path(__file__).parents[2] / "docs"
GRIDS = ("lr", "main", "equal-time", "seeds")
SLOW = 3.0  # times the median: a step that did not only train
WINDOW = 100  # steps before one, with which its loss is compared
SPIKE = 0.5  # nats above their median: a spike


def extract(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Grid -> its runs, each as the page needs it, ready for JSON.

    Raises:
        ValueError: when there is no run.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for grid in GRIDS:
        folders = sorted(path.parent for path in (out / grid).glob("*/metrics.jsonl"))
        runs = [describe(run) for run in load_runs(folders)] if folders else []
        if runs:
            found[grid] = [run for run in runs if run is not None]
    if not found:
        raise ValueError(f"{out} holds no run of {', '.join(GRIDS)}; launch them with --out {out}")
    return found


def describe(run: Run) -> dict[str, Any] | None:
    """One run; None before its first record."""
    records, evaluations = run.events("train"), run.events("evaluation")
    if not records:
        return None
    schedule, model = run.config["schedule"], run.model
    seconds, median = step_seconds(records)
    at = dict(zip([0, *(record["step"] for record in records)], [0.0, *itertools.accumulate(seconds)], strict=True))
    final = run.folder / "evaluation.json"
    starts = run.events("start") + run.events("resume")
    return {
        "name": run.folder.name,
        "kind": kind_of(model),
        "layers": model.n_layers,
        "width": model.d_model,
        "parameters": parameters(model),
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
        "start_s": records[-1]["seconds"] - sum(seconds),
        "validation": [
            {"tokens": e["tokens"], "gpu_s": round(at[e["step"]], 3), "loss": e["validation_loss"]}
            for e in evaluations
            if e["step"] in at
        ],
        **stability(records, run.config["optimizer"]["grad_clip"], schedule),
        "final": json.loads(final.read_text(encoding="utf-8")) if final.is_file() else None,
    }


def step_seconds(records: Sequence[dict[str, Any]]) -> tuple[list[float], float]:
    """Seconds between the records of training, those of slow steps replaced, and the median of a step."""
    counts, times = [], []
    for before, record in itertools.pairwise([{"step": 0, "seconds": 0.0}, *records]):
        counts.append(record["step"] - before["step"])
        times.append((record["seconds"] - before["seconds"]) / counts[-1])
    median = statistics.median(times)
    return [n * (t if t <= SLOW * median else median) for n, t in zip(counts, times, strict=True)], median


def stability(records: Sequence[dict[str, Any]], grad_clip: float | None, schedule: dict[str, Any]) -> dict[str, Any]:
    """Statistics of gradient norms after the warm-up, and of losses that stand out."""
    first = schedule["warmup_steps"] or round(schedule["warmup_fraction"] * schedule["steps"])
    norms = sorted(r["grad_norm"] for r in records if r["step"] > first) or [math.nan]
    losses, spikes, highest = [r["loss"] for r in records], 0, 0.0
    for n in range(WINDOW, len(losses)):
        above = losses[n] - statistics.median(losses[n - WINDOW : n])
        spikes += above > SPIKE
        highest = max(highest, above)
    return {
        "norm_median": statistics.median(norms),
        "norm_99": norms[min(len(norms) - 1, int(0.99 * len(norms)))],
        "norm_max": norms[-1],
        "clipped": sum(norm > (grad_clip or math.inf) for norm in norms) / len(norms),
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
    for grid in ("main", "equal-time", "seeds"):
        if grid not in found:
            continue
        parts.append([grid, "params", "lr", "tokens", "tokens/s", "GPU s", "start s", "loss", "all", "C4", "bits/byte"])
        parts += [row(run) for run in found[grid]]
        parts.append([])
        parts.append([grid, "norm median", "99 %", "largest", "clipped", "spikes", "largest rise"])
        for run in found[grid]:
            numbers = [f"{run[name]:.2f}" for name in ("norm_median", "norm_99", "norm_max")]
            parts.append([
                run["name"], *numbers, f"{100 * run['clipped']:.1f} %", str(run["spikes"]), f"{run['largest_rise']:.2f}"
            ])  # fmt: skip
        parts.append([])
    scored = [run for run in found.get("main", []) if run["final"] and "tasks" in run["final"]]
    if scored:
        names = [task["task"] for task in scored[0]["final"]["tasks"]]
        parts.append(["zero-shot, %", *(run["name"] for run in scored)])
        for n, name in enumerate(names):
            results = [run["final"]["tasks"][n] for run in scored]
            parts.append([name, *(f"{100 * r['accuracy']:.1f} ± {100 * r['standard_error']:.1f}" for r in results)])
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
        f"{run['start_s']:.0f}",
        f"{loss_of(run):.4f}",
        *(f"{values['loss']:.4f}" if values else "-" for values in of.values()),
        f"{of['validation']['bits_per_byte']:.4f}" if of["validation"] else "-",
    ]


def groups(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs by their model."""
    by: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by.setdefault(f"{run['kind']}, {run['layers']} x {run['width']}", []).append(run)
    return by


def loss_of(run: dict[str, Any]) -> float:
    """The last validation loss while training."""
    return run["validation"][-1]["loss"] if run["validation"] else math.nan


# --- picture ---------------------------------------------------------------------------------------------------------


def draw(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Validation loss against tokens and against GPU seconds; runs of the grid "equal-time" are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    looks: dict[str, tuple[str, str]] = {}
    for grid, line in (("main", "-"), ("equal-time", "--")):
        for model, runs in groups(found.get(grid, [])).items():
            colour, marker = looks.setdefault(model, (COLOURS[len(looks) % 7], MARKERS[len(looks) % 7]))
            for n, run in enumerate(runs):
                points = [p for p in run["validation"] if p["tokens"]]
                label = f"{model}  {loss_of(run):.3f}" if grid == "main" else f"{model}, longer" if n == 0 else None
                for panel, (axis, scale) in zip(axes, (("tokens", 1e-6), ("gpu_s", 1.0)), strict=True):
                    panel.plot(
                        [scale * p[axis] for p in points], [p["loss"] for p in points], line, color=colour,
                        marker=marker, markersize=4, linewidth=1.4, label=label,
                    )  # fmt: skip
    for run in found.get("seeds", []):
        colour, marker = looks.setdefault(f"{run['kind']}, {run['layers']} x {run['width']}", ("#777777", "x"))
        for panel, (axis, scale) in zip(axes, (("tokens", 1e-6), ("gpu_s", 1.0)), strict=True):
            if axis == "tokens" and run["validation"]:
                last = run["validation"][-1]
                panel.plot(scale * last[axis], last["loss"], marker, color=colour, markersize=7, fillstyle="none")
    shown = [p["loss"] for grid in ("main", "equal-time") for run in found.get(grid, []) for p in run["validation"][3:]]
    if shown:
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        axes[0].set_ylim(min(shown) - margin, max(shown) + margin)
    for panel, label in zip(axes, ("training tokens, millions", "GPU seconds of training"), strict=True):
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss, nats a token")
    axes[0].legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})


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
                stored.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            draw(found, given.docs / "figures" / "results.png")
        print(tables(found), end="")
    except (ValueError, OSError) as error:
        print(f"report.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
