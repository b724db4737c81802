"""Read files of values (JSON, TOML, YAML) that may be damaged or hostile: limits first, then syntax, then types.

Every such file in the package is read here. A bad one costs one sentence (`ValueError`) that names the file, and little
time and memory: size, nesting and the number of aliases are limited before anything is built from the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from recurformer.settings import SHOWN, field_types, shown

T = TypeVar("T")

LARGEST = 512 << 10  # bytes of a file of settings: what the slowest parser reads in about a second
LARGEST_LIST = 16 << 20  # bytes of a file that lists tensors or files
DEEPEST = 64  # levels of lists and tables inside each other
YAML_VALUES = 20_000  # in one file, aliases followed
YAML_ALIASES = 100
YAML_MERGED = 1000  # entries of a table that merges others


# --- text -------------------------------------------------------------------------------------------------------------


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Return the text of a file.

    Args:
        largest: bytes that the file may have.

    Raises:
        ValueError: when it is missing, no regular file (a pipe, a device), too large or not UTF-8.
    """
    size = check_regular(path)
    if size > largest:
        raise ValueError(
            f"{path} has {size:,} bytes, more than the {largest:,} that such a file may have; "
            "check that it is the right one"
        )
    try:
        return path.read_bytes()[: largest + 1].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}); it is damaged or of another kind") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({brief(error)}); check its permissions") from error


def check_regular(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        ValueError: when it is missing or no regular file. A pipe would wait for ever, /dev/zero never ends.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; copy it again") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{shown(str(path))} cannot be read ({brief(error)}); check its name and permissions"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file; give a file")
    return status.st_size


def brief(error: BaseException) -> str:
    """Return the first line of an error's message, cut where it is long."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


# --- syntax -----------------------------------------------------------------------------------------------------------


def read_values(path: Path, largest: int = LARGEST) -> Any:
    """Return the values in a `.json`, `.toml`, `.yaml` or `.yml` file.

    Raises:
        ValueError: as `read_text` does, and for another suffix, bad syntax and too deep nesting.
    """
    if path.suffix not in PARSERS:
        raise ValueError(f"{path}: the name must end in {', '.join(PARSERS)}")
    return parse(read_text(path, largest), path.suffix, path)


def read_table(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """Return the table in a JSON, TOML or YAML file. An empty YAML file is an empty table.

    Raises:
        ValueError: as `read_values` does, and when it holds something else.
    """
    values = read_values(path, largest)
    if values is None and path.suffix in (".yaml", ".yml"):
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a table of named values")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise ValueError(f"{path} has the key {shown(strange[0])}; keys must be text")
    return values


def parse(text: str, suffix: str, source: object) -> Any:
    """Return the values in a text.

    Args:
        suffix: one of `PARSERS`, which says what kind of text it is.
        source: named in messages.

    Raises:
        ValueError: for bad syntax and too deep nesting.
    """
    kind = suffix.removeprefix(".").upper().replace("YML", "YAML")
    too_deep = f"{source} nests lists or tables more than {DEEPEST} deep; it is damaged or not meant for this"
    try:
        if DEEPER[suffix](text):
            raise ValueError(too_deep)
        values = PARSERS[suffix](text)
    except RecursionError:
        raise ValueError(too_deep) from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{source} is not valid {kind} ({_complaint(error)}); correct it or copy it again") from None
    except ValueError as error:
        if str(error) == too_deep:
            raise
        why = "a number of too many digits" if "int_max_str_digits" in str(error) else brief(error)
        raise ValueError(f"{source} is not valid {kind} ({why}); correct it or copy it again") from None
    return values


def _complaint(error: Exception) -> str:
    """Return what a parser says, with the place where it has one."""
    place = getattr(error, "problem_mark", None)
    if place is not None:
        return f"{brief(ValueError(getattr(error, 'problem', None) or 'bad syntax'))}, line {place.line + 1}"
    return brief(error)


# An unclosed quote reaches to the end: looking for its end again from every later quote would take quadratic time.
JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
TOML_TEXT = re.compile(
    r"""#[^\n]*|\"{3}(?:[^"\\]|\\.|"(?!""))*+\"{0,3}|'{3}(?:[^']|'(?!''))*+'{0,3}|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*'?""",
    re.DOTALL,
)
TOML_KEY = re.compile(rf"(?<![\w-])[\w-]++(?:\s*+\.\s*+[\w-]++){{{DEEPEST},}}")


def _brackets_are_deep(text: str) -> bool:
    depth = 0
    for bracket in re.finditer(r"[\[{\]}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEEPEST:
            return True
    return False


def _json_is_deep(text: str) -> bool:
    if text.count("[") + text.count("{") <= DEEPEST:  # a line of metrics, say
        return False
    return _brackets_are_deep(JSON_TEXT.sub("", text))


def _toml_is_deep(text: str) -> bool:
    """Whether brackets or the parts of a dotted key nest too deeply; the library keeps every prefix of such a key."""
    bare = TOML_TEXT.sub("q", text)
    return _brackets_are_deep(bare) or TOML_KEY.search(bare) is not None


class _YamlLoader(yaml.SafeLoader):
    """YAML with 1.2's numbers (PyYAML's 1.1 rules take 1e-3 for text), limited in depth, values, aliases and merges."""

    aliases = depth = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        self.values += 1
        self.depth += 1
        if self.aliases > YAML_ALIASES:
            raise ValueError(f"more than {YAML_ALIASES} aliases")
        if self.values > YAML_VALUES:
            raise ValueError(f"more than {YAML_VALUES:,} values")
        if self.depth > DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > YAML_MERGED:
            raise ValueError(f"a table of more than {YAML_MERGED:,} entries that merges others")


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _yaml(text: str) -> Any:
    values = yaml.load(text, Loader=_YamlLoader)
    if _size(values, {}) > YAML_VALUES:
        raise ValueError(f"more than {YAML_VALUES:,} values, aliases followed")
    return values


def _size(value: Any, known: dict[int, int]) -> int:
    """Return the number of values inside a value, aliases followed. One that contains itself raises RecursionError."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inside)
    return known[id(value)]


PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}
DEEPER: dict[str, Callable[[str], bool]] = {
    ".toml": _toml_is_deep, ".yaml": lambda text: False, ".yml": lambda text: False, ".json": _json_is_deep,
}  # fmt: skip


# --- types ------------------------------------------------------------------------------------------------------------


def build(kind: type[T], values: Any, source: object, remedy: str = "") -> T:
    """Return a settings object whose fields have these values. Values that are no field of it are left out.

    Args:
        kind: a subclass of `Settings`; its fields carry their types and limits.
        values: a table.
        source: the file that they come from, named in messages.
        remedy: ends each message.

    Raises:
        ValueError: for a field that is missing or has a value that it does not accept.
    """
    end = f"; {remedy}" if remedy else ""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} holds {shown(values)}, not a table of named values{end}")
    fields: dict[str, Any] = {name: values[name] for name in field_types(kind) if name in values}
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]  # pyright: ignore[reportArgumentType]
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"{source} lacks {', '.join(missing)}; it is incomplete{end}")
    try:
        return kind(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}{end}") from None


def check_format_version(version: Any, newest: int, source: object) -> None:
    """Raise ValueError when a folder was written by a newer version of the package than this one."""
    if type(version) is not int or not 1 <= version <= newest:
        raise ValueError(
            f"{source} has format_version {shown(version)}; this version reads up to {newest}: upgrade recurformer"
        )


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, values) of each line of a JSON lines file. A last line without an end is left out.

    NUL bytes at the start of a line are skipped: after a power cut some file systems leave them for unwritten data.

    Raises:
        ValueError: for a line that is no JSON; the message names file and line.
    """
    check_regular(path)
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(LARGEST)
            place = f"line {number} of {path}"
            if len(line) == LARGEST:
                raise ValueError(f"{place} has more than {LARGEST:,} bytes; the file is damaged, so remove the line")
            if not line.endswith(b"\n"):
                return
            line = line.lstrip(b"\0")
            if line == b"\n":
                continue
            try:
                yield place, parse(line.decode("utf-8"), ".json", place)
            except UnicodeDecodeError:
                raise ValueError(f"{place} is not UTF-8 text; the file is damaged, so remove the line") from None
