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
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from recurformer.files import appearing, remove_folder, remove_leftovers
from recurformer.reading import LARGEST_LIST, build, check_format_version, check_regular, read_table
from recurformer.settings import SHOWN, Natural, NonNegative, Settings, shown
from recurformer.store.weights import PARTS, check_dtype, open_parts, open_tensors, write_tensors

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer"  # its tensors: a file, or a folder of parts
NAME = re.compile(r"step-\d{8,}")
OLD_LEFTOVER = re.compile(r"\.tmp-(old-)?step-\d{8,}")  # of killed processes of earlier versions

RngState = dict[str, Tensor]
RNG_TENSORS = {  # of `RngState`, as safetensors names their types; there may be one more for each GPU
    "python": ((626,), "I64"),
    "python_gauss": ((), "float64"),
    "numpy": ((626,), "I64"),
    "numpy_gauss": ((), "float64"),
    "torch": ((5056,), "U8"),
}

Steps = Annotated[int, Field(ge=0, le=2**53)]


@dataclass
class TrainingState(Settings):
    """Where a run is. With the weights, the optimizer and the random states it is all that a run continues from.

    Every number that depends on time (learning rate, which evaluation is due, ...) is computed from `step`.
    """

    step: Steps = 0  # optimizer updates made
    position: Steps = 0  # windows consumed: the place in the data
    tokens: Steps = 0  # targets learned from, over all processes
    seconds: NonNegative = 0.0  # of training, without evaluation and saving
    evaluated: Annotated[int, Field(ge=-1, le=2**53)] = -1  # the step of the last evaluation
    validation_loss: float | None = None  # its loss, nats per token
    dataset: str = ""  # fingerprint of the training tokens


@dataclass(frozen=True)
class FileRecord(Settings):
    """Size and hash of one file of a checkpoint, as the manifest states them."""

    bytes: Natural
    sha256: str


@dataclass(frozen=True)
class Manifest(Settings):
    """The contents of a checkpoint's `manifest.json`."""

    step: Steps
    files: dict[str, FileRecord]
    validation_loss: float | None

    CHECKED_BY_ITSELF: ClassVar = ("files",)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest in a checkpoint's folder.

        Raises:
            NewerFormatError: when a newer version has written it.
            ValueError: when it is missing or damaged, or names files outside of the folder.
        """
        path = folder / MANIFEST
        values = read_table(path, LARGEST_LIST)
        try:
            check_format_version(values.get("format_version", FORMAT_VERSION), FORMAT_VERSION, path)
        except ValueError as error:
            raise NewerFormatError(str(error)) from None
        files = values.get("files")
        if not isinstance(files, dict):
            raise ValueError(f"{path} lists no files; it is damaged")
        for name in files:
            if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise ValueError(f"{path} names {shown(name)}, which is outside of its folder; it is damaged")
        records = {name: build(FileRecord, entry, path) for name, entry in files.items()}
        return build(cls, {**values, "files": records}, path)


class NewerFormatError(ValueError):
    """A checkpoint was written by a newer version. It is not damaged: nothing goes back to the one before it."""


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
        """Return (state, optimizer tensors, random states), on the CPU.

        Raises:
            ValueError: for a file whose contents make no sense, although its size and hash are right. It is named.
        """
        folder = self.path / "training"
        remedy = f"remove {self.path} to continue from the checkpoint before it"
        try:
            file = folder / "state.json"
            values = read_table(file)
            if missing := [f.name for f in dataclasses.fields(TrainingState) if f.name not in values]:
                raise ValueError(f"{file} lacks {', '.join(missing)}")
            state = build(TrainingState, values, file)
            if state.step != self.step:
                raise ValueError(f"{file} is of step {state.step}, its checkpoint of step {self.step}")
            optimizer = self._optimizer(folder)
            rng = open_tensors(folder / "rng.safetensors")
            for name, expected in RNG_TENSORS.items():
                if name not in rng or (rng[name].shape, rng[name].dtype) != expected:
                    raise ValueError(f"{folder / 'rng.safetensors'} has no usable random state {name!r}")
            return state, optimizer, {name: tensor.read() for name, tensor in rng.items()}
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error

    @staticmethod
    def _optimizer(folder: Path) -> dict[str, Tensor]:
        parts = folder / OPTIMIZER
        file = parts.with_suffix(".safetensors")
        found = open_parts(sorted(parts.glob(PARTS))) if parts.is_dir() else open_tensors(file)
        for name, tensor in found.items():
            check_dtype(name, tensor)
        return {name: tensor.read() for name, tensor in found.items()}


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
    """Return the checkpoint of a step, which another process has written or checked."""
    path = checkpoint_folder(folder, step)
    return Checkpoint(path, step, Manifest.read(path).validation_loss)


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[Path]]:
    """Return (complete checkpoints, damaged folders) of RUN/checkpoints, each by rising step.

    Sizes are checked, hashes are not. Folders whose names are not exactly those of checkpoints are passed over.

    Raises:
        ValueError: for a checkpoint that a newer version has written.
    """
    complete: list[Checkpoint] = []
    damaged: list[Path] = []
    for path in sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()):
        try:
            manifest = Manifest.read(path)
        except NewerFormatError:
            raise
        except ValueError:
            damaged.append(path)
            continue
        right_name = path.name == checkpoint_folder(folder, manifest.step).name
        if right_name and all(_has_size(path / name, record) for name, record in manifest.files.items()):
            complete.append(Checkpoint(path, manifest.step, manifest.validation_loss))
        else:
            damaged.append(path)
    return complete, damaged


def _has_size(path: Path, record: FileRecord) -> bool:
    try:
        return check_regular(path) == record.bytes
    except ValueError:
        return False


def newest_checkpoint(folder: Path, say: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """Return the newest checkpoint of RUN/checkpoints whose every byte is as written; None when there is none.

    Args:
        say: is told about each newer one that is damaged and passed over.

    Raises:
        ValueError: for a checkpoint that a newer version has written.
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
    """Return the one of the lowest validation loss (the newer of equals); None when none was evaluated."""
    measured = [(c.validation_loss, -c.step, c) for c in checkpoints if c.validation_loss is not None]
    return min(measured, key=lambda m: m[:2])[2] if measured else None


def resolve(path: str | Path, which: Literal["best", "newest"] = "best") -> Path:
    """Return the model folder that a path means: a model folder itself, that of a checkpoint, or one of a run's.

    Args:
        path: a model folder, RUN/checkpoints/step-..., or RUN.
        which: of a run, the checkpoint of the lowest validation loss (the newest if none was evaluated) or the newest.

    Raises:
        ValueError: when the path leads to no complete model.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        raise ValueError(f"{str(path)[:SHOWN]} is no folder; give a model's, a checkpoint's or a training run's folder")
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
    """Return whether every file of a checkpoint has the size and the hash that its manifest states."""
    try:
        files = Manifest.read(checkpoint.path).files
        return all(
            _has_size(checkpoint.path / name, record) and digest(checkpoint.path / name) == record.sha256
            for name, record in files.items()
        )
    except (OSError, ValueError):
        return False


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
