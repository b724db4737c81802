"""Tokens a second of training steps on one process and on several, in one table.

    torchrun --standalone --nproc-per-node 2 benchmarks/ddp.py --preset 150m-6 --layers recurrent

The first process measures by itself while the others wait; then all share a step of as many tokens, and then one of as
many tokens a process. A step is the training's own: micro-batches to the device, forward, loss, backward, sum of the
gradients over the processes, clipping, fused AdamW. Tokens are random. Written for GPUs; a CPU will do to try it out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recurformer.config import ModelConfig
from recurformer.data.windows import Batch
from recurformer.experiments.bench.common import in_words, machine
from recurformer.experiments.bench.timing import release, time_runs
from recurformer.training.config import TrainConfig
from recurformer.training.distributed import OneProcess, join_processes
from recurformer.training.optimizer import make_optimizer, set_rates
from recurformer.training.start import make_model
from recurformer.training.steps import gradient_step
from recurformer.training.torchrun import training_device


def random_batches(config: TrainConfig, rank: int, size: int) -> Iterator[Batch]:
    """One process's share of steps of random tokens, without end."""
    draw = torch.Generator().manual_seed(rank)
    share = config.batch_size // size
    while True:
        drawn = torch.randint(0, config.model.vocab_size, (share, config.data.window + 1), generator=draw)
        ids = torch.arange(share)
        yield Batch(tokens=drawn[:, :-1].clone(), targets=drawn[:, 1:].clone(), document_ids=None, window_ids=ids)


def measure(
    config: TrainConfig, processes: OneProcess, device: torch.device, repeats: int, warmup: int
) -> dict[str, Any]:
    """One row: the slowest process's median step, and what it makes in tokens a second."""
    torch.manual_seed(config.seed)
    model = make_model(config, device, None, processes)
    optimizer = make_optimizer(model, config.optimizer)
    batches = random_batches(config, processes.rank, processes.size)

    def step() -> None:
        set_rates(optimizer, 0, config.optimizer, config.schedule)
        loss, _, _ = gradient_step(model, optimizer, next(batches), config, device, processes)
        processes.gather(loss, 0)
        optimizer.step()

    times = time_runs(lambda _: step, device, repeats, warmup)
    sums = time_runs(lambda _: lambda: processes.sum_gradients(model), device, repeats, 1)
    everyone = processes.gather(times.median, sums.median, min(times.runs), max(times.runs))
    step_s, sum_s, fastest, slowest = (max(values) for values in zip(*everyone, strict=True))
    tokens = config.batch_size * config.data.window
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return {
        "processes": processes.size, "parallel": config.parallel if processes.size > 1 else "-", "tokens": tokens,
        "micro_batch_size": min(config.micro_batch_size or config.batch_size, config.batch_size // processes.size),
        "step_s": step_s, "fastest_s": fastest, "slowest_s": slowest,
        "sum_of_gradients_s": sum_s, "tokens_per_s": tokens / step_s, "peak_GiB": peak,
    }  # fmt: skip


def free(device: torch.device) -> None:
    """Give back what the last row held."""
    if device.type == "cuda":
        from recurformer.scan.fused.engines import release_engines

        release_engines()
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="150m-6")
    parser.add_argument("--layers", default="recurrent", help="recurrent, standard or first:K")
    parser.add_argument("--tokens", type=int, default=262_144, help="of one step")
    parser.add_argument("--length", type=int, default=512, help="N, positions of a sequence")
    parser.add_argument("--micro-batch-size", type=int, default=256, help="sequences in memory at once, a process")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    asked = parser.parse_args()

    one = TrainConfig.from_dict({
        "model": ModelConfig.preset(asked.preset, layers=asked.layers).to_dict(),
        "data": {"window": asked.length}, "batch_size": asked.tokens // asked.length,
        "micro_batch_size": min(asked.micro_batch_size, asked.tokens // asked.length), "precision": asked.precision,
        "parallel": asked.parallel, "device": asked.device, "timeout": 3600.0,
    })  # fmt: skip
    device = training_device(one)
    rows: list[dict[str, Any]] = []
    with join_processes(one, device) as processes:

        def show(row: dict[str, Any]) -> None:
            rows.append(row)
            if processes.rank == 0:
                gain = row["tokens_per_s"] / rows[0]["tokens_per_s"]
                print(
                    f"{row['processes']} processes ({row['parallel']}), {row['tokens']:,} tokens a step, micro-batches "
                    f"of {row['micro_batch_size']}: {row['step_s'] * 1e3:,.1f} ms ({row['fastest_s'] * 1e3:,.1f}.."
                    f"{row['slowest_s'] * 1e3:,.1f}), of which gradients {row['sum_of_gradients_s'] * 1e3:,.1f}; "
                    f"{row['tokens_per_s']:,.0f} tokens/s, {gain:.2f}x, peak {row['peak_GiB']:.1f} GiB",
                    flush=True,
                )

        if processes.rank == 0:
            show(measure(one, OneProcess(), device, asked.repeats, asked.warmup))
            free(device)
        else:
            rows.append({"tokens_per_s": float("nan")})
        processes.gather(0)  # the others wait here
        for factor in (1, processes.size) if processes.size > 1 else ():
            show(
                measure(
                    replace(one, batch_size=factor * one.batch_size), processes, device, asked.repeats, asked.warmup
                )
            )
            free(device)
        if processes.rank == 0:
            print(in_words(machine()))
            if asked.out is not None:
                asked.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
