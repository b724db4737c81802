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
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from recurformer.files import sync_folder
from recurformer.store.checkpoints import (
    MANIFEST,
    OPTIMIZER,
    Checkpoint,
    RngState,
    TrainingState,
    best_checkpoint,
    digest,
    list_checkpoints,
)

if TYPE_CHECKING:
    from recurformer.training.distributed import World

FORMAT_VERSION = 1
TEMPORARY = ".tmp-"


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
        "files": {name: {"bytes": p.stat().st_size, "sha256": digest(p)} for name, p in files.items()},
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


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


# --- finding --------------------------------------------------------------------------------------------------------


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
