"""Exact tiling in plain PyTorch operations on any device: the entry, and the autograd function around both passes.

`forward.py` and `backward.py` hold the two passes, `blocks.py` attention between blocks of positions, and `stack.py`
the equations of several layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.layer import LayerMaths
from recurformer.scan.schedule import Schedule, choose_schedule
from recurformer.scan.tiled.backward import ForwardRecord, TiledBackward
from recurformer.scan.tiled.call import Activations, Past, QueriesAndPairs, TiledCall
from recurformer.scan.tiled.forward import TiledForward

if TYPE_CHECKING:
    from recurformer.attention import Layout

LEAF = 32  # positions of a leaf of a single layer: larger leaves spare the launches of small tiles
STACK_LEAF = 16  # positions of a leaf of several layers, and how far each is behind the layer below
KEEP_BYTES = 2**29  # up to this many bytes a layer, save="auto" keeps what the backward would recompute
SAVES = ("auto", "minimal", "all")

cheapest_schedule = lru_cache(maxsize=256)(choose_schedule)


def tiled_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs and persistent pairs of one recurrent layer.

    Arguments and results are those of `reference_scan`, the options those of `tiled_stack_scan`.
    """
    z, ((keys, values),) = tiled_stack_scan(x, [layer], layout, [past], **options)
    return z, keys, values


def tiled_stack_scan(
    x: Tensor,
    layers: Sequence[LayerMaths],
    layout: Layout,
    past: Sequence[Past] | None = None,
    *,
    chunk: int | str | None = "auto",
    leaf: int | None = None,
    save: str = "auto",
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the outputs of the last of several recurrent layers of one shape, and the persistent pairs of each.

    Args:
        x: (B, N, D), the first layer's inputs.
        layers: their weights and equations.
        layout: positions, padding and documents.
        past: keys and values (B, G, P, K) of each layer, without gradient. None: there are none.
        chunk: C, positions of a chunk, a power of two; each layer is one chunk behind the layer below. None: the
            paper's tiling, one layer after the other. "auto": for one layer the chunk of least modelled HBM traffic,
            for several one leaf.
        leaf: S, positions of a leaf, a power of two; a leaf takes memory for S^2 scores a head. With 1 the scan is
            the paper's algorithm to the letter. None: LEAF for one layer, STACK_LEAF for several, at most a chunk.
        save: what the forward keeps for the backward. "minimal": inputs and outputs, from which the backward recomputes
            the rest in parallel. "all": also queries, pairs, attention outputs and the inner values of the MLP. "auto":
            "all" up to KEEP_BYTES bytes a layer.

    Returns:
        z (B, N, D), and a pair of keys and values (B, G, N, K) for each layer.

    Raises:
        ValueError: for a chunk or leaf that is no power of two, or an unknown `save`.
    """
    if torch.compiler.is_compiling():  # thousands of operations in loops: as one graph they take minutes to compile
        eager: Any = torch.compiler.disable(tiled_stack_scan)
        return eager(x, layers, layout, past, chunk=chunk, leaf=leaf, save=save)
    if save not in SAVES:
        raise ValueError(f"save is {save!r}; choose 'auto', 'minimal' or 'all'")
    schedule = schedule_of(layers, layout, chunk, leaf)
    tensors = [getattr(layer, name) for layer in layers for name in LayerMaths.tensor_names()]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    keep = save == "all" or (save == "auto" and kept_bytes(x, layers[0]) <= KEEP_BYTES)
    of_layers: list[Past] = [None] * len(layers) if past is None else list(past)
    call = TiledCall(layers[0].config, layout, of_layers, schedule, differentiable, keep and differentiable)
    z, keys, values = TiledScan.apply(x, call, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    return z, list(zip(keys, values, strict=True))


def schedule_of(layers: Sequence[LayerMaths], layout: Layout, chunk: int | str | None, leaf: int | None) -> Schedule:
    """Return the schedule that the options of `tiled_stack_scan` ask for.

    Raises:
        ValueError: as there.
    """
    if leaf is None:
        leaf = LEAF if len(layers) == 1 else STACK_LEAF
        leaf = min(leaf, chunk) if isinstance(chunk, int) else leaf
    if not isinstance(chunk, str):
        return Schedule(layout.length, layout.past, chunk, leaf)
    if chunk != "auto":
        raise ValueError(f"chunk is {chunk!r}; give a power of two, None (pure tiling) or 'auto'")
    if len(layers) > 1:
        return Schedule(layout.length, layout.past, leaf, leaf)
    config = layers[0].config
    sizes = (config.head_width, config.n_heads, config.kv_heads)
    return cheapest_schedule(layout.length, layout.past, leaf, *sizes)


def kept_bytes(x: Tensor, layer: LayerMaths) -> int:
    """Return the bytes that save="all" keeps of one layer besides inputs and outputs, 4 bytes a number."""
    config = layer.config
    inner = config.mlp_width * (1 if layer.gate is None else 2)
    per_position = 2 * (config.n_heads + config.kv_heads) * config.head_width + inner  # q and a, k and v, MLP
    return x.shape[0] * x.shape[1] * per_position * 4


class TiledScan(torch.autograd.Function):
    """A stack of layers as a pure function of its input and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: TiledCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        layers, B, N, L = call.layers(tensors), *x.shape[:2], len(call.past)
        done = TiledForward(call, layers, x)
        done.run()
        shape = (L, B, call.config.kv_heads, N, -1)
        keys, values = (t.view(shape).to(layers[0].compute_dtype) for t in (done.pairs.k, done.pairs.v))
        if call.differentiable:
            kept = () if done.activations is None else (*done.pairs, *done.activations)
            ctx.save_for_backward(x, done.z, *tensors, *kept)
        ctx.call = call
        ctx.mark_non_differentiable(keys, values)  # pairs in a cache are constants
        ctx.set_materialize_grads(False)
        z = done.z[-1]
        if not call.differentiable and L > 1:
            z = z.clone()  # a view would keep the outputs of all layers alive
        return z.transpose(0, 1), keys, values

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the tiled scan has no second derivative (create_graph=True); set scan = 'reference', which has"
            )
        call: TiledCall = ctx.call
        L, names = len(call.past), LayerMaths.tensor_names()
        gz, count = incoming[0], len(names) * L
        if gz is None:
            return (None,) * (2 + count)
        x, z, *rest = ctx.saved_tensors
        tensors, kept = rest[:count], rest[count:]
        pairs, activations = (QueriesAndPairs(*kept[:3]), Activations(*kept[3:])) if kept else (None, None)
        record = ForwardRecord(x, z, pairs, activations)
        needed = ctx.needs_input_grad[2:]
        wanted = {name for name, need in zip(names * L, needed, strict=True) if need}
        with torch.autocast(x.device.type, enabled=False):
            gx, gradients = TiledBackward(call, call.layers(tensors), record, wanted, gz).run()
        by_layer = [gradients[name][l] if name in gradients else None for l in range(L) for name in names]
        return (gx, None, *(g if need else None for g, need in zip(by_layer, needed, strict=True)))
