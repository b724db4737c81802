"""Checkpoints on disk: written whole or not at all, checked before use, the last ones and the best one kept.

    RUN/checkpoints/step-00001000/
        model/       what `recurformer.save` writes; `recurformer.load` reads it
        training/    optimizer.safetensors, rng.safetensors, state.json: plain tensors and numbers, no pickle
                     (under FSDP model/ and training/optimizer/ hold a file of each process, with its part)
        manifest.json    step, validation loss, and the size and SHA-256 of every other file

A checkpoint is complete when its folder has its final name and every file has the size that the manifest states.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from recurformer.files import appearing, remove_folder, remove_leftovers
from recurformer.store.weights import read_parts, write_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer"  # its tensors: a file, or a folder of parts
NAME = re.compile(r"step-\d{8,}")
OLD_LEFTOVER = re.compile(r"\.tmp-(old-)?step-\d{8,}")  # of killed processes of earlier versions

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


# --- writing --------------------------------------------------------------------------------------------------------


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint in `folder` (RUN/checkpoints)."""
    return folder / f"step-{step:08d}"


def write_checkpoint(
    folder: Path,
    state: TrainingState,
    save_model: Callable[[Path], None],
    optimizer: dict[str, Tensor],
    rng: RngState,
) -> Checkpoint:
    """Write one checkpoint into `folder` (RUN/checkpoints). It has its name when all of it is on disk, not before.

    Args:
        save_model: writes the model into the folder that it is given.

    Raises:
        OSError: when it cannot be written (a full disk). Nothing is left behind then.
    """
    path = checkpoint_folder(folder, state.step)
    with appearing(path, replace=True) as unfinished:  # a damaged one of the same step may be there
        (unfinished / "training").mkdir()
        save_model(unfinished / "model")
        write_tensors(optimizer, unfinished / "training" / f"{OPTIMIZER}.safetensors")
        loss = describe_checkpoint(unfinished, state, rng)
    return Checkpoint(path, state.step, loss)


def describe_checkpoint(unfinished: Path, state: TrainingState, rng: RngState) -> float | None:
    """Add random states, state and manifest to a folder that holds model and optimizer.

    Returns:
        The validation loss that the manifest records; None when this step was not evaluated.
    """
    training = unfinished / "training"
    write_tensors(rng, training / "rng.safetensors")
    _write_json(training / "state.json", dataclasses.asdict(state))
    loss = state.validation_loss if state.evaluated == state.step else None
    loss = None if loss is None or not math.isfinite(loss) else loss
    files = {p.relative_to(unfinished).as_posix(): p for p in sorted(unfinished.rglob("*")) if p.is_file()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "validation_loss": loss,
        "files": {name: {"bytes": p.stat().st_size, "sha256": digest(p)} for name, p in files.items()},
    }
    _write_json(unfinished / MANIFEST, manifest)
    return loss


def remove_outdated(folder: Path, keep_last: int, keep: Iterable[Path] = ()) -> None:
    """Delete all checkpoints but the newest `keep_last` complete ones, the best one and those in `keep`.

    Damaged checkpoints older than the newest complete one go too, and what killed writers left behind. Only folders
    that have exactly a checkpoint's name are deleted. Copies under other names stay, and so do links.
    """
    remove_leftovers(folder)
    for leftover in folder.glob(".tmp-*"):
        if OLD_LEFTOVER.fullmatch(leftover.name) and not leftover.is_symlink():
            shutil.rmtree(leftover)
    complete, damaged = list_checkpoints(folder)
    if not complete:
        return
    kept = {c.path for c in complete[-keep_last:]} | set(keep)
    if (best := best_checkpoint(complete)) is not None:
        kept.add(best.path)
    outdated = [c.path for c in complete if c.path not in kept]
    outdated += [path for path in damaged if path.name < complete[-1].path.name]
    for path in outdated:
        if not path.is_symlink():
            remove_folder(path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


# --- finding and checking -------------------------------------------------------------------------------------------


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, which another process has written or checked."""
    path = checkpoint_folder(folder, step)
    return Checkpoint(path, step, json.loads((path / MANIFEST).read_text(encoding="utf-8"))["validation_loss"])


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[Path]]:
    """(complete checkpoints, damaged folders) of RUN/checkpoints, each by rising step. Sizes are checked, no hashes."""
    complete: list[Checkpoint] = []
    damaged: list[Path] = []
    for path in sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()):
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
