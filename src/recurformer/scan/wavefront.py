"""Several recurrent layers at once (design: wavefront): layer l works on a chunk while layer l - 1 works on the next.

One layer leaves a machine idle when the batch is small: its products have few rows, and each waits for the one before.
A stack of L layers needs L times as many of them, but those of different layers are independent as soon as layer l
stays a chunk behind layer l - 1. They become one batched product, so that for whole chunks N + (L - 1) C steps take the
place of N L, forward and backward. The work is that of `recurformer.scan.fused` on a GPU and of
`recurformer.scan.tiled` elsewhere, both of which take a stack; its order is what is new here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recurformer.hardware import interpreted
from recurformer.scan.fused import scan as fused
from recurformer.scan.schedule import WAVEFRONT_CHUNK
from recurformer.scan.tiled import scan as tiled

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
    """Outputs of the last of consecutive recurrent layers and the persistent pairs of each.

    Args:
        x: (B, N, D), the first layer's inputs.
        layers: maths and weights, all of one shape.
        layout, past: as `stack_scan` of `recurformer.scan.fused` on a GPU and of `recurformer.scan.tiled` elsewhere,
            whose options are taken too.

    Returns:
        z (B, N, D), and keys and values (B, G, N, K) of each layer.

    Raises:
        ValueError: as `stack_scan`.
    """
    on_gpu = x.device.type == "cuda" or interpreted()
    if on_gpu and len(layers) > 1:
        options = {"chunk": WAVEFRONT_CHUNK, "leaf": WAVEFRONT_CHUNK, **options}
    scan = fused.stack_scan if on_gpu else tiled.stack_scan
    return scan(x, layers, layout, past, **options)


def layer_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of one layer; arguments and results as `reference_scan`."""
    z, ((keys, values),) = wavefront_scan(x, [layer], layout, [past], **options)
    return z, keys, values
