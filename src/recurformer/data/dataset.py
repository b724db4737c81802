"""Tokens on disk: a folder made by `prepare`, or raw shards without a header, as OLMo's `.npy` files are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from recurformer.data.sidecar import DTYPES, SIDECAR, STARTS_DTYPE, TOKENIZER_FOLDER, Sidecar, token_dtype
from recurformer.data.tokenizer import Tokenizer, load_tokenizer
from recurformer.settings import suggest

NUMPY_MAGIC = b"\x93NUMPY"

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class DataFile:
    """A file that must stay as it was when the dataset was opened."""

    path: Path
    stamp: tuple[int, int]
    """Bytes and time of the last change, in nanoseconds. Inodes change by themselves on some network file systems."""

    @classmethod
    def of(cls, path: Path) -> DataFile:
        """Return a file as it is now."""
        return cls(path, _stamp(path.stat()))

    def check(self, file: BinaryIO) -> None:
        """Raise ValueError when the opened file is not the one that the dataset was opened with."""
        if _stamp(os.fstat(file.fileno())) != self.stamp:
            raise ValueError(
                f"{self.path} was replaced or changed after it was opened, so it may hold other tokens; let nothing "
                "write to data in use, and start again from the data of this run"
            )


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    tokens: DataFile
    n_tokens: int
    starts: DataFile | None
    """File with the start of each document; None for a raw shard, whose documents end at the end token."""

    @property
    def path(self) -> Path:
        """The file of tokens."""
        return self.tokens.path


class TokenDataset:
    """Tokens on disk, read at any place. Nothing stays in memory and no file stays open.

    An instance can be pickled and shared between threads.

    Args:
        source: a folder made by `recurformer prepare`, or raw shards: a file, a list of files, or a folder of `.npy`
            files, which are read in order of their names. A raw shard is a bare sequence of little-endian integers.
        vocab_size: number of ids. Raw shards do not store it and require it; for a prepared folder it must agree.
        dtype: "uint16" or "uint32"; None: the narrowest type that holds the vocabulary. For a prepared folder it must
            agree.
        eos_id: the id that ends each document of raw shards; None: each file counts as one document. For a prepared
            folder it must agree.

    Attributes:
        n_tokens: tokens of all shards.
        n_documents: documents of all shards; None for raw shards.
        n_bytes: UTF-8 bytes of the text behind the tokens, for bits per byte; None for raw shards.
        fingerprint: a hash that changes when the tokens or their meaning do.
        tokenizer_info: what `dataset.json` says of the tokenizer; None for raw shards.

    Raises:
        ValueError: a file is missing, damaged, truncated or foreign, or an option does not fit.
    """

    def __init__(
        self,
        source: Source,
        *,
        vocab_size: int | None = None,
        dtype: str | None = None,
        eos_id: int | None = None,
    ):
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}{suggest(dtype, DTYPES)}")
        if isinstance(source, str | os.PathLike) and (Path(source) / SIDECAR).is_file():
            self._open_prepared(Path(source), {"vocab_size": vocab_size, "dtype": dtype, "eos_id": eos_id})
        else:
            self._open_raw(_raw_paths(source), vocab_size, dtype, eos_id)
        self.n_tokens = sum(shard.n_tokens for shard in self.shards)

    def _open_prepared(self, folder: Path, given: dict[str, int | str | None]) -> None:
        sidecar = Sidecar.read(folder)
        for name, value in given.items():
            if value is not None and value != getattr(sidecar, name):
                raise ValueError(f"{name} {value!r} was asked for, but {folder} holds {getattr(sidecar, name)!r}")
        self.folder: Path | None = folder
        self.vocab_size, self.eos_id, self.dtype = sidecar.vocab_size, sidecar.eos_id, sidecar.dtype
        self.n_bytes, self.n_documents = sidecar.n_bytes, sidecar.n_documents
        self.fingerprint, self.tokenizer_info = sidecar.fingerprint, sidecar.tokenizer
        shards: list[Shard] = []
        for info in sidecar.shards:
            tokens, starts = folder / info.tokens, folder / info.documents
            _expect_size(tokens, info.n_tokens, DTYPES[self.dtype])
            _expect_size(starts, info.n_documents, STARTS_DTYPE)
            shards.append(Shard(DataFile.of(tokens), info.n_tokens, DataFile.of(starts)))
        self.shards = tuple(shards)

    def _open_raw(self, paths: list[Path], vocab_size: int | None, dtype: str | None, eos_id: int | None) -> None:
        if vocab_size is None:
            raise ValueError(
                f"{paths[0].parent} holds no {SIDECAR}, so its files are raw shards, which do not say what they hold; "
                "give vocab_size, or make the folder with `recurformer prepare`"
            )
        self.folder, self.n_bytes, self.n_documents, self.tokenizer_info = None, None, None, None
        self.vocab_size, self.eos_id, self.dtype = vocab_size, eos_id, dtype or token_dtype(vocab_size)
        if eos_id is not None and not 0 <= eos_id < vocab_size:
            raise ValueError(f"eos_id {eos_id} is outside the vocabulary; it must be from 0 to {vocab_size - 1}")
        digest = hashlib.sha256(f"{self.dtype} {vocab_size} {eos_id}".encode())
        self.shards = tuple(_open_raw_shard(path, self.dtype, digest) for path in paths)
        self.fingerprint = digest.hexdigest()

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that made the tokens; None for raw shards.

        Raises:
            ValueError: its file is missing, damaged, or not the one that `dataset.json` records.
        """
        if self.folder is None or self.tokenizer_info is None:
            return None
        folder = self.folder / TOKENIZER_FOLDER
        tokenizer = load_tokenizer(folder)
        contents = b"" if tokenizer.file is None else (folder / tokenizer.file).read_bytes()
        if hashlib.sha256(contents).hexdigest() != self.tokenizer_info.sha256:
            raise ValueError(
                f"{folder} holds another tokenizer than {self.folder / SIDECAR} records; prepare the text anew"
            )
        return tokenizer

    def read(self, shard: int, start: int, count: int) -> np.ndarray:
        """Return the tokens start ... start + count - 1 of a shard, (count,) int64.

        Raises:
            ValueError: the file ends before, was replaced or changed, or holds an id outside the vocabulary.
        """
        # A positioned read, not a lasting memory map: there is no limit on open files, and a file that was truncated
        # meanwhile is an error, not a crash.
        path, dtype = self.shards[shard].path, DTYPES[self.dtype]
        with path.open("rb") as file:
            file.seek(int(start) * dtype.itemsize)  # a NumPy integer of 32 bits would overflow at 2^31 tokens
            tokens = np.fromfile(file, dtype=dtype, count=int(count)).astype(np.int64)
            if len(tokens) != count:
                raise ValueError(f"{path} ends before token {start + count}; it was changed, prepare it anew")
            self.shards[shard].tokens.check(file)
        if count and tokens.max() >= self.vocab_size:
            at = int(tokens.argmax())
            raise ValueError(
                f"{path} holds id {tokens[at]} at token {start + at}, outside the vocabulary of {self.vocab_size}; "
                "the dtype or the vocabulary size is not the file's"
            )
        return tokens

    def document_starts(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Return the positions p of a shard, start < p < stop, at which a document begins, (n,) int64 ascending."""
        starts = self.shards[shard].starts
        if starts is not None:
            with starts.path.open("rb") as file:
                starts.check(file)
                every = np.memmap(file, dtype=STARTS_DTYPE, mode="r")
            first, last = np.searchsorted(every, [start + 1, max(stop, start + 1)])
            found = np.array(every[first:last], dtype=np.int64)
            if len(found) and not (start < found[0] and found[-1] < stop and (np.diff(found) > 0).all()):
                raise ValueError(f"{starts.path} holds places that do not ascend; it is damaged, prepare it anew")
            return found
        if self.eos_id is None or stop - start < 2:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(self.read(shard, start, stop - 1 - start) == self.eos_id) + start + 1

    def documents(self) -> Iterator[tuple[int, int, int]]:
        """Yield every document as (shard, start, stop), in order."""
        stride = 1 << 20
        for index, shard in enumerate(self.shards):
            begin = 0
            for start in range(0, shard.n_tokens, stride):
                # `document_starts` leaves out its own start, so a stride begins one token earlier
                for border in self.document_starts(index, max(0, start - 1), min(start + stride, shard.n_tokens)):
                    yield index, begin, int(border)
                    begin = int(border)
            yield index, begin, shard.n_tokens

    def verify(self) -> None:
        """Read every file of a prepared folder and compare it with its recorded hash.

        Raises:
            ValueError: a file differs; the message names the first.
        """
        if self.folder is None:
            raise ValueError("raw shards record no hashes; only a prepared folder can be verified")
        for info in Sidecar.read(self.folder).shards:
            for name, expected in ((info.tokens, info.tokens_sha256), (info.documents, info.documents_sha256)):
                with (self.folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        raise ValueError(f"{self.folder / name} does not match its recorded hash; prepare it anew")


def _raw_paths(source: Source) -> list[Path]:
    given = [Path(source)] if isinstance(source, str | os.PathLike) else [Path(path) for path in source]
    paths: list[Path] = []
    for path in given:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds neither {SIDECAR} nor .npy shards; make it with `recurformer prepare`")
        paths += files
    if not paths:
        raise ValueError("no shard; give a prepared folder or at least one raw shard")
    return paths


def _open_raw_shard(path: Path, dtype: str, digest: hashlib._Hash) -> Shard:
    """Return a raw shard, and add its size, its head and its tail to the digest of the dataset."""
    n_bytes, width = path.stat().st_size, DTYPES[dtype].itemsize
    with path.open("rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, n_bytes - (1 << 16)))
        tail = file.read()
    if head.startswith(NUMPY_MAGIC):
        raise ValueError(f"{path} has a NumPy header; raw shards have none: write it anew with array.tofile()")
    if n_bytes == 0 or n_bytes % width:
        raise ValueError(
            f"{path} has {n_bytes} bytes, which is no whole number of {dtype} tokens; "
            "the file is truncated or holds another dtype"
        )
    digest.update(f"\n{path.name} {n_bytes} ".encode() + head + tail)
    return Shard(DataFile.of(path), n_bytes // width, None)


def _expect_size(path: Path, count: int, dtype: np.dtype) -> None:
    """Raise ValueError when a file has another size: it is then truncated, foreign or of another type."""
    size = path.stat().st_size if path.is_file() else None
    if size != count * dtype.itemsize:
        found = "is missing" if size is None else f"has {size} bytes"
        raise ValueError(
            f"{path} {found}; {count} values of {dtype.name} take {count * dtype.itemsize}: "
            "the folder is incomplete or was changed, prepare it anew"
        )
