"""Options of a command from the fields of a settings class: name, type, default and help are written once, there."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import click

from recurformer.settings import choices_of, entry_type, field_types

S = TypeVar("S")


class SettingsCommand(click.Command):
    """A command that takes the fields of settings classes as options, beside the options of its own.

    The classes are imported when the command runs or shows its help: their modules import torch.

    Args:
        settings: the classes, each as "module:Class". A field of a later class whose name is taken is left out.
    """

    def __init__(self, *arguments: Any, settings: Sequence[str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.settings = settings

    @cached_property
    def made(self) -> list[click.Option]:
        """The options that are made of fields."""
        found: dict[str, click.Option] = {}
        for place in self.settings:
            module, name = place.split(":")
            for option in options_of(getattr(import_module(module), name)):
                found.setdefault(str(option.name), option)
        return list(found.values())

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        arguments = [parameter for parameter in own if isinstance(parameter, click.Argument)]
        return [*arguments, *self.made, *(parameter for parameter in own if parameter not in arguments)]


def options_of(section: type) -> list[click.Option]:
    """Return an option for every field of a settings class that asks for one (see `setting`)."""
    annotations = field_types(section)
    fields = (field for field in dataclasses.fields(section) if field.metadata.get("option") is not None)
    return [_option(field, annotations[field.name]) for field in fields]


def chosen(section: type[S], options: dict[str, Any], **more: Any) -> S:
    """Return the settings that the options of a command give. An option that was left out leaves the field's default.

    Raises:
        ValueError: naming the setting that the class refuses.
    """
    names = {field.name for field in dataclasses.fields(section)}  # pyright: ignore[reportArgumentType]
    given = {name: value for name, value in options.items() if name in names and value is not None}
    return section(**given, **more)


def _option(field: dataclasses.Field[Any], annotation: Any) -> click.Option:
    about, entry = field.metadata, entry_type(annotation)
    flag = f"--{field.name.replace('_', '-')}"
    kind = _plain(annotation if entry is None else entry)
    default = None if about["unset"] is not None or (about["repeated"] and not field.default) else field.default
    attributes: dict[str, Any] = {"help": about["doc"], "default": default}
    if about["unset"] is not None:
        attributes["help"] += f"  [default: {about['unset']}]"
    if kind is bool:
        return click.Option(
            [about["option"] or f"{flag}/--no-{field.name.replace('_', '-')}", field.name], **attributes
        )
    choices = [str(choice) for choice in choices_of(annotation if entry is None else entry) if choice is not None]
    metavar = about["metavar"] or "|".join(choices) or None
    if entry is not None and about["repeated"]:
        attributes |= {"multiple": True, "callback": lambda context, parameter, value: value or None}
        attributes["help"] = attributes["help"].replace(".", "; may be repeated.", 1)
    elif entry is not None:
        kind, metavar = CommaList(kind), f"{metavar or ('N' if kind is int else 'NAME')},..."
        if isinstance(default, tuple):
            attributes["default"] = ",".join(map(str, default))
    return click.Option([about["option"] or flag, field.name], type=kind, metavar=metavar, **attributes)


def _plain(annotation: Any) -> type:
    """Return the Python type below limits and alternatives; str for a choice of names."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation if annotation in (bool, int, float) else str


class CommaList(click.ParamType):
    """Entries of one type with commas between them."""

    name = "list"

    def __init__(self, entry: type) -> None:
        self.entry = entry

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        words = [word.strip() for word in value.split(",") if word.strip()]
        try:
            return tuple(self.entry(word) for word in words)
        except ValueError:
            numbers = "whole numbers" if self.entry is int else "numbers"
            self.fail(f"{value!r} is no list of {numbers}; write them as 64,128", param, ctx)
