"""Cross-entropy of the output layer without its logits: liger-kernel's fused kernels on NVIDIA GPUs.

262,144 tokens by 32,128 logits are 17 GB in 16 bits. The fused loss makes them a few thousand rows at a time, takes the
gradient of each block while it is there, and keeps the gradients of the hidden states and of the weight. Elsewhere, and
without liger-kernel, `LanguageModel` makes blocks of logits with plain operations and makes them again in the backward.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # the target that counts for nothing


@cache
def liger_loss() -> Any:
    """liger-kernel's loss, summed over targets, weight gradient accumulated in float32; None when it isn't there."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)


def fused_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum of the token losses -log softmax(weight x)[target], a float32 scalar.

    Args:
        x: (T, D), what the output layer reads.
        weight: (rows, D) in the dtype of x; rows from `vocab_size` on are padding and count as absent.
        targets: (T,) int64, `IGNORE` for none.
        vocab_size: V.
    """
    bias = None
    if len(weight) > vocab_size:  # cutting them off would leave products whose width is no multiple of 8: slow
        bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        bias[vocab_size:] = float("-inf")
    return FusedLoss.apply(x, weight, targets, bias)  # pyright: ignore[reportReturnType]


class FusedLoss(torch.autograd.Function):
    """The library's function with two of its habits removed: it multiplies saved gradients in place, so that a second
    backward pass would multiply them twice, and it has no gradient for the weight when x needs none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        loss = liger_loss()
        if not any(ctx.needs_input_grad):
            return loss(weight, x, targets, bias)
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(ctx.needs_input_grad[1])
            total = loss(weight, x, targets, bias)
            wanted = [t for t, need in zip((x, weight), ctx.needs_input_grad, strict=False) if need]
            ctx.gradients = torch.autograd.grad(total, wanted)
        return total.detach()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        scaled = [(made * gradients[0]).to(made.dtype) for made in ctx.gradients]
        wanted = [scaled.pop() if need else None for need in reversed(ctx.needs_input_grad[:2])]
        return wanted[1], wanted[0], None, None
