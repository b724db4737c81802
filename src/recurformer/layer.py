"""The equations of one layer (paper section 2.2) on plain matrices.

    h_i  = RMS(x_i)                                          attention_input
    q_i  = RMSq(Q h_i)                                       queries
    k^_i = RMSk(K h_i)         v^_i = V h_i                  pairs

    a_i  = attention of q_i to (k_1, v_1) ... (k_{i-1}, v_{i-1}), (k^_i, v^_i)
    y_i  = x_i + s O a_i                                     after_attention
    z_i  = y_i + s MLP(RMS(y_i))                             after_mlp

    k_i  = RMSk(K RMS(z_i))    v_i  = V RMS(z_i)             attention_input, then pairs

z is the layer's output. The temporary pair (k^, v^), called k_tmp and v_tmp in code, is used by its own position only.
The persistent pair (k, v) is used by every later position. `recurformer.scan.reference` computes a and loops over the
positions. A standard layer uses the same equations, with the temporary pairs of all positions in place of (k, v).

Shape legend of the whole package: B batch, N positions, P past ones (in the cache), L layers, D width, F MLP width,
H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from recurformer.attention import Rotation
from recurformer.config import ModelConfig

# --- precision -------------------------------------------------------------------------------------------------------


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32: the dtype of residual stream, norm statistics, softmax and loss."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of matrix products: autocast's where autocast is on, else the weight's.

    Products of a float64 model stay in float64 under autocast.
    """
    device = weight.device.type
    if device != "meta" and weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


# --- parts -----------------------------------------------------------------------------------------------------------


# A new norm needs a name in `config.py` and a function here. The faster forms of the maths then step aside for it until
# they know it too: `recurformer.hardware.CENTRED_NORMS` lists the norms that they know.
NORMS = {"rms": F.rms_norm, "layer": F.layer_norm}


def normalise(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    """Return the RMS norm or layer norm of x over its last dimension, in the accumulation dtype."""
    x = x.to(accumulation_dtype(x.dtype))
    return NORMS[config.norm](x, weight.shape, weight.to(x.dtype), eps=config.norm_eps)


def activate(up: Tensor, gate: Tensor | None, config: ModelConfig) -> Tensor:
    """Return GELU(up), or SiLU(gate) * up where there is a gate."""
    if gate is not None:
        return F.silu(gate) * up
    return F.gelu(up, approximate="tanh" if config.activation == "gelu_tanh" else "none")


# --- the layer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMaths:
    """The weights of one layer and its equations, one method a line of the paper.

    Matrices and biases are in the compute dtype, norm weights are as stored. `Layer.maths()` makes one from parameters.
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
    gate: Tensor | None = None  # (F, D), with activation "swiglu"
    q_norm: Tensor | None = None  # (K,), or (H K,) with qk_norm "full"
    k_norm: Tensor | None = None  # (K,), or (G K,) with qk_norm "full"
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @classmethod
    def tensor_names(cls) -> list[str]:
        """Return the names of the fields that hold a tensor or None."""
        return [f.name for f in fields(cls) if f.name != "config"]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrices, in which products are computed."""
        return self.q.dtype

    def attention_input(self, x: Tensor) -> Tensor:
        """Return RMS(x), (B, N, D), in the compute dtype: h of the layer's input x, or RMS(z) of its output z."""
        return normalise(x, self.attention_norm, self.config).to(self.compute_dtype)

    def queries(self, h: Tensor, rotation: Rotation | None) -> Tensor:
        """Return q = RMSq(Q h), (B, H, N, K), rotated where the model has RoPE, from h (B, N, D)."""
        return self._normed_heads(F.linear(h, self.q, self.q_bias), self.q_norm, rotation)

    def pairs(self, h: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Return k = RMSk(K h), rotated where the model has RoPE, and v = V h, each (B, G, N, K), from h (B, N, D).

        h = RMS(x) gives the temporary pairs, h = RMS(z) the persistent ones.
        """
        k = self._normed_heads(F.linear(h, self.k, self.k_bias), self.k_norm, rotation)
        v = F.linear(h, self.v, self.v_bias)
        return k, v.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)

    def _normed_heads(self, u: Tensor, norm_weight: Tensor | None, rotation: Rotation | None) -> Tensor:
        """Return queries or keys u (B, N, heads K) after QK-norm and rotation, (B, heads, N, K)."""
        dtype = u.dtype
        if norm_weight is not None and self.config.qk_norm == "full":
            u = normalise(u, norm_weight, self.config)
        u = u.unflatten(-1, (-1, self.config.head_width))
        if norm_weight is not None and self.config.qk_norm == "head":
            u = normalise(u, norm_weight, self.config)
        u = u.transpose(1, 2)
        return (u if rotation is None else rotation(u)).to(dtype)

    def after_attention(self, x: Tensor, a: Tensor) -> Tensor:
        """Return y = x + s O a, (B, N, D), from x (B, N, D) and the attention outputs a (B, H, N, K)."""
        branch = F.linear(a.transpose(1, 2).flatten(2), self.o, self.o_bias)
        return torch.add(x, branch, alpha=self.config.branch_scale)

    def after_mlp(self, y: Tensor) -> Tensor:
        """Return z = y + s MLP(RMS(y)), (B, N, D), from y (B, N, D)."""
        h = normalise(y, self.mlp_norm, self.config).to(self.compute_dtype)
        up = F.linear(h, self.up, self.up_bias)
        gate = None if self.gate is None else F.linear(h, self.gate, self.gate_bias)
        branch = F.linear(activate(up, gate, self.config), self.down, self.down_bias)
        return torch.add(y, branch, alpha=self.config.branch_scale)

    # A standard layer runs these two: everything before its attention, and everything after it.

    def projections(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, N, K) and temporary pairs, each (B, G, N, K), of the layer's input x (B, N, D)."""
        h = self.attention_input(x)
        return self.queries(h, rotation), *self.pairs(h, rotation)

    def outputs(self, x: Tensor, a: Tensor) -> Tensor:
        """Return z (B, N, D) from the layer's input x (B, N, D) and the attention outputs a (B, H, N, K)."""
        return self.after_mlp(self.after_attention(x, a))
