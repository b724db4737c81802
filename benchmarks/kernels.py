"""Time each GPU kernel of a recurrent layer, in a forward and in a forward and backward.

    python benchmarks/kernels.py --batch-size 512 --d-model 1024 --n-heads 16
    python benchmarks/kernels.py --batch-size 64 --stack 12 --scan wavefront

The work is that of `recurformer bench layer`. Kernels that start while others still run overlap, so the sum of the
profiler's durations may exceed the whole time.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from recurformer.cli import main
from recurformer.experiments.bench.common import ScanName, in_words, machine, milliseconds, spread
from recurformer.experiments.bench.layer import PASSES, LayerSettings, layer_passes
from recurformer.experiments.bench.timing import DTYPES, Work, release, time_runs
from recurformer.scan.algorithms import SCANS


def kernels_of(work: Work) -> dict[str, list[float]]:
    """Return by name the microseconds of every kernel, copy and fill that some work runs on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        work()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events() or []:
        if event.device_type == DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time)
    return found


def table(kernels: dict[str, list[float]], positions: int, most: int) -> list[str]:
    """Return the lines of a table of kernels, the one with the most time first.

    Args:
        kernels: microseconds of each launch, by kernel.
        positions: N times layers, by which times a position are divided.
        most: kernels to name.
    """
    lines = [f"{'launches':>8} {'ms':>9} {'us each':>9} {'us/pos':>8}  kernel"]
    totals = sorted(((sum(times), len(times), name) for name, times in kernels.items()), reverse=True)
    rest = totals[most:]
    if rest:
        totals[most:] = [(sum(row[0] for row in rest), sum(row[1] for row in rest), f"{len(rest)} others")]
    for total, count, name in [*totals, (sum(map(sum, kernels.values())), sum(map(len, kernels.values())), "all")]:
        each = total / max(1, count)
        lines.append(f"{count:8,} {total / 1e3:9.2f} {each:9.1f} {total / positions:8.2f}  {name[:100]}")
    return lines


@click.command()
@click.option("--batch-size", default=512, type=int, help="Sequences.")
@click.option("--length", default=512, type=int, metavar="N", help="Positions.")
@click.option("--d-model", default=1024, type=int, help="Width of the residual stream.")
@click.option("--n-heads", default=16, type=int, help="Query heads.")
@click.option(
    "--stack", default=1, type=int, metavar="L", help="Recurrent layers in the stack. Times are those of one."
)
@click.option("--scan", default="fused", type=click.Choice(tuple(SCANS)), help="Scan that evaluates them.")
@click.option("--dtype", default="bf16", type=click.Choice(tuple(DTYPES)), help="Compute dtype. bf16 is autocast.")
@click.option("--repeats", default=5, type=int, help="Timed runs. The median is shown.")
@click.option("--most", default=30, type=click.IntRange(1), help="Kernels to name, those with the most time first.")
def kernels(scan: ScanName, most: int, **shape: Any) -> None:
    """Time a recurrent layer, or a stack of them, and its kernels on an NVIDIA GPU."""
    settings = LayerSettings(scans=(scan,), standard=False, device="cuda", **shape)
    if not torch.cuda.is_available():
        raise ValueError("there is no NVIDIA GPU here; these kernels need one, run this script where there is one")
    s, device = settings, torch.device("cuda")
    print(in_words(machine()))
    print(f"B {s.batch_size}, N {s.length}, D {s.d_model}, H {s.n_heads}, stack of {s.stack}, {s.dtype}, {scan}")
    for which in PASSES:
        torch.manual_seed(s.seed)
        with torch.set_grad_enabled(which == "both"):
            subject, prepare = layer_passes(s, scan, device)
            times = time_runs(prepare, device, s.repeats, s.warmup).to_dict(which)
            seen = kernels_of(prepare(0))
        one = milliseconds(times[f"{which}_s"] / subject.layers)
        print(f"\n{which}: {one} ms a layer ({spread(times, which, subject.layers)})")
        print("\n".join(table(seen, s.length * subject.layers, most)), flush=True)
        del subject, prepare
        release(device)


if __name__ == "__main__":
    main(command=kernels, name="kernels.py")
