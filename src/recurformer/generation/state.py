"""What one decode step reads and writes: buffers whose addresses never change between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recurformer.cache import KVCache
from recurformer.config import ModelConfig


@dataclass
class State:
    """Static buffers of one decode engine, all on one device. Slots are as in `KVCache`: pads count.

    Keys and values at unfilled slots, and at pads, are finite but otherwise anything.
    """

    tokens: Tensor  # (B,) int64, the ids to feed
    slot: Tensor  # () int32, slots filled so far = the slot that this step writes, the same for all rows
    positions: Tensor  # (B,) int32, real tokens before the one that is fed
    keys: Tensor  # (L, B, G, capacity, K) in the compute dtype, persistent keys of every layer
    values: Tensor  # the same
    valid: Tensor | None  # (B, capacity) bool, False at pads, True at unfilled slots; None: no pad anywhere
    key_positions: Tensor | None  # (B, capacity) int32, position of each slot, unfilled ones included; with `valid`
    logits: Tensor  # (B, V) in the compute dtype, output

    @classmethod
    def empty(
        cls, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: Any, padded: bool = False
    ) -> State:
        """Buffers without a filled slot; `padded` when some slot will be a pad."""
        B, L, G, K = batch_size, config.n_layers, config.kv_heads, config.head_width
        with torch.inference_mode(False), torch.no_grad():  # they outlive the call that makes them
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
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return self.keys.nbytes + self.values.nbytes

    def place(self, slot: int) -> None:
        """Let `slot` be the next one to write, and derive all positions from `valid`, in place."""
        self.slot.fill_(slot)
        if self.valid is None or self.key_positions is None:
            self.positions.fill_(slot)
            return
        self.key_positions.copy_(self.valid.cumsum(1, dtype=torch.int32) - self.valid.int())
        if slot < self.capacity:
            self.positions.copy_(self.key_positions[:, slot])

    def advance(self) -> None:
        """After a step, on the device: the next slot, and the positions there."""
        self.slot.add_(1)
        if self.key_positions is None:
            self.positions.add_(1)
        else:
            self.positions.copy_(self.key_positions.index_select(1, self.slot.clamp(max=self.capacity - 1)[None])[:, 0])

    def load(self, cache: KVCache, rows: Tensor | None = None) -> None:
        """Take over every filled slot of a cache, of these rows in this order (None: of all); they must fit."""
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
        """The first `length` slots as a `KVCache` over this very memory, until it grows into one of its own."""
        cache = object.__new__(KVCache)
        cache.config, cache.batch_size, cache.max_length = config, self.batch_size, None
        cache.length = length
        cache.keys, cache.values = list(self.keys), list(self.values)
        if self.valid is None:
            cache.valid = torch.ones(self.batch_size, self.capacity, dtype=torch.bool, device=self.keys.device)
        else:
            cache.valid = self.valid
        cache.padded = self.valid is not None and not bool(self.valid[:, :length].all())
        return cache
