"""The records of a run: what a kill or a power cut leaves is read, other damage is named with its line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recurformer.store.runs import read_metrics

GOOD: dict[str, Any] = {"event": "train", "step": 1, "loss": 2.5, "tokens": 64, "seconds": 1.0, "lr": None}


def write(folder: Path, *lines: str) -> None:
    (folder / "metrics.jsonl").write_bytes("".join(lines).encode())


def test_records_are_read(tmp_path: Path):
    assert read_metrics(tmp_path) == []
    write(tmp_path, json.dumps(GOOD) + "\n", '{"event": "train", "st')
    assert read_metrics(tmp_path) == [GOOD]


def test_nul_bytes_of_a_power_cut_are_skipped(tmp_path: Path):
    line = json.dumps(GOOD) + "\n"
    write(tmp_path, line, "\0" * 4096)
    assert read_metrics(tmp_path) == [GOOD]
    write(tmp_path, line, "\0" * 4096, line, "\0" * 10, "\n", line)
    assert read_metrics(tmp_path) == [GOOD] * 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"event": "train"\0, "step": 1}', "is not valid JSON"),
        ("[1]", r"is \[1\], not a record; remove the line"),
        ("[" * 5000, "64 deep"),
        (json.dumps({**GOOD, "event": 5}), "has no event or no whole number as step; remove the line"),
        (json.dumps({**GOOD, "step": 1.5}), "no whole number as step"),
        (json.dumps({**GOOD, "step": 10**30}), "no whole number as step"),
        (json.dumps({**GOOD, "step": True}), "no whole number as step"),
        (json.dumps({**GOOD, "loss": "low"}), "loss is 'low', not a number; remove the line"),
        (json.dumps({**GOOD, "tokens": 10**400}), "tokens is 10+... .401 characters., not a number"),
        (json.dumps({**GOOD, "seconds": [1]}), r"seconds is \[1\], not a number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str):
    write(tmp_path, json.dumps(GOOD) + "\n", line + "\n", json.dumps(GOOD) + "\n")
    with pytest.raises(ValueError, match=f"line 2 of .*metrics.jsonl.*{message}"):
        read_metrics(tmp_path)


def test_a_pipe_is_no_file_of_records(tmp_path: Path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is no regular file"):
        read_metrics(tmp_path)


def test_runs_are_read_without_torch():
    code = (
        "import sys, recurformer.store.runs, recurformer.files, recurformer.reading; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
