"""The cost of a run before it starts: parameters, steps, memory, time and disk. Writes nothing.

Memory is arithmetic on the configuration. Time is measured: a few real steps on this device with random tokens, scaled
to the run. Where even one sequence takes too long or too much memory, time is computed from the measured rate of a
matrix product, and the table says so.

With several processes all numbers are those of one process, with its share of each step. Their exchange is not
counted.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from recurformer.choose import choices
from recurformer.training.config import DataConfig, TrainConfig, open_tokens
from recurformer.training.memory import H100_BYTES, Memory, available_bytes, memory_on, memory_on_h100, rows_of, scan_of
from recurformer.training.timing import Time, estimate_time, h100_seconds
from recurformer.training.torchrun import training_device
from recurformer.units import bytes_text, duration, rate_text

if TYPE_CHECKING:
    from rich.console import Console

Row = tuple[str, str, str]  # name, value, remark


@dataclass(frozen=True)
class Estimate:
    """The cost of a run on a device."""

    config: TrainConfig
    mine: TrainConfig  # the share of one process
    processes: int
    device: torch.device
    memory: Memory  # of one process
    time: Time
    free_bytes: float
    scan: str
    data: dict[str, str]  # "training" and "validation" -> how many tokens there are, or that they are missing

    @property
    def seconds(self) -> float:
        """Seconds of all steps, without evaluation and saving."""
        return self.time.step * self.config.schedule.steps

    @property
    def tokens(self) -> int:
        """Targets of the whole run."""
        c = self.config
        return c.schedule.steps * c.batch_size * c.data.window

    @property
    def parts(self) -> int:
        """Number of processes over which weights, gradients and optimizer state are split."""
        return self.processes if self.config.parallel == "fsdp" else 1

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: weights, and the optimizer's state."""
        full = 8 if self.config.precision == "fp64" else 4
        return full * self.config.model.num_parameters(embedding=True) + self.memory.optimizer * self.parts


def estimate(config: TrainConfig, processes: int = 1) -> Estimate:
    """Estimate the cost of a run on the device that it would run on, or on several like it. The data may be missing.

    Raises:
        ValueError: for a device that is not here, a scan that it does not have, or a batch that does not split.
    """
    device, mine = training_device(config), config.share(processes)
    parts = processes if config.parallel == "fsdp" else 1
    free, scan = available_bytes(device), scan_of(mine, device, together=parts == 1)
    memory = memory_on(mine, device, scan, parts)
    timed = mine if scan == "none" else dataclasses.replace(mine, scan=scan, init_from=None)
    tokens = config.schedule.steps * config.batch_size * config.data.window
    data = {"training": describe_data(config.data, "train", tokens)}
    if config.data.validation is not None:
        data["validation"] = describe_data(config.data, "validation")
    return Estimate(config, mine, processes, device, memory, estimate_time(timed, device, free), free, scan, data)


def describe_data(data: DataConfig, which: Literal["train", "validation"], tokens: int | None = None) -> str:
    """Return a line about a run's data: the number of tokens and how often they are read, or that they are missing.

    Args:
        tokens: targets of the run.
    """
    source = getattr(data, which)
    if not Path(source).exists():
        return f"{source} is missing"
    found = open_tokens(data, which)
    epochs = "" if tokens is None else f", read {tokens / found.n_tokens:.2f} times"
    return f"{found.n_tokens:,} tokens in {source}{epochs}"


# --- the table ------------------------------------------------------------------------------------------------------


def show(e: Estimate, console: Console) -> None:
    """Print an estimate as a table of 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for rows in (_model_rows(e), _step_rows(e), _memory_rows(e), _time_rows(e), _disk_rows(e), _h100_rows(e)):
        for row in rows:
            table.add_row(*map(Text, row))  # plain: names of folders may look like markup
        table.add_section()
    console.print(table)
    if e.memory.total > e.free_bytes:
        console.print(f"This is more memory than is free here: {_remedy(e)}.", markup=False, soft_wrap=True)


def _model_rows(e: Estimate) -> list[Row]:
    m = e.config.model
    return [
        ("model", m.kind, f"{m.n_layers} layers of {m.d_model}, {m.n_heads} heads, MLP {m.mlp_width}"),
        ("parameters", f"{m.num_parameters():,}", "without embedding and output layer"),
        ("", f"{m.num_parameters(embedding=True):,}", f"with them; vocabulary {m.vocab_size:,}"),
    ]


def _step_rows(e: Estimate) -> list[Row]:
    c, N = e.config, e.processes
    rows = [
        ("steps", f"{c.schedule.steps:,}", f"of {c.batch_size:,} sequences of {c.data.window:,} tokens"),
        ("tokens", f"{e.tokens:,}", f"{e.tokens / c.model.num_parameters():.1f} a parameter"),
    ]
    if N > 1:
        rows.append(("processes", f"{N:,}", f"{c.parallel}, {e.mine.batch_size:,} sequences of a step each"))
    return rows + [("" if n else "data", what, text) for n, (what, text) in enumerate(e.data.items())]


def _memory_rows(e: Estimate) -> list[Row]:
    c, m, memory = e.config, e.config.model, e.memory
    chosen = choices(m, e.device)
    attention, loss = chosen["attention"].name, chosen["loss"].name
    free = "an unknown size" if math.isinf(e.free_bytes) else bytes_text(e.free_bytes)
    each = "; of each process" if e.processes > 1 else ""
    weights = c.precision + (", with a float32 copy" if c.precision == "bf16" else "")
    weights += f"; split over {e.processes}, but for what is gathered" if e.parts > 1 else ""
    rows = [
        ("memory", bytes_text(memory.total), f"of {free} free{each}; an estimate"),
        ("  weights", bytes_text(memory.weights), weights),
        ("  gradients", bytes_text(memory.gradients), ""),
        ("  optimizer", bytes_text(memory.optimizer), "AdamW's two means"),
    ]
    if "standard" in m.layer_kinds:
        micro = e.mine.micro_batch_size or e.mine.batch_size
        rows.append(("  standard", bytes_text(memory.standard), f"kept at {micro} sequences; attention: {attention}"))
    if "recurrent" in m.layer_kinds:
        kept = f"kept at {rows_of(e.mine)} sequences; scan: {e.scan}"
        rows.append(("  recurrent", bytes_text(memory.recurrent), kept))
    which = f" ({loss})" if "loss" in memory.moment else ""
    return [*rows, ("  working", bytes_text(memory.working), f"{memory.moment}{which}")]


def _time_rows(e: Estimate) -> list[Row]:
    N = e.processes
    name = torch.cuda.get_device_name(e.device) if e.device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    where = f"{N} times {name}" if N > 1 else name
    exchanged = ", what processes exchange" if N > 1 else ""
    return [
        ("time", duration(e.seconds), f"{rate_text(e.tokens / e.seconds)} on {where}"),
        ("  a step", duration(e.time.step), e.time.how),
        ("  not in it", "", f"evaluation, checkpoints, compilation{exchanged}"),
    ]


def _disk_rows(e: Estimate) -> list[Row]:
    keep = e.config.checkpoint.keep_last + 1  # the best one stays, too
    size = bytes_text(e.checkpoint_bytes)
    return [("disk", bytes_text(keep * e.checkpoint_bytes), f"{keep} checkpoints of {size}; one more to write")]


def _h100_rows(e: Estimate) -> list[Row]:
    """Return what an H100 would need, for a run in bf16 that is estimated on a CPU; no rows for any other."""
    if e.device.type != "cpu" or e.config.precision != "bf16":
        return []
    steps, seconds = e.config.schedule.steps, h100_seconds(e.mine)
    memory, scan = memory_on_h100(e.mine, e.parts)
    which = "" if scan == "none" else f"; scan: {scan}"
    return [
        (
            f"{e.processes} H100s" if e.processes > 1 else "one H100",
            duration(seconds * steps),
            rate_text(e.tokens / steps / seconds),
        ),
        ("  a step", duration(seconds), "not timed: operations, at the rate measured for 150m-12"),
        ("  memory", bytes_text(memory.total), f"of {bytes_text(H100_BYTES)}{which}"),
    ]


def _remedy(e: Estimate) -> str:
    """Return the settings that lower the memory of a step."""
    wide = " and recurrent_micro_batch_size" if e.mine.recurrent_micro_batch_size is not None else ""
    again = "standard" in e.config.model.layer_kinds and not e.config.recompute
    return f"lower micro_batch_size{wide}{', or set recompute' if again else ''}"
