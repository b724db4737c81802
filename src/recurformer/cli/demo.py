"""`recurformer demo`: three small models, trained and compared."""

from __future__ import annotations

from pathlib import Path

import click

from recurformer.cli.common import command_line


@click.command()
@click.option(
    "--out", default="demo", type=click.Path(path_type=Path), metavar="DIR", help="Folder for data, runs and report."
)
@click.option("--steps", type=click.IntRange(min=1), default=240, help="Optimizer steps of each model.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Training setting of all models; may be repeated."
)
def demo(out: Path, steps: int, settings: tuple[str, ...]) -> None:
    """Train, compare and sample three small models.

    Runs that are finished in DIR are kept, and an interrupted one continues.
    """
    from recurformer.experiments.demo import run_demo
    from recurformer.training import TrainingError

    try:
        run_demo(out, steps, settings, command_line())
    except TrainingError as error:
        raise click.ClickException(str(error)) from error
