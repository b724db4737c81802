"""Attention between blocks of queries and pairs, with running softmax states: the arithmetic under the tiled scan.

Nothing of a layer but its attention is here, and no score matrix larger than QUERY_BLOCK x KEY_BLOCK a head exists.
Shapes: E = B G rows of the attention products, R = H / G query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recurformer.model import Layout

QUERY_BLOCK, KEY_BLOCK = 128, 512  # the largest block of scores that exists at once
PACKED_BLOCK = 32  # of queries, where documents are packed: what a short document does not see is left out


class State(NamedTuple):
    """Running softmax of every query: maximum m and sum l, (E, R, N), and weighted values acc, (E, R, N, K)."""

    m: Tensor
    l: Tensor
    acc: Tensor


class LeafState(NamedTuple):
    """What the queries of one leaf bring to their read: first slot, normalised state, score bias inside the leaf."""

    start: int
    lse: Tensor  # (E, R, S, 1), -inf where nothing has been met yet
    o: Tensor  # (E, R, S, K)
    bias: Tensor | None  # (B or 1, G or 1, R or 1, S, S)

    @staticmethod
    def empty() -> LeafState:
        nothing = torch.empty(0)
        return LeafState(0, nothing, nothing, None)


class Attention:
    """Queries and pairs of one call, in at least float32, and attention between blocks of them.

    Keys are named by position; negative ones are the past's.

    Args:
        layout: positions, padding, documents.
        q: (E, R, N, K), already scaled by 1/sqrt(K).
        k, v: (E, N, K), contiguous; overwritten as persistent pairs become known.
        batch: B.
        past: keys and values (B, G, P, K), or None.
    """

    def __init__(
        self, layout: Layout, batch: int, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> None:
        self.layout, self.past, self.q, self.k, self.v = layout, past, q, k, v
        E, self.R, self.N, self.K = q.shape
        self.B, self.G = batch, E // batch

    @classmethod
    def of(cls, layout: Layout, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None) -> Attention:
        """From queries (B, H, N, K) and pairs (B, G, N, K) as a layer makes them; copies the pairs."""
        (B, H, N, K), G = q.shape, k.shape[1]
        acc = torch.promote_types(q.dtype, torch.float32)
        scaled = (q.to(acc) * K**-0.5).reshape(B * G, H // G, N, K).contiguous()
        k, v = (t.to(acc, copy=True, memory_format=torch.contiguous_format).view(B * G, N, K) for t in (k, v))
        return cls(layout, B, scaled, k, v, past)

    def new_state(self, length: int) -> State:
        """The state of `length` queries that have met nothing."""
        lowest = torch.finfo(self.q.dtype).min / 4  # finite: the state of nothing must not make NaN of -inf - -inf
        shape = (*self.q.shape[:2], length)
        return State(self.q.new_full(shape, lowest), self.q.new_zeros(shape), self.q.new_zeros(*shape, self.K))

    def set_pair(self, position: int, k: Tensor, v: Tensor) -> None:
        """Put the persistent pair (B, G, 1, K) of a position into its slot."""
        self.k[:, position] = k.view(-1, self.K)
        self.v[:, position] = v.view(-1, self.K)

    def blocks(self, queries: slice, keys: slice) -> Iterator[tuple[slice, slice]]:
        """Cut a block into pieces of bounded size; those in which no query sees a key (other documents) are skipped."""
        earliest = self.layout.earliest
        # Scores against the layer's input are as 1 to K: narrow heads get smaller blocks.
        length = PACKED_BLOCK if earliest is not None else min(QUERY_BLOCK, max(16, 2 * self.K))
        for q in cut(queries, length):
            first = keys.start if earliest is None else max(keys.start, earliest[q.start])
            for part in (slice(first, min(keys.stop, 0)), slice(max(first, 0), keys.stop)):
                for k in cut(part, KEY_BLOCK):
                    yield q, k

    def pairs_at(self, keys: slice) -> tuple[Tensor, Tensor]:
        """Keys and values (E, k, K) of a range of positions on one side of 0."""
        if keys.start >= 0:
            return self.k[:, keys], self.v[:, keys]
        assert self.past is not None
        slots = slice(keys.start + self.layout.past, keys.stop + self.layout.past)
        k, v = (t[:, :, slots].to(self.q.dtype).flatten(0, 1) for t in self.past)
        return k, v

    def grouped(self, bias: Tensor | None) -> Tensor | None:
        """A bias (B or 1, H or 1, ...) as (B or 1, G or 1, R or 1, ...)."""
        if bias is None:
            return None
        return bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (self.G, self.R))

    def rows(self, t: Tensor, queries: slice) -> Tensor:
        """(E, R, N, ...) at some queries as (E, R q, ...)."""
        return t[:, :, queries].flatten(1, 2)

    def scores(self, queries: slice, keys: slice, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """Biased scores (E, R q, k) of queries and *strictly earlier* keys; others, and unseen ones, are -inf.

        Args:
            k: (E, k, K), the keys.
            bias: (B or 1, G or 1, R or 1, q, k) when it is known already.
        """
        n, m = queries.stop - queries.start, keys.stop - keys.start
        s = torch.bmm(self.rows(self.q, queries), k.transpose(1, 2))
        if bias is None:
            slots = slice(keys.start + self.layout.past, keys.stop + self.layout.past)
            bias = self.grouped(self.layout.bias(queries, slots))
        if bias is not None:
            s.view(self.B, self.G, self.R, n, m).add_(bias)
        if keys.stop > queries.start:
            i = torch.arange(queries.start, queries.stop, device=s.device)
            j = torch.arange(keys.start, keys.stop, device=s.device)
            s.view(-1, n, m).masked_fill_(j >= i[:, None], float("-inf"))
        return s

    def absorb(self, state: State, queries: slice, keys: slice, origin: int = 0) -> None:
        """Merge strictly earlier keys into the running softmax of queries, in place.

        Args:
            origin: the first query of the state.
        """
        for q, kv in self.blocks(queries, keys):
            k, v = self.pairs_at(kv)
            n = q.stop - q.start
            s = self.scores(q, kv, k).view(-1, self.R, n, kv.stop - kv.start)
            m, l, acc = (t[:, :, q.start - origin : q.stop - origin] for t in state)
            new = torch.maximum(m, s.amax(-1))
            p, decay = s.sub_(new[..., None]).exp_(), (m - new).exp_()
            m.copy_(new)
            l.mul_(decay).add_(p.sum(-1))
            acc.mul_(decay[..., None]).add_(torch.bmm(p.flatten(1, 2), v).view_as(acc))

    def leaf_state(self, state: State, leaf: slice) -> LeafState:
        m, l, acc = (t[:, :, leaf] for t in state)
        o = acc / l.clamp_min(torch.finfo(l.dtype).tiny)[..., None]
        return LeafState(leaf.start, (m + l.log())[..., None], o, self.leaf_bias(leaf))

    def leaf_bias(self, leaf: slice) -> Tensor | None:
        return self.grouped(self.layout.bias(leaf, slice(leaf.start + self.layout.past, leaf.stop + self.layout.past)))

    def read(self, leaf: LeafState, position: int) -> tuple[Tensor, Tensor]:
        """Attention output (E, R, K) and log-sum-exp (E, R) of one position: state, leaf, and its own slot."""
        row, slots = position - leaf.start, slice(leaf.start, position + 1)
        s = torch.bmm(self.q[:, :, position], self.k[:, slots].transpose(1, 2))
        if leaf.bias is not None:
            s.view(self.B, self.G, self.R, -1).add_(leaf.bias[..., row, : row + 1])
        s = torch.cat([leaf.lse[:, :, row], s], dim=-1)  # what was met before counts as one more key, of value o
        m = s.amax(-1, keepdim=True)
        p = s.sub_(m).exp_()
        l = p.sum(-1, keepdim=True)
        a = torch.baddbmm(p[..., :1] * leaf.o[:, :, row], p[..., 1:], self.v[:, slots])
        return a.div_(l), (m + l.log())[..., 0]


def cut(span: slice, length: int) -> Iterator[slice]:
    """Consecutive pieces of at most `length`; none of an empty span."""
    for start in range(span.start, span.stop, length):
        yield slice(start, min(start + length, span.stop))
