"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

ECHO_SECONDS = 5.0  # torchrun forwards the signal that the terminal has already sent to every process

STOPS = ("SIGINT", "SIGTERM")  # Ctrl-C; `kill` and most schedulers
WARNINGS = ("SIGHUP", "SIGUSR1")  # a terminal that closes; SLURM's warning (--signal=USR1@120)


class StopRequest:
    """The signal that asked the run to stop; None before there was one."""

    signal: int | None = None
    time = 0.0  # seconds on the monotonic clock


def stop_numbers() -> list[int]:
    """Return the signals that stop a run on this system. SIGHUP stays ignored where the parent ignores it (nohup)."""
    numbers = [getattr(signal, name) for name in (*STOPS, *WARNINGS) if hasattr(signal, name)]
    return [n for n in numbers if n.name in STOPS or signal.getsignal(n) != signal.SIG_IGN]


@contextmanager
def stop_signals(quiet: bool, echo: float) -> Iterator[StopRequest]:
    """Turn the first stop signal into a request. A second SIGINT or SIGTERM ends the process at once. SIGHUP and
    SIGUSR1 only ever ask: a terminal that closes sends SIGHUP twice, and SLURM sends SIGTERM after its warning.

    Outside the main thread Python handles no signals, and nothing changes.

    Args:
        quiet: write no message.
        echo: ignore further signals for this many seconds after the first.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Python sets sys.__stderr__ to None when it starts without one; descriptor 2 may then be any file.
    descriptor = None if quiet or sys.__stderr__ is None else sys.__stderr__.fileno()

    def handle(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if request.signal is not None and (name in WARNINGS or time.monotonic() - request.time < echo):
            return
        if request.signal is not None and signal.Signals(request.signal).name in STOPS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        request.signal, request.time = number, time.monotonic()
        if descriptor is not None:
            # os.write and not print: the signal may have come in the middle of another print.
            with suppress(OSError):  # the terminal is gone
                os.write(descriptor, f"\n{name}: saving after this step; once more to abort\n".encode())

    before = {number: signal.signal(number, handle) for number in stop_numbers()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
