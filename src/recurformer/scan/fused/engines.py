"""The engines of the shapes met before, kept with their buffers and graphs. Imports no Triton before one is needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from recurformer.scan.fused.memory import total_memory
from recurformer.scan.fused.shape import EngineShape

if TYPE_CHECKING:
    from recurformer.scan.fused.engine import Engine

MOST_ENGINES = 8
MEMORY_PART = 8  # the engines together hold at most this part of the device's memory


class EngineCache:
    """Engines by shape and stream. The least recently used ones are dropped first.

    An engine serves one call at a time: hold `lock` from `engine_of` until the call's work has been submitted.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._engines: OrderedDict[tuple[EngineShape, int], Engine] = OrderedDict()

    def engine_of(self, shape: EngineShape) -> Engine:
        """Return the engine of a shape and of the current stream. Make it where there is none."""
        stream = torch.cuda.current_stream(shape.device).cuda_stream if shape.device.type == "cuda" else 0
        key = (shape, stream)
        if key in self._engines:
            self._engines.move_to_end(key)
            return self._engines[key]
        limit = total_memory(shape.device) // MEMORY_PART
        while len(self._engines) >= MOST_ENGINES or sum(engine.bytes for engine in self._engines.values()) > limit:
            self._engines.popitem(last=False)[1].wait()
        from recurformer.scan.fused.engine import Engine  # late: Triton may be missing

        engine = self._engines[key] = Engine(shape)
        return engine

    def engines(self) -> list[Engine]:
        """Return the engines that are kept, the least recently used one first."""
        return list(self._engines.values())

    def release(self) -> None:
        """Give back the buffers and graphs of all engines."""
        with self.lock:
            for engine in self._engines.values():
                engine.wait()
            self._engines.clear()


ENGINES = EngineCache()


def release_engines() -> None:
    """Give back the buffers and graphs that are kept for shapes met before."""
    ENGINES.release()
