"""The table of one call: addresses and sizes that kernels read from device memory."""

from __future__ import annotations

from enum import IntEnum, unique
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from recurformer.attention import Layout


@unique
class Slot(IntEnum):
    """Slots of the table, 64-bit integers. Each one from `X` on holds an address, except `ROTATION_STRIDE`."""

    STEP = 0  # w, the step of the running graph
    LENGTH = 1  # N
    PAST = 2  # P
    X = 3  # the first layer's inputs
    Z = 4  # outputs of all layers
    Q = 5
    KV = 6  # the past's pairs, then temporary ones, each replaced by the persistent one
    A = 7  # attention outputs
    LSE = 8  # log-sum-exps
    POSITIONS = 9  # (B, P + N), as are segments
    QUERY_SEGMENTS = 10
    KEY_SEGMENTS = 11
    FIRST = 12  # (B, chunks): the first slot that a chunk's queries see
    LAST = 13  # (B, chunks): the end of the positions that see a chunk's keys
    COS = 14
    SIN = 15
    ROTATION_STRIDE = 16  # values between the rotations of two sequences; 0 when all share them
    GZ = 17  # gradients: of the last layer's outputs,
    GX = 18  # of the first layer's inputs,
    GA = 19  # of attention outputs
    DELTA = 20  # <ga, a> for each head
    UP = 21  # the MLP's inner values
    RAW = 22  # the products with Q, K and V


class TableEntries:
    """Entries of the table for one call. Keeps the tensors alive whose addresses it holds.

    Args:
        layout: positions, padding, documents.
        batch: B.
        chunk: C.
        segmented: whether padding or documents limit which keys a query sees.
        tensors: contiguous tensors by the names of their slots.
    """

    def __init__(self, layout: Layout, batch: int, chunk: int, segmented: bool, **tensors: Tensor) -> None:
        self.values: dict[int, int] = {Slot.LENGTH: layout.length, Slot.PAST: layout.past}
        self.tensors: list[Tensor] = []
        self.point(**tensors)
        if layout.rotation is not None:
            cos, sin = layout.rotation.cos.float().contiguous(), layout.rotation.sin.float().contiguous()
            self.point(COS=cos, SIN=sin)
            self.values[Slot.ROTATION_STRIDE] = cos[0].numel() if cos.shape[0] > 1 else 0
        if segmented:
            self.point(**segments(layout, batch, chunk))

    def point(self, **tensors: Tensor) -> None:
        """Enter the addresses of contiguous tensors."""
        for name, tensor in tensors.items():
            assert tensor.is_contiguous()
            self.tensors.append(tensor)
            self.values[Slot[name]] = tensor.data_ptr()

    def row(self, step: int) -> list[int]:
        """Return all slots in order, with this step; slots without an entry are 0."""
        return [step, *(self.values.get(slot, 0) for slot in range(1, len(Slot)))]


def segments(layout: Layout, batch: int, chunk: int) -> dict[str, Tensor]:
    """Return by slot which keys each query sees, as int32 tensors.

    A query sees earlier keys of its own segment. A document is a segment, and the keys of pads have segment -1, which
    no query has.
    """
    P, N, device = layout.past, layout.length, layout.positions.device
    M, chunks = P + N, -(-N // chunk)
    if layout.documents is None:
        documents = torch.zeros(batch, M, dtype=torch.int64, device=device)
        first = torch.zeros(batch, chunks, dtype=torch.int64, device=device)
        last = torch.full((batch, chunks), N, dtype=torch.int64, device=device)
    else:
        changes = torch.nn.functional.pad(layout.documents.diff(dim=1) != 0, (1, 0), value=True)
        documents = changes.cumsum(1)
        slots = torch.arange(M, device=device)
        begin = torch.where(changes, slots, 0).cummax(1).values
        ends = torch.nn.functional.pad(changes[:, 1:], (0, 1), value=True)
        end = torch.where(ends, slots + 1, M).flip(1).cummin(1).values.flip(1)
        starts = torch.arange(chunks, device=device) * chunk
        first = begin[:, P + starts]
        last = end[:, P + (starts + chunk).clamp(max=N) - 1] - P
    keys = documents if layout.valid is None else torch.where(layout.valid, documents, -1)
    found = {
        "POSITIONS": layout.positions.expand(batch, M), "QUERY_SEGMENTS": documents,
        "KEY_SEGMENTS": keys.expand(batch, M), "FIRST": first, "LAST": last,
    }  # fmt: skip
    return {name: t.to(torch.int32).contiguous() for name, t in found.items()}
