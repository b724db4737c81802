"""Options, progress and output that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def device_option(command):
    """--device, as every verb that runs a model has it."""
    return click.option("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1, ...")(
        command
    )


def make_folder(out: str | None) -> None:
    """A name that can't be a folder fails before the work, not after it."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)


def with_progress(work: Any) -> Any:
    """What `work` returns, called with a function that shows (what, done, total) as a bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("start", total=None)
        return work(lambda what, done, total: bar.update(task, description=what, completed=done, total=total))


def run_experiment(name: str, measure: Any, show: Any, draw: Any, settings: Any, out: str | None) -> None:
    """Measure, print the table on 100 columns or more, and write NAME.json and NAME.png into a folder."""
    from rich.console import Console

    from recurformer.experiments.bench import common

    make_folder(out)
    results = with_progress(lambda report: measure(settings, report))
    show(results, Console(width=max(100, Console().width)))
    if out is not None:
        print("\n".join(map(str, common.write(out, name, results, draw(results)))))


def names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """A list of names with commas between."""
    return tuple(name.strip() for name in value.split(",") if name.strip())


def sizes(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """A list of whole numbers with commas between."""
    try:
        return tuple(int(number) for number in names(context, parameter, value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers; write them as 64,128") from None
