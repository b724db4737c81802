"""Signals while text is prepared: the work stops, and everything half-made is removed."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn


class Stop:
    """The signal that asked the work to stop.

    Attributes:
        number: the signal; None until one comes.
    """

    number: int | None = None

    def raise_again(self) -> None:
        """Stop when a signal has come. Python drops an exception that its handler raises inside some callbacks."""
        if self.number is not None:
            _unwind(self.number)


def _unwind(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Let SIGTERM end the block by an exception, as Ctrl-C does. Yield the record of the signal that came."""
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        stop.number = number
        _unwind(number)

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread alone
        yield stop
        return
    ours = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ours.append(signal.SIGINT)
    before = {number: signal.signal(number, handle) for number in ours}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes in the block so that a signal neither interrupts the start nor reaches them on their way.

    SIGINT and SIGTERM reach this process at the end of the block. The new processes inherit a blocked SIGINT until
    they call `leave_interrupts_to_parent`, because Ctrl-C goes to every process of a terminal. They never inherit a
    blocked SIGTERM: a pool ends its processes by it, and would wait for ever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def leave_interrupts_to_parent() -> None:
    """Ignore Ctrl-C in a process of a pool, and let every other signal through."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
