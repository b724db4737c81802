"""The equations of `recurformer.layer` for several layers of one shape at once.

The products of different layers become one batched product. That is what the tiled scan gains from small layers: for a
few rows, the launch of a product costs more than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from recurformer.hardware import CENTRED_NORMS
from recurformer.layer import accumulation_dtype, activate

if TYPE_CHECKING:
    from recurformer.attention import Rotation
    from recurformer.config import ModelConfig
    from recurformer.layer import LayerMaths

PAIR_PARTS = ("k", "v", "k_bias", "v_bias")  # `kv` and `kv_bias` hold these


@dataclass(frozen=True)
class StackedLayers:
    """The weights of L layers in tensors with one more dimension, and the equations of `LayerMaths` over them.

    Inputs are x (L, n, D): n rows of each layer. Where `LayerMaths` has the batch B, these equations have L.
    """

    config: ModelConfig
    attention_norm: Tensor  # (L, 1, D)
    q: Tensor  # (L, H K, D)
    kv: Tensor  # (L, 2 G K, D), K above V, so that one product makes both
    o: Tensor  # (L, D, H K)
    mlp_norm: Tensor  # (L, 1, D)
    up: Tensor  # (L, F, D)
    down: Tensor  # (L, D, F)
    gate: Tensor | None = None  # (L, F, D)
    q_norm: Tensor | None = None  # (L, 1, 1, K) for one head at a time, (L, 1, H K) for all
    k_norm: Tensor | None = None  # (L, 1, 1, K) or (L, 1, G K)
    q_bias: Tensor | None = None  # biases are (L, 1, out)
    kv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[LayerMaths], *, for_forward: bool) -> StackedLayers:
        """Stack the weights of layers.

        Args:
            layers: of one shape.
            for_forward: store o, up, gate and down by columns, which is faster for a few rows of x. Otherwise they are
                stored by rows, which is faster for a few rows of gradients. The projections have one order in memory
                for both, so that the backward repeats queries and keys to the bit.
        """
        first, per_head = layers[0], layers[0].config.qk_norm == "head"
        tensors = {"kv": stack_matrices([torch.cat([layer.k, layer.v]) for layer in layers])}
        if first.k_bias is not None and first.v_bias is not None:
            biases = [torch.cat([getattr(layer, name) for name in ("k_bias", "v_bias")]) for layer in layers]
            tensors["kv_bias"] = torch.stack(biases)[:, None]
        for name in first.tensor_names():
            if name in PAIR_PARTS or getattr(first, name) is None:
                continue
            each = [getattr(layer, name) for layer in layers]
            if each[0].dim() == 2:
                tensors[name] = stack_matrices(each, by_column=for_forward and name != "q")
            else:
                vectors = torch.stack(each)[:, None]
                tensors[name] = vectors[:, None] if per_head and name in ("q_norm", "k_norm") else vectors
        return cls(first.config, **tensors)

    def __getitem__(self, layers: slice) -> StackedLayers:
        """Return some of the layers, without a copy."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[layers] for name, t in tensors.items() if isinstance(t, Tensor)})

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrices, in which products are computed."""
        return self.q.dtype

    def attention_input(self, x: Tensor) -> Tensor:
        """Return RMS(x), (L, n, D), in the compute dtype."""
        return normalise_stack(x, self.attention_norm, self.config).to(self.compute_dtype)

    def queries(self, h: Tensor, rotation: Rotation | None) -> Tensor:
        """Return q = RMSq(Q h), rotated, (L, H, n, K), from h (L, n, D)."""
        return self._normed_heads(linear_stack(h, self.q, self.q_bias), self.q_norm, rotation)

    def pairs(self, h: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Return k = RMSk(K h), rotated, and v = V h, each (L, G, n, K), from h (L, n, D)."""
        k, v = linear_stack(h, self.kv, self.kv_bias).chunk(2, dim=-1)
        v = v.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
        return self._normed_heads(k, self.k_norm, rotation), v

    def keys_before_norm(self, h: Tensor) -> Tensor:
        """Return K h, (L, n, G K), from h (L, n, D)."""
        width = self.kv.shape[1] // 2
        bias = None if self.kv_bias is None else self.kv_bias[:, :, :width]
        return linear_stack(h, self.kv[:, :width], bias)

    def _normed_heads(self, u: Tensor, norm_weight: Tensor | None, rotation: Rotation | None) -> Tensor:
        """Return queries or keys u (L, n, heads K) after QK-norm and rotation, (L, heads, n, K)."""
        dtype, K = u.dtype, self.config.head_width
        if norm_weight is not None and self.config.qk_norm == "full":
            u = normalise_stack(u, norm_weight, self.config)
        u = u.unflatten(-1, (-1, K))
        if norm_weight is not None and self.config.qk_norm == "head":
            u = normalise_stack(u, norm_weight, self.config)
        u = u.transpose(1, 2)
        return (u if rotation is None else rotation(u)).to(dtype)

    def after_attention(self, x: Tensor, a: Tensor) -> Tensor:
        """Return y = x + s O a, (L, n, D), from x (L, n, D) and the attention outputs a (L, n, H K)."""
        return torch.add(x, linear_stack(a, self.o, self.o_bias), alpha=self.config.branch_scale)

    def mlp_inner(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the inner values of the MLP before the activation, `up` and `gate`, (L, n, F), from y (L, n, D)."""
        h = normalise_stack(y, self.mlp_norm, self.config).to(self.compute_dtype)
        gate = None if self.gate is None else linear_stack(h, self.gate, self.gate_bias)
        return linear_stack(h, self.up, self.up_bias), gate

    def after_mlp(self, y: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
        """Return z = y + s MLP(RMS(y)), (L, n, D), from y and the inner values of the MLP."""
        branch = linear_stack(activate(up, gate, self.config), self.down, self.down_bias)
        return torch.add(y, branch, alpha=self.config.branch_scale)


def stack_matrices(matrices: Sequence[Tensor], by_column: bool = False) -> Tensor:
    """Return matrices (out, in) as one tensor (L, out, in), in memory by columns where `by_column`."""
    if by_column:
        return torch.stack([matrix.t() for matrix in matrices]).transpose(1, 2)
    return torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0][None]


def linear_stack(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b of each layer: x (L, n, in), W (L, out, in), b (L, 1, out)."""
    weight = weight.transpose(1, 2)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def normalise_stack(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    """Return the norm of x over its last dimension, in the accumulation dtype, with a weight that broadcasts."""
    x = x.to(accumulation_dtype(x.dtype))
    weight = weight.to(x.dtype)
    if CENTRED_NORMS[config.norm]:
        return F.layer_norm(x, weight.shape[-1:], eps=config.norm_eps) * weight
    # With vector_norm there is one operation over the width: on a CPU, F.rms_norm takes twice as long for a few rows.
    width = x.shape[-1]
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().add(width * config.norm_eps).rsqrt()
    return x * inverse * (weight * width**0.5)
