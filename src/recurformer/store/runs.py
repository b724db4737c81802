"""Read the records in a training run's folder, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recurformer.reading import read_lines
from recurformer.settings import shown

METRICS = "metrics.jsonl"
NUMBERS = {
    "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "validation_loss", "bits_per_byte",
}  # fmt: skip


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's `metrics.jsonl`. A last line that a kill has cut short is left out.

    Raises:
        ValueError: for a line that is no record; the message names file, line and remedy.
    """
    path = Path(out) / METRICS
    records: list[dict[str, Any]] = []
    for place, record in read_lines(path) if path.exists() else ():
        if not isinstance(record, dict):
            raise ValueError(f"{place} is {shown(record)}, not a record; remove the line")
        step = record.get("step")
        if not isinstance(record.get("event"), str) or type(step) is not int or not 0 <= step <= 2**53:
            raise ValueError(f"{place} has no event or no whole number as step; remove the line")
        for name in NUMBERS & record.keys():
            if not _is_number(record[name]):
                raise ValueError(f"{place}: {name} is {shown(record[name])}, not a number; remove the line")
        records.append(record)
    return records


def _is_number(value: Any) -> bool:
    """Whether a record may have this number: None stands for one that was not finite, larger integers make no float."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
