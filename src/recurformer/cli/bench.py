"""`recurformer bench`: speed, memory and memory traffic."""

from __future__ import annotations

from typing import Any

import click

from recurformer.cli.common import device_option, make_folder, names, run_experiment, sizes
from recurformer.cli.groups import Group


@click.group(cls=Group)
def bench() -> None:
    """Measure speed and memory, and model memory traffic."""


@bench.command("scan")
@click.option("--length", "lengths", multiple=True, default=(256,), type=int, metavar="N", help="Positions; may be "
              "repeated.")  # fmt: skip
@click.option("--batch-size", default=16, type=int, help="Sequences.")
@click.option("--d-model", default=256, type=int, help="Width of the residual stream.")
@click.option("--n-layers", default=4, type=int, help="Layers.")
@click.option("--n-heads", default=4, type=int, help="Heads.")
@click.option("--vocab-size", default=256, type=int, help="Of the language model around the layers.")
@click.option("--dtype", default="fp32", help="fp32, or bf16 (autocast: weights stay float32).")
@click.option("--path", "paths", multiple=True, metavar="NAME", help="A scan by its name, standard or peer; may be "
              "repeated.  [default: all]")  # fmt: skip
@click.option("--backward/--forward-only", default=True, help="A training step without the optimizer, or inference.")
@click.option("--repeats", default=5, type=int, help="Timed runs, of which the median counts.")
@click.option("--warmup", default=1, type=int, help="Runs before them.")
@click.option("--peer-repeats", type=int, metavar="N", help="Timed runs of the peer, which is slow.  [default: as "
              "many]")  # fmt: skip
@click.option("--threads", type=int, metavar="N", help="Of the CPU.  [default: as PyTorch chooses]")
@click.option("--seed", default=0, type=int, help="Of weights and tokens.")
@device_option
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder for scan.json and scan.png.")
def bench_scan(lengths: tuple[int, ...], paths: tuple[str, ...], device: str, out: str | None, **shape: Any) -> None:
    """Time and peak memory of the reference, every faster scan and standard layers, in one run.

    Times are medians after warm-up; the paths take turns. Memory is what a run holds beyond model and tokens. The
    package recurrent-transformer-pytorch, when it is installed, is measured beside them as "peer", at the same widths
    and without what it adds to the paper's layer.
    """
    from recurformer.experiments.bench import scan
    from recurformer.generation.text import pick_device

    settings = scan.ScanSettings(
        lengths=lengths, paths=paths or scan.PATHS, device=str(pick_device(device)), **shape
    )  # fmt: skip
    run_experiment("scan", scan.bench_scan, scan.show_scan, scan.draw_scan, settings, out)


def timing_options(command):
    """What every benchmark of a GPU has."""
    for option in (
        click.option("--dtype", default="bf16", help="bf16, or fp32."),
        click.option("--repeats", default=5, type=int, help="Timed runs, of which the median counts."),
        click.option("--warmup", default=3, type=int, help="Runs before them."),
        click.option("--seed", default=0, type=int, help="Of weights and inputs."),
        device_option,
        click.option("--out", type=click.Path(), metavar="DIR", help="Folder for the numbers (JSON) and a picture."),
    ):
        command = option(command)
    return command


compile_option = click.option("--compile/--no-compile", default=None, help="Fuse element-wise steps of standard "
                              "layers.  [default: on a GPU]")  # fmt: skip


@bench.command("layer")
@click.option("--batch-size", default=64, type=int, help="Sequences.")
@click.option("--length", default=512, type=int, metavar="N", help="Positions.")
@click.option("--d-model", default=1024, type=int, help="Width of the residual stream.")
@click.option("--n-heads", default=16, type=int, help="Query heads.")
@click.option("--n-kv-heads", type=int, metavar="G", help="Key-value heads.  [default: as many as query heads]")
@click.option("--stack", default=1, type=int, metavar="L", help="Layers on top of each other; times are of one.")
@click.option("--scans", default="auto", callback=names, metavar="NAME,...", help="How the recurrent layer is "
              "evaluated, a row each.")  # fmt: skip
@click.option("--standard/--no-standard", default=True, help="Measure a standard layer beside it.")
@click.option("--official", type=click.Path(), metavar="CHECKOUT", help="Folder with the code of "
              "github.com/geniucos/recurrent-transformer, whose blocks are measured in the same run.")  # fmt: skip
@click.option("--backward/--forward-only", default=True, help="Forward and backward besides the forward alone.")
@click.option("--inputs", default=3, type=int, help="Different inputs that the runs take in turn.")
@compile_option
@timing_options
def bench_layer(scans: tuple[str, ...], device: str, out: str | None, **shape: Any) -> None:
    """One layer, or a stack of them: forward, and forward and backward, beside a standard layer."""
    from recurformer.experiments.bench import layer
    from recurformer.generation.text import pick_device

    settings = layer.LayerSettings(scans=scans, device=str(pick_device(device)), **shape)
    run_experiment("layer", layer.bench_layer, layer.show_layer, layer.draw_layer, settings, out)


@bench.command("model")
@click.option("--presets", default="150m-12", callback=names, metavar="NAME,...", help="Shapes.")
@click.option("--kinds", default="standard,recurrent,first:1,first:3", callback=names, metavar="KIND,...",
              help="Of their layers.")  # fmt: skip
@click.option("--tokens", default=262_144, type=int, help="Of one optimizer step.")
@click.option("--length", default=512, type=int, metavar="N", help="Positions of a sequence.")
@click.option("--micro-batch-sizes", default="64,128", callback=sizes, metavar="B,...", help="Sequences at once, each "
              "tried.")  # fmt: skip
@click.option("--recurrent-micro-batch-sizes", default="", callback=sizes, metavar="B,...", help="Sequences at once "
              "in the recurrent layers of a hybrid, each tried beside the same number in all layers.")  # fmt: skip
@click.option("--recompute", default="off", type=click.Choice(["off", "on", "both"]), help="Evaluate standard layers "
              "again in the backward.")  # fmt: skip
@click.option("--scan", default="auto", help="How recurrent layers are evaluated.")
@compile_option
@timing_options
def bench_model(recompute: str, device: str, out: str | None, **options: Any) -> None:
    """Whole optimizer steps: tokens a second of recurrent models and hybrids against the Transformer, each with its own
    fastest micro-batch."""
    from recurformer.experiments.bench import model
    from recurformer.generation.text import pick_device

    again = {"off": (False,), "on": (True,), "both": (False, True)}[recompute]
    settings = model.ModelSettings(recompute=again, device=str(pick_device(device)), **options)
    run_experiment("model", model.bench_model, model.show_model, model.draw_model, settings, out)


@bench.command("prefill")
@click.option("--presets", default="300m-6,300m-24", callback=names, metavar="NAME,...", help="Shapes.")
@click.option("--scans", default="auto", callback=names, metavar="NAME,...", help="How recurrent layers read, a row "
              "each; engine: as generation does.")  # fmt: skip
@click.option("--standard/--no-standard", default=True, help="Measure standard layers beside them.")
@click.option("--length", default=2048, type=int, metavar="N", help="Positions of the prompt.")
@click.option("--batch-size", default=1, type=int, help="Prompts.")
@click.option("--inputs", default=3, type=int, help="Different prompts that the runs take in turn.")
@timing_options
def bench_prefill(device: str, out: str | None, **options: Any) -> None:
    """Reading a prompt: tokens a second against what streaming the weights once a position allows."""
    from recurformer.experiments.bench import prefill
    from recurformer.generation.text import pick_device

    settings = prefill.PrefillSettings(device=str(pick_device(device)), **options)
    run_experiment("prefill", prefill.bench_prefill, prefill.show_prefill, prefill.draw_prefill, settings, out)


@bench.command("decode")
@click.option("--models", default="300m-6,300m-24:standard", callback=names, metavar="PRESET:KIND,...",
              help="Shapes; recurrent without a kind.")  # fmt: skip
@click.option("--batch-sizes", default="1,64", callback=sizes, metavar="B,...", help="Rows that continue at once, "
              "each tried.")  # fmt: skip
@click.option("--contexts", default="1024", callback=sizes, metavar="N,...", help="Slots that the last timed token "
              "sees, each tried.")  # fmt: skip
@click.option("--step", "steps", default="auto", callback=names, metavar="NAME,...", help="auto, plain (PyTorch "
              "operations) or fused (kernels), a row each.")  # fmt: skip
@click.option("--tokens", default=16, type=int, help="Of one timed run.")
@click.option("--huggingface/--no-huggingface", default=False, help="Also time generate, of Hugging Face and ours, on "
              "the same weights, one row.")  # fmt: skip
@timing_options
def bench_decode(device: str, out: str | None, **options: Any) -> None:
    """Decoding: milliseconds a token over batch and context, against what reading weights and cache once allows.

    Recurrent and standard models run in the same engine. The cache holds random pairs; no prompt is read.
    """
    from recurformer.experiments.bench import decode
    from recurformer.generation.text import pick_device

    settings = decode.DecodeSettings(device=str(pick_device(device)), **options)
    run_experiment("decode", decode.bench_decode, decode.show_decode, decode.draw_decode, settings, out)


@bench.command("traffic")
@click.option("--measure", is_flag=True, help="Read what a GPU's memory really moves, with NVIDIA's profiler ncu.")
@click.option("--length", "lengths", multiple=True, type=int, metavar="N", help="Positions; may be repeated.  "
              "[default: powers of two from 64 to 65536; measured: 256 to 4096]")  # fmt: skip
@click.option("--batch-size", type=int, help="Sequences.  [default: 1; measured: 16]")
@click.option("--n-heads", default=16, type=int, help="Query heads.")
@click.option("--n-kv-heads", type=int, metavar="G", help="Key-value heads.  [default: as many as query heads]")
@click.option("--head-dim", default=64, type=int, help="Width of a head.")
@click.option("--element-bytes", default=2, type=int, help="Of queries, keys, values and outputs.")
@click.option("--chunk", type=int, metavar="C", help="Positions of a chunk, a power of two.  [default: pure tiling]")
@click.option("--leaf", default=1, type=int, help="Positions that read each other directly, a power of two.")
@click.option("--scan", default="fused", help="Measured: how the layer is evaluated, in pure tiling.")
@click.option("--backward/--forward-only", default=False, help="Measured: forward and backward.")
@click.option("--replay", default="app-range", help="Measured: ncu reads the counters around the whole scan, or around "
              "every kernel (kernel: slow).")  # fmt: skip
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder for traffic.json and traffic.png.")
def bench_traffic(
    measure: bool,
    lengths: tuple[int, ...],
    batch_size: int | None,
    scan: str,
    backward: bool,
    replay: str,
    out: str | None,
    **shape: Any,
) -> None:
    """HBM traffic of a recurrent layer over the length: of its attention, modelled, naive against tiled; with --measure
    the DRAM bytes of one layer in bf16 in pure tiling, and how they grow."""
    from rich.console import Console

    from recurformer.experiments.bench import common, traffic

    given: dict[str, Any] = {"lengths": lengths} if lengths else {}
    given |= {"batch_size": batch_size} if batch_size is not None else {}
    if measure:
        if (shape["n_kv_heads"], shape["element_bytes"], shape["chunk"], shape["leaf"]) != (None, 2, None, 1):
            raise ValueError("--measure is of pure tiling in bf16; drop --n-kv-heads, --element-bytes, --chunk, --leaf")
        settings = traffic.MeasureSettings(
            n_heads=shape["n_heads"], head_dim=shape["head_dim"], scan=scan, backward=backward, replay=replay, **given
        )
        name = f"traffic-measured{'-backward' if backward else ''}"
        run_experiment(name, traffic.measure_traffic, traffic.show_measured, traffic.draw_measured, settings, out)
        return
    settings = traffic.TrafficSettings(**given, **shape)
    results = traffic.bench_traffic(settings)
    traffic.show_traffic(results, Console())
    if out is not None:
        made = common.write(out, "traffic", results, traffic.draw_traffic(results))
        print("\n".join(map(str, made)))


@bench.command("stability")
@click.option("--d-model", default=64, type=int, help="Width of the models followed over distance.")
@click.option("--n-layers", default=2, type=int, help="Their layers.")
@click.option("--n-heads", default=4, type=int, help="Heads of every model.")
@click.option("--length", default=128, type=int, help="Positions; distances are measured from the last one.")
@click.option("--steps", default=100, type=int, help="Training steps before the second look.")
@click.option("--lr", default=4e-3, type=float, help="Learning rate of that training.")
@click.option("--uniform-width", default=128, type=int, help="Width of the single layer with uniform attention.")
@click.option("--training/--no-training", "grid", default=True, help="Also train a grid of depths, widths and learning "
              "rates, and report gradient norms.")  # fmt: skip
@click.option("--seed", default=0, type=int, help="Of weights and data.")
@click.option("--out", type=click.Path(), metavar="DIR", help="Folder for stability.json and stability.png.")
def bench_stability(grid: bool, out: str | None, **settings: Any) -> None:
    """Gradients over distance, fresh and trained, with bounds for one layer; gradient norms while training.

    Recurrent and standard models and an Elman network, on the text inside the package. A few minutes on a CPU.
    """
    from rich.console import Console

    from recurformer.experiments.bench import common, stability

    if not grid:
        settings["depths"] = ()
    chosen = stability.StabilitySettings(**settings)
    make_folder(out)
    console = Console(stderr=True)
    with console.status("start") as status:
        results = stability.bench_stability(chosen, status.update)
    stability.show_stability(results, Console())
    if out is not None:
        print("\n".join(map(str, common.write(out, "stability", results, stability.draw_stability(results)))))
