"""`prepare`: documents to token shards, in one pass, on all cores, and never half."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from recurformer.data.shards import ShardWriter, refuse_existing
from recurformer.data.sidecar import DTYPES, TOKENIZER_FOLDER, Sidecar, SourceInfo, TokenizerInfo, token_dtype
from recurformer.data.sources import PIECE, Source, find_sources
from recurformer.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer, train_bpe
from recurformer.files import appearing

SHARD_TOKENS = 100_000_000

BPE_SAMPLE = 256 << 20
"""Characters a BPE is trained on at most: its table of words grows with the text, and gains nothing after this."""

WORTH_A_POOL = 16 << 20
"""Bytes of input below which starting processes takes longer than it saves."""


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` made."""

    folder: Path
    n_tokens: int
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of text behind the tokens."""
    n_shards: int
    vocab_size: int
    dtype: str
    eos_id: int | None


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | Tokenizer = "bytes",
    *,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    append_eos: bool = True,
    text_field: str = "text",
    split: str = "train",
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Tokenize text into a folder that `TokenDataset` opens. The same inputs and options give the same bytes, whatever
    the number of workers.

    Args:
        inputs: files (.txt, .md, .jsonl, each also .gz or .zst, and .parquet), folders, globs, or a Hugging Face
            dataset, `hf:NAME` or `hf:NAME:CONFIGURATION`.
        out: the folder to make. It appears under this name when it is complete, and not before.
        tokenizer: "bytes", a `tokenizer.json`, a SentencePiece `.model`, a saved tokenizer's folder, "train-bpe:SIZE",
            which learns a byte-level BPE of SIZE tokens from the inputs, or a `Tokenizer`.
        shard_tokens: a shard ends with the first document that brings it to this many tokens.
        workers: processes that tokenize; None: as many as there are cores, or just this one for a small input.
        append_eos: end each document with the tokenizer's end token.
        text_field: where a JSON line or a table keeps its text.
        split: which split of a Hugging Face dataset.
        overwrite: replace `out` when it is a folder that this function made.
        progress: show a bar on a terminal.

    Raises:
        ValueError: for unreadable or empty input, naming file and line, and for options that do not fit; no trace of
            `out` is left.
    """
    out = Path(out)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    refuse_existing(out, overwrite)
    sources = find_sources(inputs, text_field, split)
    requested = type(tokenizer).__name__ if isinstance(tokenizer, Tokenizer) else str(tokenizer)
    with _stopped_by_signals() as stop, _Bar(sources, progress) as bar:
        made = _tokenizer(tokenizer, sources, bar)
        if append_eos and made.eos_id is None:
            raise ValueError(f"tokenizer {requested} has no end-of-document token; prepare with --no-append-eos")
        if workers is None:
            small = sum(source.size for source in sources) < WORTH_A_POOL
            workers = 1 if small or isinstance(made, BytesTokenizer) else _cores()
        with appearing(out, replace=overwrite) as folder:
            sidecar = _write(folder, sources, made, requested, shard_tokens, workers, append_eos, bar, stop)
    return PrepareSummary(
        folder=out,
        n_tokens=sidecar.n_tokens,
        n_documents=sidecar.n_documents,
        n_bytes=sidecar.n_bytes,
        n_shards=len(sidecar.shards),
        vocab_size=sidecar.vocab_size,
        dtype=sidecar.dtype,
        eos_id=sidecar.eos_id,
    )


def _tokenizer(wanted: str | os.PathLike[str] | Tokenizer, sources: Sequence[Source], bar: _Bar) -> Tokenizer:
    if isinstance(wanted, Tokenizer):
        return wanted
    if not str(wanted).startswith("train-bpe"):
        return load_tokenizer(wanted)
    name, _, size = str(wanted).partition(":")
    if name != "train-bpe" or not (size.isascii() and size.isdigit()):
        raise ValueError(f"tokenizer {str(wanted)!r}: write train-bpe:SIZE with a whole number, as train-bpe:4096")
    with contextlib.closing(_sample(sources, bar)) as texts:
        return train_bpe(texts, int(size))


def _sample(sources: Sequence[Source], bar: _Bar) -> Generator[str, None, None]:
    """Every k-th piece of the inputs, with the k that spreads `BPE_SAMPLE` over all of them."""
    unpacked = sum(source.size * (4 if source.name.endswith((".gz", ".zst", ".parquet")) else 1) for source in sources)
    stride = max(1, round(unpacked / BPE_SAMPLE))
    bar.begin("training the tokenizer")
    index, taken = 0, 0
    for source in sources:
        for piece in source.pieces(bar.tap):
            if index % stride == 0:
                yield piece.text
                taken += len(piece.text)
            if taken >= BPE_SAMPLE:
                return
            index += 1


def _write(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    requested: str,
    shard_tokens: int,
    workers: int,
    append_eos: bool,
    bar: _Bar,
    stop: _Stop,
) -> Sidecar:
    dtype = token_dtype(tokenizer.vocab_size)
    readings = [_Reading(source) for source in sources]
    tokenizer.save(folder / TOKENIZER_FOLDER)
    encoded_tasks = _in_order(_tasks(readings, bar), tokenizer, folder / TOKENIZER_FOLDER, dtype, workers)
    bar.begin("tokenizing")
    with contextlib.closing(ShardWriter(folder, dtype, tokenizer.eos_id if append_eos else None, shard_tokens)) as out:
        for task, encoded in encoded_tasks:
            begin = 0
            for text_bytes, count, reading in zip(encoded.n_bytes, encoded.n_tokens, task.ends_of, strict=True):
                out.write(encoded.tokens[begin : begin + count], text_bytes)
                begin += count
                if reading is not None and out.end_document():
                    reading.n_documents += 1
            bar.tokens(out.n_tokens)
            stop.raise_again()
        out.finish()
    if not out.shards:
        raise ValueError(f"no text in {', '.join(source.name for source in sources)}; nothing to prepare")
    sidecar = Sidecar(
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        append_eos=append_eos,
        n_tokens=sum(shard.n_tokens for shard in out.shards),
        n_documents=sum(shard.n_documents for shard in out.shards),
        n_bytes=sum(shard.n_bytes for shard in out.shards),
        shards=tuple(out.shards),
        sources=tuple(reading.info() for reading in readings),
        tokenizer=TokenizerInfo(
            kind=tokenizer.kind, requested=requested, sha256=hashlib.sha256(tokenizer.contents()).hexdigest()
        ),
    )
    sidecar.write(folder)
    return sidecar


# --- reading and encoding ---------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """A source and what was seen of it."""

    source: Source
    digest: Any = field(default_factory=hashlib.sha256)
    n_bytes: int = 0
    n_documents: int = 0

    def tap(self, chunk: bytes) -> None:
        self.digest.update(chunk)
        self.n_bytes += len(chunk)

    def info(self) -> SourceInfo:
        return SourceInfo(
            name=self.source.name,
            sha256=self.digest.hexdigest(),
            n_bytes=self.n_bytes,
            n_documents=self.n_documents,
        )


class _Task(NamedTuple):
    """About a piece's worth of text: what one worker encodes at a time. Cut by the text alone."""

    texts: list[str]
    ends_of: list[_Reading | None]
    """For each text: the source whose document ends with it, None when the document goes on."""


class _Encoded(NamedTuple):
    tokens: np.ndarray
    """Of all texts, end to end."""
    n_tokens: list[int]
    n_bytes: list[int]


def _tasks(readings: Sequence[_Reading], bar: _Bar) -> Iterator[_Task]:
    task, length = _Task([], []), 0
    for reading in readings:

        def tap(chunk: bytes, reading: _Reading = reading) -> None:
            reading.tap(chunk)
            bar.tap(chunk)

        for piece in reading.source.pieces(tap):
            task.texts.append(piece.text)
            task.ends_of.append(reading if piece.last else None)
            length += len(piece.text) + 64  # many tiny documents are work as well
            if length >= PIECE // 2:
                yield task
                task, length = _Task([], []), 0
    if task.texts:
        yield task


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> _Encoded:
    arrays = [tokenizer.encode_array(text) for text in texts]
    tokens = np.concatenate(arrays)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < tokenizer.vocab_size:
        wrong = int(tokens.max()) if tokens.max() >= tokenizer.vocab_size else int(tokens.min())
        raise ValueError(
            f"the tokenizer gave id {wrong}, outside its vocabulary of {tokenizer.vocab_size}; "
            "its files do not belong together"
        )
    n_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    return _Encoded(tokens.astype(DTYPES[dtype]), [len(array) for array in arrays], n_bytes)


def _in_order(
    tasks: Iterator[_Task], tokenizer: Tokenizer, saved: Path, dtype: str, workers: int
) -> Iterator[tuple[_Task, _Encoded]]:
    """Each task with its tokens, in the order of the tasks, at most two tasks a worker in flight."""
    if workers == 1:
        yield from ((task, _encode(task.texts, tokenizer, dtype)) for task in tasks)
        return
    # Fresh processes: a fork of one that runs threads, as torch and the tokenizers do, may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(saved, dtype))
    pending: deque[tuple[_Task, Future[_Encoded]]] = deque()
    try:
        for task in tasks:
            with _signals_held():  # may start a process
                pending.append((task, pool.submit(_encode_in_worker, task.texts)))
            if len(pending) >= 2 * workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a tokenizing process ended unexpectedly: out of memory, or prepare() was called by a script that does so "
            'on import, without `if __name__ == "__main__":`; use fewer workers, or workers=1'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[Tokenizer, str] | None = None


def _start_worker(saved: Path, dtype: str) -> None:
    global _worker
    _worker = load_tokenizer(saved), dtype  # sent as a path: starting a process waits until what it is sent is read
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _worker is not None
    return _encode(texts, *_worker)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- around it --------------------------------------------------------------------------------------------------------


class _Stop:
    """The signal that asked to stop, if one did."""

    number: int | None = None

    def raise_again(self) -> None:
        """Stop, where what a signal raised was lost: Python drops what is raised in callbacks of its own."""
        if self.number is not None:
            _unwind(self.number)


def _unwind(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[_Stop]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that what is half made is removed, and remember either."""
    stop = _Stop()

    def handle(number: int, frame: object) -> None:
        stop.number = number
        _unwind(number)

    if threading.current_thread() is not threading.main_thread():  # only there can it be arranged
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
def _signals_held() -> Iterator[None]:
    """Put off SIGINT and SIGTERM to the end of the block. Processes started in it never get them: Ctrl-C at a terminal
    goes to them as well, and is the parent's to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held, came = (signal.SIGINT, signal.SIGTERM), []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in held}
    if hasattr(signal, "pthread_sigmask"):  # children inherit the mask, not the handlers
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


class _Bar:
    """Progress on stderr: bytes of input read, speed, tokens, time left. Silent where there is no terminal."""

    def __init__(self, sources: Sequence[Source], shown: bool):
        console = Console(stderr=True)
        sizes = [source.size for source in sources]
        self._total = sum(sizes) if all(sizes) else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Start over with another pass over the inputs."""
        if self._task is not None:
            self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(what, total=self._total, tokens="")

    def tap(self, chunk: bytes) -> None:
        """Some input was read."""
        if self._task is not None:
            self._progress.advance(self._task, len(chunk))

    def tokens(self, count: int) -> None:
        """So many tokens were written."""
        if self._task is not None:
            self._progress.update(self._task, tokens=f"{count:,} tokens")
