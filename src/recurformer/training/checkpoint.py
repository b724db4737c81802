"""Checkpoints that several processes write together, and the random states that a checkpoint holds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recurformer.files import appearing, unfinished
from recurformer.reading import brief
from recurformer.store.checkpoints import (
    OPTIMIZER,
    Checkpoint,
    RngState,
    TrainingState,
    checkpoint_folder,
    describe_checkpoint,
)
from recurformer.store.weights import write_parts

if TYPE_CHECKING:
    from recurformer.training.distributed import OneProcess


def write_shared_checkpoint(
    folder: Path,
    state: TrainingState,
    describe_model: Callable[[Path], None],
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    rng: RngState,
    processes: OneProcess,
) -> Checkpoint | None:
    """Write one checkpoint from several processes, each of which writes its own part of the tensors.

    Args:
        folder: RUN/checkpoints.
        describe_model: writes everything but the weights into the model's folder that it is given.
        weights, optimizer: DTensors, or whole tensors.

    Returns:
        The checkpoint in the first process, None in the others.

    Raises:
        OSError: in one process, when it cannot be written. The others raise EndedElsewhereError.
    """
    path = checkpoint_folder(folder, state.step)
    place = unfinished(path)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(appearing(path, replace=True))
            for name in ("model", f"training/{OPTIMIZER}"):
                (place / name).mkdir(parents=True)

        def finish() -> Checkpoint:
            describe_model(place / "model")
            loss = describe_checkpoint(place, state, rng)
            stack.close()
            return Checkpoint(path, state.step, loss)

        processes.together(begin, alone=True)
        processes.together(lambda: write_parts(weights, place / "model"))
        processes.together(lambda: write_parts(optimizer, place / "training" / OPTIMIZER))
        return processes.together(finish, alone=True)


# --- random states --------------------------------------------------------------------------------------------------


def read_rng() -> RngState:
    """Return the states of all generators that a step might draw from, as tensors: Python, NumPy, torch, GPUs."""
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
    """Set the states that `read_rng` returned, apart from those of GPUs that are not here.

    Raises:
        ValueError: for numbers that are no state of a generator.
    """
    try:
        _restore_rng(state)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(
            f"the random states of the checkpoint are damaged ({brief(error)}); remove it to continue from the "
            "checkpoint before it"
        ) from error


def _restore_rng(state: RngState) -> None:
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    *keys, place, has_gauss = state["numpy"].tolist()
    if not 0 <= place <= len(keys):  # NumPy itself would read beyond its memory
        raise ValueError(f"place {place} of {len(keys)}")
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, state["numpy_gauss"].item())
    )
    torch.set_rng_state(state["torch"])
    for n in range(torch.cuda.device_count()):
        if f"cuda:{n}" in state:
            torch.cuda.set_rng_state(state[f"cuda:{n}"], n)
