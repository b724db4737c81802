"""Groups of commands: whole descriptions in `--help`, and commands that are imported when they are called or listed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class Group(click.Group):
    """A group whose help shows the whole first sentence of each command. Click would cut it at the end of the line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(1000)) for name, command in found.items() if command])


class LazyGroup(Group):
    """A group whose commands live in modules of their own, imported on first use.

    Args:
        homes: name of a command -> "module:function", in the order of the help.
    """

    def __init__(self, *arguments: Any, homes: Mapping[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.homes = homes

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.homes)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.homes:
            return None
        module, function = self.homes[cmd_name].split(":")
        return getattr(import_module(module), function)
