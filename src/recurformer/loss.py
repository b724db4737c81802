"""Cross-entropy of the output layer, with logits or without ever holding all of them.

262,144 tokens by 32,128 logits are 17 GB in 16 bits. On NVIDIA GPUs liger-kernel's fused kernels compute a few thousand
rows of logits at a time and take the gradient of each block at once. They keep only the gradients of hidden states and
weight. Elsewhere plain operations compute blocks of logits, and compute them again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the target that counts for nothing
LOGITS_AT_ONCE = 2**25  # elements of a block of logits


def mean_over_targets(total: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the token losses divided by the number of real targets; 0 without any."""
    return total / (targets != IGNORE).sum().clamp(min=1)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the token losses in nats, a scalar in at least float32.

    Args:
        logits: (..., V).
        targets: (...) int64, `IGNORE` for none.
    """
    rows = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def chunked_loss(x: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """Return the sum of the token losses, computed on blocks of logits that the backward pass computes again.

    Args:
        x: (B, N, D), the input of the output layer.
        targets: (B, N) int64, `IGNORE` for none.
        logits_of: from (rows, D) to logits (rows, V).
        width: logits of one position, padding included. A block has at most `LOGITS_AT_ONCE` of them.
    """

    def total(part: Tensor, wanted: Tensor) -> Tensor:
        return summed_loss(logits_of(part), wanted)

    rows = max(1, LOGITS_AT_ONCE // width)
    if targets.numel() <= rows:
        return total(x, targets)
    parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    losses = [
        checkpoint(total, part, wanted, use_reentrant=False) if torch.is_grad_enabled() else total(part, wanted)
        for part, wanted in parts
    ]
    return torch.stack(losses).sum()  # pyright: ignore[reportArgumentType]


# --- on NVIDIA GPUs --------------------------------------------------------------------------------------------------


@cache
def liger_loss() -> Any:
    """Return liger-kernel's loss, summed over targets, weight gradient in float32; None when it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)


def fused_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the sum of the token losses -log softmax(weight x)[target], a float32 scalar.

    Args:
        x: (T, D), the input of the output layer.
        weight: (rows, D) in the dtype of x. Rows from `vocab_size` on are padding and count as absent.
        targets: (T,) int64, `IGNORE` for none.
        vocab_size: V.
    """
    bias = None
    if len(weight) > vocab_size:  # cutting the rows off would make products whose width is no multiple of 8: slow
        bias = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
        bias[vocab_size:] = float("-inf")
    return FusedLoss.apply(x, weight, targets, bias)  # pyright: ignore[reportReturnType]


class FusedLoss(torch.autograd.Function):
    """liger-kernel's function without two of its faults.

    The library multiplies saved gradients in place, so that a second backward pass would multiply them twice. It also
    gives no gradient for the weight when x needs none.
    """

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
