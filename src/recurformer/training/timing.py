"""Time of a training step: measured on this device, or from operations and a measured rate."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import torch

from recurformer.data.windows import Batch
from recurformer.hardware import is_out_of_memory
from recurformer.training.config import TrainConfig
from recurformer.training.distributed import OneProcess
from recurformer.training.memory import memory_on, rows_of, scan_of
from recurformer.training.optimizer import make_optimizer, set_rates
from recurformer.training.start import make_model
from recurformer.training.steps import gradient_step

PATIENCE = 10.0  # a step that is expected to take longer (in seconds) is not timed
RATE_SHARE = 0.4  # part of a matrix product's rate that an untimed training step is taken to reach
H100_RATE = 790e12  # operations a second of bf16 products on an H100
# The part of H100_RATE that training of "150m-12" was measured to reach (docs/benchmarks.md), by the kind of layers. An
# output layer counts as standard.
H100_SHARES = {"standard": 0.50, "recurrent": 0.23}
SIDE = {"cpu": 1024, "cuda": 8192}  # side of the square matrices whose product measures the rate


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step, and how they are known."""

    step: float
    how: str


def step_operations(config: TrainConfig) -> dict[str, float]:
    """Return the floating-point operations of an optimizer step, forward and backward, by the kind of layers.

    The output layer counts as standard. A multiply-add counts as two operations.
    """
    m, N = config.model, config.data.window
    attention = (
        m.n_heads * m.head_width * N
    )  # of a layer and token: scores and values; the mask hides half of the pairs
    layer = m.num_parameters() / m.n_layers + attention
    kinds, tokens = m.layer_kinds, config.batch_size * N
    again = 4 / 3 if config.recompute else 1
    standard = kinds.count("standard") * layer * again + m.padded_vocab_size * m.d_model
    return {"standard": 6 * tokens * standard, "recurrent": 6 * tokens * kinds.count("recurrent") * layer}


def h100_seconds(config: TrainConfig) -> float:
    """Return the seconds of a step on one H100 in bf16, by arithmetic."""
    return sum(count / (H100_SHARES[kind] * H100_RATE) for kind, count in step_operations(config).items())


def estimate_time(config: TrainConfig, device: torch.device, free: float) -> Time:
    """Time a step on this device. A step that would take too long or too much memory is computed from the rate of a
    matrix product instead.

    Args:
        free: bytes that may be used.
    """
    rate = product_rate(device, config.precision)
    sequence = sum(step_operations(config).values()) / config.batch_size / (RATE_SHARE * rate)
    at_once = rows_of(config)
    sequences = at_once if device.type == "cuda" else max(1, min(at_once, int(PATIENCE / 4 / sequence)))
    part = smaller(config, sequences)
    fits = memory_on(part, device, scan_of(part, device)).total < 0.9 * free
    if fits and sequence * sequences <= PATIENCE:
        try:
            seconds = time_steps(part, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        else:
            what = f"timed here: 2 steps of {sequences} sequence{'s' if sequences > 1 else ''}, random tokens"
            return Time(seconds * config.batch_size / sequences, what)
    why = "too slow to time" if fits else "no memory to time it"
    return Time(
        sequence * config.batch_size,
        f"{why}: from {rate / 1e9:,.3g} GFLOP/s of a product here, at {100 * RATE_SHARE:.0f} %",
    )


def smaller(config: TrainConfig, sequences: int) -> TrainConfig:
    """Return the run with steps of fewer sequences, and with new weights."""
    narrow = min(config.micro_batch_size or sequences, sequences)
    wide = sequences if config.recurrent_micro_batch_size is not None else None
    return dataclasses.replace(
        config, batch_size=sequences, micro_batch_size=narrow, recurrent_micro_batch_size=wide, init_from=None
    )


def time_steps(config: TrainConfig, device: torch.device, repeats: int = 2) -> float:
    """Return the mean seconds of whole optimizer steps on random tokens, without the first, which compiles."""

    state = torch.random.get_rng_state()
    model = make_model(config, device, None, OneProcess())
    torch.random.set_rng_state(state)
    optimizer = make_optimizer(model, config.optimizer)
    draw = torch.Generator().manual_seed(0)
    seconds = []
    for number in range(1 + repeats):
        shape = (config.batch_size, config.data.window + 1)
        drawn = torch.randint(config.model.vocab_size, shape, generator=draw)
        batch = Batch(drawn[:, :-1].clone(), drawn[:, 1:].clone(), None, torch.arange(config.batch_size))
        began = time.perf_counter()
        set_rates(optimizer, 0, config.optimizer, config.schedule)
        gradient_step(model, optimizer, batch, config, device, OneProcess())
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            seconds.append(time.perf_counter() - began)
    return sum(seconds) / len(seconds)


def product_rate(device: torch.device, precision: str) -> float:
    """Return the floating-point operations a second of a square matrix product, the best of three."""
    n = SIDE.get(device.type, SIDE["cpu"])
    # A CPU without units for bf16 may take minutes for one product. One product already shows that it is slow.
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        if best > 1:
            break
    return 2 * n**3 / best
