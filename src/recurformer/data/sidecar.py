"""`dataset.json`, which describes a prepared folder, and the rule that gives tokens their width on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from recurformer.settings import SHOWN, shown

SIDECAR = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
"""Types of a stored token. They are little-endian on every machine."""

STARTS_DTYPE = np.dtype("<i8")
"""Type of the stored start of a document."""

MOST_IDS = 2**32
"""Size of the largest vocabulary that can be stored."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)]
"""Name of a file in the folder itself: a path could lead to any file of the machine."""

Size = Annotated[int, Field(ge=0, lt=2**63)]


def token_dtype(vocab_size: int) -> str:
    """Return the name of the narrowest type that holds the ids 0 ... vocab_size - 1.

    Raises:
        ValueError: no type holds them.
    """
    for name, dtype in DTYPES.items():
        if 1 <= vocab_size <= np.iinfo(dtype).max + 1:
            return name
    raise ValueError(f"a vocabulary of {shown(vocab_size)} tokens cannot be stored; it must have from 1 to 2^32")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardInfo(_Strict):
    """A file of tokens, and the file that says where its documents begin."""

    tokens: FileName
    documents: FileName
    n_tokens: Size
    n_documents: Size
    n_bytes: Size
    tokens_sha256: str
    documents_sha256: str


class SourceInfo(_Strict):
    """One input as it was read."""

    name: str
    sha256: str
    n_bytes: Size
    n_documents: Size


class TokenizerInfo(_Strict):
    """The tokenizer whose files lie in the folder `tokenizer`."""

    kind: str
    requested: str
    sha256: str


class Sidecar(_Strict):
    """The content of `dataset.json`. It follows from the inputs and the options alone: equal work gives equal files."""

    format: Literal["recurformer-tokens"] = "recurformer-tokens"
    format_version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, le=MOST_IDS)]
    eos_id: Annotated[int, Field(ge=0, lt=MOST_IDS)] | None
    append_eos: bool
    n_tokens: Size
    n_documents: Size
    n_bytes: Size
    shards: tuple[ShardInfo, ...]
    sources: tuple[SourceInfo, ...]
    tokenizer: TokenizerInfo

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Sidecar:
        for name in ("n_tokens", "n_documents", "n_bytes"):
            if (total := sum(getattr(shard, name) for shard in self.shards)) != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but the shards have {total}")
        if self.eos_id is not None and self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id is {self.eos_id}, outside the vocabulary of {self.vocab_size}")
        return self

    def write(self, folder: Path) -> None:
        """Write `dataset.json` into a folder, durably."""
        with (folder / SIDECAR).open("w", encoding="utf-8", newline="\n") as file:
            file.write(self.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Sidecar:
        """Return the content of a folder's `dataset.json`.

        Raises:
            ValueError: the file is missing, damaged or of another version.
        """
        path = folder / SIDECAR
        if not path.is_file():
            raise ValueError(f"{folder} holds no {SIDECAR}; make it with `recurformer prepare`")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            found = f", not {shown(first['input'])}" if first["loc"] else ""
            raise ValueError(
                f"{path} is damaged or of another version: {place[:SHOWN]}: {first['msg']}{found}; prepare it anew"
            ) from error

    @property
    def fingerprint(self) -> str:
        """A hash that is equal exactly when the tokens, their documents and their meaning are. Sources do not count."""
        content = self.model_dump_json(exclude={"sources": True, "tokenizer": {"requested"}})
        return hashlib.sha256(content.encode()).hexdigest()
