"""A `KVCache` as the cache object that Hugging Face's generation carries from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from recurformer.cache import KVCache


class RecurformerCache(Cache):
    """Persistent keys and values of past positions. Exact under reordering and cropping, as `KVCache` is.

    Attributes:
        kv: the `KVCache`; None before the first call of a model.
    """

    def __init__(self, kv: KVCache | None = None) -> None:
        super().__init__(layers=[])  # ours are in `kv`
        self.kv = kv

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kv})"

    def __len__(self) -> int:
        return 0 if self.kv is None else len(self.kv.keys)

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the model itself writes to this cache; pass it to the model's call")

    # --- what generation asks --------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots filled, pads included."""
        return 0 if self.kv is None else self.kv.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots that it may hold; -1: it grows."""
        return -1 if self.kv is None or self.kv.max_length is None else self.kv.max_length

    get_max_cache_shape = get_max_length  # its name before transformers 5.1x

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """(slots with the new ones, the first of them)."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + new, 0

    @property
    def is_initialized(self) -> bool:
        return self.kv is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * max(1, len(self))

    @property
    def is_linear(self) -> list[bool]:
        return [False] * max(1, len(self))

    def activate_past_recording(self) -> None:
        """Nothing to do: every slot can always be cropped to."""

    # --- what it does to a cache -----------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` slots. Above 0, its older meaning: the number of first slots to keep."""
        if self.kv is not None and tokens_to_remove != 0:
            n = tokens_to_remove if tokens_to_remove > 0 else self.kv.length + tokens_to_remove
            self.kv.crop(min(n, self.kv.length))

    def reset(self) -> None:
        """Empty it."""
        self.kv = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        if self.kv is not None:
            self.kv = self.kv.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, repeats side by side."""
        if self.kv is not None:
            self.kv = self.kv.select(torch.arange(self.kv.batch_size).repeat_interleave(repeats))
