"""A training configuration from a TOML, YAML or JSON file and from `--set a.b=c`."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recurformer.settings import check, field_types, shown
from recurformer.training.config import TrainConfig

MAX_FILE_BYTES = 2**20


def read_train_config(
    file: str | Path | None = None, settings: Sequence[str] = (), *, init_from: str | None = None
) -> TrainConfig:
    """Read a configuration file and apply `--set`-style changes to it.

    Args:
        file: .toml, .yaml, .yml or .json; None: the defaults.
        settings: "a.b=value" each. The value is read as TOML ("1e-3", "true", "[1, 2]", a quoted string). It is taken
            as text where it is no TOML, and where the setting accepts the text and not the TOML value.
        init_from: the setting of that name, taken as it is.

    Raises:
        ValueError: for an unreadable file, a setting without "=", an unknown name or a bad value.
    """
    values = {} if file is None else read_file(Path(file))
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {shown(text)} has no '='; write it as section.name=value")
        *sections, name = key.strip().split(".")
        if init_from is not None and (sections, name) == ([], "init_from"):
            raise ValueError(f"--init-from {init_from!r} and --set {text!r} name two folders; drop one of them")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {shown(text)}: {section!r} is a single value, not a section")
        node[name] = _value(value, _annotation(sections, name))
    if init_from is not None:
        values["init_from"] = init_from
    return TrainConfig.from_dict(values)


def read_file(file: Path) -> dict[str, Any]:
    """Return the nested dictionaries of a TOML, YAML or JSON file.

    Raises:
        ValueError: for another suffix, text that does not parse or a file that is no table of settings.
    """
    readers = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}
    if file.suffix not in readers:
        raise ValueError(f"configuration {str(file)!r}: the name must end in {', '.join(readers)}")
    if not file.is_file():
        raise ValueError(f"configuration {str(file)!r}: there is no such file")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"configuration {str(file)!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        values = readers[file.suffix](file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"configuration {str(file)!r} cannot be read: {error}") from None
    except RecursionError:
        raise ValueError(f"configuration {str(file)!r} is nested too deeply; settings have one section") from None
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"configuration {str(file)!r} holds a {type(values).__name__}, not a table of settings")
    return values


class _YamlLoader(yaml.SafeLoader):
    """YAML with numbers as in version 1.2, and without aliases.

    PyYAML follows version 1.1, which takes 1e-3 for text. Aliases of aliases make a small file endless.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"{self.peek_event().start_mark}: aliases (*name) are not read; write the value again")
        return super().compose_node(parent, index)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_YamlLoader)


def _annotation(sections: Sequence[str], name: str) -> Any:
    """Return the annotation of a setting; None for a section, and for a name that is no setting."""
    found: Any = TrainConfig
    for part in (*sections, name):
        found = field_types(found).get(part) if dataclasses.is_dataclass(found) else None
    return None if dataclasses.is_dataclass(found) else found


def _value(text: str, annotation: Any) -> Any:
    """Return the TOML value of a text, or the text itself: a folder may be called 2024, true or 1e5."""
    text = text.strip()
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    if annotation is not None and not _accepts(annotation, value) and _accepts(annotation, text):
        return text
    return value


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        check("", value, annotation)
    except ValueError:
        return False
    return True
