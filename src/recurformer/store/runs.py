"""Read the records in a training run's folder, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recurformer.reading import read_lines
from recurformer.settings import shown

METRICS = "metrics.jsonl"


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
        if not isinstance(record.get("event"), str) or type(record.get("step")) is not int:
            raise ValueError(f"{place} has no event or no whole number as step; remove the line")
        records.append(record)
    return records
