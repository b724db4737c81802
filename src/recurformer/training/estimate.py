"""What a run will cost, before anything is spent: parameters, steps, memory, time and disk. Writes nothing.

Memory is arithmetic on the configuration. Time is measured: a few real steps on this device with random tokens, scaled
to the run; where even one sequence takes too long or too much memory, it is arithmetic divided by the measured rate of
a matrix product, and the table says so.

Of several processes, all of it is that of one, with its share of each step; what they tell each other is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recurformer.choose import choose_scan, chosen_attention, chosen_loss, gpu_scan, longest_stack
from recurformer.config import ModelConfig
from recurformer.scan.fused.memory import affordable_save, kept_values, total_memory
from recurformer.training.config import DataConfig, TrainConfig, open_tokens
from recurformer.units import bytes_text, duration, rate_text

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = 10.0  # seconds that a timed step may be expected to take
RATE_SHARE = 0.4  # of a matrix product's rate that a training step is taken to reach where it cannot be timed
H100_BYTES, H100_RATE = 79.1 * 2**30, 790e12  # memory that is free on one, and its rate of bf16 products
# The part of that rate that training of "150m-12" was measured to reach (docs/benchmarks.md), by the kind of layers; an
# output layer goes with standard ones.
H100_SHARES = {"standard": 0.50, "recurrent": 0.23}
KERNELS = ("none", "fused", "wavefront")  # scans beside which a GPU runs fused kernels only
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied to find the rate


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by what they are for."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two means of each learning parameter
    standard: int  # what standard layers keep for the backward, at a micro-batch
    recurrent: int  # what recurrent layers keep, at theirs
    working: int  # beyond what is kept, at the moment that takes most
    moment: str  # which that is

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.standard + self.recurrent + self.working


def estimate_memory(
    config: TrainConfig, *, gpu: bool, scan: str, device_bytes: float = math.inf, parts: int = 1
) -> Memory:
    """Peak memory of a step, from what the code is known to keep.

    Args:
        config: the run; of several processes, the `share` of one.
        gpu: whether the fused kernels, compiled layers and the fused loss run, rather than plain operations.
        scan: that of recurrent layers, by its name.
        device_bytes: memory of the device, free or not: the fused scan keeps more where there is much.
        parts: processes over which weights, gradients and optimizer state are split.
    """
    m = config.model
    full = 8 if config.precision == "fp64" else 4
    short = 2 if config.precision == "bf16" else full  # bytes of what products read and write
    D, Q, P, F = m.d_model, m.n_heads * m.head_width, m.kv_heads * m.head_width, m.mlp_width
    inner = F * (2 if m.activation == "swiglu" else 1)
    everything = m.num_parameters(embedding=True)
    kinds = m.layer_kinds
    learning = everything
    if config.trained == "recurrent":
        learning = m.num_parameters() * kinds.count("recurrent") // len(kinds)
    narrow = (config.micro_batch_size or config.batch_size) * config.data.window
    wide = (config.recurrent_micro_batch_size or config.micro_batch_size or config.batch_size) * config.data.window

    # A standard layer: both residuals; the branches' inputs; q, k, v, before and after their norm; attention's output;
    # the MLP's inside before and after its activation. Plain RMS norms keep what they multiply, too.
    one = 2 * full * D + short * (2 * D + 2 * (Q + P) + P + Q) + short * (inner + F)
    compiled = gpu if config.compile is None else config.compile
    if m.norm == "rms" and not compiled:
        one += full * (2 * D + (0 if m.qk_norm == "none" else Q + P))
    standard = kinds.count("standard") * (full * D if config.recompute else one) * narrow
    again = one * narrow if config.recompute and "standard" in kinds else 0

    # A recurrent layer: its input; attention's output; what else is kept while it is little.
    count, recurrent, loop = kinds.count("recurrent"), 0, 0
    stack = count if scan == "wavefront" else 1  # layers at work at once
    if count and gpu:
        save = affordable_save(m, short * wide, torch.device("cuda"), device_bytes)
        recurrent = count * wide * (full * D + short * Q + 4 * m.n_heads + short * kept_values(m, save))
        loop = wide * (count * 10 if scan == "wavefront" else 24) * D
        if save == "all":  # queries are made again
            loop += short * wide * stack * Q
    elif count:
        from recurformer.scan.tiled.backward import POSITION_BLOCK
        from recurformer.scan.tiled.scan import KEEP_BYTES

        more = full * (2 * Q + 2 * P + inner)
        recurrent = count * wide * (full * D + (more if wide * more <= KEEP_BYTES else 0))
        # Of all positions: queries and pairs, their gradients, those of attention's output and of the residual stream.
        # Of a block of positions: the MLP's inside and its slopes, and what comes before it.
        block = wide // config.data.window * min(config.data.window, POSITION_BLOCK)
        loop = full * (wide * stack * (3 * Q + 4 * P + D) + block * (6 * inner + 8 * D))
    # When the backward comes to the last recurrent layer, the standard ones above it have let go of what they kept.
    above = kinds[::-1].index("recurrent") if count else 0
    freed = standard * above // max(1, kinds.count("standard"))
    moments = {
        "of the loss": loss_bytes(m, narrow, full, gpu),
        "of a standard layer, evaluated again": again,
        "of recurrent layers in the backward": loop - freed,
    }
    moment = max(moments, key=lambda name: moments[name])
    copies = short * everything if short < full else 0
    # What is gathered: embedding and output layer, and the layer that runs.
    gathered = 0 if parts == 1 else full * (everything - m.num_parameters() + m.num_parameters() // m.n_layers)
    return Memory(
        weights=full * everything // parts + copies + gathered,
        gradients=full * learning // parts + gathered,
        optimizer=2 * full * learning // parts,
        standard=standard,
        recurrent=recurrent,
        working=moments[moment],
        moment=moment,
    )


def loss_bytes(model: ModelConfig, tokens: int, full: int, gpu: bool) -> int:
    """Logits, log-probabilities and the gradient of the rows that are made at once; of the fused loss, its blocks and
    the gradients that it keeps."""
    from recurformer.model import LOGITS_AT_ONCE

    V, D = model.padded_vocab_size, model.d_model
    if gpu:
        return tokens * D * 8 + V * D * 4
    return 3 * full * V * min(tokens, max(1, LOGITS_AT_ONCE // V))


def available_bytes(device: torch.device) -> float:
    """Memory that is free on a device; infinite where nobody says."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return math.inf


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step, and how they are known."""

    step: float
    how: str


def step_operations(config: TrainConfig) -> dict[str, float]:
    """Floating-point operations of an optimizer step, forward and backward, by the kind of layers; the output layer
    goes with the standard ones. A multiply-add counts as two."""
    m, N = config.model, config.data.window
    attention = m.n_heads * m.head_width * N  # of a layer and token: scores and values, half of the pairs masked
    layer = m.num_parameters() / m.n_layers + attention
    kinds, tokens = m.layer_kinds, config.batch_size * N
    again = 4 / 3 if config.recompute else 1
    standard = kinds.count("standard") * layer * again + m.padded_vocab_size * m.d_model
    return {"standard": 6 * tokens * standard, "recurrent": 6 * tokens * kinds.count("recurrent") * layer}


def h100_seconds(config: TrainConfig) -> float:
    """Seconds of a step on one H100 in bf16, by arithmetic."""
    return sum(count / (H100_SHARES[kind] * H100_RATE) for kind, count in step_operations(config).items())


def estimate_time(config: TrainConfig, device: torch.device, free: float) -> Time:
    """Seconds of a step here: timed, or, where that would take too long or too much, from the rate of a product.

    Args:
        free: bytes that may be used.
    """
    gpu = device.type == "cuda"
    rate = product_rate(device, config.precision)
    sequence = sum(step_operations(config).values()) / config.batch_size / (RATE_SHARE * rate)
    at_once = rows_of(config)
    sequences = at_once if gpu else max(1, min(at_once, int(PATIENCE / 4 / sequence)))
    part = smaller(config, sequences)
    fits = memory_on(part, device, scan_of(part, device)).total < 0.9 * free
    if fits and sequence * sequences <= PATIENCE:
        try:
            seconds = time_steps(part, device)
        except torch.OutOfMemoryError:
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
    """The run with steps of fewer sequences."""
    narrow = min(config.micro_batch_size or sequences, sequences)
    wide = sequences if config.recurrent_micro_batch_size is not None else None
    return dataclasses.replace(
        config, batch_size=sequences, micro_batch_size=narrow, recurrent_micro_batch_size=wide, init_from=None
    )


def time_steps(config: TrainConfig, device: torch.device, repeats: int = 2) -> float:
    """The mean seconds of whole optimizer steps on random tokens, after one that is not counted."""
    from recurformer.data.windows import Batch
    from recurformer.training.distributed import OneProcess
    from recurformer.training.optimizer import make_optimizer, set_rates
    from recurformer.training.start import make_model
    from recurformer.training.steps import gradient_step

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
    """Floating-point operations a second of a square matrix product, the best of three."""
    n = SIDE.get(device.type, SIDE["cpu"])
    # A CPU without units for bf16 takes minutes for such a product; what counts there is that it is slow.
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


def scan_of(config: TrainConfig, device: torch.device, together: bool = True) -> str:
    """The scan of the recurrent layers; "none" where there is none.

    Args:
        together: False where weights are split, which evaluates layers one by one.
    """
    if "recurrent" not in config.model.layer_kinds:
        return "none"
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(config.precision, torch.float32)
    return choose_scan(
        config.scan, config.model, device, batch_size=rows_of(config), length=config.data.window, dtype=dtype,
        together=together and not config.recompute,
    )[0]  # fmt: skip


def h100_scan(config: TrainConfig, together: bool = True) -> str:
    """That of an H100 which is not here."""
    if "recurrent" not in config.model.layer_kinds:
        return "none"
    if config.scan != "auto":
        return config.scan
    stack = longest_stack(config.model) if together and not config.recompute else 1
    return gpu_scan(stack, rows_of(config), config.data.window)[0]


def rows_of(config: TrainConfig) -> int:
    """Sequences that recurrent layers take at once."""
    return config.recurrent_micro_batch_size or config.micro_batch_size or config.batch_size


def memory_on(config: TrainConfig, device: torch.device, scan: str, parts: int = 1) -> Memory:
    """`estimate_memory` of a device that is here."""
    gpu = device.type == "cuda" and scan in KERNELS
    return estimate_memory(config, gpu=gpu, scan=scan, device_bytes=total_memory(device), parts=parts)


# --- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a run will cost on a device."""

    config: TrainConfig
    mine: TrainConfig  # the share of one process
    processes: int
    device: torch.device
    memory: Memory  # of one process
    time: Time
    free_bytes: float
    scan: str
    data: dict[str, str]  # "training", "validation" -> what is there, or what is missing

    @property
    def seconds(self) -> float:
        """Of all steps; evaluation and saving come on top."""
        return self.time.step * self.config.schedule.steps

    @property
    def tokens(self) -> int:
        """Targets of the whole run."""
        c = self.config
        return c.schedule.steps * c.batch_size * c.data.window

    @property
    def parts(self) -> int:
        """Over how many processes weights, gradients and optimizer state are split."""
        return self.processes if self.config.parallel == "fsdp" else 1

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: weights, and the optimizer's state."""
        full = 8 if self.config.precision == "fp64" else 4
        return full * self.config.model.num_parameters(embedding=True) + self.memory.optimizer * self.parts


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """What a run would cost on the device it would run on, or on so many like it. The data need not be there.

    Raises:
        ValueError: for a device that is not here, a scan that it does not have, or a batch that does not split.
    """
    from recurformer.training.distributed import training_device

    device, mine = training_device(config), config.share(processes)
    parts = processes if config.parallel == "fsdp" else 1
    free, scan = available_bytes(device), scan_of(mine, device, together=parts == 1)
    memory = memory_on(mine, device, scan, parts)
    timed = mine if scan == "none" else dataclasses.replace(mine, scan=scan, init_from=None)
    tokens = config.schedule.steps * config.batch_size * config.data.window
    data = {"training": describe_data(config.data, config.data.train, tokens)}
    if config.data.validation is not None:
        data["validation"] = describe_data(config.data, config.data.validation)
    return Estimate(config, mine, processes, device, memory, estimate_time(timed, device, free), free, scan, data)


def describe_data(data: DataConfig, source: str, tokens: int | None = None) -> str:
    """One line about tokens on disk: how many, how often they are read, or why they cannot be."""
    if not Path(source).exists():
        return f"{source} is missing"
    found = open_tokens(data, source)
    epochs = "" if tokens is None else f", read {tokens / found.n_tokens:.2f} times"
    return f"{found.n_tokens:,} tokens in {source}{epochs}"


def show(e: Estimate, console: Console) -> None:
    """Print one table; 80 columns hold it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    c, m, memory, N = e.config, e.config.model, e.memory, e.processes
    micro, wide = e.mine.micro_batch_size or e.mine.batch_size, rows_of(e.mine)
    keep = c.checkpoint.keep_last + 1
    attention, loss = chosen_attention(m, e.device).name, chosen_loss(m, e.device).name
    full = m.num_parameters(embedding=True)
    free = "an unknown size" if math.isinf(e.free_bytes) else bytes_text(e.free_bytes)
    name = torch.cuda.get_device_name(e.device) if e.device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    rows: list[tuple[str, str, str] | None] = [
        ("model", m.kind, f"{m.n_layers} layers of {m.d_model}, {m.n_heads} heads, MLP {m.mlp_width}"),
        ("parameters", f"{m.num_parameters():,}", "without embedding and output layer"),
        ("", f"{full:,}", "with them"),
        None,
        ("steps", f"{c.schedule.steps:,}", f"of {c.batch_size:,} sequences of {c.data.window:,} tokens"),
        ("tokens", f"{e.tokens:,}", f"{e.tokens / m.num_parameters():.1f} a parameter"),
        *([("processes", f"{N:,}", f"{c.parallel}, {e.mine.batch_size:,} sequences of a step each")] if N > 1 else []),
        *(("data" if n == 0 else "", what, text) for n, (what, text) in enumerate(e.data.items())),
        None,
        ("memory", bytes_text(memory.total), f"of {free} free{'; of each process' if N > 1 else ''}; an estimate"),
        (
            "  weights",
            bytes_text(memory.weights),
            c.precision
            + (", with a float32 copy" if c.precision == "bf16" else "")
            + (f"; split over {N}, but for what is gathered" if e.parts > 1 else ""),
        ),
        ("  gradients", bytes_text(memory.gradients), ""),
        ("  optimizer", bytes_text(memory.optimizer), "AdamW's two means"),
    ]
    if "standard" in m.layer_kinds:
        rows.append(("  standard", bytes_text(memory.standard), f"kept at {micro} sequences; attention: {attention}"))
    if "recurrent" in m.layer_kinds:
        rows.append(("  recurrent", bytes_text(memory.recurrent), f"kept at {wide} sequences; scan: {e.scan}"))
    rows += [
        ("  working", bytes_text(memory.working), f"{memory.moment}{f' ({loss})' if 'loss' in memory.moment else ''}"),
        None,
        ("time", duration(e.seconds), f"{rate_text(e.tokens / e.seconds)} on {f'{N} times ' if N > 1 else ''}{name}"),
        ("  a step", duration(e.time.step), e.time.how),
        ("  not in it", "", f"evaluation, checkpoints, compilation{', what processes exchange' if N > 1 else ''}"),
        None,
        (
            "disk",
            bytes_text(keep * e.checkpoint_bytes),
            f"{keep} checkpoints of {bytes_text(e.checkpoint_bytes)}; one more to write",
        ),
    ]
    if e.device.type == "cpu" and c.precision == "bf16":
        seconds, scan = h100_seconds(e.mine), h100_scan(e.mine, together=e.parts == 1)
        there = estimate_memory(
            e.mine, gpu=scan in KERNELS, scan=scan, device_bytes=H100_BYTES, parts=e.parts
        ).total  # fmt: skip
        rows += [
            None,
            (
                f"{N} H100s" if N > 1 else "one H100",
                duration(seconds * c.schedule.steps),
                rate_text(e.tokens / c.schedule.steps / seconds),
            ),
            ("  a step", duration(seconds), "not timed: operations, at the rate measured for 150m-12"),
            (
                "  memory",
                bytes_text(there),
                f"of {bytes_text(H100_BYTES)}{'' if scan == 'none' else f'; scan: {scan}'}",
            ),
        ]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console.print(table)
    if memory.total > e.free_bytes:
        remedy = "lower micro_batch_size"
        if e.mine.recurrent_micro_batch_size is not None:
            remedy += " and recurrent_micro_batch_size"
        if "standard" in m.layer_kinds and not c.recompute:
            remedy += ", or set recompute"
        console.print(f"This is more memory than is free here: {remedy}.", markup=False, soft_wrap=True)
