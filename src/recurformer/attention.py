"""Who sees whom, and the attention of standard layers.

First half: `Layout` holds positions, padding, documents, ALiBi slopes and rotary angles of one call, for every scan.
Second half: `parallel_attention`. On NVIDIA GPUs it runs PyTorch's FlexAttention, compiled, which needs no bias tensor:
ALiBi is arithmetic on the indices of a score, and who sees whom is known for blocks of 128 x 128. Elsewhere it runs
scaled_dot_product_attention. Its bias has a bounded size: long calls attend one block of queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recurformer.hardware import FLEX_BLOCK, FLEX_HEAD_WIDTHS, compiler_present

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from recurformer.config import ModelConfig

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BIAS_ELEMENTS = 2**22  # of the bias at once; blocks of this size were no slower than a whole bias at 2k and 4k tokens
BIAS_ELEMENTS_GPU = (
    2**27
)  # 0.5 GB; small blocks would leave a GPU idle: 2 queries each behind 65,536 tokens of 32 heads
RECOMPILE_LIMIT = 64  # with and without gradients, pads, documents, ...: more variants than PyTorch's default of 8

Scores = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


# --- positions, padding, documents ---


def alibi_slopes(n_heads: int, scheme: str = "geometric", *, device: Any = None) -> Tensor:
    """Return the ALiBi slopes (H,), float64, of heads h = 1 ... H.

    Args:
        n_heads: H.
        scheme: "geometric" is 2^(-8h/H) for every H, as in the official code. "interleaved" is Press et al.: if H is no
            power of two, the slopes of the next smaller power of two, then every other slope of the next larger one.
        device: of the result; None: torch's default device.
    """

    def geometric(count: int) -> Tensor:
        return torch.exp2(-8.0 * torch.arange(1, count + 1, dtype=torch.float64, device=device) / count)

    if scheme == "geometric":
        return geometric(n_heads)
    power = 2 ** int(math.log2(n_heads))
    return torch.cat([geometric(power), geometric(2 * power)[0::2][: n_heads - power]])


def rotary_frequencies(config: ModelConfig, device: Any = None) -> Tensor:
    """Return the angle (K/2,) by which RoPE turns pair c of coordinates per position: theta^(-2c/K), in float64."""
    K = config.head_width
    exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64  # MPS lacks float64
    return config.rope_theta ** (-torch.arange(0, K, 2, dtype=exact, device=device) / K)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, each (B or 1, 1, N, K/2)."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, positions: slice) -> Rotation:
        return Rotation(self.cos[:, :, positions], self.sin[:, :, positions])

    def inverse(self) -> Rotation:
        """Return the rotation by the opposite angles."""
        return Rotation(self.cos, -self.sin)

    def __call__(self, u: Tensor) -> Tensor:
        """Return u (B, heads, N, K) rotated. Coordinates c and c + K/2 are a pair (the half-split convention)."""
        first, second = u.to(self.cos.dtype).chunk(2, dim=-1)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat(turned, dim=-1).to(u.dtype)


@dataclass(frozen=True)
class Layout:
    """Positions, padding and documents of the tokens of one call: who sees whom.

    Slots are columns of the batch, 0 ... M-1. The first P of them are in the cache. The *position* of a token is the
    number of real tokens before it in its row and document. A query sees itself, and every earlier slot that holds a
    real token of its own document.
    """

    past: int  # P
    length: int  # N
    positions: Tensor  # (B or 1, M) int64
    valid: Tensor | None = None  # (B, M) bool, False at pads; None: no pads
    documents: Tensor | None = None  # (B, M) int64, non-decreasing; None: one document a row
    slopes: Tensor | None = None  # (H,) in the accumulation dtype; None: no ALiBi
    rotation: Rotation | None = None  # of the N new positions; None: no RoPE

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        length: int,
        *,
        past: int = 0,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> Layout:
        """Return the layout of `length` new tokens behind `past` cached slots.

        Args:
            config: of the model, for its kind of positions.
            length: N.
            past: P.
            valid: (B, P + N) bool, False at pads; None: no pads.
            documents: (B, N) int64, non-decreasing, without a past; None: one document a row.
            dtype: of slopes and rotary angles, the model's accumulation dtype.
            device: of the model; None: torch's default device.
        """
        if valid is None:
            positions = torch.arange(past + length, device=device)[None]
        else:
            positions = valid.cumsum(1) - valid.long()
        if documents is not None:  # positions restart in each document
            begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
            positions = positions - torch.where(begins, positions, 0).cummax(1).values
        slopes = rotation = None
        if config.position == "alibi":
            slopes = alibi_slopes(config.n_heads, config.alibi_slopes, device=device).to(dtype)
        elif config.position == "rope":
            frequencies = rotary_frequencies(config, device)
            angles = positions[:, None, past:, None].to(frequencies.dtype) * frequencies
            rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype))
        return cls(past, length, positions, valid, documents, slopes, rotation)

    @property
    def causal_only(self) -> bool:
        """Whether attention is plain causal attention over the new tokens."""
        return self.past == 0 and self.valid is None and self.documents is None and self.slopes is None

    def visible(self, queries: slice, keys: slice) -> Tensor | None:
        """Return where a query of a block sees a key, (B or 1, 1, q, k) bool; None when all see all.

        Args:
            queries: range of new positions, 0 <= start < stop <= N.
            keys: range of slots, 0 <= start < stop <= M.
        """
        seen: Tensor | None = None
        device = self.positions.device
        i = torch.arange(self.past + queries.start, self.past + queries.stop, device=device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=device)
        if keys.stop > self.past + queries.start + 1:
            seen = (j <= i)[None]
        if self.valid is not None:
            real = self.valid[:, None, keys]
            seen = real if seen is None else seen & real
        if self.documents is not None:
            of_query = self.documents[:, self.past + queries.start : self.past + queries.stop, None]
            same = of_query == self.documents[:, None, keys]
            seen = same if seen is None else seen & same
        if seen is None:
            return None
        if keys.stop > self.past + queries.start:
            seen = seen | (j == i)  # a pad sees itself: no row of scores is ever empty
        return seen[:, None]

    def bias(self, queries: slice, keys: slice) -> Tensor | None:
        """Return what is added to the scaled scores of a block: ALiBi, and -inf where a query does not see a key.

        Args:
            queries: range of new positions, 0 <= start < stop <= N.
            keys: range of slots, 0 <= start < stop <= M.

        Returns:
            (B or 1, H or 1, q, k); None when there is nothing to add.
        """
        bias: Tensor | None = None
        if self.slopes is not None:
            i = self.positions[:, self.past + queries.start : self.past + queries.stop, None]
            distance = (i - self.positions[:, None, keys]).to(self.slopes.dtype)
            bias = -self.slopes[:, None, None] * distance[:, None]
        visible = self.visible(queries, keys)
        if visible is None:
            return bias
        if bias is None:
            bias = torch.zeros((), dtype=torch.float32, device=visible.device)
        return torch.where(visible, bias, float("-inf"))

    def bias_elements(self, queries: int) -> int:
        """Return the number of elements of the bias of so many queries and all keys."""
        rows = 1 if self.valid is None and self.documents is None else len(self.positions)
        heads = 1 if self.slopes is None else len(self.slopes)
        return rows * heads * queries * (self.past + self.length)

    @cached_property
    def earliest(self) -> list[int] | None:
        """The first slot that a query sees in any row, for each new position; None: always slot 0."""
        if self.documents is None:
            return None
        begins = F.pad(self.documents.diff(dim=1) != 0, (1, 0), value=True)
        slots = torch.arange(self.documents.shape[1], device=begins.device)
        return torch.where(begins, slots, 0).cummax(1).values.amin(0).tolist()

    @cached_property
    def full_bias(self) -> Tensor | None:
        """The bias of all N queries and M keys, made once for all layers."""
        return self.bias(slice(0, self.length), slice(0, self.past + self.length))

    @cached_property
    def flex(self) -> tuple[Any, Any]:
        """The bias and the visible blocks as FlexAttention takes them, made once for all layers."""
        return biased_scores(self), visible_blocks(self)


# --- attention of standard layers ---


def flex_applies(q: Tensor, layout: Layout) -> bool:
    """Return whether `flex` can attend: a bias is needed, there is no past, and the kernels take shape and dtype."""
    return (
        q.device.type == "cuda"
        and not layout.causal_only
        and layout.past == 0
        and layout.length >= FLEX_BLOCK
        and q.shape[-1] in FLEX_HEAD_WIDTHS
        and q.dtype in DTYPES
        and compiler_present()
    )


def flex(q: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Return what `parallel_attention` returns, through FlexAttention. Needs `flex_applies`."""
    from torch.nn.attention.flex_attention import flex_attention

    scores, blocks = layout.flex
    return compiled(flex_attention)(q, keys, values, scores, blocks, enable_gqa=q.shape[1] != keys.shape[1])


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled by torch.compile, once in a process: all layers of one shape share the result."""
    import torch._dynamo.config as settings

    # Past the limit PyTorch runs the function uncompiled: FlexAttention would then make all (N, N) scores.
    settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function)


def biased_scores(layout: Layout) -> Scores | None:
    """Return ALiBi as a function of (score, row, head, query, key); None without ALiBi."""
    slopes, positions = layout.slopes, layout.positions
    if slopes is None:
        return None
    if layout.valid is None:  # then positions differ as slots do, within a document too

        def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - slopes[h] * (q - k)

        return alibi

    def alibi_with_pads(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score - slopes[h] * (positions[b, q] - positions[b, k])

    return alibi_with_pads


def visible_blocks(layout: Layout) -> BlockMask:
    """Return who sees whom by blocks: all, none, or (in between) by a function of the indices."""
    from torch.nn.attention.flex_attention import BlockMask

    N, device, valid, documents = layout.length, layout.positions.device, layout.valid, layout.documents
    n = -(-N // FLEX_BLOCK)
    block = torch.arange(n, device=device)
    some, every = (block[:, None] >= block)[None], (block[:, None] > block)[None]  # (B or 1, queries, keys)
    if documents is not None:  # ids do not decrease, so a block's first and last id bound all others
        first, last = documents[:, ::FLEX_BLOCK], documents[:, (block * FLEX_BLOCK + FLEX_BLOCK - 1).clamp(max=N - 1)]
        some = some & (last[:, None, :] >= first[:, :, None])
        every = every & (first[:, None, :] == last[:, :, None])
    if valid is not None:
        whole = F.pad(valid, (0, n * FLEX_BLOCK - N)).unflatten(1, (n, FLEX_BLOCK)).all(2)
        every = every & whole[:, None, :]

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = k <= q
        if documents is not None:
            seen = seen & (documents[b, q] == documents[b, k])
        if valid is not None:
            seen = (seen & valid[b, k]) | (k == q)
        return seen

    def listed(dense: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many blocks of each row are set, and the numbers of all blocks with those first."""
        numbers = dense.int().argsort(dim=-1, descending=True, stable=True)
        return dense.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None].contiguous()

    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(N, N)
    )


def parallel_attention(q: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Return the attention outputs (B, H, N, K) of a standard layer.

    Args:
        q: (B, H, N, K), the queries of the new tokens.
        keys, values: (B, G, M, K), the pairs of past and new tokens.
        layout: positions, padding and documents.
    """
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    if flex_applies(q, layout):
        return flex(q, keys, values, layout)
    grouped = q.shape[1] != keys.shape[1]
    if layout.causal_only:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=layout.length > 1, enable_gqa=grouped)
    limit = BIAS_ELEMENTS_GPU if q.device.type == "cuda" else BIAS_ELEMENTS
    if layout.bias_elements(layout.length) <= limit:
        bias = None if layout.full_bias is None else layout.full_bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, enable_gqa=grouped)
    return attention_by_blocks(q, keys, values, layout, limit)


def attention_by_blocks(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, limit: int) -> Tensor:
    """Return what `parallel_attention` returns, with the bias of one block of queries at a time: `limit` elements.

    A block reads only the keys up to its last query, so long calls take about half the products of a full bias. The
    backward pass makes the bias of each block again.
    """

    def attend(q: Tensor, keys: Tensor, values: Tensor, queries: slice) -> Tensor:
        bias = layout.bias(queries, slice(0, keys.shape[2]))
        return F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=None if bias is None else bias.to(q.dtype),
            enable_gqa=q.shape[1] != keys.shape[1],
        )

    N, size = layout.length, max(1, limit // layout.bias_elements(1))
    outputs = []
    for start in range(0, N, size):
        stop = min(N, start + size)
        seen = slice(0, layout.past + stop)
        block = (q[:, :, start:stop], keys[:, :, seen], values[:, :, seen], slice(start, stop))
        if torch.is_grad_enabled():
            outputs.append(checkpoint(attend, *block, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(attend(*block))
    return torch.cat(outputs, dim=2)
