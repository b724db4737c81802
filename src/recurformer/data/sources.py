"""Documents of one file or dataset, as a stream of pieces of bounded size."""

from __future__ import annotations

import abc
import codecs
import contextlib
import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from recurformer.data.extras import require
from recurformer.data.unpacking import UnreadableError, unpack_gzip, unpack_zstd
from recurformer.settings import shown, suggest

PIECE = 1 << 20
"""Most characters of a piece. A longer document is cut, so that tokenizing never needs all of it in memory."""

CHUNK = 1 << 14
"""Bytes read at a time. They are few, because one compressed chunk may unpack to hundreds of times its size."""

DOCUMENT_BYTES = 1 << 26
"""Default for the most bytes of one record, which is parsed whole. 64 MiB of JSON can take 1.7 GB as objects."""

DATASET = "hf:"
"""Beginning of a dataset's name. Without it, a mistyped path would be looked for on the network."""

Tap = Callable[[bytes], object]
"""A function that gets every byte of a source, once and in order, while it is read: for hashes and progress."""


class Piece(NamedTuple):
    """A run of one document's text."""

    text: str
    last: bool
    """Whether the document ends here."""
    source: Source
    number: int
    """Line or row of the document in its source."""


class Source(abc.ABC):
    """One input: a file or a dataset.

    Attributes:
        name: what messages and the sidecar call it. It can always be printed.
        size: bytes that the tap will get; 0 when that is not known beforehand.
    """

    unit: str | None = None
    """Noun that the numbers of documents count; None: the source is one document."""

    name: str
    size: int
    is_stream = False
    """Whether the bytes can be read only once."""

    @abc.abstractmethod
    def pieces(self, tap: Tap) -> Iterator[Piece]:
        """Yield the documents, in order.

        Raises:
            ValueError: a part cannot be read. The message names the file, the line or row, and the reason.
        """

    def place(self, number: int) -> str:
        """Return the name of a document for a message."""
        return self.name if self.unit is None else f"{self.name}, {self.unit} {number}"

    def cut(self, text: str, number: int) -> Iterator[Piece]:
        """Yield the pieces of a document that is in memory."""
        start = 0
        while len(text) - start > PIECE:
            at = _cut(text, start)
            yield Piece(text[start:at], False, self, number)
            start = at
        if text:
            yield Piece(text[start:], True, self, number)


def printable(path: str | os.PathLike[str]) -> str:
    r"""Return a path as text that every file and terminal can hold: bytes that are not UTF-8 show as \xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _File(Source):
    path: Path
    """The file; "-" stands for standard input."""
    text_field: str
    document_bytes: int

    def __post_init__(self) -> None:
        self.name = "standard input" if str(self.path) == "-" else printable(self.path)
        self.is_stream = not self.path.is_file()
        self.size = 0 if self.is_stream else self.path.stat().st_size

    def _raw(self, tap: Tap) -> Iterator[bytes]:
        with self._opened() as file:
            while chunk := file.read(CHUNK):
                tap(chunk)
                yield chunk

    def _opened(self) -> contextlib.AbstractContextManager[BinaryIO]:
        if str(self.path) != "-":
            return self.path.open("rb")
        if sys.stdin is None:
            raise ValueError("standard input is closed; pipe text into it")
        return contextlib.nullcontext(sys.stdin.buffer)

    def _unpacked(self, tap: Tap) -> Iterator[bytes]:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return unpack_gzip(self._raw(tap))
        return unpack_zstd(self._raw(tap), self.name) if suffix == ".zst" else self._raw(tap)

    def _lines(self, tap: Tap) -> Iterator[tuple[int, bytes]]:
        """Yield (number, line) without line ends and without a byte order mark."""
        number, parts, length = 1, [], 0
        try:
            for chunk in self._unpacked(tap):
                *ends, rest = chunk.split(b"\n")
                for end in ends:
                    self._check_length(length + len(end))
                    line = b"".join([*parts, end])
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                    number, parts, length = number + 1, [], 0
                parts.append(rest)
                length += len(rest)
                self._check_length(length)
        except UnreadableError as error:
            raise self._error(number, error) from error
        line = b"".join(parts)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line

    def _check_length(self, length: int) -> None:
        if length > self.document_bytes:
            raise UnreadableError(
                f"longer than {self.document_bytes:,} bytes; put one record on each line, or raise --max-document-bytes"
            )

    def _error(self, line: int, problem: object) -> ValueError:
        return ValueError(f"{self.name}, line {line}: {problem}")


class TextFile(_File):
    """A .txt or .md file: one document in UTF-8."""

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        text = ""
        for decoded in self._decoded(tap):
            text += decoded
            start = 0
            while len(text) - start > PIECE:
                at = _cut(text, start)
                yield Piece(text[start:at], False, self, 1)
                start = at
            text = text[start:]
        if text:
            yield Piece(text, True, self, 1)

    def _decoded(self, tap: Tap) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte order mark is not text
        line = 1
        try:
            for chunk in self._unpacked(tap):
                text = decoder.decode(chunk)
                line += chunk.count(b"\n")
                yield text
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:  # its object is this chunk, after an unfinished character of the last
            line += error.object[: error.start].count(b"\n")
            byte = error.object[error.start]
            raise self._error(line, f"byte 0x{byte:02x} is not UTF-8 ({error.reason}); convert the file") from error
        except UnreadableError as error:
            raise self._error(line, error) from error


class JsonLinesFile(_File):
    """A .jsonl file: one JSON object on each line, a document each."""

    unit = "line"

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        for number, line in self._lines(tap):
            if line.strip():
                yield from self._record(self._parsed(line, number), number)

    def _parsed(self, line: bytes, number: int) -> object:
        try:
            return json.loads(line)
        except UnicodeDecodeError as error:
            raise self._error(number, f"not UTF-8 ({error.reason}); convert the file") from error
        except ValueError as error:
            raise self._error(number, f"not JSON ({error})") from error
        except RecursionError as error:
            raise self._error(number, "JSON nested too deeply") from error

    def _record(self, record: object, number: int) -> Iterator[Piece]:
        try:
            text = _text_of(record, self.text_field)
        except UnreadableError as error:
            raise ValueError(f"{self.place(number)}: {error}") from error
        yield from self.cut(text, number)


class JsonFile(JsonLinesFile):
    """A .json file: JSON lines, or one JSON array of objects, which is read whole."""

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        lines = self._lines(tap)
        first = next(((number, line) for number, line in lines if line.strip()), None)
        if first is None:
            return
        if not first[1].lstrip().startswith(b"["):
            self.unit = "line"
            for number, line in itertools.chain([first], lines):
                if line.strip():
                    yield from self._record(self._parsed(line, number), number)
            return
        self.unit = "record"
        parts, length = [first[1]], len(first[1])
        for number, line in lines:
            parts.append(line)
            length += len(line) + 1
            if length > self.document_bytes:
                raise self._error(
                    number,
                    f"the array is longer than {self.document_bytes:,} bytes; write it as JSON lines "
                    f"(jq -c '.[]'), or raise --max-document-bytes",
                )
        for number, record in enumerate(self._array(b"\n".join(parts), first[0]), start=1):
            yield from self._record(record, number)

    def _array(self, content: bytes, line: int) -> Iterable[object]:
        found = self._parsed(content, line)
        return found if isinstance(found, list) else [found]


class TableFile(_File):
    """A .csv or .tsv file: names of columns in the first row, then a document in each row."""

    unit = "line"

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        csv.field_size_limit(max(csv.field_size_limit(), self.document_bytes))  # of the process; 128 KiB by default
        self.record_bytes = 0  # read since the last whole record: an open quote would take the rest of the file
        delimiter = "\t" if ".tsv" in [suffix.lower() for suffix in self.path.suffixes] else ","
        rows = csv.reader(self._text_lines(tap), delimiter=delimiter)
        column = None
        try:
            for row in rows:
                self.record_bytes = 0
                if not row:
                    continue
                if column is None:
                    if self.text_field not in row:
                        raise UnreadableError(_missing(self.text_field, row))
                    column = row.index(self.text_field)
                    continue
                if column >= len(row):
                    raise UnreadableError(f"{len(row)} columns, so {self.text_field!r} is missing")
                yield from self.cut(row[column], rows.line_num)
        except (csv.Error, UnreadableError) as error:
            raise self._error(rows.line_num, error) from error

    def _text_lines(self, tap: Tap) -> Iterator[str]:
        for number, line in self._lines(tap):
            self.record_bytes += len(line) + 1
            if self.record_bytes > self.document_bytes + 1:
                raise self._error(
                    number,
                    f"the record is longer than {self.document_bytes:,} bytes; close its quotes, or raise "
                    "--max-document-bytes",
                )
            try:
                yield line.decode() + "\n"
            except UnicodeDecodeError as error:
                raise self._error(number, f"not UTF-8 ({error.reason}); convert the file") from error


class ParquetFile(_File):
    """A .parquet file: a document in each row."""

    unit = "row"

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        parquet = require("pyarrow.parquet", f"{self.name} (.parquet)")
        arrow_error = require("pyarrow", "parquet").ArrowException
        for _ in self._raw(tap):  # for the tap alone: parquet is not read from front to back
            pass
        try:
            # With a buffer size a column is streamed; without one a whole row group of it is read at once.
            with parquet.ParquetFile(self.path, buffer_size=CHUNK) as file:
                columns = file.schema_arrow.names
                if columns.count(self.text_field) != 1:
                    twice = f"the column {self.text_field!r} is there more than once; rename one"
                    missing = _missing(self.text_field, columns)
                    raise ValueError(f"{self.name}: {twice if self.text_field in columns else missing}")
                row = 0
                for batch in file.iter_batches(batch_size=64, columns=[self.text_field]):
                    # By name: for the column "text", the library also returns "text.lang", maybe first.
                    for text in batch.column(batch.schema.get_field_index(self.text_field)):
                        row += 1
                        yield from _row_document(self, row, text.as_py(), self.document_bytes)
        except (arrow_error, OSError) as error:
            raise ValueError(f"{self.name}: not a readable parquet file ({error})") from error


@dataclass(eq=False)
class HubDataset(Source):
    """A dataset that the `datasets` library loads, `hf:NAME` or `hf:NAME:CONFIGURATION`, streamed."""

    name: str
    split: str
    text_field: str
    document_bytes: int
    size = 0
    unit = "row"

    def pieces(self, tap: Tap) -> Iterator[Piece]:
        library = require("datasets", f"the dataset {self.name}")
        name, _, configuration = self.name.removeprefix(DATASET).partition(":")
        try:
            rows = iter(library.load_dataset(name, configuration or None, split=self.split, streaming=True))
        except Exception as error:  # the library and its network layer raise many kinds
            raise ValueError(f"{self.name} cannot be loaded: {error}") from error
        for number, row in enumerate(rows, start=1):
            if self.text_field not in row:
                raise ValueError(f"{self.name}: {_missing(self.text_field, row)}")
            for piece in _row_document(self, number, row[self.text_field], self.document_bytes):
                tap(piece.text.encode())
                yield piece


# --- one document -----------------------------------------------------------------------------------------------------


def _row_document(source: Source, row: int, text: object, most_bytes: int) -> Iterator[Piece]:
    try:
        found = _checked(text)
        if len(found) > most_bytes:
            raise UnreadableError(f"longer than {most_bytes:,} bytes; cut the text, or raise --max-document-bytes")
    except UnreadableError as error:
        raise ValueError(f"{source.place(row)}: {error}") from error
    yield from source.cut(found, row)


def _text_of(record: object, field: str) -> str:
    if not isinstance(record, dict):
        raise UnreadableError(f"a JSON {type(record).__name__}; each line must be an object with a {field!r} field")
    if field not in record:
        raise UnreadableError(_missing(field, record))
    return _checked(record[field])


def _checked(text: object) -> str:
    if not isinstance(text, str):
        raise UnreadableError(
            f"the text is {'missing' if text is None else f'a {type(text).__name__}'}; it must be a string"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnreadableError(f"half a surrogate pair at character {error.start} of the text") from error
    return text


def _missing(field: str, present: Iterable[str]) -> str:
    some = list(itertools.islice(present, 12))
    listed = ", ".join(map(shown, some)) or "none"
    return f"no field {field!r}{suggest(field, some)}; present: {listed}; choose one with --text-field"


def _cut(text: str, start: int = 0) -> int:
    """Return where to end the piece that begins at `start`, for a text that goes on for longer than a piece.

    The best place is one where tokenizers divide a text anyway: before a single space that a word follows. Without
    one, the piece ends after a line, else anywhere. The place depends on the text alone.
    """
    lowest, highest = start + PIECE - PIECE // 16, start + PIECE
    space = text.rfind(" ", lowest, highest)
    while space > 0 and (text[space - 1].isspace() or not text[space + 1].isalnum()):
        space = text.rfind(" ", lowest, space)
    if space > 0:
        return space
    return text.rfind("\n", lowest, highest) + 1 or highest
