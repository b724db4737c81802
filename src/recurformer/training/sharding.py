"""Tensors of a model over several processes: gradients summed in buckets (DDP), parameters split by layers (FSDP)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recurformer.model import LanguageModel, Output

BUCKET_BYTES = 2**26  # gradients that one call sums: enough to fill a link, little beside a model


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in groups of one dtype and of about BUCKET_BYTES."""
    group: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if group and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def in_one_piece(tensors: list[Tensor], work: Callable[[Tensor], Any]) -> None:
    """Apply an in-place function to several tensors as if they were one tensor."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    work(flat)
    pieces = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [piece.view_as(one) for piece, one in zip(pieces, tensors, strict=True)])


def shard(model: LanguageModel, device: torch.device) -> LanguageModel:
    """Split every parameter over the processes, layer by layer. A layer's parameters are gathered while it runs.

    The model runs sharded layers one by one, so the parameters of at most one layer are gathered at once.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    _show_tensors_in(Output)
    # FSDP warns that a layer's output may be a view of what the layer keeps. No output is ever changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means: the loss is already divided
            module.set_force_sum_reduction_for_comms(True)
    for method in ("embed", "run_layers", "finish", "loss"):  # which training calls one by one
        register_fsdp_forward_method(model, method)
    return model


def _show_tensors_in(output: type) -> None:
    """Let FSDP find the tensors in what a model returns: their gradients tell it when to gather weights again."""
    from torch.utils import _pytree

    if output not in _pytree.SUPPORTED_NODES:
        _pytree.register_dataclass(output)


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Split a whole tensor, equal in all processes, as a parameter of its shape is split."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
