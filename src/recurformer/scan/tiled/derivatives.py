"""Derivatives of the parts of a layer, each over many positions at once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from recurformer.hardware import CENTRED_NORMS
from recurformer.layer import accumulation_dtype, activate
from recurformer.scan.tiled.call import position_views

if TYPE_CHECKING:
    from recurformer.attention import Rotation
    from recurformer.config import ModelConfig
    from recurformer.scan.tiled.stack import StackedLayers


class NormTape:
    """A norm `output = xhat * weight` over many positions, and its derivative at one position after the other.

    With xhat = (x - mean x) rstd and the gradient g of the output, the gradient of x is
    `rstd weight g - mean(rstd weight g) - xhat rstd mean(g output)`. An RMS norm has no means of x and no second term.

    Args:
        x: (layers, n, ..., width).
        weight: of a `StackedLayers`.
        config: kind and epsilon of the norm.
    """

    def __init__(self, x: Tensor, weight: Tensor, config: ModelConfig) -> None:
        x = x.to(accumulation_dtype(x.dtype))
        self.centred, weight = CENTRED_NORMS[config.norm], weight.to(x.dtype)[:, None]
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        self.xhat = x * rstd
        self.output = self.xhat * weight
        self.output_rows, self.slope_rows, self.xhat_rows = position_views(
            self.output, rstd * weight, self.xhat * (rstd / -x.shape[-1])
        )

    def backward(self, g: Tensor, row: int, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return the gradient of the input at one position.

        Args:
            g: the gradient of the output there.
            row: the position.
            residual: a gradient that is added to the result.
            out: where to write the result, with a residual only.
        """
        along = (g * self.output_rows[row]).sum(-1, keepdim=True)
        slope = self.slope_rows[row]
        gx = g * slope if residual is None else torch.addcmul(residual, g, slope, out=out)
        if self.centred:
            gx -= (g * slope).mean(-1, keepdim=True)
        return gx.addcmul_(self.xhat_rows[row], along)

    def weight_gradient(self, g: Tensor) -> Tensor:
        """Return the gradient of the weight of each layer, (layers, width), given that of all outputs."""
        return (g * self.xhat).flatten(1, -2).sum(1)


def activation_slopes(up: Tensor, gate: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the activated inner values of the MLP and their elementwise derivatives by `up` and by `gate`."""
    leaves = [t.detach().requires_grad_() for t in (up, gate) if t is not None]
    with torch.enable_grad():
        inner = activate(leaves[0], leaves[1] if gate is not None else None, config)
    slopes = torch.autograd.grad(inner, leaves, torch.ones_like(inner))
    return inner.detach(), slopes[0], slopes[1] if gate is not None else None


class InputProjections:
    """Queries and temporary pairs of several layers at many positions, recorded by autograd.

    Nothing in them is sequential, so that autograd may do the work.

    Args:
        stack: the layers.
        x: their inputs, (layers, n B, D).
        rotation: of heads (layers, heads, n B, K).
        wanted: names of the tensors of a single layer that need a gradient.

    Attributes:
        q: (layers, H, n B, K), not scaled.
        k_tmp, v_tmp: (layers, G, n B, K).
    """

    NAMES = ("attention_norm", "q", "kv", "q_norm", "k_norm", "q_bias", "kv_bias")
    PARTS: ClassVar = {"kv": ("k", "v"), "kv_bias": ("k_bias", "v_bias")}

    def __init__(self, stack: StackedLayers, x: Tensor, rotation: Rotation | None, wanted: set[str]) -> None:
        self.x = x.detach().requires_grad_()
        self.weights = {
            name: getattr(stack, name).detach().requires_grad_(not wanted.isdisjoint(self.PARTS.get(name, (name,))))
            for name in self.NAMES
            if getattr(stack, name) is not None
        }
        with torch.enable_grad():
            stack = replace(stack, **self.weights)
            h = stack.attention_input(self.x)
            self.q = stack.queries(h, rotation)
            self.k_tmp, self.v_tmp = stack.pairs(h, rotation)

    def backward(self, gq: Tensor, gk_tmp: Tensor, gv_tmp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the gradient of x and, by the names of a single layer, those of the weights, stacked."""
        weights = {name: weight for name, weight in self.weights.items() if weight.requires_grad}
        outputs = (self.q, self.k_tmp, self.v_tmp)
        incoming = [g.to(t.dtype) for g, t in zip((gq, gk_tmp, gv_tmp), outputs, strict=True)]
        gx, *gradients = torch.autograd.grad(outputs, (self.x, *weights.values()), incoming)
        by_name: dict[str, Tensor] = {}
        for name, gradient in zip(weights, gradients, strict=True):
            names = self.PARTS.get(name, (name,))
            parts = gradient.chunk(len(names), dim=2 if name == "kv_bias" else 1)
            by_name |= dict(zip(names, parts, strict=True))
        return gx, by_name
