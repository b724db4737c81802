"""How GPU benchmarks measure: events on the device's own clock, peak memory, and what memory can move."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from recurformer import attention
from recurformer.config import ModelConfig
from recurformer.experiments.bench.memory import LiveTensors
from recurformer.model import LanguageModel, Layer

Work = Callable[[], object]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

COPY_BYTES = {"cuda": 2**30, "cpu": 2**25}  # of the buffer that `copy_bandwidth` copies: far beyond any cache


@dataclass(frozen=True)
class Times:
    """Seconds of timed runs, in order."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def to_dict(self, name: str) -> dict[str, Any]:
        """Entries NAME_s (the median), NAME_fastest_s, NAME_slowest_s and NAME_runs_s, ready for JSON."""
        return {
            f"{name}_s": self.median,
            f"{name}_fastest_s": min(self.runs),
            f"{name}_slowest_s": max(self.runs),
            f"{name}_runs_s": list(self.runs),
        }


def time_runs(prepare: Callable[[int], Work], device: torch.device, repeats: int, warmup: int) -> Times:
    """Time some work again and again.

    Args:
        prepare: given the number of the run, returns what is timed; what it does itself (inputs of that run, cleared
            gradients) is not.
        device: on a GPU the time is that between two events in its queue, elsewhere that of the clock.
        repeats, warmup: timed runs, and runs before them.
    """
    runs = []
    for number in range(warmup + repeats):
        seconds = timed(prepare(number), device)
        if number >= warmup:
            runs.append(seconds)
    return Times(tuple(runs))


def timed(work: Work, device: torch.device) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        begin.record()
        work()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass
class Peak:
    """The largest number of bytes held at once inside `peak_memory_of`, beyond what existed before."""

    bytes: int = 0


@contextmanager
def peak_memory_of(device: torch.device) -> Iterator[Peak]:
    """Peak memory of what is done inside, weights made there included; known when the block is left.

    On a GPU it is the allocator's own count, so memory that CUDA graphs reserve is in it from their capture on: build
    and warm up inside.
    """
    found = Peak()
    if device.type != "cuda":
        with LiveTensors() as tensors:
            yield found
        found.bytes = tensors.peak
        return
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    torch.cuda.synchronize(device)
    found.bytes = torch.cuda.max_memory_allocated(device) - before


def release(device: torch.device) -> None:
    """Free what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def build_model(
    config: ModelConfig, device: torch.device, scan: str = "auto", compiled: bool | None = None, recompute: bool = False
) -> LanguageModel:
    """A model with weights drawn on the device, its standard layers compiled on a GPU unless told otherwise."""
    with device:
        model = LanguageModel(config)
    model.scan = scan
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.compiled = device.type == "cuda" if compiled is None else compiled
    model.recompute = "standard" if recompute else "none"
    return model


def forget_compiled() -> None:
    """Let torch.compile start anew. With several shapes in one process it would make kernels for any shape, which are
    slower than those that a training of one shape gets."""
    torch.compiler.reset()
    attention.compiled.cache_clear()


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes a second that a copy on the device reads and writes together."""
    size = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / time_runs(lambda _: lambda: target.copy_(source), device, repeats, warmup=2).median
