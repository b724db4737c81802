"""Tensors in safetensors files: one file, shards with an index, or the parts that several processes have written.

Names, shapes and types come from the headers of the files and are checked before a tensor is read or a layer is built.
A tensor that is read is a copy of its own: the file may be replaced or overwritten later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recurformer.config import ModelConfig
from recurformer.reading import LARGEST_LIST, brief, check_regular, parse, read_table
from recurformer.settings import shown

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of shards, as Hugging Face writes it
PARTS = "shard-*.safetensors"  # one file for each of the processes that have written them
PARTS_KEY = "DCP_SHARDING_INFO"  # in the header of a part: where its pieces lie in the whole tensors

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of weights: safetensors, torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet."""

    shape: Shape
    dtype: str  # as torch names it, or as the file does where it is no type of weights
    source: str  # the file or object that holds it, for messages
    read: Callable[[], Tensor]  # returns a copy; raises ValueError when the file is damaged


# --- writing ----------------------------------------------------------------------------------------------------------


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors into one safetensors file.

    Raises:
        OSError: when it cannot be written (a full disk).
    """
    try:
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:  # no subclass of OSError
        raise OSError(f"{path} could not be written: {brief(error)}") from error


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


# --- headers ----------------------------------------------------------------------------------------------------------


def find_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the weights in a model's folder by name, none of them read yet.

    They lie in `model.safetensors`, in shards with Hugging Face's index, or in the parts of several processes.

    Raises:
        ValueError: when the folder has none, or a file is missing, damaged or no safetensors file.
    """
    if (path := folder / WEIGHTS_FILE).is_file():
        return open_tensors(path)
    if parts := sorted(folder.glob(PARTS)):
        return open_parts(parts)
    if not (path := folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; the folder is incomplete")
    return _open_shards(path)


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a safetensors file by name, none of them read yet.

    Raises:
        ValueError: when it is missing, truncated or no safetensors file.
    """
    return {name: tensor for name, _, tensor in _open(path)}


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    places = read_table(index, LARGEST_LIST).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} is damaged (it has no weight_map); copy or save it again")
    for file in set(map(repr, places.values())):
        if "/" in file or "\\" in file or file[:1] not in "'\"":
            raise ValueError(f"{index} names the file {shown(file)[:200]}; shards must lie beside it, without folders")
    shards = {file: open_tensors(index.parent / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in shards[file]:
            raise ValueError(f"{index.parent / file} lacks {shown(name)}, which {index.name} places there")
    return {name: shards[file][name] for name, file in places.items()}


@dataclass(frozen=True)
class _Piece:
    offsets: Shape  # where it begins in the whole tensor
    tensor: StoredTensor

    def overlaps(self, other: _Piece) -> bool:
        pairs = zip(self.offsets, self.tensor.shape, other.offsets, other.tensor.shape, strict=True)
        return all(a < b + n and b < a + m for a, m, b, n in pairs)


def open_parts(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the whole tensors of which each file holds some pieces, none of them read yet.

    Raises:
        ValueError: when a file is damaged, or the pieces of a tensor leave a gap or overlap: a part is missing then.
    """
    pieces: dict[str, list[_Piece]] = {}
    for file in files:
        for name, offsets, tensor in _open(file):
            pieces.setdefault(name, []).append(_Piece(offsets, tensor))
    return {name: _joined(name, found) for name, found in pieces.items()}


def _joined(name: str, pieces: list[_Piece]) -> StoredTensor:
    """Return the tensor that pieces make up; every element must be in exactly one of them."""
    first = pieces[0].tensor
    ends = [tuple(map(sum, zip(p.offsets, p.tensor.shape, strict=True))) for p in pieces]
    fits = all(len(p.offsets) == len(first.shape) and p.tensor.dtype == first.dtype for p in pieces)
    shape = tuple(map(max, zip(*ends, strict=True))) if fits else ()
    filled = sum(math.prod(p.tensor.shape) for p in pieces)
    apart = fits and not any(a.overlaps(b) for n, a in enumerate(pieces) for b in pieces[:n])
    if not apart or filled != math.prod(shape):
        raise ValueError(
            f"the parts in {Path(first.source).parent} do not make up {shown(name)} of shape {shown(shape)}: a part is "
            "missing or of another checkpoint; copy the folder again or take another checkpoint"
        )

    def read() -> Tensor:
        if len(pieces) == 1:
            return first.read()
        whole = torch.empty(shape, dtype=getattr(torch, first.dtype))  # each element is filled: checked above
        for piece in pieces:
            place = [slice(a, a + n) for a, n in zip(piece.offsets, piece.tensor.shape, strict=True)]
            whole[tuple(place)] = piece.tensor.read()
        return whole

    return StoredTensor(shape, first.dtype, first.source, read)


def _open(path: Path) -> list[tuple[str, Shape, StoredTensor]]:
    """Return (name, offsets in the whole tensor, tensor) for each entry of a safetensors file."""
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            raise ValueError(f"{path} is truncated or no safetensors file; copy or save it again")
        if header > LARGEST_LIST:  # the library would take memory for it first
            raise ValueError(f"{path} has a header of {header:,} bytes; at most {LARGEST_LIST:,} are read")
        opened = safe_open(path, framework="pt", device="cpu")
        places = parse((opened.metadata() or {}).get(PARTS_KEY, "{}"), ".json", f"the {PARTS_KEY} of {path}")
        return [_entry(path, opened, name, places) for name in opened.keys()]  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        why = brief(error)
        raise ValueError(f"{path} is truncated or no safetensors file ({why}); copy or save it again") from error


def _entry(path: Path, opened: Any, name: str, places: Any) -> tuple[str, Shape, StoredTensor]:
    part = opened.get_slice(name)
    shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
    offsets = [0] * len(shape)
    if places:
        place = places.get(name) if isinstance(places, dict) else None
        offsets = place.get("saved_offsets") if isinstance(place, dict) else None
        if not isinstance(offsets, list) or not all(type(n) is int and 0 <= n < 2**48 for n in offsets):
            raise ValueError(f"{path} does not say where {shown(name)} belongs; copy or save it again")

    def read() -> Tensor:
        try:
            return opened.get_tensor(name).clone()  # the library's tensor is a view of the file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged at {shown(name)} ({brief(error)}); copy or save it again") from error

    return name, tuple(offsets), StoredTensor(shape, DTYPES.get(dtype, dtype), str(path), read)


def in_memory(tensors: Mapping[str, Tensor], source: str) -> dict[str, StoredTensor]:
    """Return tensors that are in memory already, in the form of stored ones."""

    def stored(tensor: Tensor) -> StoredTensor:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return StoredTensor(tuple(tensor.shape), dtype, source, lambda: tensor.detach().clone())

    return {name: stored(tensor) for name, tensor in tensors.items()}


# --- what a model needs -----------------------------------------------------------------------------------------------


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return names and shapes of a model's parameters, in the order of its state dict, without building it."""
    D, F, K = config.d_model, config.mlp_width, config.head_width
    queries, pairs = config.n_heads * K, config.kv_heads * K
    rows = config.padded_vocab_size
    qk_widths = {"none": None, "head": (K, K), "full": (queries, pairs)}[config.qk_norm]

    def linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
        return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}

    layer: dict[str, Shape] = {"attention_norm.weight": (D,)}
    for name, width in (("q_proj", queries), ("k_proj", pairs), ("v_proj", pairs)):
        layer |= linear(name, width, D, config.attention_bias)
    layer |= linear("o_proj", D, queries, config.attention_bias)
    if qk_widths is not None:
        layer |= {"q_norm.weight": (qk_widths[0],), "k_norm.weight": (qk_widths[1],)}
    layer["mlp_norm.weight"] = (D,)
    for name in ("up_proj", "gate_proj") if config.activation == "swiglu" else ("up_proj",):
        layer |= linear(name, F, D, config.mlp_bias)
    layer |= linear("down_proj", D, F, config.mlp_bias)

    shapes: dict[str, Shape] = {"embedding.weight": (rows, D)}
    for l in range(config.n_layers):
        shapes |= {f"layers.{l}.{name}": shape for name, shape in layer.items()}
    shapes["norm.weight"] = (D,)
    return shapes if config.tie_embeddings else {**shapes, "head.weight": (rows, D)}


def check_dtype(name: str, tensor: StoredTensor) -> None:
    """Raise ValueError when a tensor has a type that weights cannot have: integers, bool, complex, 8 bits."""
    if tensor.dtype not in DTYPES.values():
        raise ValueError(
            f"{shown(name)} in {tensor.source} has type {shown(tensor.dtype)}; weights are read as "
            f"{', '.join(DTYPES.values())}: convert it to one of these"
        )
