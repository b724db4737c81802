"""Tensors in safetensors files: one file, shards with an index, or the parts of several processes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of shards, as Hugging Face writes it
PARTS = "shard-*.safetensors"  # of tensors, one file for each of the processes that have written them


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, on the CPU: of `model.safetensors`, of the shards in Hugging Face's index, or of the
    parts that the processes of a run have written."""
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return _read_safetensors(path)
    if any(folder.glob(PARTS)):
        return read_parts(folder)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ValueError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; the folder is incomplete")
    try:
        shards = json.loads(index.read_text())["weight_map"]
        files = sorted({folder / Path(name).name for name in shards.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}); copy or save it again") from error
    return {name: tensor for file in files for name, tensor in _read_safetensors(file).items()}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors into one safetensors file.

    Raises:
        OSError: when it cannot be written (a full disk).
    """
    try:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:  # no subclass of OSError
        raise OSError(f"{path} could not be written: {error}") from error


def write_parts(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors from several processes, each its own part into a safetensors file of its own.

    Args:
        tensors: DTensors, or whole ones. The header of a file says which part of which tensor it holds.
        folder: it exists. An error in one process before all write together would leave the others waiting.

    Raises:
        OSError: in every process, when one of them could not write.
    """
    from torch.distributed import checkpoint

    try:
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except checkpoint.CheckpointException as error:  # no subclass of Exception; every process gets it
        reasons = [f"process {rank}: {reason}" for rank, (reason, _) in error.failures.items()]
        raise OSError("; ".join(reasons)) from error


def read_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors, on the CPU, of what several processes have written, each its own part."""
    from torch.distributed import checkpoint

    try:
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in found.items()}  # pyright: ignore[reportAttributeAccessIssue]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError, checkpoint.CheckpointException) as error:
        raise ValueError(f"a part in {folder} is truncated or no safetensors file ({error})") from error
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy or save it again") from error
