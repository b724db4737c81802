"""Shared by all benchmarks: facts of the machine, numbers as text, tables, pictures, and files written whole."""

from __future__ import annotations

import json
import platform
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recurformer.files import replacing
from recurformer.info import environment
from recurformer.report import COLOURS, plain_label, png, short_tick

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


Progress = Callable[[str, int, int], None]
"""Called with the present work in words, units done and units in all."""

Dtype = Literal["fp32", "bf16"]
ScanName = Literal["auto", "reference", "tiled", "fused", "wavefront"]

TEXTS = ("path", "layers", "preset", "answer at each position")  # headings of columns that hold words


def silent(work: str, done: int, total: int) -> None:
    """Show no progress."""


def machine() -> dict[str, Any]:
    """Return versions, processor, devices, threads and the time in UTC, ready for JSON."""
    import torch

    facts = environment()
    versions = dict(facts["versions"])
    if torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda
        for package in ("triton", "liger-kernel"):
            with suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
    return {
        "versions": versions,
        "cpu": processor(),
        "devices": facts["devices"],
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """Return the processor's name as its maker writes it, or the system's word for it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def in_words(facts: dict[str, Any]) -> str:
    """Return one line about the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    gpus = [name for device, name in facts["devices"].items() if device != "cpu"]
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    return "; ".join([facts["cpu"], *gpus, threads, versions, facts["date"]])


def record(benchmark: str, settings: Any, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return the result of a benchmark, ready for JSON: settings (a dataclass), machine, rows and further entries."""
    return {"benchmark": benchmark, "settings": asdict(settings), "machine": machine(), "rows": rows, **more}


def remarks(results: dict[str, Any]) -> list[str]:
    """Return the lines under a table: the notes as sentences, and the machine."""
    return [*(f"{note[0].upper()}{note[1:]}." for note in results["notes"]), in_words(results["machine"])]


def milliseconds(seconds: float | None) -> str:
    """Return milliseconds with at least three digits, or a dash for None."""
    return "-" if seconds is None else f"{1e3 * seconds:,.{0 if seconds >= 1 else 1 if seconds >= 1e-3 else 3}f}"


def spread(row: dict[str, Any], name: str, parts: int = 1) -> str:
    """Return the fastest and the slowest run in milliseconds, or a dash where the row has no run.

    Args:
        row: holds NAME_s, NAME_fastest_s and NAME_slowest_s, in seconds.
        name: prefix of these keys.
        parts: equal parts of a run. The times of one part are returned.
    """
    if f"{name}_s" not in row:
        return "-"
    return "..".join(milliseconds(row[f"{name}_{which}_s"] / parts) for which in ("fastest", "slowest"))


def show_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    left: int = 0,
) -> None:
    """Print a table with its numbers to the right, and lines of notes under it.

    Args:
        left: columns of text before the numbers. Columns under one of `TEXTS` are text too.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for n, heading in enumerate(headings):
        words = heading in TEXTS or n < left
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # as text: a task or file name may hold brackets
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def set_title(figure: Figure, title: str, facts: dict[str, Any] | None = None) -> None:
    """Write a title above a figure and the machine below it, both broken into lines that fit the figure's width."""
    inches = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(plain_label(title), int(12 * inches)), fontsize=10)
    if facts is not None:
        figure.supxlabel(textwrap.fill(in_words(facts), int(17 * inches)), fontsize=7, color="#555555")


def draw_bars(
    panels: Sequence[tuple[str, dict[str, float], float | None]], title: str, facts: dict[str, Any] | None = None
) -> bytes:
    """Return a PNG of horizontal bars, one panel next to the other.

    Args:
        panels: for each panel a label, the values by name, and the place of a dashed line or None.
        title: stands above the panels.
        facts: the machine of the measurement, which stands below the panels.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    rows = max(len(values) for _, values, _ in panels)
    figure = Figure(figsize=(4.5 * len(panels), 1.8 + 0.35 * rows), layout="constrained")
    axes = figure.subplots(
        1, len(panels), squeeze=False, sharey=all(list(v) == list(panels[0][1]) for _, v, _ in panels)
    )
    for panel, (label, values, line) in zip(axes[0], panels, strict=True):
        bars = panel.barh(
            list(values), list(values.values()), color=[COLOURS[n % len(COLOURS)] for n in range(len(values))]
        )
        panel.bar_label(bars, labels=[f" {v:,.0f}" if v >= 1000 else f" {v:.4g}" for v in values.values()], padding=2)
        if line is not None:
            panel.axvline(line, color="#777777", linestyle="--", linewidth=1.2)
        panel.set_xlabel(label)
        panel.xaxis.set_major_formatter(FuncFormatter(short_tick))
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(len(values) - 0.4, -0.6)
    set_title(figure, title, facts)
    return png(figure)


def write(out: str | Path, name: str, results: dict[str, Any], picture: bytes) -> tuple[Path, Path]:
    """Write NAME.json and NAME.png into a folder, made if missing, and return their paths."""

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    with replacing(out / f"{name}.png") as temporary:
        temporary.write_bytes(picture)
    return out / f"{name}.json", out / f"{name}.png"
