"""What the folder of a training run holds, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`; a last line cut short by a kill is left out."""
    path = Path(out) / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
