"""Checkpoints on disk, found, checked and read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file
from torch import Tensor

from recurformer.store.weights import read_parts

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer"  # its tensors: a file, or a folder of parts


RngState = dict[str, Tensor]


@dataclass
class TrainingState:
    """Where a run is. With the weights, the optimizer and the random states it is all that a run continues from.

    Every number that depends on time (learning rate, which evaluation is due, ...) is computed from `step`.
    """

    step: int = 0  # optimizer updates made
    position: int = 0  # windows consumed: the place in the data
    tokens: int = 0  # targets learned from, over all processes
    seconds: float = 0.0  # of training, without evaluation and saving
    evaluated: int = -1  # the step of the last evaluation
    validation_loss: float | None = None  # its loss, nats per token
    dataset: str = ""  # fingerprint of the training tokens


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path
    step: int
    validation_loss: float | None  # measured at this step; None when there was no evaluation

    @property
    def model(self) -> Path:
        """Its model folder."""
        return self.path / "model"

    def read(self) -> tuple[TrainingState, dict[str, Tensor], RngState]:
        """(state, optimizer tensors, random states), on the CPU."""
        folder = self.path / "training"
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state = TrainingState(**{f.name: values[f.name] for f in dataclasses.fields(TrainingState)})
        parts = folder / OPTIMIZER
        optimizer = read_parts(parts) if parts.is_dir() else load_file(parts.with_suffix(".safetensors"))
        return state, optimizer, load_file(folder / "rng.safetensors")


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, which another process has written or checked."""
    path = folder / f"step-{step:08d}"
    return Checkpoint(path, step, json.loads((path / MANIFEST).read_text(encoding="utf-8"))["validation_loss"])


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[Path]]:
    """(complete checkpoints, damaged folders) of RUN/checkpoints, each by rising step. Sizes are checked, no hashes."""
    complete: list[Checkpoint] = []
    damaged: list[Path] = []
    for path in sorted(folder.glob("step-*")):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                complete.append(Checkpoint(path, manifest["step"], manifest["validation_loss"]))
                continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        damaged.append(path)
    return complete, damaged


def newest_checkpoint(folder: Path, say: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The newest checkpoint of RUN/checkpoints whose every byte is as written; None when there is none.

    Args:
        say: told about each newer one that is damaged and passed over.
    """
    complete, damaged = list_checkpoints(folder)
    by_path = {c.path: c for c in complete}
    for path in sorted([*by_path, *damaged], reverse=True):
        checkpoint = by_path.get(path)
        if checkpoint is not None and intact(checkpoint):
            return checkpoint
        say(f"checkpoint {path} is truncated or damaged; going back to the one before it")
    return None


def best_checkpoint(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one of the lowest validation loss (the newer of equals); None when none was evaluated."""
    measured = [(c.validation_loss, -c.step, c) for c in checkpoints if c.validation_loss is not None]
    return min(measured, key=lambda m: m[:2])[2] if measured else None


def resolve(path: str | Path, which: Literal["best", "newest"] = "best") -> Path:
    """The model folder that a path means: a model folder itself, that of a checkpoint, or of one of a run's.

    Args:
        path: a model folder, RUN/checkpoints/step-..., or RUN.
        which: of a run, the checkpoint of the lowest validation loss (the newest if none was evaluated) or the newest.

    Raises:
        ValueError: when the path leads to no complete model.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; give a model's, a checkpoint's or a training run's folder")
    if (path / "checkpoints").is_dir():
        complete, damaged = list_checkpoints(path / "checkpoints")
        if not complete:
            found = f"only {len(damaged)} damaged checkpoint(s)" if damaged else "no checkpoint yet"
            raise ValueError(f"the run {path} has {found}; continue it with `recurformer train --resume --out {path}`")
        best = best_checkpoint(complete) if which == "best" else None
        return (best or complete[-1]).model
    if (path / MANIFEST).is_file() and (path / "model").is_dir():
        return path / "model"
    return path


def intact(checkpoint: Checkpoint) -> bool:
    manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    try:
        return all(digest(checkpoint.path / name) == entry["sha256"] for name, entry in manifest["files"].items())
    except OSError:
        return False


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
