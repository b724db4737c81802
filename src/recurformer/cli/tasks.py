"""`recurformer tasks`: state-tracking tasks, and which layers need recurrence."""

from __future__ import annotations

from typing import Any

import click

from recurformer.cli.common import device_option, run_experiment
from recurformer.cli.groups import Group


@click.group(cls=Group)
def tasks() -> None:
    """State-tracking tasks: train small models, score them at and beyond the training length."""


@tasks.command("list")
def tasks_list() -> None:
    """The tasks, their vocabularies and shortest lengths."""
    from rich.console import Console

    from recurformer.experiments.bench.common import show_table
    from recurformer.experiments.tasks import TASKS, make_task

    made = [(name if family.limits is None else f"{name}[:K]", make_task(name)) for name, family in TASKS.items()]
    cells = [[name, str(task.vocab_size), str(task.shortest), task.about] for name, task in made]
    notes = ["With K left out: as described here."]
    show_table(
        Console(width=max(100, Console().width)),
        "",
        ["task", "tokens", "shortest", "answer at each position"],
        cells,
        notes,
        left=1,
    )


def training_options(command):
    """What the verbs that train small models share."""
    for option in (
        click.option("--d-model", default=64, type=int, help="Width of every model."),
        click.option("--batch-size", default=64, type=int, help="Sequences of a training step."),
        click.option("--seed", "seeds", multiple=True, default=(0,), type=int, help="May be repeated: one run each."),
        click.option("--scan", default="auto", help="How recurrent layers are evaluated."),
        device_option,
        click.option("--out", type=click.Path(), metavar="DIR", help="Folder for the results and the picture."),
    ):
        command = option(command)
    return command


@tasks.command("run")
@click.argument("names", nargs=-1, required=True, metavar="TASK...")
@click.option("--layers", multiple=True, default=("recurrent", "first:1", "standard"), metavar="KIND",
              help="recurrent, standard or first:K; may be repeated.")  # fmt: skip
@click.option("--n-layers", multiple=True, default=(2,), type=int, help="Depth; may be repeated.")
@click.option("--n-heads", default=16, type=int, help="Heads of every model.")
@click.option("--position", default="alibi", help="alibi, rope or none.")
@click.option("--length", default=16, type=int, help="Positions of the training sequences.")
@click.option("--curriculum", multiple=True, type=int, metavar="N", help="Train at this shorter length first, until it "
              "is learned; may be repeated, rising.")  # fmt: skip
@click.option("--factor", "factors", multiple=True, default=(1, 2, 4, 8), type=int, help="Test at this multiple of it; "
              "may be repeated.")  # fmt: skip
@click.option("--steps", default=300, type=int, help="Training steps of each model.")
@click.option("--lr", default=3e-3, type=float, help="Peak learning rate.")
@click.option("--test-count", default=256, type=int, help="Sequences of each test.")
@click.option("--minutes", type=float, help="Train each model no longer than this.  [default: without limit]")
@training_options
def tasks_run(names: tuple[str, ...], device: str, out: str | None, **settings: Any) -> None:
    """Train models on TASKs (see `recurformer tasks list`) and score them at the training length and beyond.

    Models of one depth have the same parameters. Every sequence is new; accuracy counts the second half of the
    positions.
    """
    from recurformer.experiments.tasks import sweep
    from recurformer.generation.text import pick_device

    chosen = sweep.TaskSettings(tasks=names, device=str(pick_device(device)), **settings)
    run_experiment("tasks", sweep.run_tasks, sweep.show_tasks, sweep.draw_tasks, chosen, out)


@tasks.command("hybrids")
@click.argument("on", default="text", metavar="[text|TASK]")
@click.option("--n-layers", default=4, type=int, help="Layers of every model.")
@click.option("--n-heads", default=8, type=int, help="Heads of every model.")
@click.option("--length", default=64, type=int, help="Positions of the training sequences.")
@click.option("--steps", default=200, type=int, help="Training steps of each model.")
@click.option("--lr", default=4e-3, type=float, help="Peak learning rate.")
@click.option("--placement", "only", multiple=True, metavar="LETTERS", help="R recurrent and S standard, first to "
              "last; may be repeated.  [default: all of interest]")  # fmt: skip
@training_options
def tasks_hybrids(on: str, device: str, out: str | None, **settings: Any) -> None:
    """Which layers need recurrence: none, each single one, the first or last few, every other one, all.

    On the text inside the package, or on a task. The Transformer is also trained for twice and four times the steps, to
    compare at equal cost.
    """
    from recurformer.experiments.tasks import hybrids
    from recurformer.generation.text import pick_device

    chosen = hybrids.HybridSettings(on=on, device=str(pick_device(device)), **settings)
    run_experiment("hybrids", hybrids.run_hybrids, hybrids.show_hybrids, hybrids.draw_hybrids, chosen, out)
