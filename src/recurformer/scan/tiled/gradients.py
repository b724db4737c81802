"""The sums in which the backward of the tiled scan collects gradients: of attention, and of weights.

Shapes are those of `blocks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurformer.layer import accumulation_dtype
from recurformer.scan.tiled.blocks import Attention, LeafGradients

if TYPE_CHECKING:
    from recurformer.layer import LayerMaths
    from recurformer.scan.schedule import Block
    from recurformer.scan.tiled.call import QueriesAndPairs, TiledCall


class AttentionGradients:
    """Gradients of the queries and persistent pairs of each layer, filled by the mirrored schedule.

    Attributes:
        layers: the attention of each layer.
        q: (L, E, R, N, K), scaled queries.
        lse: (L, E, R, N), log-sum-exp of each query.
        ga: (L, E, R, N, K), gradient of the attention outputs a.
        delta: (L, E, R, N), <ga_i, a_i> of each head.
        gq: (L, E, R, N, K), gradient of the scaled queries.
        gkv: (L, B, 2, G, N, K), gradient of the persistent pairs, keys beside values.
    """

    def __init__(self, call: TiledCall, pairs: QueriesAndPairs, lse: Tensor | None) -> None:
        self.layers: list[Attention] = pairs.attentions(call)
        self.q = q = pairs.q
        self.lse = q.new_empty(q.shape[:4]) if lse is None else lse
        self.ga, self.delta, self.gq = torch.empty_like(q), q.new_empty(q.shape[:4]), torch.zeros_like(q)
        one = self.layers[0]
        self.gkv = q.new_zeros(len(self.layers), one.B, 2, one.G, one.N, one.K)

    def send(self, l: int, block: Block) -> None:
        """Add what a block of one layer gives to the gradients of its pairs and of its queries, whose ga is known.

        Pairs of the past are constants.
        """
        attention, rows = self.layers[l], self.layers[l].rows
        B, G, R, K = attention.B, attention.G, attention.R, attention.K
        for keys, queries in attention.pieces(block):
            k, v = attention.pairs_at(keys)
            p = attention.scores(queries, keys, k).sub_(rows(self.lse[l], queries)[..., None]).exp_()
            ga, delta = rows(self.ga[l], queries), rows(self.delta[l], queries)
            ds = torch.bmm(ga, v.transpose(1, 2)).sub_(delta[..., None]).mul_(p)
            # Not baddbmm_: on a strided destination it runs one small product after the other.
            self.gq[l][:, :, queries] += torch.bmm(ds, k).view(B * G, R, -1, K)
            if keys.start >= 0:
                q = rows(attention.q, queries)
                self.gkv[l, :, 0, :, keys] += torch.bmm(ds.transpose(1, 2), q).view(B, G, -1, K)
                self.gkv[l, :, 1, :, keys] += torch.bmm(p.transpose(1, 2), ga).view(B, G, -1, K)

    def begin_leaf(self, layers: range, spans: list[slice]) -> LeafGradients:
        """Return one leaf of each of some layers. All queries behind the leaves must be done."""
        attentions, lse, gkv = self.layers[layers.start : layers.stop], [], []
        for l in layers:
            lse.append(self.lse[l])
            gkv.append(self.gkv[l])
        return LeafGradients(attentions, spans, lse, gkv)

    def end_leaf(self, l: int, positions: slice, leaf: LeafGradients, place: int, a: Tensor) -> None:
        """Note the gradients of one layer's queries in a leaf, all of whose positions are done.

        Args:
            l: the layer.
            positions: the n positions of the leaf.
            leaf: of several layers.
            place: of the layer among them.
            a: attention outputs (n, B, H K).
        """
        attention, n = self.layers[l], len(a)
        ga = leaf.ga[place].reshape(-1, attention.R, n, attention.K)
        a = a.view(n, *ga.shape[:2], attention.K).permute(1, 2, 0, 3)
        self.ga[l][:, :, positions] = ga
        self.delta[l][:, :, positions] = (ga * a).sum(-1)
        self.gq[l][:, :, positions] += leaf.query_gradients(place, attention.k[:, positions])


class WeightGradients:
    """The gradients of the weights of each layer, added up in at least float32.

    Args:
        layers: of one shape.
        wanted: names of the tensors that need a gradient. All others are left out.
    """

    def __init__(self, layers: list[LayerMaths], wanted: set[str]) -> None:
        self.layers, self.wanted = layers, wanted
        self.sums: dict[str, Tensor] = {}  # (L, ...)

    def sum_of(self, name: str, layers: range) -> Tensor:
        """Return the sum so far of some layers' gradients."""
        if name not in self.sums:
            weight = getattr(self.layers[0], name)
            shape = (len(self.layers), *weight.shape)
            self.sums[name] = weight.new_zeros(shape, dtype=accumulation_dtype(weight.dtype))
        return self.sums[name][layers.start : layers.stop]

    def add(self, name: str, layers: range, gradient: Tensor) -> None:
        """Add the gradients of one tensor of some layers, (layers, ...) with as many numbers as the tensor."""
        if name in self.wanted:
            total = self.sum_of(name, layers)
            total.add_(gradient.view(total.shape))

    def add_product(self, name: str, layers: range, g: Tensor, h: Tensor) -> None:
        """Add the gradients of a matrix and its bias.

        Args:
            name: of the matrix.
            layers: which layers.
            g: gradient of the product's outputs, (layers, n, B, out).
            h: the product's inputs, (layers, n, B, in).
        """
        dtype, g = self.layers[0].compute_dtype, g.flatten(1, -2)
        if name in self.wanted:
            total = self.sum_of(name, layers)
            factors = g.to(dtype).transpose(1, 2), h.flatten(1, -2).to(dtype)
            if total.dtype == dtype:
                torch.baddbmm(total, *factors, out=total)
            else:
                total.add_(torch.bmm(*factors))
        if f"{name}_bias" in self.wanted:
            self.add(f"{name}_bias", layers, g.to(accumulation_dtype(dtype)).sum(1))

    def of_each_layer(self) -> dict[str, list[Tensor]]:
        """Return the gradients of each layer, by name, in the dtype of the weights. The sums are gone afterwards.

        Each layer's are a copy, so that a caller who keeps one of them does not keep those of all layers.
        """
        gradients = {}
        for name in list(self.sums):
            total = self.sums.pop(name)
            parts = zip(total, self.layers, strict=True)
            gradients[name] = [g.to(getattr(layer, name).dtype, copy=len(self.layers) > 1) for g, layer in parts]
        return gradients
