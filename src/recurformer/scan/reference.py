"""The definition of a recurrent layer: a loop over positions. The other scans are tested against it.

Position i attends to the persistent pairs of all earlier positions and to one temporary pair, made from its own input.
Its output then gives its persistent pair, which every later position attends to. Autograd makes the gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recurformer.attention import Layout
    from recurformer.layer import LayerMaths


def reference_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs and the persistent pairs of one recurrent layer.

    Args:
        x: (B, N, D), the layer's inputs.
        layer: weights and equations of the layer.
        layout: positions, padding and documents of the batch.
        past: keys and values (B, G, P, K) of P earlier positions. They get no gradient. None: no earlier positions.

    Returns:
        z (B, N, D), and the persistent keys and values of the N positions, each (B, G, N, K).
    """
    P, N = layout.past, layout.length
    h = layer.attention_input(x)
    q = layer.queries(h, layout.rotation)
    k_tmp, v_tmp = layer.pairs(h, layout.rotation)
    k, v = (k_tmp[:, :, :0], v_tmp[:, :, :0]) if past is None else past  # persistent pairs so far
    bias, outputs = layout.full_bias, []
    for i in range(N):
        here = slice(i, i + 1)
        a = attend(
            q[:, :, here],
            torch.cat([k, k_tmp[:, :, here]], dim=2),
            torch.cat([v, v_tmp[:, :, here]], dim=2),
            None if bias is None else bias[:, :, here, : P + i + 1],
        )
        y = layer.after_attention(x[:, here], a)
        z = layer.after_mlp(y)
        rotation = None if layout.rotation is None else layout.rotation[here]
        k_i, v_i = layer.pairs(layer.attention_input(z), rotation)
        k, v = torch.cat([k, k_i], dim=2), torch.cat([v, v_i], dim=2)
        outputs.append(z)
    return torch.cat(outputs, dim=1), k[:, :, P:], v[:, :, P:]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + bias) v, (B, H, n, K), computed in at least float32.

    Args:
        q: (B, H, n, K).
        k, v: (B, G, m, K). Query head h uses key-value head h // (H / G).
        bias: (B or 1, H or 1, n, m), or None for zero.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(dtype).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q.to(dtype) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).to(q.dtype)
