"""Encode text in one process or in several, in the order of the text."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recurformer.data.interrupts import Stop, leave_interrupts_to_parent, starting_processes
from recurformer.data.sidecar import DTYPES
from recurformer.data.sources import Piece
from recurformer.data.tokenizer import Tokenizer, load_tokenizer


class Encoded(NamedTuple):
    """The tokens of several texts."""

    tokens: np.ndarray
    """Tokens of all texts, end to end, in the type of the shards."""
    n_tokens: list[int]
    """Tokens of each text."""
    n_bytes: list[int]
    """UTF-8 bytes of each text."""


class RefusedTextError(Exception):
    """A tokenizer refused a text.

    Attributes:
        index: number of the text among those that were encoded together.
        reason: what is wrong with it.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index, self.reason = index, reason


def encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Encoded:
    """Return the tokens of texts.

    Raises:
        RefusedTextError: the tokenizer refuses a text.
        ValueError: the tokenizer gives an id outside its vocabulary.
    """
    arrays: list[np.ndarray] = []
    for index, text in enumerate(texts):
        try:
            arrays.append(tokenizer.encode_array(text))
        except ValueError as error:
            raise RefusedTextError(index, str(error)) from error
    tokens = np.concatenate(arrays)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        wrong = int(tokens.max()) if tokens.max() >= tokenizer.vocab_size else int(tokens.min())
        raise ValueError(
            f"the tokenizer gave id {wrong}, outside its vocabulary of {tokenizer.vocab_size}; "
            "its files do not belong together"
        )
    n_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    return Encoded(tokens.astype(DTYPES[dtype]), [len(array) for array in arrays], n_bytes)


class Encoder:
    """Encodes tasks, each a list of pieces, and yields them in their order.

    Args:
        tokenizer: the tokenizer.
        saved: folder where `tokenizer.save` has written it, for other processes.
        dtype: type of the tokens, a key of `DTYPES`.
        workers: processes; 1: this one alone.
        stop: the record of a signal that came.
    """

    def __init__(self, tokenizer: Tokenizer, saved: Path, dtype: str, workers: int, stop: Stop):
        self.tokenizer, self.saved, self.dtype, self.workers, self.stop = tokenizer, saved, dtype, workers, stop

    def encode_all(self, tasks: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], Encoded]]:
        """Yield each task with its tokens, in the order of the tasks.

        Raises:
            ValueError: the tokenizer refuses a piece. The message says where it comes from.
            ChildProcessError: a process ended before its work.
        """
        if self.workers == 1:
            for task in tasks:
                yield task, self._result(task, None)
            return
        try:
            yield from self._in_processes(tasks)
        except BrokenProcessPool as error:
            self.stop.raise_again()  # a signal to the whole group ends the processes, too
            raise ChildProcessError(
                f"one of {self.workers} tokenizing processes ended unexpectedly, perhaps because memory ran out; "
                "use fewer workers, or 1. A script that calls prepare() with several workers needs "
                '`if __name__ == "__main__":` around the call'
            ) from error

    def _in_processes(self, tasks: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], Encoded]]:
        """Keep at most two tasks a process in flight, so that memory does not grow with the input."""
        # Fresh processes: a fork of a process with threads, as torch and the tokenizers start them, may hang.
        context = multiprocessing.get_context("spawn")
        options = {"initializer": _start_worker, "initargs": (self.saved, self.dtype)}
        pool = ProcessPoolExecutor(self.workers, mp_context=context, **options)
        pending: deque[tuple[list[Piece], Future[Encoded]]] = deque()
        try:
            for task in tasks:
                with starting_processes():
                    pending.append((task, pool.submit(_encode_in_worker, [piece.text for piece in task])))
                if len(pending) >= 2 * self.workers:
                    done, future = pending.popleft()
                    yield done, self._result(done, future)
            for done, future in pending:
                yield done, self._result(done, future)
        finally:
            pool.shutdown(cancel_futures=True)

    def _result(self, task: list[Piece], future: Future[Encoded] | None) -> Encoded:
        try:
            if future is not None:
                return future.result()
            return encode([piece.text for piece in task], self.tokenizer, self.dtype)
        except RefusedTextError as error:
            piece = task[error.index]
            raise ValueError(f"{piece.source.place(piece.number)}: {error.reason}") from error


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- inside a process of the pool -------------------------------------------------------------------------------------

_worker: tuple[Tokenizer, str] | None = None


def _start_worker(saved: Path, dtype: str) -> None:
    global _worker
    leave_interrupts_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The tokenizer comes as a path: the parent waits until a new process has read everything that it is sent.
    _worker = load_tokenizer(saved), dtype


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    assert _worker is not None
    return encode(texts, *_worker)
