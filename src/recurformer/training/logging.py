"""Records of a run: `metrics.jsonl` always, TensorBoard and W&B on request, and a progress line on a terminal."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recurformer.files import replacing
from recurformer.store.checkpoints import TrainingState
from recurformer.store.runs import METRICS, read_metrics
from recurformer.training.config import TrainConfig
from recurformer.version import __version__

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def import_logger(name: str) -> ModuleType:
    """Import the module of an optional logger and return it.

    Raises:
        ValueError: when it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise ValueError(
            f"log.loggers names {name!r}, which cannot be imported ({error}); "
            "pip install 'recurformer[loggers]' or leave it out"
        ) from None


class Metrics:
    """The records of a run: one JSON object a line, each written to disk at once.

    Every record has `event` and `step` (updates made so far). Events: "start" and "resume" (device, versions),
    "train" (loss, lr, grad_norm, tokens, tokens_per_second, seconds), "evaluation" (validation_loss, bits_per_byte,
    tokens, seconds), "sample" (prompt, text).

    Args:
        out: the run's folder.
        resumed: the state that the run continues from; None for a new run. Records of later steps are removed first,
            in TensorBoard, too: the run makes those steps again.
    """

    def __init__(self, out: Path, config: TrainConfig, resumed: TrainingState | None) -> None:
        self.path = out / METRICS
        _drop_records_after(self.path, resumed)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if "tensorboard" in config.log.loggers:
            writer = import_logger("tensorboard").SummaryWriter
            self._tensorboard = writer(str(out / "tensorboard"), purge_step=resumed.step + 1 if resumed else 0)
        if "wandb" in config.log.loggers:
            self._wandb = import_logger("wandb").init(
                project=config.log.wandb_project,
                name=out.resolve().name,
                id=_wandb_id(out / "wandb-id"),
                resume="allow",
                dir=str(out),
                config=config.to_dict(),
            )

    def write(self, event: str, step: int, **values: Any) -> None:
        """Record one event, on every logger."""
        # JSON has no NaN. A number that is unknown, as bits per byte of raw shards, becomes null.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
            if event == "sample":
                self._tensorboard.add_text("sample", values["text"], step)
        if self._wandb is not None and numbers:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Flush and close every logger."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoMetrics:
    """Records of a process that writes none: one process of a run writes for all."""

    def write(self, event: str, step: int, **values: Any) -> None:
        """Write nothing."""


def _drop_records_after(path: Path, resumed: TrainingState | None) -> None:
    """Remove the records of later steps. An evaluation at the resumed step itself may be later than its checkpoint."""
    if not path.is_file():
        return
    kept: list[dict[str, Any]] = []
    if resumed is not None:
        known = {"evaluation": resumed.evaluated, "sample": resumed.evaluated}
        kept = [r for r in read_metrics(path.parent) if r["step"] <= known.get(r["event"], resumed.step)]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _wandb_id(path: Path) -> str:
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(uuid.uuid4().hex)
    return path.read_text()


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return what a run runs on: device, threads, cores and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"recurformer": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


class _Stderr:
    """The present stderr, or nothing where it is closed. A run outlives its terminal and the reader of its output."""

    def __init__(self) -> None:
        self._file = sys.stderr  # kept: a progress bar replaces sys.stderr by a proxy that writes here
        self.encoding = getattr(self._file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            if self._file is not None:
                self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if self._file is not None:
                self._file.flush()

    def isatty(self) -> bool:
        try:
            return self._file is not None and self._file.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        return self._file.fileno()


class Screen:
    """Progress on stderr: a progress line on a terminal, one line a record elsewhere.

    Args:
        steps: steps of the run.
        step: steps made so far.
        quiet: show nothing.
    """

    def __init__(self, steps: int, step: int, quiet: bool) -> None:
        self.console = Console(file=cast(TextIO, _Stderr()), quiet=quiet, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
            disable=not self._live,
        )
        self._task = self._progress.add_task("training", total=steps, completed=step, loss="-", speed="-")
        self._steps = steps

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, message: str) -> None:
        """Print a line of text, above the progress line."""
        self.console.print(message, markup=False)

    def advance(self, step: int) -> None:
        """Show that a step is made."""
        self._progress.update(self._task, completed=step)

    def train(self, step: int, loss: float, speed: float, left: float) -> None:
        """Show the numbers of a training record; `left` is in seconds."""
        self._progress.update(self._task, loss=f"{loss:.4f}", speed=f"{speed:,.0f}")
        if not self._live:
            minutes, seconds = divmod(round(left), 60)
            self.say(f"step {step}/{self._steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  {minutes}:{seconds:02d} left")


def say_on_stderr(message: str) -> None:
    """Print a message before there is a screen."""
    print(message, file=cast(TextIO, _Stderr()), flush=True)
