"""One evaluation of a stack: its shape, layout and past, and the tensors that are N positions long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurformer.layer import LayerMaths
from recurformer.scan.fused.shape import EngineShape
from recurformer.scan.fused.table import TableEntries

if TYPE_CHECKING:
    from recurformer.attention import Layout
    from recurformer.config import ModelConfig

Past = tuple[Tensor, Tensor] | None  # keys and values (B, G, P, K) of one layer


@dataclass(frozen=True)
class FusedCall:
    """Everything of one evaluation that is not a differentiable tensor."""

    shape: EngineShape
    layout: Layout
    past: list[Past]  # of each layer
    keeps_pairs: bool  # queries and pairs, or the products they are made of, stay for the backward
    names: list[str]  # the fields of LayerMaths that the differentiable tensors fill, layer by layer
    config: ModelConfig  # of the model

    def layers(self, tensors: Sequence[Tensor | None]) -> list[LayerMaths]:
        """Return the layers made of the differentiable tensors."""
        count = len(self.names)
        return [
            LayerMaths(self.config, **dict(zip(self.names, tensors[l * count : (l + 1) * count], strict=True)))  # pyright: ignore[reportArgumentType]
            for l in range(self.shape.L)
        ]

    @property
    def steps(self) -> int:
        """Steps of a forward or backward pass."""
        return self.shape.steps(self.layout.length)

    def empty(self, name: str) -> Tensor:
        """Return an uninitialised tensor of a given name that is N positions long, (L, N, B, width).

        Args:
            name: q, a or ga (width H K), kv (P + N positions, width 2 G K), lse or delta (width H, float32), raw
                (the products with Q, K and V) or up (the MLP's inner values).
        """
        shape, sizes = self.shape, self.shape.sizes
        whole = shape.whole(self.layout.length)
        length, width, dtype = {
            "q": (whole, sizes.queries, shape.dtype), "a": (whole, sizes.queries, shape.dtype),
            "ga": (whole, sizes.queries, shape.dtype), "kv": (self.layout.past + whole, sizes.pairs, shape.dtype),
            "lse": (whole, sizes.H, torch.float32), "delta": (whole, sizes.H, torch.float32),
            "raw": (whole, sizes.projections, shape.dtype), "up": (whole, sizes.inner, shape.dtype),
        }[name]  # fmt: skip
        return torch.empty(shape.L, length, shape.B, width, dtype=dtype, device=shape.device)

    def new_pairs(self) -> Tensor:
        """Return `empty("kv")` with the past in its first P slots."""
        kv, P = self.empty("kv"), self.layout.past
        if P:
            for l, past in enumerate(self.past):
                assert past is not None
                pairs = torch.stack(past, dim=3)  # (B, G, P, 2, K)
                kv[l, :P].copy_(pairs.permute(2, 0, 3, 1, 4).flatten(2))
        return kv

    def entries(self, **tensors: Tensor) -> TableEntries:
        """Return the table's entries of this call, with these tensors by slot."""
        return TableEntries(self.layout, self.shape.B, self.shape.C, self.shape.segmented, **tensors)

    def persistent_pairs(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return views (L, B, G, N, K) of the new keys and values in kv (L, P + N, B, 2 G K)."""
        P, N, sizes = self.layout.past, self.layout.length, self.shape.sizes
        pairs = kv[:, P : P + N].view(self.shape.L, N, self.shape.B, 2, sizes.G, sizes.K)
        keys, values = pairs.permute(3, 0, 2, 4, 1, 5)
        return keys, values


def aligned(t: Tensor) -> Tensor:
    """Return t as a contiguous float32 tensor at a multiple of 16 bytes, where wide loads can read it."""
    t = t.float().contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
