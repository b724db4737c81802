"""A training configuration from a TOML, YAML or JSON file and from `--set a.b=c`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurformer.reading import DEEPEST, parse, read_table
from recurformer.settings import check, field_types, shown
from recurformer.training.config import TrainConfig


def read_train_config(
    file: str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    init_from: str | None = None,
    data_may_be_missing: bool = False,
) -> TrainConfig:
    """Read a configuration file and apply `--set`-style changes to it.

    Args:
        file: .toml, .yaml, .yml or .json; None: the defaults.
        settings: "a.b=value" each. The value is read as TOML ("1e-3", "true", "[1, 2]", a quoted string). It is taken
            as text where it is no TOML, and where the setting accepts the text and not the TOML value.
        init_from: the setting of that name, taken as it is.
        data_may_be_missing: take a preset's or the default vocabulary where neither settings nor data give one.

    Raises:
        ValueError: for a file that cannot be read, a setting without "=", an unknown name or a bad value.
    """
    values = {} if file is None else read_file(Path(file))
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {shown(text)} has no '='; write it as section.name=value")
        *sections, name = key.strip().split(".")
        if init_from is not None and (sections, name) == ([], "init_from"):
            raise ValueError(f"--init-from {init_from!r} and --set {text!r} name two folders; drop one of them")
        if len(sections) > DEEPEST:
            raise ValueError(f"--set {shown(text)}: there is no setting of {len(sections)} sections")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {shown(text)}: {section!r} is a single value, not a section")
        node[name] = _value(value, _annotation(sections, name))
    if init_from is not None:
        values["init_from"] = init_from
    return TrainConfig.from_dict(values, data_may_be_missing)


def read_file(file: Path) -> dict[str, Any]:
    """Return the nested dictionaries of a TOML, YAML or JSON file.

    Raises:
        ValueError: for a missing file, another suffix, bad syntax or a file that is no table of settings.
    """
    if not file.is_file():
        raise ValueError(f"configuration {str(file)!r}: there is no such file")
    return read_table(file)


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
        value = parse(f"value = {text}", ".toml", "--set")["value"]
    except ValueError:
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
