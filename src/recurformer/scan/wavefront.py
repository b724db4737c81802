"""The wavefront: several recurrent layers advanced together, each one chunk of positions behind the layer below.

At a small batch one layer leaves a machine idle: its products have few rows, and each waits for the one before. The
layers of a stack do not wait for each other when layer l stays a chunk behind layer l - 1. Their products then become
one batched product: N + (L - 1) C steps over the positions take the place of N L, in the forward and in the backward.

The two stack scans below do the work: `recurformer.scan.fused` on a GPU, `recurformer.scan.tiled` elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recurformer.hardware import interpreted
from recurformer.scan.fused.scan import fused_stack_scan
from recurformer.scan.schedule import WAVEFRONT_CHUNK
from recurformer.scan.tiled.scan import tiled_stack_scan

if TYPE_CHECKING:
    from recurformer.attention import Layout
    from recurformer.layer import LayerMaths


def wavefront_scan(
    x: Tensor,
    layers: Sequence[LayerMaths],
    layout: Layout,
    past: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    **options: Any,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the outputs of the last of several consecutive recurrent layers, and the persistent pairs of each.

    Args:
        x: (B, N, D), the first layer's inputs.
        layers: weights and equations of each layer, all of one shape.
        layout: positions, padding and documents of the batch.
        past: keys and values (B, G, P, K) of each layer, without gradient. None: there are none.
        options: those of the stack scan that runs.

    Returns:
        z (B, N, D), and keys and values (B, G, N, K) of each layer.

    Raises:
        ValueError: as the stack scan that runs.
    """
    if x.device.type != "cuda" and not interpreted():
        return tiled_stack_scan(x, layers, layout, past, **options)
    if len(layers) > 1:
        options = {"chunk": WAVEFRONT_CHUNK, "leaf": WAVEFRONT_CHUNK, **options}
    return fused_stack_scan(x, layers, layout, past, **options)


def layer_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate a stack of one layer; arguments and results are those of `reference_scan`."""
    z, ((keys, values),) = wavefront_scan(x, [layer], layout, [past], **options)
    return z, keys, values
