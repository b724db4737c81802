"""A run killed with SIGKILL at random moments and resumed ends with the weights of the undisturbed run.

`RECURFORMER_KILLS=20 pytest tests/training/test_kill.py` kills more often than the suite does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from recurformer.files import WORK
from recurformer.store.checkpoints import list_checkpoints
from recurformer.training import train

KILLS = int(os.environ.get("RECURFORMER_KILLS", "3"))
STEPS = 10 * KILLS


def start(run: Path, file: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    arguments = ["train", "--config", str(file), "--out", str(run), "--resume", "--quiet", *options]
    return subprocess.Popen([sys.executable, "-m", "recurformer", *arguments], env=environment, stderr=subprocess.PIPE)


def test_killed_at_random_moments(values, tiny, tmp_path, weights, same_weights, records):
    settings = {"schedule__steps": STEPS, "evaluation__every": 3, "evaluation__batches": 1, "checkpoint__every": 2}
    (file := tmp_path / "config.json").write_text(json.dumps(values(**settings)))
    train(tiny(**settings), tmp_path / "whole", quiet=True)

    run, moments = tmp_path / "run", random.Random(0)
    metrics, folder = run / "metrics.jsonl", run / "checkpoints"
    for kill in range(KILLS):
        with start(run, file) as process:
            size = metrics.stat().st_size if metrics.exists() else 0
            deadline = time.monotonic() + 60
            saving = kill % 2 == 1  # every other time in the middle of a checkpoint

            def reached(size: int = size, saving: bool = saving) -> bool:
                if saving:
                    return any(folder.glob(f".*{WORK}"))
                return metrics.exists() and metrics.stat().st_size > size

            while not reached() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.003) if saving else moments.uniform(0, 0.25))
            assert process.poll() is None, process.stderr and process.stderr.read()
            process.kill()
        assert process.returncode == -signal.SIGKILL
    with start(run, file) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error

    complete, damaged = list_checkpoints(folder)
    assert complete[-1].step == STEPS
    assert not damaged
    assert not list(folder.glob(f".*{WORK}"))
    assert same_weights(weights(tmp_path / "whole"), weights(run))
    for event in ("train", "evaluation"):
        assert records(run, event) == records(tmp_path / "whole", event)


def test_the_command_saves_on_a_signal(values, tmp_path):
    (file := tmp_path / "config.json").write_text(json.dumps(values(schedule__steps=10_000, checkpoint__every=10_000)))
    run = tmp_path / "run"
    with start(run, file) as process:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or b'"train"' not in (run / "metrics.jsonl").read_bytes():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    (checkpoint,), damaged = list_checkpoints(run / "checkpoints")
    assert 0 < checkpoint.step < 10_000
    assert not damaged
