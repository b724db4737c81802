"""Find the sources that the inputs of `prepare` name: files, folders, globs, datasets, standard input."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from recurformer.data.sources import (
    DATASET,
    DOCUMENT_BYTES,
    HubDataset,
    JsonFile,
    JsonLinesFile,
    ParquetFile,
    Source,
    TableFile,
    TextFile,
    printable,
)

Format = Literal["auto", "txt", "jsonl", "json", "csv"]

_READERS = {
    "txt": TextFile, "md": TextFile, "jsonl": JsonLinesFile, "json": JsonFile, "csv": TableFile, "tsv": TableFile,
    "parquet": ParquetFile,
}  # fmt: skip

_NAME = re.compile(
    r"\.(?:(?P<kind>txt|md|jsonl|json|csv|tsv)(?P<packing>\.(?:gz|zst))?|(?P<parquet>parquet))$", re.IGNORECASE
)
_KINDS = "known are .txt, .md, .jsonl, .json, .csv, .tsv (each also .gz or .zst) and .parquet"

# By itself a .json is mostly a file of settings, and a table mostly holds no text: a folder is read without them.
_IN_FOLDERS = re.compile(r"\.(?:(?:txt|md|jsonl)(?:\.(?:gz|zst))?|json\.(?:gz|zst)|parquet)$", re.IGNORECASE)
_FOLDER_KINDS = "known are .txt, .md, .jsonl (each also .gz or .zst), .json.gz, .json.zst and .parquet"

_STREAM = re.compile(r"-|/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")


def find_sources(
    inputs: Sequence[str | os.PathLike[str]],
    text_field: str = "text",
    split: str = "train",
    input_format: Format = "auto",
    document_bytes: int = DOCUMENT_BYTES,
) -> list[Source]:
    """Return the sources that the inputs name, in the order given. Files of a folder or glob are sorted by path.

    Args:
        inputs: files, folders, globs, datasets (`hf:NAME`), or "-" for standard input.
        text_field: field or column that holds the text.
        split: split of a dataset.
        input_format: format of files that are named one by one; "auto": by their names, and text from standard input.
        document_bytes: most bytes of a record that is parsed whole.

    Raises:
        ValueError: an input names nothing readable, or a file is named twice.
    """
    if not inputs:
        raise ValueError("no input; give files, folders, globs or a Hugging Face dataset, hf:NAME")
    found: list[Source] = []
    origin: dict[str, str] = {}
    for given in map(str, inputs):
        if given.startswith(DATASET):
            if not given.removeprefix(DATASET).partition(":")[0]:
                raise ValueError(f"{given!r} names no dataset; write {DATASET}NAME or {DATASET}NAME:CONFIGURATION")
            found.append(HubDataset(given, split, text_field, document_bytes))
            continue
        for path, kind in _files(given, input_format):
            real = str(path) if _STREAM.fullmatch(str(path)) else os.path.realpath(path)
            if real in origin:
                raise ValueError(
                    f"{printable(path)} is given twice, by {printable(origin[real])!r} and {printable(given)!r}; "
                    "name it once"
                )
            origin[real] = given
            found.append(_READERS[kind](path, text_field, document_bytes))
    return found


def _files(given: str, input_format: Format) -> list[tuple[Path, str]]:
    """Return the files of one input with their formats."""
    name = printable(given)
    if not given:
        raise ValueError('an input is ""; give a file, a folder, a glob or a Hugging Face dataset, hf:NAME')
    if _STREAM.fullmatch(given):
        return [(Path(given), "txt" if input_format == "auto" else input_format)]
    path = Path(given)
    if path.is_dir():
        return _files_of_folder(path)
    if path.exists():
        candidates = [path]
    else:
        candidates = sorted({match for match in _matches(given) if not match.is_dir()}, key=Path.as_posix)
        if not candidates:
            raise ValueError(f"{name} does not exist; a Hugging Face dataset is written {DATASET}NAME")
    files = [(file, kind) for file in candidates if (kind := _kind(file, input_format))]
    if not files:
        problem = "files of this kind are not read" if path.exists() else "no file that matches can be read"
        raise ValueError(f"{name}: {problem}; {_KINDS}; --input-format reads other names")
    for file, _ in files:
        _check_readable(file)
    return files


def _kind(path: Path, input_format: Format) -> str | None:
    """Return the format of a file, a key of `_READERS`; None when its name tells none."""
    if input_format != "auto":
        return input_format
    match = _NAME.search(path.name)
    return match and (match["kind"] or match["parquet"]).lower()


def _files_of_folder(folder: Path) -> list[tuple[Path, str]]:
    """Return the files of a folder at any depth, through links, sorted by path. Hidden ones are left out."""
    found = (Path(parent, name) for parent, _, names in _walk(folder) for name in names if _IN_FOLDERS.search(name))
    files = sorted(found, key=Path.as_posix)
    if not files:
        raise ValueError(f"{printable(folder)} holds no file that can be read; {_FOLDER_KINDS}")
    for file in files:
        _check_readable(file)
    return [(file, kind) for file in files if (kind := _kind(file, "auto"))]


def _matches(pattern: str) -> Iterator[Path]:
    """Yield the paths that match a pattern as the shell's, where `**` stands for folders at any depth.

    `glob.glob` would follow loops of links, and a few of them take for ever.
    """
    path = Path(pattern)
    if glob.has_magic(pattern):
        yield from _expanded(Path(path.anchor), path.parts[1:] if path.anchor else path.parts)


def _expanded(parent: Path, parts: Sequence[str]) -> Iterator[Path]:
    if not parts:
        yield parent
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        folders = [parent, *(Path(at, name) for at, names, _ in _walk(parent) for name in names)]
        for folder in folders:
            yield from _expanded(folder, rest or ["*"])
    elif not glob.has_magic(part):
        if os.path.lexists(parent / part):
            yield from _expanded(parent / part, rest)
    elif parent.is_dir():
        names = [name for name in os.listdir(parent) if part[0] == "." or name[0] != "."]
        for name in fnmatch.filter(names, part):
            yield from _expanded(parent / name, rest)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, names of folders, names of files) at any depth, through links but not round in loops."""

    def fail(error: OSError) -> None:
        raise ValueError(f"{printable(error.filename)} cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "." and not _is_loop(Path(parent, name))]
        yield parent, folders, [name for name in names if name[0] != "."]


def _is_loop(path: Path) -> bool:
    """Whether a path is a link to a folder that the path itself goes through."""
    if not path.is_symlink():
        return False
    target = os.path.realpath(path)
    return any(Path(os.path.realpath(parent)).is_relative_to(target) for parent in path.parents)


def _check_readable(path: Path) -> None:
    """Refuse what would hang, or fail when half of the work is done."""
    name = printable(path)
    if not path.exists():
        raise ValueError(f"{name} is a link to {printable(os.readlink(path))}, which does not exist; remove the link")
    if not path.is_file():
        raise ValueError(f"{name} is no regular file but a pipe or a device; pipe text into `recurformer prepare -`")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name} may not be read by this user; change its permissions or leave it out")
