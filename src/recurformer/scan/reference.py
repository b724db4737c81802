"""The definition of a recurrent layer: a loop over positions (paper section 2.2). Boring, slow, and the oracle.

At position i the layer attends to the persistent pairs of the positions before it, which are made from the layer's own
outputs z, and to one temporary pair made from its input x at i; then it makes the persistent pair of i, which every
later position sees. Autograd does the rest.
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
    """Outputs and persistent pairs of one recurrent layer.

    Args:
        x: (B, N, D), the layer's inputs.
        layer: its maths and weights.
        layout: positions, padding, documents.
        past: keys and values (B, G, P, K) of earlier positions, constants; None: there are none.

    Returns:
        z (B, N, D), and the persistent keys and values (B, G, N, K) of the N positions.
    """
    h = layer.attention_input(x)
    q = layer.queries(h, layout.rotation)
    k_tmp, v_tmp = layer.pairs(h, layout.rotation)
    k, v = (k_tmp[:, :, :0], v_tmp[:, :, :0]) if past is None else past
    P, N = layout.past, layout.length
    bias, outputs = layout.full_bias, []
    for i in range(N):
        here = slice(i, i + 1)
        a = attend(
            q[:, :, here],
            torch.cat([k, k_tmp[:, :, here]], dim=2),
            torch.cat([v, v_tmp[:, :, here]], dim=2),
            None if bias is None else bias[:, :, here, : P + i + 1],
        )
        z = layer.outputs(x[:, here], a)
        k_i, v_i = layer.pairs(layer.attention_input(z), None if layout.rotation is None else layout.rotation[here])
        k, v = torch.cat([k, k_i], dim=2), torch.cat([v, v_i], dim=2)
        outputs.append(z)
    return torch.cat(outputs, dim=1), k[:, :, P:], v[:, :, P:]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v in at least float32: q (B, H, n, K), k and v (B, G, m, K), to (B, H, n, K)."""
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]  # query heads h G-major: heads g * group ... share key-value head g
    k, v = (t.to(acc).repeat_interleave(group, dim=1) for t in (k, v))
    scores = q.to(acc) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).to(q.dtype)
