"""`recurformer tasks`: state-tracking tasks, and the layers that need recurrence."""

from __future__ import annotations

from typing import Any

import click

from recurformer.cli.common import device_option, out_option, run_experiment, torch_device
from recurformer.cli.groups import Group
from recurformer.cli.options import SettingsCommand, chosen

TASKS = "recurformer.experiments.tasks"


@click.group(cls=Group)
def tasks() -> None:
    """Train small models on state-tracking tasks and score them beyond the training length."""


@tasks.command("list")
def tasks_list() -> None:
    """List the tasks with their vocabularies and shortest lengths."""
    from rich.console import Console

    from recurformer.experiments.bench.common import show_table
    from recurformer.experiments.tasks import TASKS, make_task

    made = [(name if family.limits is None else f"{name}[:K]", make_task(name)) for name, family in TASKS.items()]
    cells = [[name, str(task.vocab_size), str(task.shortest), task.about] for name, task in made]
    headings = ["task", "tokens", "shortest", "answer at each position"]
    notes = ["K is the difficulty. The row describes the task without it."]
    show_table(Console(width=max(100, Console().width)), "", headings, cells, notes, left=1)


@tasks.command("run", cls=SettingsCommand, settings=[f"{TASKS}.sweep:TaskSettings"])
@click.argument("names", nargs=-1, required=True, metavar="TASK...")
@device_option
@out_option("tasks.json and tasks.png")
def tasks_run(names: tuple[str, ...], device: str, out: str | None, **options: Any) -> None:
    """Train models on TASKs and score them at the training length and beyond.

    `recurformer tasks list` shows the tasks. Models of one depth have the same parameters. Every sequence is new;
    accuracy counts the second half of the positions.
    """
    from recurformer.experiments.tasks import sweep

    settings = chosen(sweep.TaskSettings, options, tasks=names, device=torch_device(device))
    run_experiment("tasks", sweep.run_tasks, sweep.show_tasks, sweep.draw_tasks, settings, out)


@tasks.command("hybrids", cls=SettingsCommand, settings=[f"{TASKS}.hybrids:HybridSettings"])
@click.argument("on", default="text", metavar="[text|TASK]")
@device_option
@out_option("hybrids.json and hybrids.png")
def tasks_hybrids(on: str, device: str, out: str | None, **options: Any) -> None:
    """Compare placements of recurrent layers: none, a single one, the first or last few, every other one, all.

    The models train on the text inside the package, or on a task. The Transformer also trains for two and four times
    the steps, to compare at equal cost.
    """
    from recurformer.experiments.tasks import hybrids

    settings = chosen(hybrids.HybridSettings, options, on=on, device=torch_device(device))
    run_experiment("hybrids", hybrids.run_hybrids, hybrids.show_hybrids, hybrids.draw_hybrids, settings, out)
