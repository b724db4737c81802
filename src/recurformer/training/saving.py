"""A run's checkpoints as the loop writes them, alone or together with other processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import recurformer
from recurformer.model import LanguageModel
from recurformer.store.checkpoints import Checkpoint, TrainingState, checkpoint_at, write_checkpoint
from recurformer.store.folders import plain_state_dict, save_description
from recurformer.training.checkpoint import read_rng, write_shared_checkpoint
from recurformer.training.distributed import OneProcess
from recurformer.training.optimizer import optimizer_tensors
from recurformer.training.run import TrainingError

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer


def save(
    folder: Path,
    state: TrainingState,
    model: LanguageModel,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer | None,
    previous: Checkpoint | None,
    processes: OneProcess,
) -> Checkpoint:
    """Write a checkpoint into RUN/checkpoints and return it.

    The random states are those of the first process. No step draws from them, so the other processes need none.

    Args:
        previous: the newest checkpoint before this one, which an error names.

    Raises:
        TrainingError: when it cannot be written (a full disk); the checkpoint before it stays whole.
    """
    tensors = optimizer_tensors(optimizer, model)

    def write() -> Checkpoint:
        return write_checkpoint(
            folder, state, lambda path: recurformer.save(model, path, tokenizer=tokenizer), tensors, read_rng()
        )

    def describe(path: Path) -> None:
        save_description(config=model.config, folder=path, tokenizer=tokenizer)

    try:
        if processes.sharded:
            weights = plain_state_dict(model)
            made = write_shared_checkpoint(folder, state, describe, weights, tensors, read_rng(), processes)
        else:
            made = processes.together(write, alone=True)
        return made or checkpoint_at(folder, state.step)
    except TrainingError:  # another process has ended or is gone: the disk has nothing to do with it
        raise
    except Exception as error:  # safetensors has an error type of its own for a full disk
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {folder} ({error}; {free / 2**20:,.0f} MiB "
            f"free). {f'{previous.path.name} is intact' if previous else 'There is none yet'}; make room and --resume"
        ) from error


def all_finite(model: nn.Module, optimizer: torch.optim.Optimizer, processes: OneProcess) -> bool:
    """Return whether every weight and every number of the optimizer is finite, in every process."""
    state = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    flags = [_local(tensor).isfinite().all() for tensor in (*model.parameters(), *state)]
    device = next(model.parameters()).device
    mine = bool(torch.stack([flag.to(device) for flag in flags]).all())
    return all(ok for (ok,) in processes.gather(mine))


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]
