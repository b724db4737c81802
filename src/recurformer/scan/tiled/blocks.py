"""Attention between blocks of queries and pairs with running softmax states: the arithmetic below the tiled scan.

No matrix of scores larger than QUERY_BLOCK x KEY_BLOCK per head exists.

Shapes: E = B G rows of the attention products, R = H / G query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from recurformer.scan.schedule import Block

if TYPE_CHECKING:
    from recurformer.attention import Layout

QUERY_BLOCK, KEY_BLOCK = 128, 512  # queries and keys of the largest block of scores that exists at once
PACKED_BLOCK = 32  # queries of a block with packed documents: the shorter a block, the more keys it can leave out


class SoftmaxState(NamedTuple):
    """The running softmax of each query: maximum m and sum l, (E, R, N), and weighted values acc, (E, R, N, K)."""

    m: Tensor
    l: Tensor
    acc: Tensor


class Attention:
    """The queries and pairs of one layer in at least float32, and attention between blocks of them.

    Keys are named by position. Negative keys are slots of the past.

    Args:
        layout: positions, padding and documents.
        batch: B.
        q: (E, R, N, K), already scaled by 1/sqrt(K).
        k, v: (E, N, K), contiguous. Persistent pairs overwrite the temporary ones as they become known.
        past: keys and values (B, G, P, K), or None.
    """

    def __init__(
        self, layout: Layout, batch: int, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> None:
        self.layout, self.past, self.q, self.k, self.v = layout, past, q, k, v
        E, self.R, self.N, self.K = q.shape
        self.B, self.G = batch, E // batch

    def fill(self, positions: slice, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Store unscaled queries (B, H, n, K) and pairs (B, G, n, K) of a range of positions."""
        to_q, to_k, to_v = (t.view(self.B, -1, self.N, self.K)[:, :, positions] for t in (self.q, self.k, self.v))
        torch.mul(q.to(to_q.dtype), self.K**-0.5, out=to_q)
        to_k.copy_(k)
        to_v.copy_(v)

    def new_state(self, length: int) -> SoftmaxState:
        """Return the state of `length` queries before their first key."""
        lowest = torch.finfo(self.q.dtype).min / 4  # finite, because -inf - -inf would be NaN
        shape = (*self.q.shape[:2], length)
        m, l, acc = self.q.new_full(shape, lowest), self.q.new_zeros(shape), self.q.new_zeros(*shape, self.K)
        return SoftmaxState(m, l, acc)

    def pieces(self, block: Block) -> Iterator[Block]:
        """Cut a block into pieces of bounded size, without those in which no query sees a key (other documents)."""
        earliest = self.layout.earliest
        # A query takes K numbers and a score one. Smaller blocks for narrow heads keep scores small beside the queries.
        length = PACKED_BLOCK if earliest is not None else min(QUERY_BLOCK, max(8, 2 * self.K))
        for queries in cut(block.queries, length):
            first = block.keys.start if earliest is None else max(block.keys.start, earliest[queries.start])
            for side in (slice(first, min(block.keys.stop, 0)), slice(max(first, 0), block.keys.stop)):
                for keys in cut(side, KEY_BLOCK):
                    yield Block(keys, queries)

    def pairs_at(self, keys: slice) -> tuple[Tensor, Tensor]:
        """Return keys and values (E, k, K) of a range of positions, all negative or none."""
        if keys.start >= 0:
            return self.k[:, keys], self.v[:, keys]
        assert self.past is not None
        slots = slice(keys.start + self.layout.past, keys.stop + self.layout.past)
        k, v = (t[:, :, slots].to(self.q.dtype).flatten(0, 1) for t in self.past)
        return k, v

    def grouped(self, bias: Tensor | None) -> Tensor | None:
        """Return a bias (B or 1, H or 1, ...) as (B or 1, G or 1, R or 1, ...)."""
        if bias is None:
            return None
        return bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (self.G, self.R))

    def rows(self, t: Tensor, queries: slice) -> Tensor:
        """Return t (E, R, N, ...) at some queries as (E, R q, ...)."""
        return t[:, :, queries].flatten(1, 2)

    def scores(self, queries: slice, keys: slice, k: Tensor) -> Tensor:
        """Return the biased scores (E, R q, k) of queries and strictly earlier keys k (E, k, K).

        A score is -inf where the key is not earlier or where the query does not see it.
        """
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

    def merge(self, state: SoftmaxState, block: Block, first: int = 0) -> None:
        """Merge the strictly earlier keys of a block into the softmax states of its queries, in place.

        Args:
            state: of consecutive queries.
            block: its queries are among those of the state.
            first: the first query of the state.
        """
        for keys, queries in self.pieces(block):
            k, v = self.pairs_at(keys)
            n = queries.stop - queries.start
            s = self.scores(queries, keys, k).view(-1, self.R, n, keys.stop - keys.start)
            m, l, acc = (t[:, :, queries.start - first : queries.stop - first] for t in state)
            new = torch.maximum(m, s.amax(-1))
            p, decay = s.sub_(new[..., None]).exp_(), (m - new).exp_()
            m.copy_(new)
            l.mul_(decay).add_(p.sum(-1))
            acc.mul_(decay[..., None]).add_(torch.bmm(p.flatten(1, 2), v).view_as(acc))

    def leaf_bias(self, leaf: slice) -> Tensor | None:
        """Return the bias of the scores inside a leaf, (B or 1, G or 1, R or 1, S, S)."""
        return self.grouped(self.layout.bias(leaf, slice(leaf.start + self.layout.past, leaf.stop + self.layout.past)))


class Leaf:
    """The pairs of one leaf, which its queries read one after the other. One object serves all leaves of a wave.

    Several layers are read together, each at a leaf of its own: their rows E follow each other.

    The slot of a position holds its temporary pair until its persistent pair is known. One product with all slots up
    to its own therefore reaches exactly the pairs that a query attends to. The state of a query before the leaf counts
    as one more key in front of these slots: its score is the log-sum-exp of the state, its value the output of the
    state, which is different for each query.
    """

    def __init__(self, attention: Attention, side: int, layers: int = 1) -> None:
        """Allocate the buffers.

        Args:
            attention: of one of the layers, which all have the same shape.
            side: the most positions of a leaf.
            layers: how many are read together.
        """
        q, B, G, R, K = attention.q, attention.B, attention.G, attention.R, attention.K
        self.E = B * G
        E = layers * self.E
        self.k, self.v = q.new_zeros(2, E, 1 + side, K)  # slot 0 belongs to the state and stays zero
        self.scores = q.new_zeros(E, R, side, 1 + side)  # without the product of queries and keys
        self.q, self.state_output = q.new_zeros(2, E, R, side, K)
        # The views of each row are made once: inside the loop, making one costs as much as a small operation.
        upto = [slice(0, row + 2) for row in range(side)]
        self.k_upto = [self.k[:, slots].transpose(1, 2) for slots in upto]
        self.v_upto = [self.v[:, slots] for slots in upto]
        self.scores_upto = [self.scores[:, :, row, slots] for row, slots in enumerate(upto)]
        self.q_rows, self.state_output_rows = self.q.unbind(2), self.state_output.unbind(2)
        self.k_slots, self.v_slots = (
            t.view(layers, B, G, 1 + side, K).transpose(1, 2).unbind(3)[1:] for t in (self.k, self.v)
        )
        self.largest: list[tuple[Tensor, Tensor]] = []  # score and probability, of each position so far

    def load(self, place: int, attention: Attention, state: SoftmaxState, positions: slice, first: int = 0) -> None:
        """Copy one layer's temporary pairs, queries and states of the positions of a leaf into the buffers.

        Args:
            place: of the layer among those that are read together.
            attention: of the layer.
            state: its queries have met all pairs before the leaf.
            positions: of the leaf.
            first: the first query of the state.
        """
        n, rows = positions.stop - positions.start, slice(place * self.E, (place + 1) * self.E)
        m, l, acc = (t[:, :, positions.start - first : positions.stop - first] for t in state)
        self.k[rows, 1 : n + 1], self.v[rows, 1 : n + 1] = attention.k[:, positions], attention.v[:, positions]
        self.scores[rows, :, :n, 0] = m + l.log()  # -inf where the state has met no key
        bias = attention.leaf_bias(positions)
        if bias is not None:
            self.scores[rows].unflatten(0, (attention.B, -1))[..., :n, 1 : n + 1] = bias
        torch.div(acc, l.clamp_min(torch.finfo(l.dtype).tiny)[..., None], out=self.state_output[rows, :, :n])
        self.q[rows, :, :n] = attention.q[:, :, positions]
        self.largest = []

    def attend(self, row: int) -> Tensor:
        """Return the attention outputs (E, R, K) of one position of each layer, rows in order from 0."""
        s = torch.baddbmm(self.scores_upto[row], self.q_rows[row], self.k_upto[row])
        p = s.softmax(dim=-1)
        self.largest.append((s.amax(-1), p.amax(-1)))
        return torch.baddbmm(p[..., :1] * self.state_output_rows[row], p, self.v_upto[row])

    def log_sum_exp(self) -> Tensor:
        """Return the log-sum-exp of the scores of each position so far, (layers, E, R, S).

        It is the largest score less the logarithm of that score's probability.
        """
        s, p = (torch.stack(values, dim=-1) for values in zip(*self.largest, strict=True))
        return (s - p.log()).unflatten(0, (-1, self.E))

    def set_pair(self, row: int, k: Tensor, v: Tensor) -> None:
        """Replace the temporary pairs of a position by the persistent ones, (layers, G, B, K) each."""
        self.k_slots[row].copy_(k)
        self.v_slots[row].copy_(v)

    def store_pairs(self, place: int, attention: Attention, positions: slice) -> None:
        """Copy one layer's persistent pairs to where the blocks of later queries read them."""
        slots, rows = slice(1, 1 + positions.stop - positions.start), slice(place * self.E, (place + 1) * self.E)
        attention.k[:, positions], attention.v[:, positions] = self.k[rows, slots], self.v[rows, slots]


class LeafGradients:
    """The mirror of `Leaf`, from the last position to the first: it gives the gradients of a position's pairs and takes
    the gradients ga of its attention outputs a.

    All keys and queries of a leaf are known here, so their probabilities p are computed at once. The gradients ds of a
    query's scores follow when its ga arrives. Keys and values are side by side, (B, 2, G, ...), so that one product
    gives the gradients of both: gk_j sums ds_ij q_i, and gv_j sums p_ij ga_i.
    """

    def __init__(self, attentions: list[Attention], spans: list[slice], lse: list[Tensor], gkv: list[Tensor]) -> None:
        """Begin one leaf of each layer.

        Args:
            attentions: of each layer.
            spans: the n positions of each layer.
            lse: log-sum-exp of the queries of each layer, (E, R, N).
            gkv: gradients of the pairs of each layer from queries behind the leaf, (B, 2, G, N, K).
        """
        one, L, n = attentions[0], len(attentions), spans[0].stop - spans[0].start
        B, G, R, K = one.B, one.G, one.R, one.K
        weights = one.q.new_zeros(L, B, 2, G, n, R, n)  # ds, which is zero until it is known, and p; by key
        vectors = one.q.new_zeros(L, B, 2, G, R, n, K)  # q and ga, which the weights are multiplied by
        p = one.q.new_empty(L, B, G, R, n, n)
        for layer, (attention, span) in enumerate(zip(attentions, spans, strict=True)):
            scores = attention.scores(span, span, attention.k[:, span])
            torch.exp(scores.sub_(lse[layer][:, :, span].flatten(1)[..., None]).view_as(p[layer]), out=p[layer])
            vectors[layer, :, 0] = attention.q[:, :, span].view(B, G, R, n, K)
        weights[:, :, 1] = p.permute(0, 1, 2, 5, 3, 4)
        self.ga, self.vectors = vectors[:, :, 1], vectors.view(-1, R * n, K)
        self.v = torch.cat([t.v[:, span] for t, span in zip(attentions, spans, strict=True)]).transpose(1, 2)
        # The views of each row are made once, as in `Leaf`.
        from_later = [t[:, :, :, span].reshape(-1, n, K) for t, span in zip(gkv, spans, strict=True)]
        self.from_later_rows = torch.cat(from_later).split(1, dim=1)
        self.weight_rows = weights.view(-1, n, R * n).split(1, dim=1)
        self.p_rows, self.ga_rows = p.unbind(4), self.ga.unbind(4)
        self.ds = weights[:, :, 0]  # (layers, B, G, keys, R, queries)
        self.ds_rows = self.ds.transpose(3, 4).unbind(-1)

    def pair_gradient(self, row: int) -> Tensor:
        """Return the complete gradients of a position's pairs, keys beside values, (layers B 2 G, 1, K)."""
        return torch.baddbmm(self.from_later_rows[row], self.weight_rows[row], self.vectors)

    def add_query(self, row: int, ga: Tensor, a: Tensor) -> None:
        """Take the gradients ga of a position's attention outputs a, both (layers, B, H K)."""
        ga_row, p = self.ga_rows[row], self.p_rows[row]
        ga, a = ga.view(ga_row.shape), a.view(ga_row.shape)
        ga_row.copy_(ga)
        ds = torch.bmm(ga.view(-1, *ga.shape[3:]), self.v).view(p.shape).sub_((ga * a).sum(-1, keepdim=True))
        torch.mul(ds, p, out=self.ds_rows[row])

    def query_gradients(self, place: int, k: Tensor) -> Tensor:
        """Return the gradients of one layer's scaled queries from the keys k (E, n, K) of its leaf, (E, R, n, K).

        All positions must have gone through `add_query`.
        """
        ds = self.ds[place].permute(0, 1, 3, 4, 2)  # (B, G, R, n, keys)
        return torch.bmm(ds.reshape(k.shape[0], -1, k.shape[1]), k).unflatten(1, (ds.shape[2], -1))


def cut(span: slice, length: int) -> Iterator[slice]:
    """Yield consecutive pieces of at most `length`, none of an empty span."""
    for start in range(span.start, span.stop, length):
        yield slice(start, min(start + length, span.stop))
