"""The static buffers of one decode engine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class State:
    """What a decoding step reads and writes, all on one device, at addresses that never change between steps.

    Attributes:
        tokens: (B,) int64, the ids to feed.
        slot: () int32, slots filled so far, which is the slot that a step writes; the same for all rows.
        positions: (B,) int32, position (number of real tokens before it) of the token fed now.
        keys, values: (L, B, G, capacity, K) in the compute dtype, the persistent pairs of every layer.
        valid: (B, capacity) bool, False at pads; None: no pad anywhere.
        key_positions: (B, capacity) int32, position of each slot; None without pads, where slots are positions.
        logits: (B, V) float32 or in the compute dtype, what a step leaves.
    """

    tokens: Tensor
    slot: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor | None
    key_positions: Tensor | None
    logits: Tensor
