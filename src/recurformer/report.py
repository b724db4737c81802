"""Training runs side by side: a table for the terminal, a picture of the curves, and one page that holds both."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurformer.config import ModelConfig
from recurformer.settings import suggest
from recurformer.units import short_number

if TYPE_CHECKING:
    from rich.console import Console

CURVES_FILE, PAGE_FILE = "curves.png", "report.html"
# Okabe and Ito's colours, which colour-blind readers tell apart; markers and lines tell them apart once more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Curve(NamedTuple):
    """One series of a run, by rising step."""

    tokens: list[float]
    seconds: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Run:
    """What the folder of a training run says about it."""

    folder: Path
    name: str  # short, and unique among the runs it was read with
    config: dict[str, Any]  # the training configuration, as saved
    records: list[dict[str, Any]]

    @property
    def model(self) -> ModelConfig:
        """The shape of its model."""
        return ModelConfig.from_dict(self.config["model"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The records of one event."""
        return [record for record in self.records if record.get("event") == kind]

    @property
    def training(self) -> Curve:
        """Loss on the training batches."""
        return _curve(self.events("train"), "loss")

    @property
    def validation(self) -> Curve:
        """Loss on the held-out text."""
        return _curve(self.events("evaluation"), "validation_loss")

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation of the lowest validation loss; its checkpoint is what `eval` and `generate` use."""
        measured = [e for e in self.events("evaluation") if math.isfinite(e["validation_loss"])]
        return min(measured, key=lambda e: e["validation_loss"], default=None)

    @property
    def tokens(self) -> int | None:
        """Tokens trained on."""
        return max((r["tokens"] for r in self.records if "tokens" in r), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the whole training, evaluation and saving left out."""
        done = [r for r in self.events("train") if r["seconds"] > 0]
        return done[-1]["tokens"] / done[-1]["seconds"] if done else None

    @property
    def bits_per_nat(self) -> float | None:
        """Bits per byte of the source text for each nat per token: one number for all runs on the same tokens."""
        best = self.best
        if best is None or not math.isfinite(best.get("bits_per_byte") or math.nan) or best["validation_loss"] <= 0:
            return None
        return best["bits_per_byte"] / best["validation_loss"]


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read runs, each under the shortest name that tells it from the others.

    Raises:
        ValueError: for no folder, one given twice, or one that is no training run.
    """
    if not folders:
        raise ValueError("no run is given; give at least one training run's folder")
    paths = [Path(folder) for folder in folders]
    real = [path.resolve() for path in paths]
    for path, place in zip(paths, real, strict=True):
        if real.count(place) > 1:
            raise ValueError(f"the run {path} is given twice; give each once")
    return [
        Run(path, name, *_read(path)) for path, name in zip(paths, short_names([p.parts for p in real]), strict=True)
    ]


def short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each path, with as many parts before it as it takes to tell all of them apart."""
    longest = max(len(parts) for parts in paths)
    for count in range(1, longest + 1):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return ["/".join(parts) for parts in paths]


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from recurformer.store.runs import METRICS, read_metrics

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a training run's folder")
    for name in ("config.json", METRICS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no training run: it has no {name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        records = read_metrics(folder)
        _ = Run(folder, "", config, records).model  # which refuses what is none
        well_formed = all(
            isinstance(record, dict) and needed <= record.keys()
            for record in records
            for needed in [_NEEDED.get(str(record.get("event")), set()) if isinstance(record, dict) else set()]
        )
        if not well_formed:
            raise ValueError("a record lacks a number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no training run that this version reads ({error!r})") from error
    return config, records


_NEEDED = {"train": {"loss", "tokens", "seconds"}, "evaluation": {"validation_loss", "tokens", "seconds"}}


def _curve(records: list[dict[str, Any]], name: str) -> Curve:
    rows = [(r["tokens"], r["seconds"], r[name]) for r in records if math.isfinite(r[name])]
    tokens, seconds, loss = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    return Curve(tokens, seconds, loss)


# --- table -----------------------------------------------------------------------------------------------------------


def one_tokenizer(runs: Sequence[Run]) -> bool:
    """False when the runs count different tokens: then only bits per byte compare them."""
    rates = [run.bits_per_nat for run in runs if run.bits_per_nat is not None]
    return not rates or max(rates) <= min(rates) * 1.001


def rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the comparison."""
    same = one_tokenizer(runs)
    headings = ["run", "kind", "layers", "width", "params", "tokens", "val loss" if same else "bits/byte"]
    headings += ["tokens/s", "KV B/token"]
    cells = []
    for run in runs:
        config, best, speed = run.model, run.best, run.tokens_per_second
        factor = 1.0 if same else run.bits_per_nat
        loss = None if best is None or factor is None else best["validation_loss"] * factor
        count = config.num_parameters()
        cells.append(
            [
                run.name,
                config.kind,
                str(config.n_layers),
                str(config.d_model),
                f"{count:,}" if count < 10_000_000 else short_number(count),
                "-" if run.tokens is None else short_number(run.tokens),
                "-" if loss is None else f"{loss:.4f}",
                "-" if speed is None else short_number(speed),
                f"{config.kv_bytes_per_token():,}",
            ]
        )
    return headings, cells


KEYS: dict[str, Callable[[Run], Any]] = {
    "layers": lambda run: run.model.n_layers,
    "kind": lambda run: run.model.kind,
    "width": lambda run: run.model.d_model,
    "params": lambda run: run.model.num_parameters(),
    "tokens": lambda run: run.tokens,
    "lr": lambda run: run.config["optimizer"]["lr"],
    "beta2": lambda run: run.config["optimizer"]["beta2"],
    "seed": lambda run: run.config["seed"],
}
"""By what runs can be grouped, besides any setting under its full name."""


def group(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Values of the keys -> the runs that have them, sorted; of each group the run of the lowest loss comes first.

    Args:
        keys: of `KEYS`, or full names of settings as "optimizer.beta1".

    Raises:
        ValueError: for a key that is neither.
    """
    settings = {name for run in runs for name in _flat(run.config)}
    for key in keys:
        if key not in KEYS and key not in settings:
            raise ValueError(
                f"--by {key!r} is no column and no setting; columns are {', '.join(KEYS)}"
                f"{suggest(key, [*KEYS, *settings])}"
            )
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        values = tuple(KEYS[key](run) if key in KEYS else _flat(run.config).get(key) for key in keys)
        found.setdefault(tuple(tuple(v) if isinstance(v, list) else v for v in values), []).append(run)

    def order(values: tuple[Any, ...]) -> list[tuple[bool, Any]]:
        return [(False, v) if isinstance(v, int | float) else (True, str(v)) for v in values]

    return {values: sorted(found[values], key=lowest_loss) for values in sorted(found, key=order)}


def lowest_loss(run: Run) -> float:
    """The lowest validation loss of a run, nats a token; infinite before the first evaluation."""
    best = run.best
    return math.inf if best is None else best["validation_loss"]


def show_groups(runs: Sequence[Run], keys: Sequence[str], console: Console) -> list[Run]:
    """Print a row for each group, in the form of the paper's Table 1: its best run. Gives these best runs.

    Raises:
        ValueError: for an unknown key, and for runs whose losses cannot be compared.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not one_tokenizer(runs):
        raise ValueError("--by compares losses a token, but the runs count different tokens; compare them without --by")
    groups = group(runs, keys)
    more = [name for name in ("width", "params") if name not in keys]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for n, heading in enumerate([*keys, *more, "tokens", "val loss", "runs", "best run"]):
        words = heading in ("kind", "best run") or (n < len(keys) and heading not in KEYS)
        table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "best run", overflow="fold")
    for values, members in groups.items():
        best = members[0]
        loss = lowest_loss(best)
        cells = [_cell(value) for value in values] + [_cell(KEYS[name](best)) for name in more]
        tokens = "-" if best.tokens is None else short_number(best.tokens)
        table.add_row(*cells, tokens, f"{loss:.4f}" if loss < math.inf else "-", str(len(members)), best.name)
    console.print(table)
    console.print(
        "Validation loss: the lowest of the row's runs, nats a token. Parameters: without embedding and output layer.",
        highlight=False,
    )
    return [members[0] for members in groups.values()]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return short_number(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table has to know."""
    unit = "nats a token" if one_tokenizer(runs) else "bits a byte of text, for the runs count different tokens"
    lines = [
        f"Validation loss: the lowest of the run, {unit}. Parameters: without embedding and output layer.",
        "KV bytes: 16-bit keys and values of all layers.",
    ]
    for run in runs:
        best, evaluations = run.best, run.events("evaluation")
        if best is not None and best is not evaluations[-1]:
            lines.append(
                f"{run.name}: lowest at step {best['step']:,}; at step {evaluations[-1]['step']:,} it was "
                f"{evaluations[-1]['validation_loss']:.4f} nats a token."
            )
    if len({json.dumps(run.config.get("data", {}).get("validation")) for run in runs}) > 1:
        lines.append("The runs name different validation data.")
    if len({run.tokens for run in runs}) > 1:
        lines.append("The runs saw different numbers of tokens.")
    return lines


def show(runs: Sequence[Run], console: Console) -> None:
    """Print the comparison; 80 columns hold it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    headings, cells = rows(runs)
    stacked = [
        h.replace("val loss", "val\nloss").replace("tokens/", "tokens\n/").replace("B/", "B\n/") for h in headings
    ]
    columns = zip(*[[max(h.split("\n"), key=len) for h in stacked], *cells], strict=True)
    room = console.width - sum(max(map(len, column)) for column in columns)
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1 if room >= 2 * len(headings) else 0, 0, 0), pad_edge=False, show_edge=False
    )
    for n, heading in enumerate(stacked):
        table.add_column(
            heading, justify="left" if n < 2 else "right", no_wrap=n > 0, overflow="fold", vertical="bottom"
        )
    for row in cells:
        table.add_row(*row)
    console.print(table)
    for line in notes(runs):
        console.print(line, highlight=False, markup=False)


# --- picture ---------------------------------------------------------------------------------------------------------


def draw(runs: Sequence[Run]) -> bytes:
    """PNG of the validation loss (and the smoothed training loss, thin) against tokens and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    same = one_tokenizer(runs)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for n, run in enumerate(runs):
        colour, marker, line = COLOURS[n % 7], MARKERS[n % 7], ("-", "--", ":")[n // 7 % 3]
        factor = 1.0 if same else run.bits_per_nat or math.nan
        validation, training = run.validation, run.training
        best = run.best
        label = run.name if best is None else f"{run.name}  {best['validation_loss'] * factor:.3f}"
        for panel, axis in zip(axes, ("tokens", "seconds"), strict=True):
            values = [loss * factor for loss in validation.loss]
            panel.plot(
                getattr(validation, axis),
                values,
                line,
                color=colour,
                marker=marker,
                markersize=4,
                label=label,
                zorder=3,
            )
            smooth = [loss * factor for loss in smoothed(training.loss)]
            panel.plot(getattr(training, axis), smooth, line, color=colour, linewidth=0.7, alpha=0.55, zorder=2)
    bottom, top = _limits([run.validation for run in runs], [1.0 if same else r.bits_per_nat or 1.0 for r in runs])
    axes[0].set_ylim(bottom, top)
    for panel, label in zip(axes, ("training tokens", "training time (seconds)"), strict=True):
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per token)" if same else "loss (bits per byte)")
    rate = next((run.bits_per_nat for run in runs if run.bits_per_nat is not None), None)
    if same and rate is not None:
        second = axes[1].secondary_yaxis("right", functions=(lambda y: y * rate, lambda y: y / rate))
        second.set_ylabel("loss (bits per byte of text)")
    axes[0].legend(title="validation (thin: training)", frameon=False, fontsize=9, title_fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def smoothed(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Exponential moving average, without the pull towards its start."""
    out, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def _limits(curves: Sequence[Curve], factors: Sequence[float]) -> tuple[float | None, float | None]:
    """Vertical limits that show the part where the curves differ: the first fifth may leave the frame at the top."""
    seen: list[float] = []
    for curve, factor in zip(curves, factors, strict=True):
        if curve.tokens:
            seen += [y * factor for x, y in zip(curve.tokens, curve.loss, strict=True) if x >= 0.2 * curve.tokens[-1]]
    if not seen or max(seen) == min(seen):
        return None, None
    margin = 0.06 * (max(seen) - min(seen))
    return min(seen) - margin, max(seen) + margin


# --- page ------------------------------------------------------------------------------------------------------------


def page(
    runs: Sequence[Run], curves: bytes, title: str = "Training runs", samples: Mapping[str, Sequence[str]] | None = None
) -> str:
    """One HTML page that needs nothing but itself.

    Args:
        samples: texts of each run to show; None: the last one of its training.
    """
    headings, cells = rows(runs)
    differing = _differences(runs)
    parts = [f"<h1>{html.escape(title)}</h1>", _html_table(headings, cells, numbers_from=2)]
    parts += [f'<p class="note">{html.escape(line)}</p>' for line in notes(runs)]
    picture = base64.b64encode(curves).decode()
    parts.append(f'<img alt="Loss against tokens and against seconds" src="data:image/png;base64,{picture}">')
    if differing:
        parts.append("<h2>Settings that differ</h2>")
        parts.append(_html_table(["setting", *(run.name for run in runs)], differing, numbers_from=99))
    if samples is None:
        last = {run.name: run.events("sample")[-1] for run in runs if run.events("sample")}
        samples = {name: [f"{event.get('prompt', '')}{event.get('text', '')}"] for name, event in last.items()}
    if samples:
        parts.append("<h2>Samples</h2>")
        for name, texts in samples.items():
            parts.append(f"<h3>{html.escape(name)}</h3>")
            parts += [f"<pre>{html.escape(text)}</pre>" for text in texts]
    parts.append("<h2>Made on</h2>")
    for run in runs:
        starts = [r for r in run.records if r.get("event") in ("start", "resume")]
        facts = {k: v for k, v in (starts[-1] if starts else {}).items() if k not in ("event", "step")}
        shown = ", ".join(f"{k} {v}" for k, v in _flat(facts).items())
        parts.append(f'<p class="note">{html.escape(run.name)}: {html.escape(shown) or "unknown"}</p>')
    body = "\n".join(parts)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n{_STYLE}'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


_STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; margin: 1em 0; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 0.8em; }
.note { color: #555; margin: 0.2em 0; }
</style>"""


def _html_table(headings: Sequence[str], cells: Sequence[Sequence[str]], numbers_from: int) -> str:
    def line(values: Sequence[str], tag: str) -> str:
        marks = ["" if n < numbers_from else ' class="number"' for n in range(len(values))]
        return "".join(f"<{tag}{m}>{html.escape(v)}</{tag}>" for m, v in zip(marks, values, strict=True))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in cells)
    return f"<table>\n<tr>{line(headings, 'th')}</tr>\n{body}\n</table>"


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for config in flat for name in config)
    found = [[name, *(str(config.get(name, "-")) for config in flat)] for name in names]
    return [row for row in found if len(set(row[1:])) > 1]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def write_report(
    runs: Sequence[Run],
    out: str | Path,
    title: str = "Training runs",
    samples: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Path, Path]:
    """Write the picture and the page into a folder (made if missing); their paths."""
    from recurformer.files import replacing

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    curves = draw(runs)
    with replacing(out / CURVES_FILE) as temporary:
        temporary.write_bytes(curves)
    with replacing(out / PAGE_FILE) as temporary:
        temporary.write_text(page(runs, curves, title, samples), encoding="utf-8")
    return out / CURVES_FILE, out / PAGE_FILE
