"""Persistent keys and values of past positions: per token and exact, so cropping, forking and reordering are exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recurformer.config import ModelConfig

FIRST_CAPACITY = 64  # slots of a cache that grows


class KVCache:
    """Keys and values of every layer for the slots filled so far, pads included.

    Args:
        config: of the model it serves.
        batch_size: B, rows.
        max_length: slots; exceeding it is a ValueError before any work. None: grows by doubling.
        dtype: of keys and values; None: torch's default dtype.
        device: None: torch's default device.

    Attributes:
        length: slots filled, pads included, in every layer.
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
        self.padded = False  # some filled slot is a pad
        capacity = FIRST_CAPACITY if max_length is None else max_length
        shape = (batch_size, config.kv_heads, capacity, config.head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.valid = torch.ones(batch_size, capacity, dtype=torch.bool, device=device)

    @classmethod
    def over(cls, config: ModelConfig, keys: list[Tensor], values: list[Tensor], valid: Tensor, length: int) -> KVCache:
        """Return a cache over existing buffers: keys and values (B, G, capacity, K) of each layer, valid (B, capacity).

        The cache shares the memory until it grows.
        """
        made = cls.__new__(cls)
        made.config, made.batch_size, made.max_length, made.length = config, len(valid), None, length
        made.keys, made.values, made.valid = keys, values, valid
        made.padded = not bool(valid[:, :length].all())
        return made

    @property
    def capacity(self) -> int:
        """Slots that fit before the buffers grow."""
        return self.valid.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, batch_size={self.batch_size}, max_length={self.max_length})"

    # --- for the user ----------------------------------------------------------------------------------------------

    def crop(self, n: int) -> None:
        """Keep the first n slots, in place (roll-back)."""
        if not 0 <= n <= self.length:
            raise ValueError(f"can't crop to {n} slots; the cache holds {self.length}")
        self.valid[:, n : self.length] = True
        self.padded = self.padded and not bool(self.valid[:, :n].all())
        self.length = n

    def clone(self) -> KVCache:
        """An independent copy (fork)."""
        return self._map(torch.clone, self.batch_size)

    def select(self, rows: Tensor | Sequence[int]) -> KVCache:
        """A new cache of the given rows, in this order, repeats allowed (beam reordering, several samples)."""
        index = torch.as_tensor(rows, device=self.valid.device)
        if index.dim() != 1 or index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"rows must be a non-empty list of row numbers, not {rows!r}")
        if index.min() < 0 or index.max() >= self.batch_size:
            raise ValueError(f"rows {index.tolist()} reach outside the cache's {self.batch_size} rows")
        return self._map(lambda tensor: tensor.index_select(0, index), index.numel())

    def _map(self, change: Any, batch_size: int) -> KVCache:
        new = object.__new__(KVCache)
        new.__dict__.update(self.__dict__)
        new.batch_size = batch_size
        new.keys, new.values = [change(k) for k in self.keys], [change(v) for v in self.values]
        new.valid = change(self.valid)
        return new

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

        self.keys = [grown(k, 2, 0.0) for k in self.keys]
        self.values = [grown(v, 2, 0.0) for v in self.values]
        self.valid = grown(self.valid, 1, True)

    def validity_with(self, new: Tensor | None, n: int) -> Tensor | None:
        """(B, P + n) validity of the filled and n new slots, given that of the new ones; None when there is no pad."""
        if new is None and not self.padded:
            return None
        new = torch.ones_like(self.valid[:, :1]).expand(-1, n) if new is None else new
        return torch.cat([self.valid[:, : self.length], new], dim=1)

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, P, K) of the filled slots of one layer, as constants."""
        keys, values = self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
        # Autograd may keep them until after a later call has written to the buffers.
        return (keys.clone(), values.clone()) if torch.is_grad_enabled() else (keys, values)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens' pairs (B, G, N, K) of one layer; they count once `advance` is called."""
        with torch.no_grad():
            slots = slice(self.length, self.length + keys.shape[2])
            self.keys[layer][:, :, slots] = keys
            self.values[layer][:, :, slots] = values

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`write`, and return the pairs (B, G, P + N, K) of old and new slots together."""
        self.write(layer, keys, values)
        if torch.is_grad_enabled():
            old_keys, old_values = self.past(layer)
            return torch.cat([old_keys.to(keys.dtype), keys], 2), torch.cat([old_values.to(values.dtype), values], 2)
        end = self.length + keys.shape[2]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, n: int, valid: Tensor | None) -> None:
        """Count the n slots that every layer has written; `valid` (B, n) is False at pads, None without pads."""
        if valid is not None:
            self.valid[:, self.length : self.length + n] = valid
            self.padded = True
        self.length += n
