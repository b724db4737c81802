"""Checkpoints on disk: written whole or not at all, checked before use, the last ones and the best one kept.

    RUN/checkpoints/step-00001000/
        model/       what `recurformer.save` writes; `recurformer.load` reads it
        training/    optimizer.safetensors, rng.safetensors, state.json: plain tensors and numbers, no pickle
                     (under FSDP model/ and training/optimizer/ hold a file of each process, with its part)
        manifest.json    step, validation loss, and the size and SHA-256 of every other file

A checkpoint is complete when its folder has its final name and every file the size its manifest says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurformer.config import ModelConfig
from recurformer.folders import load_config, read_parts, sync_folder

if TYPE_CHECKING:
    from recurformer.training.distributed import World

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
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


# --- writing --------------------------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    state: TrainingState,
    save_model: Callable[[Path], None],
    optimizer: dict[str, Tensor],
    rng: RngState,
) -> Checkpoint:
    """Write one checkpoint into `folder` (RUN/checkpoints), under a temporary name until all of it is on disk.

    Args:
        save_model: writes the model into the folder it is given.

    Raises:
        OSError: when it cannot be written (a full disk); nothing is left behind then.
    """
    temporary = begin_checkpoint(folder, state.step)
    try:
        save_model(temporary / "model")
        _save_tensors(optimizer, temporary / "training" / f"{OPTIMIZER}.safetensors")
        return finish_checkpoint(temporary, state, rng)
    except BaseException:
        drop_checkpoint(folder, state.step)
        raise


def write_shared_checkpoint(
    folder: Path,
    state: TrainingState,
    describe_model: Callable[[Path], None],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    rng: RngState,
    world: World,
) -> Checkpoint | None:
    """The same by several processes, each of which writes its own part of the tensors; None but in the first.

    Args:
        describe_model: writes everything but the weights into the model's folder that it is given.
        weights, optimizer: as DTensors, or whole.

    Raises:
        OSError: in one process, when it cannot be written; the others raise EndedElsewhereError.
    """
    temporary = _temporary(folder, state.step)

    def begin() -> None:
        begin_checkpoint(folder, state.step)
        for name in ("model", f"training/{OPTIMIZER}"):
            (temporary / name).mkdir()

    def finish() -> Checkpoint:
        describe_model(temporary / "model")
        return finish_checkpoint(temporary, state, rng)

    try:
        world.together(begin, alone=True)
        world.together(lambda: save_parts(weights, temporary / "model"))
        world.together(lambda: save_parts(optimizer, temporary / "training" / OPTIMIZER))
        return world.together(finish, alone=True)
    except BaseException:
        if world.rank == 0:
            drop_checkpoint(folder, state.step)
        raise


def _temporary(folder: Path, step: int) -> Path:
    return folder / f"{TEMPORARY}step-{step:08d}"


def begin_checkpoint(folder: Path, step: int) -> Path:
    """A folder under a temporary name, for `finish_checkpoint` or `drop_checkpoint`."""
    temporary = _temporary(folder, step)
    _remove(temporary)
    (temporary / "training").mkdir(parents=True)
    return temporary


def drop_checkpoint(folder: Path, step: int) -> None:
    """Leave nothing of what was begun."""
    _remove(_temporary(folder, step))


def finish_checkpoint(temporary: Path, state: TrainingState, rng: RngState) -> Checkpoint:
    """Give a folder that holds model and optimizer the rest, and, once all of it is on disk, its name."""
    folder, final = temporary.parent, temporary.with_name(temporary.name.removeprefix(TEMPORARY))
    training = temporary / "training"
    _save_tensors(rng, training / "rng.safetensors")
    _write_json(training / "state.json", dataclasses.asdict(state))
    loss = state.validation_loss if state.evaluated == state.step else None
    loss = None if loss is None or not math.isfinite(loss) else loss
    files = {p.relative_to(temporary).as_posix(): p for p in sorted(temporary.rglob("*")) if p.is_file()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "validation_loss": loss,
        "files": {name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for name, p in files.items()},
    }
    _write_json(temporary / MANIFEST, manifest)
    for path in temporary.rglob("*"):
        _sync(path)
    _sync(temporary)
    if final.exists():  # a damaged one of the same step
        _remove(final)
    os.rename(temporary, final)
    sync_folder(folder)
    return Checkpoint(final, state.step, loss)


def remove_outdated(folder: Path, keep_last: int, keep: Iterable[Path] = ()) -> None:
    """Delete all checkpoints but the newest `keep_last` complete ones, the best one and those in `keep`; and what
    writers that were killed left behind. Damaged folders older than the newest complete checkpoint go too."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        _remove(leftover)
    complete, damaged = list_checkpoints(folder)
    if not complete:
        return
    kept = {c.path for c in complete[-keep_last:]} | set(keep)
    if (best := best_checkpoint(complete)) is not None:
        kept.add(best.path)
    for checkpoint in complete:
        if checkpoint.path not in kept:
            _remove(checkpoint.path)
    for path in damaged:
        if path.name < complete[-1].path.name:
            _remove(path)


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill in between never leaves a part of it under a checkpoint's name."""
    if not folder.exists():
        return
    if not folder.name.startswith(TEMPORARY):
        hidden = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        folder = hidden
    shutil.rmtree(folder)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def save_parts(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, each process its own part, into one safetensors file a process, whose header says which part.

    The folder exists: what fails in one process before they write together would leave the others waiting.
    """
    from torch.distributed import checkpoint

    try:
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except checkpoint.CheckpointException as error:  # no subclass of Exception; every process gets it
        reasons = [f"process {rank}: {reason}" for rank, (reason, _) in error.failures.items()]
        raise OSError("; ".join(reasons)) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def checkpoint_at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, which another process has written or checked."""
    path = folder / f"step-{step:08d}"
    return Checkpoint(path, step, json.loads((path / MANIFEST).read_text(encoding="utf-8"))["validation_loss"])


# --- finding --------------------------------------------------------------------------------------------------------


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
        if checkpoint is not None and _intact(checkpoint):
            return checkpoint
        say(f"checkpoint {path} is truncated or damaged; going back to the one before it")
    return None


def best_checkpoint(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one of the lowest validation loss (the newer of equals); None when none was evaluated."""
    measured = [(c.validation_loss, -c.step, c) for c in checkpoints if c.validation_loss is not None]
    return min(measured, key=lambda m: m[:2])[2] if measured else None


def resolve_model_folder(path: str | Path, which: Literal["best", "newest"] = "best") -> Path:
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


def read_model_config(path: str | Path) -> ModelConfig:
    """The ModelConfig that a path means, by the rules of `resolve_model_folder`."""
    return load_config(resolve_model_folder(path))


def _intact(checkpoint: Checkpoint) -> bool:
    manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    try:
        return all(_digest(checkpoint.path / name) == entry["sha256"] for name, entry in manifest["files"].items())
    except OSError:
        return False


# --- random states --------------------------------------------------------------------------------------------------


def read_rng() -> RngState:
    """The states of every generator a step might draw from (Python, NumPy, torch on CPU and GPUs), as tensors."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (other people's code draws from it)
    _, keys, place, has_gauss, cached = numpy_state
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state |= {f"cuda:{n}": cuda for n, cuda in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng(state: RngState) -> None:
    """The inverse of `read_rng`. GPUs that are not here are passed over."""
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    *keys, place, has_gauss = state["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, state["numpy_gauss"].item())
    )
    torch.set_rng_state(state["torch"])
    for n in range(torch.cuda.device_count()):
        if f"cuda:{n}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{n}"], n)
