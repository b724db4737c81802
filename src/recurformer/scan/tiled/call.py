"""One call of the tiled scan: its constants, its buffers, and the views of them that a wave of layers works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from recurformer.layer import LayerMaths, accumulation_dtype
from recurformer.scan.schedule import LeafStep, Schedule, Wave, waves
from recurformer.scan.tiled.blocks import Attention

if TYPE_CHECKING:
    from recurformer.attention import Layout, Rotation
    from recurformer.config import ModelConfig

ONE_THREAD = 2**22  # multiply-adds of a position's largest product, up to which its loop runs on one CPU thread

Past = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class TiledCall:
    """The part of one evaluation of a stack of layers that is no differentiable tensor."""

    config: ModelConfig
    layout: Layout
    past: list[Past]  # keys and values (B, G, P, K) of each layer
    schedule: Schedule
    differentiable: bool  # whether a backward may follow
    keep: bool  # whether the forward saves what the backward would otherwise recompute

    def layers(self, tensors: Sequence[Any]) -> list[LayerMaths]:
        """Return the layers, given the tensors of the first layer, of the second, and so on."""
        names = LayerMaths.tensor_names()
        each = [tensors[start : start + len(names)] for start in range(0, len(tensors), len(names))]
        return [LayerMaths(self.config, **dict(zip(names, some, strict=True))) for some in each]

    @cached_property
    def waves(self) -> list[Wave]:
        """The waves in forward order. A single layer goes through all positions in one wave."""
        N, L = self.layout.length, len(self.past)
        return waves(L, N, N if L == 1 else self.schedule.chunk_length)

    @cached_property
    def leaves(self) -> list[LeafStep]:
        """The leaves of a layer in forward order."""
        return list(self.schedule.leaves())

    def leaves_of(self, wave: Wave) -> list[list[LeafStep]]:
        """Return the steps of a wave in forward order, each with one leaf of every layer."""
        side = self.schedule.leaf
        count = -(-wave.length // side)
        return [[self.leaves[start // side + n] for start in wave.starts] for n in range(count)]


class QueriesAndPairs(NamedTuple):
    """Queries and pairs of each layer in the accumulation dtype."""

    q: Tensor  # (L, E, R, N, K), scaled by 1/sqrt(K)
    k: Tensor  # (L, E, N, K), temporary until the persistent keys are known
    v: Tensor  # (L, E, N, K)

    @classmethod
    def empty(cls, call: TiledCall, x: Tensor) -> QueriesAndPairs:
        """Allocate those of the inputs x (B, N, D)."""
        config, (B, N, _), L = call.config, x.shape, len(call.past)
        G, K = config.kv_heads, config.head_width
        dtype = accumulation_dtype(x.dtype)
        q = x.new_empty(L, B * G, config.n_heads // G, N, K, dtype=dtype)
        return cls(q, *(x.new_empty(L, B * G, N, K, dtype=dtype) for _ in range(2)))

    def attentions(self, call: TiledCall) -> list[Attention]:
        """Return the attention of each layer over these queries and pairs."""
        B = self.k.shape[1] // call.config.kv_heads
        return [Attention(call.layout, B, *each) for each in zip(*self, call.past, strict=True)]


class Activations(NamedTuple):
    """The values that save="all" keeps for the backward besides queries and pairs."""

    lse: Tensor  # (L, E, R, N), log-sum-exp of the scores
    a: Tensor  # (L, N, B, H K)
    up: Tensor  # (L, N, B, F)
    gate: Tensor | None  # (L, N, B, F), with activation "swiglu"

    @classmethod
    def empty(cls, call: TiledCall, layer: LayerMaths, q: Tensor) -> Activations:
        """Allocate those of queries q (L, E, R, N, K)."""
        config, (L, E, _, N, _) = call.config, q.shape
        B = E // config.kv_heads
        up = q.new_empty(L, N, B, config.mlp_width, dtype=layer.compute_dtype)
        a = q.new_empty(L, N, B, config.n_heads * config.head_width)
        return cls(q.new_empty(q.shape[:4]), a, up, None if layer.gate is None else torch.empty_like(up))

    def by_position(self) -> list[Tensor]:
        """Return a, up and, where there is one, gate."""
        return [t for t in (self.a, self.up, self.gate) if t is not None]


# --- what a wave works on --------------------------------------------------------------------------------------------


def layer_inputs(x: Tensor, z: Tensor) -> list[Tensor]:
    """Return the inputs of each layer, (B, N, D), given those of the first and the outputs z (L, N, B, D) of all."""
    return [x, *z[:-1].transpose(1, 2)]


def wave_inputs(inputs: Sequence[Tensor], wave: Wave) -> Tensor:
    """Return a copy of the inputs of a wave's layers at their positions, (layers, n, B, D).

    Args:
        inputs: of each layer, (B, N, D).
        wave: which layers and positions.
    """
    return torch.stack([inputs[l][:, span].transpose(0, 1) for l, span in wave])


def wave_view(t: Tensor, wave: Wave) -> Tensor:
    """Return the part of t (L, N, ...) that a wave's layers have at their positions, (layers, n, ...), as a view.

    Each layer is equally far behind the layer below, so that one stride leads from layer to layer.
    """
    behind = wave.starts[0] - wave.starts[1] if len(wave.starts) > 1 else 0
    first = t[wave.layers.start, wave.starts[0] : wave.starts[0] + wave.length]
    strides = (t.stride(0) - behind * t.stride(1), *first.stride())
    return t.as_strided((len(wave.layers), *first.shape), strides, first.storage_offset())


def position_views(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the views of each tensor (layers, n, ...) at every position, all made at once."""
    return [tensor.unbind(1) for tensor in tensors]


def wave_rotation(rotation: Rotation | None, wave: Wave, B: int) -> Rotation | None:
    """Return the rotation of a wave's heads, (layers, heads, n B, K)."""
    if rotation is None:
        return None
    shape = (B, 1, wave.length, -1)
    each = [(r.cos.expand(shape), r.sin.expand(shape)) for r in (rotation[span] for span in wave.spans())]
    cos, sin = (torch.stack(parts).permute(0, 2, 3, 1, 4).flatten(2, 3) for parts in zip(*each, strict=True))
    return replace(rotation, cos=cos, sin=sin)


def position_rotations(rotation: Rotation | None, spans: list[slice]) -> list[Rotation | None]:
    """Return, for each of n positions, the rotation of the heads of several layers, (layers, heads, B, K).

    Args:
        rotation: of all N positions. None: there is none.
        spans: the n positions of each layer.
    """
    if rotation is None:
        return [None] * (spans[0].stop - spans[0].start)
    each = [rotation[span] for span in spans]
    cos, sin = (
        torch.cat(parts, dim=1).permute(2, 1, 0, 3) for parts in zip(*((r.cos, r.sin) for r in each), strict=True)
    )
    return [replace(rotation, cos=c[:, None], sin=s[:, None]) for c, s in zip(cos, sin, strict=True)]


@contextmanager
def one_thread_for_small_products(x: Tensor, config: ModelConfig, layers: int) -> Iterator[None]:
    """Run a loop of small products on one CPU thread.

    A second thread gains little on a product of B rows, and each product has to wait for it. Where another process
    holds that thread's core, thousands of such waits make the loop many times slower. The products of several layers
    are larger and divide better.

    Args:
        x: the inputs (B, N, D), on any device.
        config: of the layers.
        layers: how many are evaluated together.
    """
    threads = torch.get_num_threads()
    work = x.shape[0] * x.shape[2] * config.mlp_width * layers
    if x.device.type != "cpu" or threads == 1 or work > ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
