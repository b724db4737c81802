"""Options, progress and output that several verbs share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from recurformer.experiments.bench.common import Progress

QUIET_SECONDS = 10.0  # before the first line of progress and between two of them, where stderr is no terminal


def command_line() -> list[str]:
    """Return the words of the command that this process runs."""
    return ["recurformer", *sys.argv[1:]]


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --device, as every verb that runs a model has it."""
    words = "Device: auto (the GPU if there is one), cpu, cuda, cuda:1, ..."
    return click.option("--device", default="auto", help=words)(command)


def out_option(files: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds --out, the folder of an experiment's files."""
    return click.option("--out", type=click.Path(), metavar="DIR", help=f"Folder for {files}.")


def torch_device(name: str) -> str:
    """Return the device that a name of --device stands for, as torch writes it.

    Raises:
        ValueError: for a name of no device, or of one that is not here.
    """
    from recurformer.text import pick_device

    return str(pick_device(name))


def with_progress(work: Callable[[Progress], Any]) -> Any:
    """Call `work` with a function that shows progress on stderr, and return its result.

    A terminal gets a bar. Elsewhere a line names the present work every `QUIET_SECONDS`, where it has changed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        lines = ProgressLines()
        try:
            return work(lines.show)
        finally:
            lines.end()
    text = TextColumn("{task.description}", markup=False)  # a task's name may hold brackets
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("start", total=None)
        return work(lambda what, done, total: bar.update(task, description=what, completed=done, total=total))


class ProgressLines:
    """Lines of progress for a log. A thread prints them, because one piece of work may take minutes."""

    def __init__(self) -> None:
        self.now, self.printed = "", ""
        self.ended = threading.Event()
        threading.Thread(target=self._print, daemon=True).start()

    def show(self, what: str, done: int, total: int) -> None:
        """Note the present work, units done and units in all."""
        self.now = f"{what} ({done} of {total} done)"

    def end(self) -> None:
        """Print no more."""
        self.ended.set()

    def _print(self) -> None:
        while not self.ended.wait(QUIET_SECONDS):
            if self.now != self.printed:
                self.printed = self.now
                click.echo(self.printed, err=True)


def run_experiment(
    name: str,
    measure: Callable[[Any, Progress], dict[str, Any]],
    show: Callable[[dict[str, Any], Any], None],
    draw: Callable[[dict[str, Any]], bytes],
    settings: Any,
    out: str | None,
) -> None:
    """Measure, print the table on 100 columns or more, and write NAME.json and NAME.png into a folder.

    Args:
        name: of the files.
        measure: makes the results of the settings.
        show, draw: print the results, and make a PNG of them.
        out: the folder. It is made before the work: a name that cannot be a folder fails early. None: no files.
    """
    from rich.console import Console

    from recurformer.experiments.bench import common

    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    results = with_progress(lambda progress: measure(settings, progress))
    show(results, Console(width=max(100, Console().width)))
    if out is not None:
        print("\n".join(map(str, common.write(out, name, results, draw(results)))))
