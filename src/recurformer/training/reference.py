"""The reference of all settings, made from their declarations: `recurformer train --help`, docs/configuration.md."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from recurformer.config import PRESETS, ModelConfig
from recurformer.settings import field_types
from recurformer.training.config import TrainConfig


@dataclass(frozen=True)
class Entry:
    """One setting, as the documentation shows it."""

    name: str
    default: str
    doc: str


def reference(section: type = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str, list[Entry]]]:
    """Yield (section name, its sentence, its settings), the top level first."""
    entries: list[Entry] = []
    below: list[tuple[str, str, list[Entry]]] = []
    if section is ModelConfig:
        entries.append(
            Entry("model.preset", "none", f"Named shape, which the other settings change: {', '.join(PRESETS)}.")
        )
    for field in dataclasses.fields(section):
        annotation = field_types(section)[field.name]
        if dataclasses.is_dataclass(annotation):
            below += reference(annotation, f"{prefix}{field.name}.")  # pyright: ignore[reportArgumentType]
            continue
        default = "that of the data" if (prefix, field.name) == ("model.", "vocab_size") else _show(field.default)
        entries.append(Entry(prefix + field.name, default, field.metadata["doc"]))
    summary = "" if section is TrainConfig else " ".join((section.__doc__ or "").split("\n\n")[0].split())
    yield prefix.rstrip("."), summary, entries
    yield from below


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def markdown() -> str:
    """Return the text of `docs/configuration.md`."""
    lines = [
        "# Configuration of a training run",
        "",
        "<!-- Written by recurformer.training.reference.markdown(); a test compares. -->",
        "",
        "Settings come from a TOML, YAML or JSON file (`recurformer train --config FILE`) and from `--set",
        "NAME=VALUE`, which overrides the file. Sections are tables: `optimizer.lr` is `lr` under `[optimizer]`.",
        "`none` means no value. An unknown name is an error. So is a value of the wrong type or outside its limits.",
        "A value of `--set` is read as TOML. It is taken as text where the setting wants text: a folder may be called",
        "`2024` or `true`.",
    ]
    for name, summary, entries in reference():
        lines += ["", f"## `[{name}]`" if name else "## Top level", ""]
        lines += [summary, ""] if summary else []
        lines += ["| setting | default | meaning |", "|---|---|---|"]
        lines += [f"| `{e.name}` | `{e.default}` | {e.doc} |" for e in entries]
    return "\n".join(line.rstrip() for line in lines) + "\n"
