"""`recurformer bench`: speed, memory and memory traffic."""

from __future__ import annotations

from typing import Any

import click

from recurformer.cli.common import device_option, out_option, run_experiment, torch_device
from recurformer.cli.groups import Group
from recurformer.cli.options import SettingsCommand, chosen

BENCH = "recurformer.experiments.bench"


@click.group(cls=Group)
def bench() -> None:
    """Measure speed and memory, and model memory traffic."""


@bench.command("scan", cls=SettingsCommand, settings=[f"{BENCH}.scan:ScanSettings"])
@device_option
@out_option("scan.json and scan.png")
def bench_scan(device: str, out: str | None, **options: Any) -> None:
    """Time and peak memory of the reference, every faster scan and standard layers.

    All of them run in turn, and times are medians after warm-up. Memory is the part that a run holds in addition to
    model and tokens. The package recurrent-transformer-pytorch, where it is installed, is measured too, as "peer": at
    the same widths, and without its additions to the paper's layer.
    """
    from recurformer.experiments.bench import scan

    settings = chosen(scan.ScanSettings, options, device=torch_device(device))
    run_experiment("scan", scan.bench_scan, scan.show_scan, scan.draw_scan, settings, out)


@bench.command("layer", cls=SettingsCommand, settings=[f"{BENCH}.layer:LayerSettings"])
@device_option
@out_option("layer.json and layer.png")
def bench_layer(device: str, out: str | None, **options: Any) -> None:
    """Forward and backward of one layer or of a stack, next to a standard layer."""
    from recurformer.experiments.bench import layer

    settings = chosen(layer.LayerSettings, options, device=torch_device(device))
    run_experiment("layer", layer.bench_layer, layer.show_layer, layer.draw_layer, settings, out)


@bench.command("model", cls=SettingsCommand, settings=[f"{BENCH}.model:ModelSettings"])
@click.option("--recompute", default="off", type=click.Choice(["off", "on", "both"]), help="Second evaluation of "
              "standard layers in the backward.")  # fmt: skip
@device_option
@out_option("model.json and model.png")
def bench_model(recompute: str, device: str, out: str | None, **options: Any) -> None:
    """Tokens per second of whole optimizer steps: recurrent models and hybrids against the Transformer.

    Each model runs with its own fastest micro-batch. The defaults are meant for a GPU: on a CPU, take a small preset
    and few tokens, as in --presets nano --tokens 4096.
    """
    from recurformer.experiments.bench import model

    choices = {"off": (False,), "on": (True,), "both": (False, True)}[recompute]
    settings = chosen(model.ModelSettings, options, recompute=choices, device=torch_device(device))
    run_experiment("model", model.bench_model, model.show_model, model.draw_model, settings, out)


@bench.command("prefill", cls=SettingsCommand, settings=[f"{BENCH}.prefill:PrefillSettings"])
@device_option
@out_option("prefill.json and prefill.png")
def bench_prefill(device: str, out: str | None, **options: Any) -> None:
    """Tokens per second of reading a prompt, against the limit of streaming the weights once a position."""
    from recurformer.experiments.bench import prefill

    settings = chosen(prefill.PrefillSettings, options, device=torch_device(device))
    run_experiment("prefill", prefill.bench_prefill, prefill.show_prefill, prefill.draw_prefill, settings, out)


@bench.command("decode", cls=SettingsCommand, settings=[f"{BENCH}.decode:DecodeSettings"])
@device_option
@out_option("decode.json and decode.png")
def bench_decode(device: str, out: str | None, **options: Any) -> None:
    """Milliseconds per decoded token over batch and context, against the limit of reading weights and cache once.

    Recurrent and standard models run in the same engine. The cache holds random pairs; no prompt is read.
    """
    from recurformer.experiments.bench import decode

    settings = chosen(decode.DecodeSettings, options, device=torch_device(device))
    run_experiment("decode", decode.bench_decode, decode.show_decode, decode.draw_decode, settings, out)


@bench.command(
    "traffic", cls=SettingsCommand, settings=[f"{BENCH}.traffic:TrafficSettings", f"{BENCH}.traffic:MeasureSettings"]
)
@click.option("--measure", is_flag=True, help="DRAM bytes of a GPU, read with NVIDIA's profiler ncu.")
@out_option("traffic.json and traffic.png")
def bench_traffic(measure: bool, out: str | None, **options: Any) -> None:
    """Memory traffic of a recurrent layer over the length, modelled or measured.

    The model counts the bytes of attention, naive against tiled. With --measure, the profiler reads the DRAM bytes of
    one layer in bf16 and pure tiling, and two fits show how they grow.
    """
    from recurformer.experiments.bench import traffic

    if not measure:
        settings = chosen(traffic.TrafficSettings, options)
        run_experiment("traffic", traffic.bench_traffic, traffic.show_traffic, traffic.draw_traffic, settings, out)
        return
    if (options["n_kv_heads"], options["element_bytes"], options["chunk"], options["leaf"]) != (None, 2, None, 1):
        raise ValueError("--measure is of pure tiling in bf16; drop --n-kv-heads, --element-bytes, --chunk, --leaf")
    settings = chosen(traffic.MeasureSettings, options)
    name = f"traffic-measured{'-backward' if settings.backward else ''}"
    run_experiment(name, traffic.measure_traffic, traffic.show_measured, traffic.draw_measured, settings, out)


@bench.command("stability", cls=SettingsCommand, settings=[f"{BENCH}.stability:StabilitySettings"])
@click.option("--training/--no-training", "grid", default=True, help="Gradient norms of a grid of training runs, over "
              "depths, widths and learning rates.")  # fmt: skip
@out_option("stability.json and stability.png")
def bench_stability(grid: bool, out: str | None, **options: Any) -> None:
    """Gradients over distance before and after training, and gradient norms while training.

    Recurrent models, standard models and an Elman network train on the text inside the package. A single layer has
    bounds beside its gradients. A few minutes on a CPU.
    """
    from recurformer.experiments.bench import stability

    settings = chosen(stability.StabilitySettings, options, **({} if grid else {"depths": ()}))
    show, draw = stability.show_stability, stability.draw_stability
    run_experiment("stability", stability.bench_stability, show, draw, settings, out)
