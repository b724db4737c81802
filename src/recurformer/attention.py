"""Attention of standard layers on NVIDIA GPUs without a bias tensor: PyTorch's FlexAttention, compiled.

ALiBi is arithmetic on a score's indices, and who sees whom is known block by block of 128 x 128, so neither a bias
(H, N, N) nor a mask (B, N, N) is ever made, and blocks in which nobody sees anything are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from recurformer.config import ModelConfig
    from recurformer.model import Layout

BLOCK = 128  # queries and keys of a block; shorter sequences take scaled_dot_product_attention
WIDTHS = range(16, 129)  # head widths K
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RECOMPILE_LIMIT = 64  # with and without gradients, pads, documents, ...: more variants than PyTorch's default of 8

Scores = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def choose_attention(config: ModelConfig, device: torch.device) -> tuple[str, str]:
    """What the standard layers of a model run on a device, and why, in words."""
    if device.type != "cuda" or not compiler_present():
        return "sdpa", "scaled_dot_product_attention"
    if config.head_width not in WIDTHS:
        return "sdpa", f"FlexAttention takes heads of {WIDTHS[0]} to {WIDTHS[-1]}, not {config.head_width}"
    when = "" if config.position == "alibi" else "with pads or documents, "
    return "flex", f"FlexAttention {when}from {BLOCK} tokens on; else scaled_dot_product_attention"


@cache
def compiler_present() -> bool:
    """Whether torch.compile can make kernels for an NVIDIA GPU."""
    return torch.version.hip is None and util.find_spec("triton") is not None


def flex_applies(q: Tensor, layout: Layout) -> bool:
    """Whether `flex` can attend: a bias is needed, from an empty memory, in shapes and dtypes that its kernels take."""
    return (
        q.device.type == "cuda"
        and not layout.causal_only
        and layout.past == 0
        and layout.length >= BLOCK
        and q.shape[-1] in WIDTHS
        and q.dtype in DTYPES
        and compiler_present()
    )


def flex(q: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """As `parallel_attention`, for what `flex_applies` to."""
    from torch.nn.attention.flex_attention import flex_attention

    scores, blocks = layout.flex
    return compiled(flex_attention)(q, keys, values, scores, blocks, enable_gqa=q.shape[1] != keys.shape[1])


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function through torch.compile, once a process: all layers of one shape share the result."""
    import torch._dynamo.config as settings

    # Past the limit PyTorch goes on without compiling: FlexAttention would make all (N, N) scores.
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function)


def biased_scores(layout: Layout) -> Scores | None:
    """ALiBi as a function of (score, row, head, query, key); None without ALiBi."""
    slopes, positions = layout.slopes, layout.positions
    if slopes is None:
        return None
    if layout.valid is None:  # without pads positions differ as slots do, within a document too

        def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - slopes[h] * (q - k)

        return alibi

    def alibi_with_pads(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[h] * (positions[b, q] - positions[b, k])

    return alibi_with_pads


def visible_blocks(layout: Layout) -> BlockMask:
    """Who sees whom, as `Layout.visible`, by blocks: all, none, or (in between) by a function of the indices."""
    from torch.nn.attention.flex_attention import BlockMask

    N, device, valid, documents = layout.length, layout.positions.device, layout.valid, layout.documents
    n = -(-N // BLOCK)
    block = torch.arange(n, device=device)
    some, every = (block[:, None] >= block)[None], (block[:, None] > block)[None]  # (B or 1, queries, keys)
    if documents is not None:  # ids do not decrease, so a block's first and last say what is between
        first, last = documents[:, ::BLOCK], documents[:, (block * BLOCK + BLOCK - 1).clamp(max=N - 1)]
        some = some & (last[:, None, :] >= first[:, :, None])
        every = every & (first[:, None, :] == last[:, :, None])
    if valid is not None:
        whole = F.pad(valid, (0, n * BLOCK - N)).unflatten(1, (n, BLOCK)).all(2)
        every = every & whole[:, None, :]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q
        if documents is not None:
            seen = seen & (documents[b, q] == documents[b, k])
        if valid is not None:
            seen = (seen & valid[b, k]) | (k == q)
        return seen

    def listed(dense: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row of blocks, how many are set, and their numbers before all others'."""
        numbers = dense.int().argsort(dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None].contiguous()

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(N, N)
    )
