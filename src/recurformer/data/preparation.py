"""`prepare`: documents to shards of tokens, in one pass and on all cores. The result is whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurformer.data.encoding import Encoder, cores
from recurformer.data.inputs import Format, find_sources
from recurformer.data.interrupts import Stop, stopped_by_signals
from recurformer.data.progress import Bar
from recurformer.data.shards import ShardWriter, refuse_existing
from recurformer.data.sidecar import TOKENIZER_FOLDER, Sidecar, SourceInfo, TokenizerInfo, token_dtype
from recurformer.data.sources import DOCUMENT_BYTES, PIECE, Piece, Source, printable
from recurformer.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer, train_bpe
from recurformer.files import appearing
from recurformer.settings import Count, Settings, Text, setting

SHARD_TOKENS = 100_000_000

BPE_SAMPLE = 256 << 20
"""Most characters that a BPE is trained on. Its table of words grows with the text, and gains nothing beyond this."""

WORTH_A_POOL = 16 << 20
"""Bytes of input below which starting processes takes longer than it saves."""


@dataclass(frozen=True)
class PrepareSummary:
    """The result of `prepare`."""

    folder: Path
    n_tokens: int
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of text behind the tokens."""
    n_shards: int
    vocab_size: int
    dtype: str
    eos_id: int | None


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(Settings):
    """How text becomes a prepared folder."""

    shard_tokens: Count = setting(SHARD_TOKENS, "Tokens at which a shard ends, with the document that reaches them.")
    workers: Count | None = setting(None, "Processes that tokenize; none: one a core, one for a small input.")
    append_eos: bool = setting(True, "End each document with the tokenizer's end token.")
    text_field: Text = setting("text", "Field of a JSON line or column of a table that holds the text.")
    split: Text = setting("train", "Split of a Hugging Face dataset.")
    input_format: Format = setting("auto", "Format of files given by name; auto: by their names.")
    max_document_bytes: Count = setting(DOCUMENT_BYTES, "Most bytes of a JSON record or of a row of a table.")
    overwrite: bool = setting(False, "Replace a prepared folder of the same name.")


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
    input_format: Format = "auto",
    max_document_bytes: int = DOCUMENT_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Tokenize text into a folder that `TokenDataset` opens.

    The same inputs and options give the same bytes, whatever the number of workers.

    Args:
        inputs: files (.txt, .md, .jsonl, .json, .csv, .tsv, each also .gz or .zst, and .parquet), folders, globs, "-"
            for standard input, or a Hugging Face dataset, `hf:NAME` or `hf:NAME:CONFIGURATION`.
        out: the folder to make. It appears under this name when it is complete, and not before.
        tokenizer: "bytes", a `tokenizer.json`, a SentencePiece `.model`, a saved tokenizer's folder, a `Tokenizer`, or
            "train-bpe:SIZE", which learns a byte-level BPE of SIZE tokens from the inputs.
        shard_tokens: a shard ends with the first document that brings it to this many tokens.
        workers: processes that tokenize; None: as many as there are cores, or this one alone for a small input.
        append_eos: end each document with the tokenizer's end token.
        text_field: field of a JSON line, or column of a table, that holds the text.
        split: split of a Hugging Face dataset.
        input_format: format of files that are named one by one; "auto": by their names, and text from standard input.
        max_document_bytes: most bytes of a JSON record or of a row of a table, which is parsed whole. A text file is
            streamed and has no limit.
        overwrite: replace `out` when it is a folder that this function made.
        progress: show a bar on a terminal.

    Raises:
        ValueError: the input is unreadable or empty, or an option does not fit. The message names file and line, and
            no trace of `out` is left.
        ChildProcessError: one of the workers ended before its work.
    """
    settings = PrepareSettings(
        shard_tokens=shard_tokens,
        workers=workers,
        append_eos=append_eos,
        text_field=text_field,
        split=split,
        input_format=input_format,
        max_document_bytes=max_document_bytes,
        overwrite=overwrite,
    )
    out = Path(out)
    refuse_existing(out, overwrite)
    sources = find_sources(inputs, text_field, split, input_format, max_document_bytes)
    requested = type(tokenizer).__name__ if isinstance(tokenizer, Tokenizer) else printable(tokenizer)
    with stopped_by_signals() as stop, Bar(sources, progress) as bar:
        words = _tokenizer(tokenizer, sources, bar)
        if append_eos and words.eos_id is None:
            raise ValueError(f"tokenizer {requested} has no end-of-document token; prepare with --no-append-eos")
        with appearing(out, replace=overwrite) as folder:
            sidecar = _Preparation(sources, words, requested, settings, bar, stop).write(folder)
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


def _tokenizer(wanted: str | os.PathLike[str] | Tokenizer, sources: Sequence[Source], bar: Bar) -> Tokenizer:
    if isinstance(wanted, Tokenizer):
        return wanted
    if not str(wanted).startswith("train-bpe"):
        return load_tokenizer(wanted)
    name, _, size = str(wanted).partition(":")
    if name != "train-bpe" or not (size.isascii() and size.isdigit()):
        raise ValueError(f"tokenizer {str(wanted)!r}: write train-bpe:SIZE with a whole number, as train-bpe:4096")
    if once := next((source.name for source in sources if source.is_stream), None):
        raise ValueError(f"{once} can be read once, but {wanted} reads the text twice; write the text to a file first")
    with contextlib.closing(_sample(sources, bar)) as texts:
        return train_bpe(texts, int(size))


def _sample(sources: Sequence[Source], bar: Bar) -> Generator[str, None, None]:
    """Yield every k-th piece of the inputs, with the k that spreads `BPE_SAMPLE` characters over all of them."""
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


@dataclass
class _Reading:
    """A source, and the count and hash of all that was read of it."""

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


@dataclass
class _Preparation:
    """The writing of one folder."""

    sources: Sequence[Source]
    tokenizer: Tokenizer
    requested: str  # the tokenizer's name as the user gave it
    settings: PrepareSettings
    bar: Bar
    stop: Stop

    def write(self, folder: Path) -> Sidecar:
        """Write tokenizer, shards and sidecar into an empty folder."""
        tokenizer, append_eos = self.tokenizer, self.settings.append_eos
        self.readings = {source: _Reading(source) for source in self.sources}
        self.bar.begin("tokenizing")
        tokenizer.save(folder / TOKENIZER_FOLDER)
        dtype = token_dtype(tokenizer.vocab_size)
        encoder = Encoder(tokenizer, folder / TOKENIZER_FOLDER, dtype, self._workers(), self.stop)
        eos = tokenizer.eos_id if append_eos else None
        with contextlib.closing(ShardWriter(folder, dtype, eos, self.settings.shard_tokens)) as shards:
            self._write_shards(shards, encoder)
        if not shards.shards:
            raise ValueError(f"no text in {', '.join(source.name for source in self.sources)}; nothing to prepare")
        sidecar = Sidecar(
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            append_eos=append_eos,
            n_tokens=sum(shard.n_tokens for shard in shards.shards),
            n_documents=sum(shard.n_documents for shard in shards.shards),
            n_bytes=sum(shard.n_bytes for shard in shards.shards),
            shards=tuple(shards.shards),
            sources=tuple(reading.info() for reading in self.readings.values()),
            tokenizer=TokenizerInfo(
                kind=tokenizer.kind,
                requested=self.requested,
                sha256=hashlib.sha256(tokenizer.contents()).hexdigest(),
            ),
        )
        sidecar.write(folder)
        return sidecar

    def _write_shards(self, shards: ShardWriter, encoder: Encoder) -> None:
        for task, encoded in encoder.encode_all(self._tasks()):
            begin = 0
            for piece, count, n_bytes in zip(task, encoded.n_tokens, encoded.n_bytes, strict=True):
                shards.write(encoded.tokens[begin : begin + count], n_bytes)
                begin += count
                if piece.last and shards.end_document():
                    self.readings[piece.source].n_documents += 1
            self.bar.show_tokens(shards.n_tokens)
            self.stop.raise_again()
        shards.finish()

    def _workers(self) -> int:
        if self.settings.workers is not None:
            return self.settings.workers
        small = sum(source.size for source in self.sources) < WORTH_A_POOL
        return 1 if small or isinstance(self.tokenizer, BytesTokenizer) else cores()

    def _tasks(self) -> Iterator[list[Piece]]:
        """Yield the pieces in groups of about half a piece's length. The text alone decides the groups."""
        task: list[Piece] = []
        length = 0
        for reading in self.readings.values():

            def tap(chunk: bytes, reading: _Reading = reading) -> None:
                reading.tap(chunk)
                self.bar.tap(chunk)

            for piece in reading.source.pieces(tap):
                task.append(piece)
                length += len(piece.text) + 64  # many tiny documents are work as well
                if length >= PIECE // 2:
                    yield task
                    task, length = [], 0
        if task:
            yield task
