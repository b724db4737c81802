"""Signals: which ones ask a run to stop, which ones abort, and how soon an evaluation or a sample ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer import LanguageModel
from recurformer.store.checkpoints import list_checkpoints
from recurformer.training import signals, train
from recurformer.training.signals import stop_signals

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function: run a script that has `signals`, the module's file alone, in a process of its own."""

    def run(script: str, shell: str = "exec {python}") -> subprocess.CompletedProcess[str]:
        head = f"""
            import importlib.util, os, signal, sys
            spec = importlib.util.spec_from_file_location("signals", {signals.__file__!r})
            signals = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(signals)
            me = os.getpid()
        """
        (tmp_path / "script.py").write_text(textwrap.dedent(head) + textwrap.dedent(script))
        command = shell.format(python=f"{sys.executable} -S {tmp_path / 'script.py'}")
        return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_each_signal_asks_once(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_signals(quiet=False, echo=0.0) as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
    assert signal.getsignal(number) is before
    assert f"{name}: saving after this step" in capfd.readouterr().err


def test_a_terminal_that_closes_sends_two_hangups() -> None:
    with stop_signals(quiet=True, echo=0.0) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == signal.SIGHUP


def test_sigterm_after_a_warning_asks_and_a_second_one_aborts(alone: Any) -> None:
    found = alone(
        """
        with signals.stop_signals(quiet=True, echo=0.0) as stop:
            os.kill(me, signal.SIGUSR1)
            os.kill(me, signal.SIGTERM)
            print(stop.signal == signal.SIGTERM, flush=True)
            os.kill(me, signal.SIGTERM)
            print("goes on", flush=True)
    """.replace('"goes on"', "1")
    )
    assert (found.stdout, found.returncode) == ("True\n", -signal.SIGTERM), found


def test_nohup_stays_in_force(alone: Any) -> None:
    found = alone(
        """
        with signals.stop_signals(quiet=True, echo=0.0) as stop:
            os.kill(me, signal.SIGHUP)
            print(stop.signal)
        """,
        shell="trap '' HUP; exec {python}",
    )
    assert found.stdout == "None\n", found


def test_a_closed_stderr_leaves_other_files_alone(tmp_path: Path, alone: Any) -> None:
    """The system gives its number to the next file that is opened: a run's lock, say."""
    file = tmp_path / "lock"
    found = alone(
        f"""
        file = open(r"{file}", "w")
        assert file.fileno() == 2
        with signals.stop_signals(quiet=False, echo=0.0) as stop:
            os.kill(me, signal.SIGTERM)
        print(stop.signal)
        """,
        shell="exec {python} 2>&-",
    )
    assert found.stdout == f"{int(signal.SIGTERM)}\n", found
    assert file.read_text() == ""


# --- in the phases of a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "name"), [(5, "SIGTERM"), (20, "SIGHUP"), (0, "SIGUSR1")])
def test_an_evaluation_ends_within_a_batch(
    step: int, name: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any, same_weights: Any,
    records: Any,
) -> None:  # fmt: skip
    """In the middle, at the end and at the start; what was cut short is made when the run goes on."""
    config = tiny(evaluation__batches=None, evaluation__batch_size=1)
    train(config, tmp_path / "whole", quiet=True)
    forward, calls = LanguageModel.forward, 0

    def watched(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if not self.training:
            calls += 1
            if calls == 13 * (step // 5) + 2:  # 13 windows of the validation text
                os.kill(os.getpid(), getattr(signal, name))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "forward", watched)
    result = train(config, tmp_path / "run", quiet=True)
    assert (result.step, result.finished, result.signal) == (step, False, getattr(signal, name))
    assert calls == 13 * (step // 5) + 2
    monkeypatch.undo()
    (*_, newest), _ = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert newest.step == step
    assert train(config, tmp_path / "run", resume=True, quiet=True).finished
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    for event in ("train", "evaluation"):
        assert records(tmp_path / "run", event) == records(tmp_path / "whole", event)
    ends = [list_checkpoints(tmp_path / run / "checkpoints")[0][-1] for run in ("whole", "run")]
    assert ends[0].validation_loss == ends[1].validation_loss is not None


def test_a_sample_ends_within_a_token(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: Any) -> None:
    drawn: list[int] = []

    def generate(self: LanguageModel, tokens: torch.Tensor, count: int, *, stream: Any, **_: Any) -> torch.Tensor:
        for number in range(count):
            drawn.append(number)
            if len(drawn) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            stream(tokens[:, -1])
        return tokens.repeat(1, 1 + count)

    monkeypatch.setattr(LanguageModel, "generate", generate)
    result = train(tiny(sample__tokens=5), tmp_path / "run", quiet=True)
    assert drawn == [0, 1, 2, 3, 4, 0, 1]  # whole at step 0, cut short at step 5
    assert (result.step, result.signal) == (6, signal.SIGTERM)
    assert [r["step"] for r in records(tmp_path / "run", "sample")] == [0]


def test_a_run_outlives_its_terminal(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a hang-up every write to the terminal fails."""

    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Gone())
    assert train(tiny(schedule__steps=2), tmp_path / "run").finished
    monkeypatch.setattr(sys, "stderr", None)
    assert train(tiny(schedule__steps=2), tmp_path / "other").finished
