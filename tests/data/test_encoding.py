"""Several processes that tokenize: they end with the work, and the work ends when one of them does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recurformer.data import prepare
from recurformer.data.tokenizer import BytesTokenizer, train_bpe

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc")


def processes_of(parent: int) -> list[int]:
    """The tokenizing processes that a process has started."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            started_by = int(status.read_text().split("PPid:")[1].split()[0])
            command = (status.parent / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if started_by == parent and b"spawn_main" in command:
            found.append(int(status.parent.name))
    return found


def field(process: int, name: str) -> int:
    """A set of signals of a process, as bits."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0], 16)


@pytest.fixture
def preparing(tmp_path: Path):
    """`recurformer prepare` with two tokenizing processes, both at work, and their ids."""
    text = "The quick brown fox. " * 1000
    (tmp_path / "in.jsonl").write_text((json.dumps({"text": text}) + "\n") * 1000)
    train_bpe(["The quick brown fox. "], 260).save(tmp_path / "bpe")
    words = ["prepare", "in.jsonl", "--out", "out", "--tokenizer", "bpe", "--workers", "2"]
    command = [sys.executable, "-m", "recurformer", *words]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until, ready = time.monotonic() + 60, []
    while len(ready) < 2:  # ready: it ignores SIGINT, so its first function has run
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        ready = [each for each in processes_of(process.pid) if field(each, "SigIgn") & 1 << signal.SIGINT - 1]
        time.sleep(0.01)
    yield process, ready
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_death_of_one_process_ends_the_work_with_one_sentence(
    preparing: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
):
    process, workers = preparing
    for each in (*workers, process.pid):  # a pool ends its processes by SIGTERM, and waits for them
        assert field(each, "SigBlk") == 0
        assert field(each, "SigIgn") & (1 << signal.SIGTERM - 1) == 0
    os.kill(workers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith(
        "recurformer: error: one of 2 tokenizing processes ended unexpectedly, perhaps because mem"
    )
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe", "in.jsonl"]
    assert not any(Path(f"/proc/{each}").exists() for each in workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_ends_all_without_an_error(
    number: signal.Signals, code: int, preparing: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
):
    process, workers = preparing
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "error" not in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe", "in.jsonl"]
    assert not any(Path(f"/proc/{each}").exists() for each in workers)


class Suicidal(BytesTokenizer):
    """Ends every process that reads it from disk, as a library that runs out of memory does."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "recurformer_tokenizer.json").write_text('{"kind": "none"}')


def test_processes_that_cannot_even_start_end_the_work(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "in.txt").write_text("some text")
    with pytest.raises(ChildProcessError, match="one of 2 tokenizing processes ended unexpectedly"):
        prepare([tmp_path / "in.txt"], tmp_path / "out", Suicidal(), workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]
