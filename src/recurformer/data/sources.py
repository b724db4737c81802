"""Files, folders, globs and datasets, read as a stream of documents in pieces of bounded size."""

from __future__ import annotations

import abc
import codecs
import glob
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recurformer.data.extras import require
from recurformer.settings import suggest

PIECE = 1 << 20
"""Characters of a piece at most. A longer document is cut, so that no document has to fit into memory."""

CHUNK = 1 << 14
"""Bytes read at a time: small, for one compressed chunk may unpack to hundreds of its size."""

LONGEST_LINE = 1 << 28
"""Bytes of a JSON line at most: such a line is one object, which has to be read whole."""

DATASET = "hf:"
"""Begins the name of a dataset. Without it a mistyped path would be looked for on the network."""

Tap = Callable[[bytes], object]
"""Shown every byte of a source, once and in order, while it is read: hashing and progress hang on it."""


class Piece(NamedTuple):
    """A run of one document's text."""

    text: str
    last: bool
    """The document ends here."""


class Source(abc.ABC):
    """One input: a file or a dataset."""

    name: str
    size: int
    """Bytes that the tap will see; 0 when that is not known beforehand."""

    @abc.abstractmethod
    def pieces(self, tap: Tap) -> Iterator[Piece]:
        """The documents, in order.

        Raises:
            ValueError: naming the file and the line (or row) that cannot be read, and why.
        """


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], text_field: str = "text", split: str = "train"
) -> list[Source]:
    """What `inputs` name, in the order given; the files of a folder or glob sorted by path, hidden ones left out.

    Raises:
        ValueError: for an input that names nothing readable, or a file named twice.
    """
    if not inputs:
        raise ValueError("no input; give files, folders, globs or a Hugging Face dataset, hf:NAME")
    found: list[Source] = []
    origin: dict[Path, str] = {}
    for given in map(str, inputs):
        if given.startswith(DATASET):
            found.append(HubDataset(given, split, text_field))
            continue
        for path in _files(given):
            if path.resolve() in origin:
                raise ValueError(f"{path} is given twice, by {origin[path.resolve()]!r} and {given!r}; name it once")
            origin[path.resolve()] = given
            found.append(_file_source(path, text_field))
    return found


# --- which files ------------------------------------------------------------------------------------------------------


def _files(given: str) -> list[Path]:
    path = Path(given)
    if path.is_file():
        if not _FILE_NAME.search(path.name):
            raise ValueError(f"{given}: files of this kind are not read; {_KINDS}")
        return [path]
    if path.is_dir():
        candidates = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = [file for file in candidates if not _hidden(file.relative_to(path))]
    else:
        files = [Path(match) for match in glob.glob(given, recursive=True) if os.path.isfile(match)]
        if not files:
            raise ValueError(f"{given} does not exist; a Hugging Face dataset is written {DATASET}NAME")
    files = sorted((file for file in files if _FILE_NAME.search(file.name)), key=Path.as_posix)
    if not files:
        raise ValueError(f"{given} holds no file that can be read; {_KINDS}")
    return files


# Packed, .json is what C4 and others call JSON lines; by itself it is mostly a file of settings, and left alone.
_FILE_NAME = re.compile(
    r"\.(?:(?P<kind>txt|md|jsonl|json(?=\.(?:gz|zst)$))(?:\.(?P<packing>gz|zst))?|(?P<parquet>parquet))$", re.IGNORECASE
)
_KINDS = "known are .txt, .md, .jsonl (each also .gz or .zst), .json.gz, .json.zst and .parquet"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file_source(path: Path, text_field: str) -> Source:
    match = _FILE_NAME.search(path.name)
    assert match is not None
    if match["parquet"]:
        return ParquetFile(path, text_field)
    if match["kind"].lower() in ("jsonl", "json"):
        return JsonLinesFile(path, text_field)
    return TextFile(path)


# --- reading ----------------------------------------------------------------------------------------------------------


class _UnreadableError(Exception):
    """Why the bytes end here; whoever counts the lines turns it into a ValueError."""


@dataclass
class _File(Source):
    path: Path

    def __post_init__(self) -> None:
        self.name = str(self.path)
        self.size = self.path.stat().st_size

    def _raw(self, tap: Tap) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK):
                tap(chunk)
                yield chunk

    def _unpacked(self, tap: Tap) -> Iterator[bytes]:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return _unpack(self._raw(tap), lambda: zlib.decompressobj(wbits=31), zlib.error)
        if suffix == ".zst":
            zstandard = require("zstandard", f"{self.name} (.zst)")
            return _unpack(self._raw(tap), zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
        return self._raw(tap)

    def _error(self, line: int, problem: object) -> ValueError:
        return ValueError(f"{self.name}, line {line}: {problem}")


def _unpack(chunks: Iterable[bytes], start: Callable[[], Any], broken: type[Exception]) -> Iterator[bytes]:
    """The contents of compressed frames laid end to end. Unlike the libraries' own readers, a frame that stops short is
    an error for both formats."""
    frame = None
    for chunk in chunks:
        while chunk:
            if frame is None:
                chunk = chunk.lstrip(b"\0") if broken is zlib.error else chunk  # gzip files may be padded with zeros
                if not chunk:
                    break
                frame = start()
            try:
                yield frame.decompress(chunk)
            except broken as error:
                raise _UnreadableError(f"the compressed data is damaged ({error})") from error
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise _UnreadableError("the compressed data is cut short; the file is incomplete")


@dataclass
class TextFile(_File):
    """A .txt or .md file: one document, read as UTF-8."""

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        text = ""
        for decoded in self._decoded(tap):
            text += decoded
            while len(text) > PIECE:
                at = _cut(text)
                yield Piece(text[:at], last=False)
                text = text[at:]
        if text:
            yield Piece(text, last=True)

    def _decoded(self, tap: Tap) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte order mark is not text
        line = 1
        try:
            for chunk in self._unpacked(tap):
                text = decoder.decode(chunk)
                line += chunk.count(b"\n")
                yield text
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:  # its object: this chunk, after an unfinished character of the last
            line += error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise self._error(line, f"byte 0x{byte:02x} is not UTF-8 ({error.reason}); convert the file") from error
        except _UnreadableError as error:
            raise self._error(line, error) from error


@dataclass
class JsonLinesFile(_File):
    """A .jsonl (or packed .json) file: one JSON object a line, each a document, its text under `text_field`."""

    text_field: str

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        for number, line in self._lines(tap):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise self._error(number, f"not UTF-8 ({error.reason}); convert the file") from error
            except ValueError as error:
                raise self._error(number, f"not JSON ({error})") from error
            except RecursionError as error:
                raise self._error(number, "JSON nested too deeply") from error
            try:
                text = _text_of(record, self.text_field)
            except _UnreadableError as error:
                raise self._error(number, error) from error
            yield from _cut_document(text)

    def _lines(self, tap: Tap) -> Iterator[tuple[int, bytes]]:
        number, parts, length = 1, [], 0
        try:
            for chunk in self._unpacked(tap):
                *complete, rest = chunk.split(b"\n")
                for end in complete:
                    line = b"".join([*parts, end])
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    number, parts, length = number + 1, [], 0
                parts.append(rest)
                length += len(rest)
                if length > LONGEST_LINE:
                    raise _UnreadableError(f"longer than {LONGEST_LINE:,} bytes; put one record on each line")
        except _UnreadableError as error:
            raise self._error(number, error) from error
        line = b"".join(parts)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


@dataclass
class ParquetFile(_File):
    """A .parquet file: a document in each row, its text in the column `text_field`."""

    text_field: str

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        parquet = require("pyarrow.parquet", f"{self.name} (.parquet)")
        arrow_error = require("pyarrow", "parquet").ArrowException
        for _ in self._raw(tap):  # read once for the tap: parquet itself is not read front to back
            pass
        try:
            # With a buffer size a column is streamed; without one a whole row group of it is read at once.
            with parquet.ParquetFile(self.path, buffer_size=CHUNK) as file:
                columns = file.schema_arrow.names
                if self.text_field not in columns:
                    raise ValueError(f"{self.name}: {_missing(self.text_field, columns)}")
                row = 0
                for batch in file.iter_batches(batch_size=64, columns=[self.text_field]):
                    for text in batch.column(0):
                        row += 1
                        yield from _row_document(self.name, row, text.as_py())
        except (arrow_error, OSError) as error:
            raise ValueError(f"{self.name}: not a readable parquet file ({error})") from error


@dataclass
class HubDataset(Source):
    """A dataset that the `datasets` library loads, `hf:NAME` or `hf:NAME:CONFIGURATION`, streamed."""

    name: str
    split: str
    text_field: str
    size = 0

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        library = require("datasets", f"the dataset {self.name}")
        name, _, configuration = self.name.removeprefix(DATASET).partition(":")
        try:
            rows = iter(library.load_dataset(name, configuration or None, split=self.split, streaming=True))
        except Exception as error:  # whatever the library and its network layer raise
            raise ValueError(f"{self.name} cannot be loaded: {error}") from error
        for number, row in enumerate(rows, start=1):
            if self.text_field not in row:
                raise ValueError(f"{self.name}: {_missing(self.text_field, row)}")
            for piece in _row_document(self.name, number, row[self.text_field]):
                tap(piece.text.encode())
                yield piece


def _row_document(name: str, row: int, text: object) -> Iterator[Piece]:
    try:
        yield from _cut_document(_checked(text))
    except _UnreadableError as error:
        raise ValueError(f"{name}, row {row}: {error}") from error


def _text_of(record: object, field: str) -> str:
    if not isinstance(record, dict):
        raise _UnreadableError(f"a JSON {type(record).__name__}; each line must be an object with a {field!r} field")
    if field not in record:
        raise _UnreadableError(_missing(field, record))
    return _checked(record[field])


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise _UnreadableError(
            f"the text is {'missing' if text is None else f'a {type(text).__name__}'}; it must be a string"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _UnreadableError(f"half a surrogate pair at character {error.start} of the text") from error
    return text


def _missing(field: str, present: Iterable[str]) -> str:
    present = list(present)
    listed = ", ".join(map(repr, present[:12])) or "none"
    return f"no field {field!r}{suggest(field, present)}; present: {listed}; choose one with --text-field"


# --- cutting ----------------------------------------------------------------------------------------------------------


def _cut_document(text: str) -> Iterator[Piece]:
    start = 0
    while len(text) - start > PIECE:
        at = _cut(text, start)
        yield Piece(text[start:at], last=False)
        start = at
    if text:
        yield Piece(text[start:], last=True)


def _cut(text: str, start: int = 0) -> int:
    """Where the piece that begins at `start`, of a text that goes on for longer than a piece, should end: where a
    tokenizer would divide the text anyway, before a single space that a word follows; where there is none, after a
    line, else anywhere. The place depends on the text alone."""
    lowest, highest = start + PIECE - PIECE // 16, start + PIECE
    space = text.rfind(" ", lowest, highest)
    while space > 0 and (text[space - 1].isspace() or not text[space + 1].isalnum()):
        space = text.rfind(" ", lowest, space)
    if space > 0:
        return space
    return text.rfind("\n", lowest, highest) + 1 or highest
