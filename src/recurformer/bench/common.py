"""What all benchmarks share: the machine, the numbers as text, and files that appear when they are complete."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def machine() -> dict[str, Any]:
    """Versions, processor, devices and threads, and the time in UTC."""
    import torch

    from recurformer.info import environment

    facts = environment()
    return {
        "versions": facts["versions"],
        "cpu": processor(),
        "devices": facts["devices"],
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name as its maker writes it, or what the system calls it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def in_words(facts: dict[str, Any]) -> str:
    """One line about the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    gpus = [name for device, name in facts["devices"].items() if device != "cpu"]
    threads = f"{facts['threads']} thread{'' if facts['threads'] == 1 else 's'}"
    return "; ".join([facts["cpu"], *gpus, threads, versions, facts["date"]])


def bytes_text(count: float) -> str:
    """A number of bytes with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{max(0, 3 - len(str(int(count))))}f} {unit}"
        count /= 1024
    raise AssertionError


def show_table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    left: int | None = None,
) -> None:
    """A table, its numbers to the right, and lines of notes under it.

    Args:
        left: columns of text before the numbers; None: those called "path".
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for n, heading in enumerate(headings):
        words = heading == "path" if left is None else n < left
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)


def write(out: str | Path, name: str, results: dict[str, Any], picture: bytes) -> tuple[Path, Path]:
    """Write NAME.json and NAME.png into a folder (made if missing); their paths."""
    from recurformer.folders import replacing

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    with replacing(out / f"{name}.png") as temporary:
        temporary.write_bytes(picture)
    return out / f"{name}.json", out / f"{name}.png"
