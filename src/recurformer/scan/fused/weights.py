"""Weights of a stack as products read them, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurformer.hardware import QK_NORMS
from recurformer.layer import LayerMaths
from recurformer.scan.fused.shape import EngineShape, LayerSizes

NewBuffer = Callable[..., Tensor]  # Workspace.new_buffer


@dataclass
class PackedWeights:
    """Weights of all layers, packed for the products.

    Matrices (L, out, in) are in the compute dtype. Biases and norm weights (L, width) are float32.
    """

    qkv: Tensor  # Q, K and V, ((H + 2 G) K, D) each layer
    kv: Tensor  # the last rows of qkv
    o: Tensor
    up: Tensor  # up, then gate
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    qkv_bias: Tensor
    kv_bias: Tensor
    o_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor
    slopes: Tensor  # (H,)

    @classmethod
    def empty(cls, shape: EngineShape, new_buffer: NewBuffer) -> PackedWeights:
        """Return buffers for the weights of a stack."""
        L, s, f32 = shape.L, shape.sizes, torch.float32
        norm = QK_NORMS[shape.config.qk_norm]
        q_width, k_width = {0: (1, 1), 1: (s.K, s.K), 2: (s.queries, s.keys)}[norm]
        return cls(
            qkv=new_buffer(L, s.projections, s.D),
            kv=new_buffer(L, s.pairs, s.D),
            o=new_buffer(L, s.D, s.queries),
            up=new_buffer(L, s.inner, s.D),
            down=new_buffer(L, s.D, s.F),
            attention_norm=new_buffer(L, s.D, dtype=f32),
            mlp_norm=new_buffer(L, s.D, dtype=f32),
            q_norm=new_buffer(L, q_width, dtype=f32),
            k_norm=new_buffer(L, k_width, dtype=f32),
            qkv_bias=new_buffer(L, s.projections, dtype=f32),
            kv_bias=new_buffer(L, s.pairs, dtype=f32),
            o_bias=new_buffer(L, s.D, dtype=f32),
            up_bias=new_buffer(L, s.inner, dtype=f32),
            down_bias=new_buffer(L, s.D, dtype=f32),
            slopes=new_buffer(s.H, dtype=f32),
        )

    def load(self, layers: Sequence[LayerMaths], slopes: Tensor | None) -> None:
        """Copy the weights of the layers, one LayerMaths each, and the slopes of ALiBi."""
        for l, layer in enumerate(layers):
            self._load_matrices(l, layer)
            self.attention_norm[l].copy_(layer.attention_norm)
            self.mlp_norm[l].copy_(layer.mlp_norm)
            if layer.q_norm is not None and layer.k_norm is not None:
                self.q_norm[l].copy_(layer.q_norm)
                self.k_norm[l].copy_(layer.k_norm)
            self._load_biases(l, layer)
        if slopes is not None:
            self.slopes.copy_(slopes)

    def _load_matrices(self, l: int, layer: LayerMaths) -> None:
        F = layer.up.shape[0]
        torch.cat([layer.q, layer.k, layer.v], out=self.qkv[l])
        torch.cat([layer.k, layer.v], out=self.kv[l])
        self.o[l].copy_(layer.o)
        self.up[l, :F].copy_(layer.up)
        if layer.gate is not None:
            self.up[l, F:].copy_(layer.gate)
        self.down[l].copy_(layer.down)

    def _load_biases(self, l: int, layer: LayerMaths) -> None:
        F = layer.up.shape[0]
        if layer.q_bias is not None and layer.k_bias is not None and layer.v_bias is not None:
            assert layer.o_bias is not None
            self.qkv_bias[l].copy_(torch.cat([layer.q_bias, layer.k_bias, layer.v_bias]))
            self.kv_bias[l].copy_(self.qkv_bias[l, layer.q.shape[0] :])
            self.o_bias[l].copy_(layer.o_bias)
        if layer.up_bias is not None and layer.down_bias is not None:
            self.up_bias[l, :F].copy_(layer.up_bias)
            if layer.gate_bias is not None:
                self.up_bias[l, F:].copy_(layer.gate_bias)
            self.down_bias[l].copy_(layer.down_bias)


class GradientSums:
    """Sums over positions and batch of the gradients of all weights, float32, in `sums` by name.

    Matrices and biases have the shape of the packed weights. Norm weights have parts, (L, parts, width), which several
    programs fill side by side. `attention_norm` and `k_norm` act on a layer's inputs and on its outputs; the sums of
    the outputs' share are `attention_norm_of_outputs` and `k_norm_of_outputs`.
    """

    def __init__(self, shape: EngineShape, weights: PackedWeights, parts: int, new_buffer: NewBuffer) -> None:
        self.sizes: LayerSizes = shape.sizes
        L, f32, config = shape.L, torch.float32, shape.config
        normed_heads = QK_NORMS[config.qk_norm] > 0
        full = ["qkv", "kv", "o", "up", "down"]
        if config.attention_bias:
            full += ["qkv_bias", "kv_bias", "o_bias"]
        if config.mlp_bias:
            full += ["up_bias", "down_bias"]
        self.sums = {name: new_buffer(*getattr(weights, name).shape, dtype=f32) for name in full}
        for name in ("attention_norm", "q_norm", "k_norm") if normed_heads else ("attention_norm",):
            self.sums[name] = new_buffer(L, parts, getattr(weights, name).shape[1], dtype=f32)
        if normed_heads:
            self.sums["k_norm_of_outputs"] = new_buffer(*weights.k_norm.shape, dtype=f32)
        for name in ("attention_norm_of_outputs", "mlp_norm"):
            self.sums[name] = new_buffer(L, shape.B, self.sizes.D, dtype=f32)

    def __getitem__(self, name: str) -> Tensor:
        return self.sums[name]

    def __contains__(self, name: str) -> bool:
        return name in self.sums

    def zero(self) -> None:
        """Set all sums to 0."""
        for total in self.sums.values():
            total.zero_()

    def of_layer(self, l: int) -> dict[str, Tensor]:
        """Return the gradients of layer l by the names of LayerMaths."""
        sums, queries, keys, F = self.sums, self.sizes.queries, self.sizes.keys, self.sizes.F
        gated = self.sizes.inner > F
        pairs = sums["qkv"][l, queries:] + sums["kv"][l]
        found = {
            "q": sums["qkv"][l, :queries], "k": pairs[:keys], "v": pairs[keys:], "o": sums["o"][l],
            "up": sums["up"][l, :F], "down": sums["down"][l],
        }  # fmt: skip
        if gated:
            found["gate"] = sums["up"][l, F:]
        norms = [name for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm") if name in sums]
        found |= {name: sums[name][l].sum(0) for name in norms}
        found["attention_norm"] += sums["attention_norm_of_outputs"][l].sum(0)
        if "k_norm" in found:
            found["k_norm"] += sums["k_norm_of_outputs"][l]
        if "qkv_bias" in sums:
            pairs = sums["qkv_bias"][l, queries:] + sums["kv_bias"][l]
            found |= {"q_bias": sums["qkv_bias"][l, :queries], "k_bias": pairs[:keys], "v_bias": pairs[keys:]}
            found["o_bias"] = sums["o_bias"][l]
        if "up_bias" in sums:
            found["up_bias"] = sums["up_bias"][l, :F]
            if gated:
                found["gate_bias"] = sums["up_bias"][l, F:]
            found["down_bias"] = sums["down_bias"][l]
        return found
