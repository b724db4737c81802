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
    from recurformer.attention import Layout

QUERY_BLOCK, KEY_BLOCK = 128, 512  # the largest block of scores that exists at once
PACKED_BLOCK = 32  # of queries, where documents are packed: what a short document does not see is left out


class State(NamedTuple):
    """Running softmax of every query: maximum m and sum l, (E, R, N), and weighted values acc, (E, R, N, K)."""

    m: Tensor
    l: Tensor
    acc: Tensor


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

    def fill(self, positions: slice, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take over queries (B, H, n, K) and pairs (B, G, n, K) of a range of positions as a layer makes them."""
        to_q, to_k, to_v = (t.view(self.B, -1, self.N, self.K)[:, :, positions] for t in (self.q, self.k, self.v))
        torch.mul(q.to(to_q.dtype), self.K**-0.5, out=to_q)
        to_k.copy_(k)
        to_v.copy_(v)

    def new_state(self, length: int) -> State:
        """The state of `length` queries that have met nothing."""
        lowest = torch.finfo(self.q.dtype).min / 4  # finite: the state of nothing must not make NaN of -inf - -inf
        shape = (*self.q.shape[:2], length)
        return State(self.q.new_full(shape, lowest), self.q.new_zeros(shape), self.q.new_zeros(*shape, self.K))

    def blocks(self, queries: slice, keys: slice) -> Iterator[tuple[slice, slice]]:
        """Cut a block into pieces of bounded size; those in which no query sees a key (other documents) are skipped."""
        earliest = self.layout.earliest
        # Scores against the layer's input are as 1 to K: narrow heads get smaller blocks.
        length = PACKED_BLOCK if earliest is not None else min(QUERY_BLOCK, max(8, 2 * self.K))
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

    def scores(self, queries: slice, keys: slice, k: Tensor) -> Tensor:
        """Biased scores (E, R q, k) of queries and *strictly earlier* keys (E, k, K); others, and unseen ones, -inf."""
        n, m = queries.stop - queries.start, keys.stop - keys.start
        s = torch.bmm(self.rows(self.q, queries), k.transpose(1, 2))
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

    def leaf_bias(self, leaf: slice) -> Tensor | None:
        """What is added to the scores inside a leaf, (B or 1, G or 1, R or 1, S, S)."""
        return self.grouped(self.layout.bias(leaf, slice(leaf.start + self.layout.past, leaf.stop + self.layout.past)))


class Leaf:
    """The pairs of one leaf as its queries read them, one after the other; one object serves all leaves of a call.

    Several layers, each at a leaf of its own, are read side by side: their rows E follow each other.

    What a query has met before the leaf, a normalised state, counts as one more key in front of the leaf's own: its
    score is the state's log-sum-exp, its value the state's output, which differs from query to query.
    """

    def __init__(self, attention: Attention, side: int, layers: int = 1) -> None:
        """Make room.

        Args:
            attention: of one of the layers, which are all of one shape.
            side: the most positions of a leaf.
        """
        q, B, G, R, K = attention.q, attention.B, attention.G, attention.R, attention.K
        self.E = B * G
        E = layers * self.E
        self.k, self.v = q.new_zeros(2, E, 1 + side, K)  # slot 0: of the state, zero in both
        self.scores = q.new_zeros(E, R, side, 1 + side)  # before the product of queries and keys
        self.q, self.o = q.new_zeros(2, E, R, side, K)
        # Views for every row, made once: in the loop over positions each would cost as much as a small operation.
        upto = [slice(0, row + 2) for row in range(side)]
        self.k_upto = [self.k[:, slots].transpose(1, 2) for slots in upto]
        self.v_upto = [self.v[:, slots] for slots in upto]
        self.scores_upto = [self.scores[:, :, row, slots] for row, slots in enumerate(upto)]
        self.q_rows, self.o_rows = self.q.unbind(2), self.o.unbind(2)
        self.k_slots, self.v_slots = (
            t.view(layers, B, G, 1 + side, K).transpose(1, 2).unbind(3)[1:] for t in (self.k, self.v)
        )
        self.peaks: list[tuple[Tensor, Tensor]] = []

    def begin(self, layer: int, attention: Attention, state: State, positions: slice, origin: int = 0) -> None:
        """Take over a layer's temporary pairs and complete states of the leaf's positions.

        Args:
            layer: its place among those side by side.
            origin: the first query of the state.
        """
        n, rows = positions.stop - positions.start, slice(layer * self.E, (layer + 1) * self.E)
        m, l, acc = (t[:, :, positions.start - origin : positions.stop - origin] for t in state)
        self.k[rows, 1 : n + 1], self.v[rows, 1 : n + 1] = attention.k[:, positions], attention.v[:, positions]
        self.scores[rows, :, :n, 0] = m + l.log()  # -inf where nothing has been met
        bias = attention.leaf_bias(positions)
        if bias is not None:
            self.scores[rows].unflatten(0, (attention.B, -1))[..., :n, 1 : n + 1] = bias
        torch.div(acc, l.clamp_min(torch.finfo(l.dtype).tiny)[..., None], out=self.o[rows, :, :n])
        self.q[rows, :, :n] = attention.q[:, :, positions]
        self.peaks = []

    def read(self, row: int) -> Tensor:
        """Attention outputs (E, R, K) of one position of each layer: state, leaf, and its own slot."""
        s = torch.baddbmm(self.scores_upto[row], self.q_rows[row], self.k_upto[row])
        p = s.softmax(dim=-1)
        self.peaks.append((s.amax(-1), p.amax(-1)))
        return torch.baddbmm(p[..., :1] * self.o_rows[row], p, self.v_upto[row])

    def log_sum_exp(self) -> Tensor:
        """Of all scores of a position, (layers, E, R, S): the largest of them less the logarithm of its probability."""
        s, p = (torch.stack(peaks, dim=-1) for peaks in zip(*self.peaks, strict=True))
        return (s - p.log()).unflatten(0, (-1, self.E))

    def set_pair(self, row: int, k: Tensor, v: Tensor) -> None:
        """Put the persistent pairs (layers, G, B, K) of a position into their slots."""
        self.k_slots[row].copy_(k)
        self.v_slots[row].copy_(v)

    def end(self, layer: int, attention: Attention, positions: slice) -> None:
        """Hand a layer's persistent pairs to the blocks of later queries."""
        slots, rows = slice(1, 1 + positions.stop - positions.start), slice(layer * self.E, (layer + 1) * self.E)
        attention.k[:, positions], attention.v[:, positions] = self.k[rows, slots], self.v[rows, slots]


class LeafGradients:
    """The mirror of `Leaf`: positions from last to first, gradients of pairs out, gradients of attention outputs in.

    Keys and queries of a leaf are all known, hence their probabilities; a query's gradients of scores are when its ga
    is. Keys and values stand beside each other, (B, 2, G, ...), so that one product serves both.
    """

    def __init__(self, attentions: list[Attention], spans: list[slice], lse: list[Tensor], gkv: list[Tensor]) -> None:
        """Begin a leaf of each layer.

        Args:
            attentions, spans: of each layer, and its n positions.
            lse: of each layer, (E, R, N).
            gkv: of each layer, (B, 2, G, N, K), what queries behind the leaf have sent to its pairs.
        """
        one, L, n = attentions[0], len(attentions), spans[0].stop - spans[0].start
        B, G, R, K = one.B, one.G, one.R, one.K
        by_key = one.q.new_zeros(L, B, 2, G, n, R, n)  # gradients of scores, zero until known, and probabilities
        met = one.q.new_zeros(L, B, 2, G, R, n, K)  # what they are multiplied with: queries and ga
        p = one.q.new_empty(L, B, G, R, n, n)
        for layer, (attention, span) in enumerate(zip(attentions, spans, strict=True)):
            scores = attention.scores(span, span, attention.k[:, span])
            torch.exp(scores.sub_(lse[layer][:, :, span].flatten(1)[..., None]).view_as(p[layer]), out=p[layer])
            met[layer, :, 0] = attention.q[:, :, span].view(B, G, R, n, K)
        by_key[:, :, 1] = p.permute(0, 1, 2, 5, 3, 4)
        self.ga, self.met = met[:, :, 1], met.view(-1, R * n, K)
        self.v = torch.cat([t.v[:, span] for t, span in zip(attentions, spans, strict=True)]).transpose(1, 2)
        # Views for every row, made once.
        sent = [t[:, :, :, span].reshape(-1, n, K) for t, span in zip(gkv, spans, strict=True)]
        self.sent_before = torch.cat(sent).split(1, dim=1)
        self.by_key = by_key.view(-1, n, R * n).split(1, dim=1)
        self.p_rows, self.ga_rows = p.unbind(4), self.ga.unbind(4)
        self.ds = by_key[:, :, 0]  # (layers, B, G, keys, R, queries)
        self.ds_rows = self.ds.transpose(3, 4).unbind(-1)

    def pair(self, row: int) -> Tensor:
        """The complete gradients of a position's pairs, key beside value, (layers B 2 G, 1, K)."""
        return torch.baddbmm(self.sent_before[row], self.by_key[row], self.met)

    def meet(self, row: int, ga: Tensor, a: Tensor) -> None:
        """Take in the gradients ga of a position's attention outputs a, both (layers, B, H K)."""
        ga_row, p = self.ga_rows[row], self.p_rows[row]
        ga, a = ga.view(ga_row.shape), a.view(ga_row.shape)
        ga_row.copy_(ga)
        ds = torch.bmm(ga.view(-1, *ga.shape[3:]), self.v).view(p.shape).sub_((ga * a).sum(-1, keepdim=True))
        torch.mul(ds, p, out=self.ds_rows[row])

    def queries(self, layer: int, k: Tensor) -> Tensor:
        """What a leaf's keys k (E, n, K) send to the gradients of its scaled queries, (E, R, n, K), at its end."""
        ds = self.ds[layer].permute(0, 1, 3, 4, 2)  # (B, G, R, n, keys)
        return torch.bmm(ds.reshape(k.shape[0], -1, k.shape[1]), k).unflatten(1, (ds.shape[2], -1))


def cut(span: slice, length: int) -> Iterator[slice]:
    """Consecutive pieces of at most `length`; none of an empty span."""
    for start in range(span.start, span.stop, length):
        yield slice(start, min(start + length, span.stop))
