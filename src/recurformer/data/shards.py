"""Write the shards of a prepared folder: tokens, starts of documents, and the hash of each file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from recurformer.data.sidecar import DTYPES, SIDECAR, STARTS_DTYPE, ShardInfo


class _HashedFile:
    """A new file, and the hash of its content."""

    def __init__(self, path: Path):
        self.name = path.name
        self._file: BinaryIO = path.open("xb", buffering=1 << 20)
        self._digest = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        contents = values.tobytes()
        self._file.write(contents)
        self._digest.update(contents)

    def finish(self) -> str:
        """Make the content durable and return its hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes documents end to end, and ends a shard with the first document that fills it.

    Args:
        folder: where the files go.
        dtype: a key of `DTYPES`.
        eos: id that ends each document; None: documents end without one.
        shard_tokens: tokens at which a shard is full.

    Attributes:
        shards: the finished shards.
    """

    def __init__(self, folder: Path, dtype: str, eos: int | None, shard_tokens: int):
        self.shards: list[ShardInfo] = []
        self._folder, self._dtype, self._shard_tokens = folder, DTYPES[dtype], shard_tokens
        self._eos = None if eos is None else np.array([eos], dtype=self._dtype)
        self._tokens: _HashedFile | None = None
        self._starts: _HashedFile | None = None
        self._n_tokens = self._n_bytes = self._n_documents = 0  # of the open shard
        self._begin = self._begin_bytes = 0  # where its last document begins

    @property
    def n_tokens(self) -> int:
        """Tokens written so far."""
        return sum(shard.n_tokens for shard in self.shards) + self._n_tokens

    def write(self, tokens: np.ndarray, n_bytes: int) -> None:
        """Append tokens to the current document.

        Args:
            tokens: (n,) of the type that the shards hold.
            n_bytes: UTF-8 bytes of the text behind them.
        """
        if len(tokens):
            self._open()[0].write(tokens)
        self._n_tokens += len(tokens)
        self._n_bytes += n_bytes

    def end_document(self) -> bool:
        """End the current document. Return False when it has no tokens: it then leaves no trace."""
        if self._n_tokens == self._begin:
            self._n_bytes = self._begin_bytes
            return False
        tokens, starts = self._open()
        if self._eos is not None:
            tokens.write(self._eos)
            self._n_tokens += 1
        starts.write(np.array([self._begin], dtype=STARTS_DTYPE))
        self._n_documents += 1
        self._begin, self._begin_bytes = self._n_tokens, self._n_bytes
        if self._n_tokens >= self._shard_tokens:
            self.finish()
        return True

    def finish(self) -> None:
        """End the open shard. Do nothing when none is open."""
        if self._tokens is None or self._starts is None:
            return
        self.shards.append(
            ShardInfo(
                tokens=self._tokens.name,
                documents=self._starts.name,
                n_tokens=self._n_tokens,
                n_documents=self._n_documents,
                n_bytes=self._n_bytes,
                tokens_sha256=self._tokens.finish(),
                documents_sha256=self._starts.finish(),
            )
        )
        self._tokens = self._starts = None
        self._n_tokens = self._n_bytes = self._n_documents = self._begin = self._begin_bytes = 0

    def close(self) -> None:
        """Close open files without finishing them."""
        for file in (self._tokens, self._starts):
            if file is not None:
                file.close()

    def _open(self) -> tuple[_HashedFile, _HashedFile]:
        if self._tokens is None or self._starts is None:
            number = f"{len(self.shards):05d}.bin"
            self._tokens = _HashedFile(self._folder / f"tokens-{number}")
            self._starts = _HashedFile(self._folder / f"documents-{number}")
        return self._tokens, self._starts


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise ValueError when something else than a prepared folder that may be replaced has the name `out`."""
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or replace it with --overwrite")
    if not (out / SIDECAR).is_file() or out.is_symlink():
        raise ValueError(f"{out} is not a prepared folder, so --overwrite does not touch it; choose another --out")
