"""The equations of one layer (paper section 2.2) on plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from recurformer.attention import Rotation
from recurformer.config import ModelConfig


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: residual stream, norm statistics, softmax and loss (design: precision)."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else the weights'. float64 is never lowered."""
    device = weight.device.type
    if device != "meta" and weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def normalise(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    """RMS or layer norm over the last dimension, in the accumulation dtype; the weights of a stack broadcast."""
    x = x.to(accumulation_dtype(x.dtype))
    weight = weight.to(x.dtype)
    if weight.dim() == 1:
        norm = F.rms_norm if config.norm == "rms" else F.layer_norm
        return norm(x, weight.shape, weight, eps=config.norm_eps)
    if config.norm == "layer":
        return F.layer_norm(x, weight.shape[-1:], eps=config.norm_eps) * weight
    # Written out, with one operation over the width: on a CPU F.rms_norm takes twice as long for a position's few rows.
    width = x.shape[-1]
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().add(width * config.norm_eps).rsqrt()
    return x * inverse * (weight * width**0.5)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; of a stack, x (L, n, in) with W (L, out, in) and b (L, 1, out), to each layer its own."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    weight = weight.transpose(1, 2)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def activate(up: Tensor, gate: Tensor | None, config: ModelConfig) -> Tensor:
    """The MLP's inner activation: GELU of `up`, or SiLU(gate) * up."""
    if gate is not None:
        return F.silu(gate) * up
    return F.gelu(up, approximate="tanh" if config.activation == "gelu_tanh" else "none")


@dataclass(frozen=True)
class LayerMaths:
    """The maths of one layer (paper section 2.2) as functions of plain tensors; the only place where it is written.

    Matrices and biases are in the compute dtype, norm weights as stored. `Layer.maths()` fills it from parameters.
    """

    config: ModelConfig
    attention_norm: Tensor  # (D,)
    q: Tensor  # (H K, D)
    k: Tensor  # (G K, D)
    v: Tensor  # (G K, D)
    o: Tensor  # (D, H K)
    mlp_norm: Tensor  # (D,)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    gate: Tensor | None = None  # (F, D), swiglu
    q_norm: Tensor | None = None  # (K,) or (H K,)
    k_norm: Tensor | None = None  # (K,) or (G K,)
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    kv: Tensor | None = None  # (2 G K, D), k above v, where `stack` has made one product of two
    kv_bias: Tensor | None = None

    @classmethod
    def stack(cls, layers: Sequence[LayerMaths], by_column: bool = False) -> LayerMaths:
        """The maths of several layers of one shape at once, for x (L, n, D): n positions of each layer.

        In `pairs` n stands where N does, and L where B does. Matrices become (L, out, in), biases and norm weights
        broadcast against (L, n, width), those of heads against (L, n, G, K); `kv` makes one product of two.

        Args:
            by_column: lay the branches' matrices out for products with few rows of x; else for those with few rows of
                gradients. Projections always are the latter: backward they are to give the very bits of the forward.
        """

        def matrices(*parts: str) -> Tensor:
            joined = [torch.cat([getattr(layer, part) for part in parts]) for layer in layers]
            if by_column and parts[0] in ("o", "up", "gate", "down"):
                return torch.stack([matrix.t() for matrix in joined]).transpose(1, 2)
            return torch.stack(joined) if len(layers) > 1 else joined[0][None]

        first, head = layers[0], layers[0].config.qk_norm == "head"
        tensors: dict[str, Tensor] = {"kv": matrices("k", "v")}
        tensors["k"], tensors["v"] = tensors["kv"].chunk(2, dim=1)
        if first.k_bias is not None and first.v_bias is not None:
            biases = [torch.cat([getattr(layer, name) for name in ("k_bias", "v_bias")]) for layer in layers]
            tensors["kv_bias"] = torch.stack(biases)[:, None]
            tensors["k_bias"], tensors["v_bias"] = tensors["kv_bias"].chunk(2, dim=2)
        for name in (f.name for f in fields(cls)):
            tensor = getattr(first, name)
            if not isinstance(tensor, Tensor) or name in tensors:
                continue
            if tensor.dim() == 2:
                tensors[name] = matrices(name)
            else:
                stacked = torch.stack([getattr(layer, name) for layer in layers])[:, None]
                tensors[name] = stacked[:, None] if head and name in ("q_norm", "k_norm") else stacked
        return cls(first.config, **tensors)

    def __getitem__(self, layers: slice) -> LayerMaths:
        """Some layers of a stack."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[layers] for name, t in tensors.items() if isinstance(t, Tensor)})

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.q.dtype

    def attention_input(self, x: Tensor) -> Tensor:
        """h = RMS(x), (B, N, D), in the compute dtype. Of outputs z it gives what the persistent pairs are made of."""
        return normalise(x, self.attention_norm, self.config).to(self.compute_dtype)

    def projections(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, K) and pairs (B, G, N, K) of x (B, N, D): what a standard layer's attention needs."""
        h = self.attention_input(x)
        return self.queries(h, rotation), *self.pairs(h, rotation)

    def queries(self, h: Tensor, rotation: Rotation | None) -> Tensor:
        """q = RMSq(Q h), rotated; (B, N, D) to (B, H, N, K)."""
        return self._heads(linear(h, self.q, self.q_bias), self.q_norm, rotation)

    def pairs(self, h: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """k = RMSk(K h), rotated, and v = V h; (B, N, D) to two of (B, G, N, K).

        Of RMS(x) these are the temporary pairs k^, v^; of RMS(z) the persistent ones.
        """
        if self.kv is None:
            k, v = linear(h, self.k, self.k_bias), linear(h, self.v, self.v_bias)
        else:
            k, v = linear(h, self.kv, self.kv_bias).chunk(2, dim=-1)
        return self._heads(k, self.k_norm, rotation), self._heads(v, None, None)

    def _heads(self, u: Tensor, norm_weight: Tensor | None, rotation: Rotation | None) -> Tensor:
        dtype, K = u.dtype, self.config.head_width
        if norm_weight is not None and self.config.qk_norm == "full":
            u = normalise(u, norm_weight, self.config)
        u = u.unflatten(-1, (-1, K))
        if norm_weight is not None and self.config.qk_norm == "head":
            u = normalise(u, norm_weight, self.config)
        u = u.transpose(1, 2)
        return (u if rotation is None else rotation(u)).to(dtype)

    def outputs(self, x: Tensor, a: Tensor) -> Tensor:
        """z from the layer's input x (B, N, D) and the attention outputs a (B, H, N, K): both residual branches."""
        y = self.attended(x, a.transpose(1, 2).flatten(2))
        return self.finished(y, *self.mlp_inner(y))

    def attended(self, x: Tensor, a: Tensor) -> Tensor:
        """y = x + s O a, with the heads of a side by side, (..., H K)."""
        return torch.add(x, linear(a, self.o, self.o_bias), alpha=self.config.branch_scale)

    def mlp_inner(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP's inner values before activation, up and (swiglu) gate, (..., F), from y (..., D)."""
        h = normalise(y, self.mlp_norm, self.config).to(self.compute_dtype)
        return linear(h, self.up, self.up_bias), None if self.gate is None else linear(h, self.gate, self.gate_bias)

    def finished(self, y: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
        """z = y + s MLP(RMS(y)), given the MLP's inner values."""
        branch = linear(activate(up, gate, self.config), self.down, self.down_bias)
        return torch.add(y, branch, alpha=self.config.branch_scale)
