"""A `KVCache` in the form that Hugging Face's generation passes from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from recurformer.cache import KVCache


class RecurformerCache(Cache):
    """Persistent keys and values of past positions. Reordering and cropping are exact, as those of `KVCache`.

    Attributes:
        kv: the `KVCache`; None before the first call of a model.
    """

    def __init__(self, kv: KVCache | None = None) -> None:
        super().__init__(layers=[])  # the layers are in `kv`
        self.kv = kv

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.kv})"

    def __len__(self) -> int:
        return 0 if self.kv is None else len(self.kv.keys)

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the model itself writes to this cache; pass it to the model's call")

    # --- questions of generation --------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of slots filled, pads included."""
        return 0 if self.kv is None else self.kv.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the largest number of slots, -1 for a cache that grows."""
        return -1 if self.kv is None or self.kv.max_length is None else self.kv.max_length

    get_max_cache_shape = get_max_length  # its name before transformers 5.1x

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of slots after the next call, and the first slot that a mask covers."""
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

    # --- changes by generation -----------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove slots from the end.

        Args:
            tokens_to_remove: minus the number of slots to remove; above 0, its older meaning: slots to keep.
        """
        if self.kv is not None and tokens_to_remove != 0:
            n = tokens_to_remove if tokens_to_remove > 0 else self.kv.length + tokens_to_remove
            self.kv.crop(min(n, self.kv.length))

    def reset(self) -> None:
        """Remove every slot."""
        self.kv = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row beam_idx[i], for every i."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        if self.kv is not None:
            self.kv = self.kv.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, with the repeats of a row next to each other."""
        if self.kv is not None:
            self.kv = self.kv.select(torch.arange(self.kv.batch_size).repeat_interleave(repeats))
