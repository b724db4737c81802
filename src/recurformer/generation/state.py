"""Buffers that one decode step reads and writes. Their addresses never change between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recurformer.cache import KVCache
from recurformer.config import ModelConfig


@dataclass
class DecodeState:
    """Static buffers of one decode engine, all on one device. Slots are as in `KVCache`: pads count.

    Keys and values at unfilled slots, and at pads, are finite and otherwise unspecified.
    """

    tokens: Tensor  # (B,) int64, the ids to feed
    slot: Tensor  # () int32, number of filled slots, which is the slot that this step writes, the same for all rows
    positions: Tensor  # (B,) int32, real tokens before the one that is fed
    keys: Tensor  # (L, B, G, capacity, K) in the compute dtype, persistent keys of every layer
    values: Tensor  # persistent values, of the same shape and dtype
    valid: Tensor | None  # (B, capacity) bool, False at pads, True at unfilled slots; None: no pad anywhere
    key_positions: (
        Tensor | None
    )  # (B, capacity) int32, position of each slot, also of unfilled ones; None without `valid`
    logits: Tensor  # (B, V) in the compute dtype, output

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: Any, padded: bool = False
    ) -> DecodeState:
        """Return buffers without a filled slot; `padded`: with room for a mask."""
        B, L, G, K = batch_size, config.n_layers, config.kv_heads, config.head_width
        with torch.inference_mode(False), torch.no_grad():  # the buffers outlive the call that makes them
            keys = torch.zeros(L, B, G, capacity, K, dtype=dtype, device=device)
            state = cls(
                tokens=torch.zeros(B, dtype=torch.int64, device=device),
                slot=torch.zeros((), dtype=torch.int32, device=device),
                positions=torch.zeros(B, dtype=torch.int32, device=device),
                keys=keys,
                values=torch.zeros_like(keys),
                valid=torch.ones(B, capacity, dtype=torch.bool, device=device) if padded else None,
                key_positions=torch.zeros(B, capacity, dtype=torch.int32, device=device) if padded else None,
                logits=torch.zeros(B, config.vocab_size, dtype=dtype, device=device),
            )
        state.place(0)
        return state

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return self.keys.nbytes + self.values.nbytes

    def place(self, slot: int) -> None:
        """Make `slot` the next one to write, and derive all positions from `valid`, in place."""
        self.slot.fill_(slot)
        if self.valid is None or self.key_positions is None:
            self.positions.fill_(slot)
            return
        self.key_positions.copy_(self.valid.cumsum(1, dtype=torch.int32) - self.valid.int())
        if slot < self.capacity:
            self.positions.copy_(self.key_positions[:, slot])

    def advance(self) -> None:
        """Move to the next slot and the positions there, on the device, after a step."""
        self.slot.add_(1)
        if self.key_positions is None:
            self.positions.add_(1)
        else:
            self.positions.copy_(self.key_positions.index_select(1, self.slot.clamp(max=self.capacity - 1)[None])[:, 0])

    def load(self, cache: KVCache, rows: Tensor | None = None) -> None:
        """Copy every filled slot of a cache; `rows`: of these rows in this order (None: of all). They must fit."""
        n = cache.length
        for l in range(len(self.keys)):
            for mine, source in ((self.keys[l], cache.keys[l]), (self.values[l], cache.values[l])):
                filled = source[:, :, :n]
                mine[:, :, :n].copy_(filled if rows is None else filled.index_select(0, rows))
        if self.valid is not None:
            filled = cache.valid[:, :n]
            self.valid.fill_(True)
            self.valid[:, :n].copy_(filled if rows is None else filled.index_select(0, rows))
        self.place(n)

    # --- the public cache ------------------------------------------------------------------------------------------

    def as_cache(self, config: ModelConfig, length: int) -> KVCache:
        """Return the first `length` slots as a `KVCache` over this very memory, until the cache grows."""
        valid = self.valid
        if valid is None:
            valid = torch.ones(self.batch_size, self.capacity, dtype=torch.bool, device=self.keys.device)
        padded = False if self.valid is None else None  # without a mask nobody has to wait for a GPU's answer
        return KVCache.over(config, list(self.keys), list(self.values), valid, length, padded=padded)
