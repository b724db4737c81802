"""Training runs side by side: a table for the terminal, a picture of the curves, and one page that holds both.

Names of runs are data: brackets are no markup, dollars are no mathematics, and a leading underscore hides nothing.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recurformer.config import ModelConfig
from recurformer.files import replacing
from recurformer.reading import brief, read_table
from recurformer.settings import suggest
from recurformer.store.runs import METRICS, read_metrics
from recurformer.units import short_number
from recurformer.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from rich.console import Console

CURVES_FILE, PAGE_FILE = "curves.png", "report.html"
# Okabe and Ito's colours, which colour-blind readers tell apart. Markers and lines tell the curves apart once more.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Curve(NamedTuple):
    """One series of a run, by rising step."""

    tokens: list[float]
    seconds: list[float]
    loss: list[float]


@dataclass(frozen=True)
class Run:
    """The contents of a training run's folder."""

    folder: Path
    name: str  # short, printable, and unique among the runs that were read together
    config: dict[str, Any]  # the training configuration, as saved
    records: list[dict[str, Any]]

    @property
    def model(self) -> ModelConfig:
        """Return the shape of its model."""
        return ModelConfig.from_dict(self.config["model"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of one event."""
        return [record for record in self.records if record.get("event") == kind]

    @property
    def training(self) -> Curve:
        """Return the loss on the training batches."""
        return _curve(self.events("train"), "loss")

    @property
    def validation(self) -> Curve:
        """Return the loss on the held-out text."""
        return _curve(self.events("evaluation"), "validation_loss")

    @property
    def best(self) -> dict[str, Any] | None:
        """Return the evaluation of the lowest validation loss. `eval` and `generate` use its checkpoint."""
        measured = [e for e in self.events("evaluation") if _is_finite(e["validation_loss"])]
        return min(measured, key=lambda e: e["validation_loss"], default=None)

    @property
    def tokens(self) -> int | None:
        """Return the number of tokens of the training so far."""
        return max((r["tokens"] for r in self.records if "tokens" in r), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed of the whole training, without evaluation and saving."""
        done = [r for r in self.events("train") if r["seconds"] > 0]
        return done[-1]["tokens"] / done[-1]["seconds"] if done else None

    @property
    def bits_per_nat(self) -> float | None:
        """Return bits per byte of the source text for each nat per token, equal for all runs on the same tokens."""
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
    names = short_names([p.parts for p in real])
    return [Run(path, name, *_read(path)) for path, name in zip(paths, names, strict=True)]


def short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the last part of each path, with as many parts before it as tell all of them apart."""
    longest = max(len(parts) for parts in paths)
    for count in range(1, longest + 1):
        names = [printable("/".join(parts[-count:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{printable('/'.join(parts))} ({n})" for n, parts in enumerate(paths, 1)]


def printable(name: str) -> str:
    """Return a name whose characters that no terminal, page or picture shows have become U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in name)  # lone surrogates are not printable


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a training run's folder")
    for name in ("config.json", METRICS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no training run: it has no {name}")
    try:
        config = read_table(folder / "config.json")
        records = read_metrics(folder)
        _ = Run(folder, "", config, records).model  # refuses a configuration without a model
        well_formed = all(
            isinstance(record, dict) and needed <= record.keys()
            for record in records
            for needed in [_NEEDED.get(str(record.get("event")), set()) if isinstance(record, dict) else set()]
        )
        if not well_formed:
            raise ValueError("a record lacks a number")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no training run that this version reads ({brief(error)})") from error
    return config, records


_NEEDED = {"train": {"loss", "tokens", "seconds"}, "evaluation": {"validation_loss", "tokens", "seconds"}}


def _is_finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _curve(records: list[dict[str, Any]], name: str) -> Curve:
    rows = [(r["tokens"], r["seconds"], r[name]) for r in records if _is_finite(r["tokens"], r["seconds"], r[name])]
    tokens, seconds, loss = map(list, zip(*rows, strict=True)) if rows else ([], [], [])
    return Curve(tokens, seconds, loss)


# --- table -----------------------------------------------------------------------------------------------------------


def one_tokenizer(runs: Sequence[Run]) -> bool:
    """Return False when the runs count different tokens. Then only bits per byte compare them."""
    rates = [run.bits_per_nat for run in runs if run.bits_per_nat is not None]
    return not rates or max(rates) <= min(rates) * 1.001


def rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the comparison."""
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
"""Names that group runs, in addition to the full name of any setting -> the value of a run."""


def group(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Run]]:
    """Return a dictionary from values of the keys to the runs with these values, the run of the lowest loss first.

    Args:
        runs: the runs to group.
        keys: names of `KEYS`, or full names of settings as "optimizer.beta1".

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
    """Return the lowest validation loss of a run in nats a token, infinite before the first evaluation."""
    best = run.best
    return math.inf if best is None else best["validation_loss"]


def show_groups(runs: Sequence[Run], keys: Sequence[str], console: Console) -> list[Run]:
    """Print the best run of each group as a row, in the form of the paper's Table 1, and return these runs.

    Raises:
        ValueError: for an unknown key, and for runs whose losses cannot be compared.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

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
        cells += [tokens, f"{loss:.4f}" if loss < math.inf else "-", str(len(members)), best.name]
        table.add_row(*map(Text, cells))
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
    """Return the sentences that a reader of the table needs."""
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
    """Print the comparison. It fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

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
        table.add_row(*map(Text, row))
    console.print(table)
    for line in notes(runs):
        console.print(line, highlight=False, markup=False)


# --- picture ---------------------------------------------------------------------------------------------------------


def plain_label(name: str) -> str:
    """Return a name as a label of a picture. Matplotlib would set `$...$` as mathematics and leave out `_name`."""
    name = name.replace("$", r"\$")
    return f"\u200b{name}" if name.startswith("_") else name


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG. A character that the font lacks is an empty box, and no warning."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def short_tick(value: float, _: object = None) -> str:
    """Return a number for an axis: 0.02, 250, 1.5k, 20M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


TIMES = ((3 * 86_400, 86_400, "days"), (7200, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))


def draw(runs: Sequence[Run]) -> bytes:
    """Return a PNG of the validation loss against tokens and against time, with the smoothed training loss as a haze.

    The loss has a logarithmic axis: it shows the whole curve, and still the small differences at its end.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    same = one_tokenizer(runs)
    columns = min(3, len(runs))
    legend = 0.5 + 0.22 * -(-len(runs) // columns)  # inches
    figure = Figure(figsize=(11, 4.2 + legend), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    longest = max((second for run in runs for second in run.validation.seconds), default=0.0)
    _, scale, unit = next(entry for entry in TIMES if longest >= entry[0])
    for n, run in enumerate(runs):
        factor = 1.0 if same else run.bits_per_nat or math.nan
        for panel, axis, divisor in ((axes[0], "tokens", 1), (axes[1], "seconds", scale)):
            _draw_curve(panel, run, n, axis, divisor, factor)
    axes[0].set_yscale("log")
    _set_ticks(axes[0].yaxis, *axes[0].get_ylim())
    for panel, label in zip(axes, ("training tokens", f"training time ({unit})"), strict=True):
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(FuncFormatter(short_tick))
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per token)" if same else "loss (bits per byte)")
    rate = next((run.bits_per_nat for run in runs if run.bits_per_nat is not None), None)
    if same and rate is not None:
        second = axes[1].secondary_yaxis("right", functions=(lambda y: y * rate, lambda y: y / rate))
        second.set_ylabel("loss (bits per byte of text)")
        _set_ticks(second.yaxis, *axes[0].get_ylim())
    handles, labels = axes[0].get_legend_handles_labels()
    title = "Validation loss, with its lowest value after the name. Thin lines: smoothed training loss."
    figure.legend(
        handles, labels, title=title, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
        title_fontsize=9,
    )  # fmt: skip
    return png(figure)


def _set_ticks(axis: Axis, low: float, high: float) -> None:
    """Set plain numbers as ticks of a logarithmic axis, also where it spans less than a factor of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    wide = high > 2 * low > 0
    axis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)) if wide else MaxNLocator(8))
    axis.set_major_formatter(FuncFormatter(short_tick))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _draw_curve(panel: Axes, run: Run, number: int, axis: str, divisor: float, factor: float) -> None:
    """Add the two curves of a run to a panel, over `axis` of `Curve` divided by `divisor`, losses times `factor`."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    line = ("-", "--", ":")[number // len(COLOURS) % 3]
    validation, training = run.validation, run.training
    label = run.name if run.best is None else f"{run.name}  {run.best['validation_loss'] * factor:.3f}"
    panel.plot(
        [x / divisor for x in getattr(validation, axis)], [loss * factor for loss in validation.loss], line,
        color=colour, marker=marker, markersize=4, label=plain_label(label), zorder=3,
    )  # fmt: skip
    panel.plot(
        [x / divisor for x in getattr(training, axis)], [loss * factor for loss in smoothed(training.loss)], line,
        color=colour, linewidth=0.7, alpha=0.55, zorder=2,
    )  # fmt: skip


def smoothed(values: Sequence[float], weight: float = 0.6) -> list[float]:
    """Return the exponential moving average, corrected for its start at zero."""
    out, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


# --- page ------------------------------------------------------------------------------------------------------------

Samples = Mapping[str, Sequence[tuple[str, str]]]
"""Name of a run -> pairs of a prompt and its continuation."""


def page(
    runs: Sequence[Run],
    curves: bytes,
    title: str = "Training runs",
    samples: Samples | None = None,
    command: Sequence[str] = (),
) -> str:
    """Return one HTML page that needs nothing but itself.

    Args:
        runs: the runs to compare.
        curves: the PNG of `draw`.
        title: heading of the page.
        samples: texts to show. None: the last sample of each run's training.
        command: words of the command that made the page.
    """
    headings, cells = rows(runs)
    made = datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    by = f" by <code>{html.escape(printable(shlex.join(command)))}</code>" if command else ""
    picture = base64.b64encode(curves).decode()
    parts = [
        f"<h1>{html.escape(printable(title))}</h1>",
        f'<p class="note">Made on {html.escape(made)}{by} with recurformer {__version__}.</p>',
        _html_table(headings, cells, words=2),
        *(f'<p class="note">{html.escape(line)}</p>' for line in notes(runs)),
        f'<img alt="Loss against tokens and against time" src="data:image/png;base64,{picture}">',
    ]
    if differing := _differences(runs):
        parts.append("<h2>Settings that differ</h2>")
        table = [["setting", *(run.name for run in runs)], *differing]
        if len(runs) > 4:  # a row for each run: many columns would leave the page
            table = [["run", *(row[0] for row in differing)], *map(list, list(zip(*table, strict=True))[1:])]
        parts.append(_html_table(table[0], table[1:], words=len(table[0])))
    if samples is None:
        last = {run.name: run.events("sample")[-1] for run in runs if run.events("sample")}
        samples = {name: [(event.get("prompt", ""), event.get("text", ""))] for name, event in last.items()}
    if samples:
        parts.append("<h2>Samples</h2>")
        parts.append('<p class="note">Prompts are on a coloured ground. The model has written the rest.</p>')
        for name, texts in samples.items():
            parts.append(f"<h3>{html.escape(name)}</h3>")
            parts += [
                f'<pre><span class="prompt">{html.escape(prompt)}</span>{html.escape(text)}</pre>'
                for prompt, text in texts
            ]
    parts.append("<h2>Machines</h2>")
    facts = [_machine(run) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    table = [[run.name, *(one.get(name, "-") for name in names)] for run, one in zip(runs, facts, strict=True)]
    parts.append(_html_table(["run", *names], table, words=len(names) + 1))
    head = f'<meta charset="utf-8">\n<title>{html.escape(printable(title))}</title>\n{_STYLE}'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _machine(run: Run) -> dict[str, str]:
    """Return name -> text of the facts that a run has recorded at its latest start; empty ones are left out."""
    starts = [record for record in run.records if record.get("event") in ("start", "resume")]
    latest = starts[-1] if starts else {}
    facts = _flat({name: value for name, value in latest.items() if name not in ("event", "step")})
    names = {name: name.rpartition(".")[2] for name in facts}  # "versions.torch" is "torch"
    return {
        names[name]: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in facts.items()
        if value not in (None, [], "")
    }


_STYLE = """<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; --text: #222; --page: #fff; --quiet: #555; --line: #ddd; --field: #f4f4f4;
        --prompt: #d6e8f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #181a1c; --quiet: #a0a4a8; --line: #3a3d40; --field: #232629; --prompt: #23445f; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1100px;
       margin: 2em auto; padding: 0 1em; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); overflow-wrap: anywhere;
       min-width: 9em; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; margin: 1em 0; background: #fff; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--field); padding: 0.8em; border-radius: 4px; }
code { overflow-wrap: anywhere; }
.prompt { background: var(--prompt); border-radius: 2px; }
.note { color: var(--quiet); margin: 0.2em 0; }
</style>"""


def _html_table(headings: Sequence[str], cells: Sequence[Sequence[str]], words: int) -> str:
    """Return a table that scrolls where it is wider than the page; its first `words` columns are text."""

    def line(values: Sequence[str], tag: str) -> str:
        classes = ["" if n < words else ' class="number"' for n in range(len(values))]
        return "".join(f"<{tag}{c}>{html.escape(v)}</{tag}>" for c, v in zip(classes, values, strict=True))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in cells)
    return f'<div class="wide"><table>\n<tr>{line(headings, "th")}</tr>\n{body}\n</table></div>'


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row for each setting that differs: its name, and its value in every run."""
    flat = [_flat(run.config) for run in runs]
    names = dict.fromkeys(name for config in flat for name in config)
    found = [[name, *(_setting_text(config.get(name, "-")) for config in flat)] for name in names]
    return [row for row in found if len(set(row[1:])) > 1]


def _setting_text(value: Any) -> str:
    """Return a setting as a configuration file writes it."""
    if isinstance(value, list):
        return ", ".join(map(_setting_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, whose keys hold the path: "optimizer.lr"."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def write_report(
    runs: Sequence[Run],
    out: str | Path,
    title: str = "Training runs",
    samples: Samples | None = None,
    command: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Write the picture and the page into a folder, made if missing, and return their paths.

    Args:
        runs, title, samples, command: see `page`.
        out: the folder.
    """

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    curves = draw(runs)
    with replacing(out / CURVES_FILE) as temporary:
        temporary.write_bytes(curves)
    with replacing(out / PAGE_FILE) as temporary:
        text = page(runs, curves, title, samples, command)
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a sample may hold half a surrogate pair
    return out / CURVES_FILE, out / PAGE_FILE
