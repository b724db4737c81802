"""Persistent keys and values of past positions.

Every pair belongs to one slot and is stored as computed, so cropping, forking and reordering are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recurformer.config import ModelConfig

FIRST_CAPACITY = 64  # slots of a cache that grows


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Make tensors that later calls may write to, whether or not the caller is in `torch.inference_mode`."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class KVCache:
    """Keys and values of every layer for the slots filled so far, pads included.

    Args:
        config: of the model that the cache serves.
        batch_size: B, rows.
        max_length: largest number of slots; a call that exceeds it raises ValueError before any work. None: the cache
            grows by doubling.
        dtype: of keys and values; None: torch's default dtype.
        device: of keys and values; None: torch's default device.

    Attributes:
        length: slots filled, pads included, the same in every layer.
        padded: whether some filled slot is a pad.
        keys, values: a buffer (B, G, capacity, K) of each layer.
        valid: (B, capacity) bool, False at pads, True at slots that are not filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; a cache needs at least 1")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; keys and values are floating-point numbers")
        self.config, self.batch_size, self.max_length = config, batch_size, max_length
        self.length = 0
        self.padded = False
        capacity = FIRST_CAPACITY if max_length is None else max_length
        shape = (batch_size, config.kv_heads, capacity, config.head_width)
        with lasting_tensors():
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
            self.values = [torch.zeros_like(keys) for keys in self.keys]
            self.valid = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)

    @classmethod
    def over(
        cls,
        config: ModelConfig,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        valid: Tensor,
        length: int,
        *,
        padded: bool | None = None,
        max_length: int | None = None,
    ) -> KVCache:
        """Return a cache whose buffers are these very tensors, until it grows into buffers of its own.

        Args:
            config: of the model that the cache serves.
            keys, values: a buffer (B, G, capacity, K) of each layer.
            valid: (B, capacity) bool, False at pads, True at slots that are not filled.
            length: slots filled.
            padded: whether some filled slot is a pad; None: as `valid` says.
            max_length: as the constructor takes it.
        """
        cache = cls(config, len(valid), max_length, device="meta")  # no memory of its own
        cache.keys, cache.values, cache.valid = list(keys), list(values), valid
        cache.length = length
        cache.padded = not bool(valid[:, :length].all()) if padded is None else padded
        return cache

    @property
    def capacity(self) -> int:
        """Number of slots that fit before the buffers grow."""
        return self.valid.shape[1]

    @property
    def nbytes(self) -> int:
        """Size of the key and value buffers in bytes."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, batch_size={self.batch_size}, max_length={self.max_length})"

    # --- for the user ----------------------------------------------------------------------------------------------

    def crop(self, n: int) -> None:
        """Keep the first n slots, in place (roll-back).

        Raises:
            ValueError: when the cache holds fewer.
        """
        if not 0 <= n <= self.length:
            raise ValueError(f"can't crop to {n} slots; the cache holds {self.length}")
        self.valid[:, n : self.length] = True
        self.padded = self.padded and not bool(self.valid[:, :n].all())
        self.length = n

    def clone(self) -> KVCache:
        """Return an independent copy (fork)."""
        return self._map(torch.clone)

    def select(self, rows: Tensor | Sequence[int]) -> KVCache:
        """Return a new cache of the given rows, in this order, repeats allowed (beam reordering, several samples).

        Raises:
            ValueError: for rows that are no list of row numbers of this cache.
        """
        index = torch.as_tensor(rows, device=self.valid.device)
        if index.dim() != 1 or index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"rows must be a non-empty list of row numbers, not {rows!r}")
        if index.min() < 0 or index.max() >= self.batch_size:
            raise ValueError(f"rows {index.tolist()} reach outside the cache's {self.batch_size} rows")
        return self._map(lambda tensor: tensor.index_select(0, index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> KVCache:
        """Return a cache of changed copies of all buffers."""
        with lasting_tensors():
            keys, values = [change(k) for k in self.keys], [change(v) for v in self.values]
            valid = change(self.valid)
        return KVCache.over(
            self.config, keys, values, valid, length=self.length, padded=self.padded, max_length=self.max_length
        )

    # --- for the model ---------------------------------------------------------------------------------------------

    def check(self, config: ModelConfig, batch_size: int, new: int, device: torch.device) -> None:
        """Raise ValueError unless a model of `config` can append `new` tokens of a batch of `batch_size` here."""
        if config != self.config:
            names = [
                f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(self.config, f.name)
            ]
            detail = ", ".join(f"{n} {getattr(self.config, n)!r} against {getattr(config, n)!r}" for n in names)
            raise ValueError(f"the cache belongs to another model ({detail}); make one from this model's config")
        if batch_size != self.batch_size:
            raise ValueError(
                f"the cache has {self.batch_size} rows, the tokens {batch_size}; use cache.select or a new cache"
            )
        if self.valid.device != device:
            raise ValueError(f"the cache is on {self.valid.device}, the model on {device}; make it with device=...")
        if self.max_length is not None and self.length + new > self.max_length:
            raise ValueError(
                f"{self.length} cached + {new} new tokens exceed the cache's max_length {self.max_length}; "
                "make a longer one, or one with max_length=None, which grows"
            )

    def reserve(self, new: int) -> None:
        """Make room for `new` more slots, doubling as often as needed."""
        capacity = self.capacity
        while capacity < self.length + new:
            capacity *= 2
        if capacity == self.capacity:
            return

        def grown(old: Tensor, dim: int, fill: float) -> Tensor:
            shape = list(old.shape)
            shape[dim] = capacity - old.shape[dim]
            return torch.cat([old, old.new_full(shape, fill)], dim)

        with lasting_tensors():
            self.keys = [grown(k, 2, 0.0) for k in self.keys]
            self.values = [grown(v, 2, 0.0) for v in self.values]
            self.valid = grown(self.valid, 1, True)

    def validity_with(self, new: Tensor | None, n: int) -> Tensor | None:
        """Return which of the filled and the n new slots hold real tokens, (B, P + n) bool; None when all do.

        Args:
            new: (B, n) bool, the same of the new slots; None: all hold real tokens.
            n: number of new slots.
        """
        if new is None and not self.padded:
            return None
        new = torch.ones_like(self.valid[:, :1]).expand(-1, n) if new is None else new
        return torch.cat([self.valid[:, : self.length], new], dim=1)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values (B, G, P, K) of the filled slots of one layer, as constants."""
        keys, values = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        # Copies, since autograd may keep them until after a later call has written to the buffers.
        return (keys.clone(), values.clone()) if torch.is_grad_enabled() else (keys, values)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the pairs (B, G, N, K) of new tokens in one layer. `advance` then counts their slots as filled."""
        with torch.no_grad():
            slots = slice(self.length, self.length + keys.shape[2])
            self.keys[layer][:, :, slots] = keys
            self.values[layer][:, :, slots] = values

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the pairs (B, G, N, K) of new tokens in one layer, and return all its pairs, (B, G, P + N, K)."""
        self.write(layer, keys, values)
        if torch.is_grad_enabled():
            old_keys, old_values = self.past(layer)
            return torch.cat([old_keys.to(keys.dtype), keys], 2), torch.cat([old_values.to(values.dtype), values], 2)
        end = self.length + keys.shape[2]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, n: int, valid: Tensor | None) -> None:
        """Count n slots as filled, after every layer has written them.

        Args:
            n: number of new slots.
            valid: (B, n) bool, False at pads; None: no pads.
        """
        if valid is not None:
            self.valid[:, self.length : self.length + n] = valid
            self.padded = True
        self.length += n
