"""The fused scan as functions of tensors: one layer, a stack of layers, and their autograd function.

Imports no Triton, so that a machine without it can import this file and learn from an error what runs instead.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.hardware import scan_obstacle
from recurformer.scan.fused.call import FusedCall, Past, aligned
from recurformer.scan.fused.engines import ENGINES
from recurformer.scan.fused.memory import SAVES, affordable_save
from recurformer.scan.fused.shape import EngineShape, product_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recurformer.attention import Layout
    from recurformer.layer import LayerMaths

CHUNK, CHUNK_LONG = 64, 128  # positions of a chunk
LONG = 1024  # positions N above which chunks are longer
LEAF, LEAF_BACKWARD = 8, 16  # positions of a leaf


def fused_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: Past = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs and persistent pairs of one recurrent layer.

    Arguments and results are those of `reference_scan`; options are those of `fused_stack_scan`.
    """
    z, ((keys, values),) = fused_stack_scan(x, [layer], layout, [past], **options)
    return z, keys, values


def fused_stack_scan(
    x: Tensor,
    layers: Sequence[LayerMaths],
    layout: Layout,
    past: Sequence[Past] | None = None,
    *,
    chunk: int | None = None,
    leaf: int | None = None,
    save: str = "auto",
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the outputs of the last of several recurrent layers of one shape, and the persistent pairs of each.

    Args:
        x: (B, N, D), the first layer's inputs.
        layers: their maths and weights.
        layout: positions, padding, documents.
        past: of each layer, keys and values (B, G, P, K), constants. Default: no past.
        chunk: C, a power of two: positions between two pulls, and by which a layer is behind the one below. Default:
            by N.
        leaf: S, a power of two up to C: positions that read each other directly. Default: the sides found fastest.
        save: what the forward keeps for the backward besides inputs, outputs and attention outputs. "minimal": nothing;
            "pairs": queries and pairs; "inner": also the MLP's inner values; "all": also the products with Q, K and V,
            in place of queries; "auto": by memory and width.

    Returns:
        z (B, N, D), and a pair of keys and values (B, G, N, K) for each layer.

    Raises:
        ValueError: if the kernels cannot run (device, head width, dtype), naming what can; if a side is not a power of
            two; if `save` is unknown.
    """
    first = layers[0]
    reason = scan_obstacle(first.config, x.device, first.compute_dtype)
    if reason is not None:
        raise ValueError(f"the fused scan can't run: {reason}")
    if save not in SAVES:
        raise ValueError(f"save is {save!r}; choose one of {', '.join(map(repr, SAVES))}")
    sides = chosen_sides(x.shape[1], chunk, leaf)
    names = [f.name for f in fields(first) if f.name != "config"]
    tensors = [getattr(layer, name) for layer in layers for name in names]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if save == "auto" and differentiable:
        save = affordable_save(first.config, x.shape[0] * x.shape[1] * first.compute_dtype.itemsize, x.device)
    call = FusedCall(
        shape=engine_shape(x, layers, layout, sides, save if differentiable else None),
        layout=layout,
        past=list(past) if past is not None else [None] * len(layers),
        keeps_pairs=save != "minimal",
        names=names,
        config=first.config,
    )
    with torch.cuda.device_of(x):  # kernels and graphs go to the current device
        z, keys, values = FusedStack.apply(x, call, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    return z, list(zip(keys, values, strict=True))


def chosen_sides(length: int, chunk: int | None, leaf: int | None) -> tuple[int, int, int]:
    """Return the positions of a chunk, of a leaf, and of a leaf of the backward.

    Args:
        length: N.
        chunk: C, or None for the default.
        leaf: S of both passes, or None for the defaults.

    Raises:
        ValueError: if a side is not a power of two.
    """
    if chunk is None:
        chunk = min(CHUNK if length <= LONG else CHUNK_LONG, max(16, 1 << (length - 1).bit_length()))
    forward, backward = (min(side, chunk) for side in ((LEAF, LEAF_BACKWARD) if leaf is None else (leaf, leaf)))
    for name, side in (("chunk", chunk), ("leaf", forward)):
        if side < 1 or side & (side - 1):
            raise ValueError(f"{name} is {side}; it must be a power of two")
    return chunk, forward, backward


def engine_shape(
    x: Tensor, layers: Sequence[LayerMaths], layout: Layout, sides: tuple[int, int, int], save: str | None
) -> EngineShape:
    """Return the shape of the engine that evaluates a stack.

    Args:
        x: (B, N, D).
        layers: of the stack.
        layout: positions, padding, documents.
        sides: as from `chosen_sides`.
        save: what the forward keeps, or None where there is no backward.
    """
    first, (chunk, leaf, leaf_backward) = layers[0], sides
    # Settings that the kernels do not read get one value, so that shapes that differ only there share an engine.
    one_layer = {"n_layers": 1, "layers": "recurrent", "vocab_size": 1, "vocab_multiple": 1, "residual_scale": "none"}
    return EngineShape(
        config=replace(first.config, **one_layer),
        L=len(layers),
        B=x.shape[0],
        C=chunk,
        leaf=leaf,
        leaf_backward=leaf_backward,
        dtype=first.compute_dtype,
        device=x.device,
        segmented=layout.valid is not None or layout.documents is not None,
        keeps_attention=save is not None,
        keeps_inner=save in ("inner", "all"),
        keeps_raw=save == "all",
        branch_scale=first.config.branch_scale,
        product_settings=product_settings(x.device),
    )


class FusedStack(torch.autograd.Function):
    """A stack of layers as a pure function of its inputs and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: FusedCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last layer's outputs (B, N, D), and keys and values (L, B, G, N, K)."""
        shape, layout = call.shape, call.layout
        x = aligned(x)
        z = torch.empty(shape.L, *x.shape, dtype=torch.float32, device=x.device)
        q, kv = call.empty("q"), call.new_pairs()
        kept = {"A": call.empty("a"), "LSE": call.empty("lse")} if shape.keeps_attention else {}
        if shape.keeps_inner:
            kept["UP"] = call.empty("up")
        if shape.keeps_raw:
            kept["RAW"] = call.empty("raw")
        entries = call.entries(X=x, Z=z, Q=q, KV=kv, **kept)
        with ENGINES.lock:
            engine = ENGINES.engine_of(shape)
            engine.load(call.layers(tensors), layout.slopes)
            engine.run_forward(call.steps, entries)

        keys, values = call.persistent_pairs(kv)
        if shape.keeps_attention:
            ctx.save_for_backward(
                x, z, kept["A"], kept["LSE"], kept.get("UP"), kept.get("RAW"),
                q if call.keeps_pairs and not shape.keeps_raw else None, kv if call.keeps_pairs else None, *tensors,
            )  # fmt: skip
        ctx.call = call
        ctx.mark_non_differentiable(keys, values)
        ctx.set_materialize_grads(False)
        # Without a backward, a view would keep the outputs of all layers alive.
        last = z[-1] if shape.keeps_attention or shape.L == 1 else z[-1].clone()
        return last, keys, values

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of every tensor of every layer."""
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the fused scan has no second derivative (create_graph=True); set scan = 'reference', which has"
            )
        call: FusedCall = ctx.call
        if incoming[0] is None:
            return (None,) * (2 + len(call.names) * call.shape.L)
        with ENGINES.lock:
            return FusedStack.gradients(ctx, call, incoming[0])

    @staticmethod
    def gradients(ctx: Any, call: FusedCall, gz: Tensor) -> tuple[Tensor | None, ...]:
        """Return what `backward` returns, given the gradient of the last layer's outputs."""
        x, z, a, lse, up, raw, q, kv, *tensors = ctx.saved_tensors
        engine = ENGINES.engine_of(call.shape)
        layers = call.layers(tensors)
        engine.load(layers, call.layout.slopes)
        entries = call.entries(X=x, Z=z, A=a, LSE=lse)
        entries.point(**{name: kept for name, kept in (("UP", up), ("RAW", raw)) if kept is not None})
        restores_pairs = kv is None
        q, kv = call.empty("q") if q is None else q, call.new_pairs() if kv is None else kv
        entries.point(Q=q, KV=kv)
        if restores_pairs:
            engine.run_restore(call.steps, entries)
        gx = torch.empty_like(x)
        entries.point(GZ=aligned(gz), GX=gx, GA=call.empty("ga"), DELTA=call.empty("delta"))
        sums = engine.run_backward(call.steps, entries)
        found = []
        for l, layer in enumerate(layers):
            gradients = sums.of_layer(l)
            for position, name in enumerate(call.names):
                needed = ctx.needs_input_grad[2 + l * len(call.names) + position]
                found.append(gradients[name].to(getattr(layer, name).dtype, copy=True) if needed else None)
        return (gx, None, *found)
