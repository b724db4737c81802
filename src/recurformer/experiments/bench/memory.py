"""Peak memory of a piece of work: the allocator's own count on a GPU, live tensors on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made inside, down to the last one freed, on any device.

    Every operation below autograd is seen, those of backward passes included; scratch space that an operation takes
    and gives back by itself is not. Tensors that existed before are not counted.

    Attributes:
        live: bytes that are alive now.
        peak: the largest value `live` has had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if makes_tensors(func):
            for tensor in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
                if isinstance(tensor, torch.Tensor):
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()  # a storage keeps its Python object for life
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


@cache
def makes_tensors(func: Any) -> bool:
    """False for operations that write into tensors or look at them under another shape."""
    return all(returned.alias_info is None for returned in func._schema.returns)


def peak_memory(work: Callable[[], object], device: torch.device | None = None) -> int:
    """Largest number of bytes that `work` holds at once beyond what existed before.

    Args:
        work: called once; what it returns is dropped.
        device: where it computes; None: the CPU.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as tensors:
        work()
    return tensors.peak
