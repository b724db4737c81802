"""The shape of a stack: everything that its buffers and recorded graphs depend on. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from recurformer.config import ModelConfig


@dataclass(frozen=True)
class LayerSizes:
    """Widths of one layer."""

    D: int
    F: int
    H: int
    G: int
    K: int
    inner: int  # the MLP's inner values before the activation: F, or 2 F with a gate

    @classmethod
    def of(cls, config: ModelConfig) -> LayerSizes:
        """Return the widths of a configuration's layers."""
        F = config.mlp_width
        inner = 2 * F if config.activation == "swiglu" else F
        return cls(config.d_model, F, config.n_heads, config.kv_heads, config.head_width, inner)

    @property
    def queries(self) -> int:
        """H K, the width of all query heads and of the attention outputs."""
        return self.H * self.K

    @property
    def keys(self) -> int:
        """G K, the width of all key heads; values have the same."""
        return self.G * self.K

    @property
    def pairs(self) -> int:
        """2 G K, the width of keys and values."""
        return 2 * self.keys

    @property
    def projections(self) -> int:
        """(H + 2 G) K, the width of the products with Q, K and V."""
        return self.queries + self.pairs


@dataclass(frozen=True)
class EngineShape:
    """Everything that the buffers and graphs of an engine depend on.

    N and P do not belong to it, because the table holds them.
    """

    config: ModelConfig  # of one layer; the number of layers and the vocabulary do not matter
    L: int
    B: int
    C: int
    leaf: int  # positions of the forward that read each other directly
    leaf_backward: int  # the same of the backward, whose kernels gain more from larger leaves
    dtype: torch.dtype
    device: torch.device
    segmented: bool  # padding or documents limit which keys a query sees
    keeps_attention: bool  # the forward keeps attention outputs and log-sum-exps for a backward
    keeps_inner: bool  # and the MLP's inner values
    keeps_raw: bool  # and the products with Q, K and V, ahead of their norms
    branch_scale: float
    product_settings: tuple[Any, ...] = ()  # PyTorch's precision settings, which a recorded product keeps

    @cached_property
    def sizes(self) -> LayerSizes:
        """Widths of a layer."""
        return LayerSizes.of(self.config)

    def whole(self, length: int) -> int:
        """Return N rounded up to chunks."""
        return -(-length // self.C) * self.C

    def steps(self, length: int) -> int:
        """Return the steps of a pass: one for each chunk, and one more for each further layer."""
        return self.whole(length) // self.C + self.L - 1


def product_settings(device: torch.device) -> tuple[Any, ...]:
    """Return PyTorch's settings that change products on a GPU; empty on other devices."""
    if device.type != "cuda":
        return ()
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
