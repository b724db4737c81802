"""The JSON file that describes a prepared folder, and the one rule that gives tokens their width on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

SIDECAR = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
"""How a token is stored: always little-endian, whatever wrote it."""

STARTS_DTYPE = np.dtype("<i8")
"""How the start of a document is stored."""


def token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds the ids 0 ... vocab_size - 1.

    Raises:
        ValueError: when none does.
    """
    for name, dtype in DTYPES.items():
        if 1 <= vocab_size <= np.iinfo(dtype).max + 1:
            return name
    raise ValueError(f"a vocabulary of {vocab_size} tokens cannot be stored; it must have from 1 to 2^32")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardInfo(_Strict):
    """One file of tokens and the one beside it that says where its documents begin."""

    tokens: str
    documents: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    tokens_sha256: str
    documents_sha256: str


class SourceInfo(_Strict):
    """One input as it was read."""

    name: str
    sha256: str
    n_bytes: int
    n_documents: int


class TokenizerInfo(_Strict):
    """The tokenizer whose files lie in the folder's `tokenizer` folder."""

    kind: str
    requested: str
    sha256: str


class Sidecar(_Strict):
    """The whole description. Everything in it follows from the inputs and the options, so that equal work gives equal
    files."""

    format: Literal["recurformer-tokens"] = "recurformer-tokens"
    format_version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eos_id: int | None
    append_eos: bool
    n_tokens: int
    n_documents: int
    n_bytes: int
    shards: tuple[ShardInfo, ...]
    sources: tuple[SourceInfo, ...]
    tokenizer: TokenizerInfo

    def write(self, folder: Path) -> None:
        """Write it into `folder`, and to the disk."""
        with (folder / SIDECAR).open("w", encoding="utf-8", newline="\n") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Sidecar:
        """Read it from `folder`.

        Raises:
            ValueError: when it is missing, damaged or of another version.
        """
        path = folder / SIDECAR
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no {SIDECAR}; make it with `recurformer prepare`") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(f"{path} is damaged or of another version: {place}: {first['msg']}") from error

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the tokens, their documents and their meaning are; where they came from does not count."""
        content = self.model_dump_json(exclude={"sources": True, "tokenizer": {"requested"}})
        return hashlib.sha256(content.encode()).hexdigest()
