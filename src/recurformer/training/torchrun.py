"""The place of this process among those of `torchrun`, and its device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from recurformer.text import pick_device

if TYPE_CHECKING:
    from recurformer.training.config import TrainConfig


class TorchrunEnvironment(NamedTuple):
    """The place of this process among those that `torchrun` has started."""

    rank: int = 0
    size: int = 1  # number of processes
    local_rank: int = 0  # rank on this machine


def torchrun_environment() -> TorchrunEnvironment:
    """Return what `torchrun` says in the environment variables; rank 0 of 1 without it.

    Raises:
        ValueError: when some of the variables are missing.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return TorchrunEnvironment()
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start several processes "
            "with torchrun, or unset WORLD_SIZE"
        )
    return TorchrunEnvironment(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def training_device(config: TrainConfig) -> torch.device:
    """Return the device of a configuration. Each of several processes on a machine has a GPU of its own.

    Raises:
        ValueError: when the device is not here.
    """
    _, size, local = torchrun_environment()
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and config.precision != "fp64" else "cpu"
    if size > 1 and name.startswith("cuda:"):
        raise ValueError(
            f"device is {name!r}, but there are {size} processes, and each takes the GPU of its local rank; "
            'set device to "cuda" or "auto"'
        )
    if size > 1 and name == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs; lower "
                'torchrun\'s --nproc-per-node or set device to "cpu"'
            )
        name = f"cuda:{local}"
    return pick_device(name)
