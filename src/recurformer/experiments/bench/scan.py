"""Time and memory of a training step or a forward pass under each scan, next to standard layers and a peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, util
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import torch
from annotated_types import MinLen
from torch import Tensor

from recurformer.choose import GPU_SCANS
from recurformer.config import ModelConfig
from recurformer.experiments.bench.common import (
    Dtype,
    Progress,
    draw_bars,
    machine,
    milliseconds,
    remarks,
    set_title,
    show_table,
    silent,
)
from recurformer.experiments.bench.memory import peak_memory
from recurformer.model import LanguageModel
from recurformer.report import COLOURS, MARKERS, png
from recurformer.settings import Count, Counts, Natural, Seed, Settings, Text, setting
from recurformer.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

PEER, PEER_MODULE = "recurrent-transformer-pytorch", "recurrent_transformer"
MeasuredPath = Literal["reference", "tiled", "fused", "wavefront", "standard", "peer"]
PATHS: tuple[MeasuredPath, ...] = get_args(MeasuredPath)

Loss = Callable[[Tensor, Tensor], Tensor]  # tokens and targets (B, N) to a scalar


@dataclass(frozen=True, kw_only=True)
class ScanSettings(Settings):
    """One measurement of a whole model under several scans."""

    lengths: Counts = setting((256,), "Positions N of a sequence, each measured by itself.", option="--length",
                              metavar="N", repeated=True)  # fmt: skip
    batch_size: Count = setting(16, "Sequences in a batch.")
    d_model: Count = setting(256, "Width of the residual stream.")
    n_layers: Count = setting(4, "Number of layers.")
    n_heads: Count = setting(4, "Number of heads.")
    vocab_size: Count = setting(256, "Vocabulary size of the model around the layers.")
    dtype: Dtype = setting("fp32", "Compute dtype. bf16 is autocast: weights stay float32.")
    paths: Annotated[tuple[MeasuredPath, ...], MinLen(1)] = setting(
        PATHS, "Scan to measure, standard layers, or the peer.", option="--path", metavar="NAME", repeated=True,
        unset="all",
    )  # fmt: skip
    backward: bool = setting(True, "A training step without the optimizer, or the forward pass alone.",
                             option="--backward/--forward-only")  # fmt: skip
    repeats: Count = setting(5, "Timed runs, of which the median counts.")
    warmup: Natural = setting(1, "Runs before the timed ones.")
    peer_repeats: Count | None = setting(
        None, "Timed runs of the peer, which takes minutes for one.", metavar="N", unset="as many"
    )
    threads: Count | None = setting(None, "Threads of the CPU.", metavar="N", unset="as PyTorch chooses")
    seed: Seed = setting(0, "Random seed of weights and tokens.")
    device: Text = setting("cpu", "Device to measure on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for path in self.paths:
            if path in GPU_SCANS and self.device == "cpu" and self.paths != PATHS:
                raise ValueError(f"{path} needs an NVIDIA GPU; leave it out, or give --device cuda")
        _ = self.config("standard")

    def turns(self, path: str) -> range:
        """Return the numbers of the runs in which a path takes part."""
        count = self.repeats
        if path == "peer":
            return range(self.warmup, self.warmup + min(count, self.peer_repeats or count))
        return range(self.warmup + count)

    def config(self, layers: str) -> ModelConfig:
        """Return the shape of our model."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            layers=layers,
        )


def bench_scan(settings: ScanSettings, progress: Progress = silent) -> dict[str, Any]:
    """Measure; all rows, and what they were made under, ready for JSON.

    Paths take turns, so that a disturbance of the machine hits all of them; times are medians after warm-up. Peak
    memory is what a run holds beyond model and tokens, measured in a run of its own.

    Args:
        progress: called with what is being done, runs done and runs in all.
    """
    before = torch.get_num_threads()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        paths, notes = [], []
        for path in dict.fromkeys(settings.paths):
            if path == "peer" and util.find_spec(PEER_MODULE) is None:
                notes.append(f"no row for the peer: the package {PEER} is not installed")
            elif path in GPU_SCANS and settings.device == "cpu":
                continue  # of the default; by name they are refused
            else:
                paths.append(path)
        rows: list[dict[str, Any]] = []
        lengths = sorted(set(settings.lengths))
        total = len(lengths) * sum(1 + len(settings.turns(path)) for path in paths)

        def report(what: str) -> None:
            nonlocal done
            progress(what, done, total)
            done += 1

        done = 0
        for N in lengths:
            rows += _measure(settings, N, paths, report)
        facts = machine()
        if "peer" in paths:
            facts["versions"][PEER] = metadata.version(PEER)
            count = len(settings.turns("peer"))
            timed = "" if count == settings.repeats else f", timed {count} time{'' if count == 1 else 's'}"
            notes.append(f"peer: {PEER} in the faster of its modes, without its gate, value MLP and block RNN{timed}")
        return {
            "benchmark": "scan",
            "settings": {**asdict(settings), "threads": torch.get_num_threads(), "paths": paths},
            "machine": facts,
            "rows": rows,
            "notes": notes,
        }
    finally:
        torch.set_num_threads(before)


@dataclass
class Contestant:
    """One path at one length."""

    name: str
    model: torch.nn.Module
    loss: Loss
    mode: str | None = None  # of the peer


def _measure(settings: ScanSettings, N: int, paths: list[str], report: Callable[[str], None]) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, N)
    tokens, targets = (
        torch.randint(0, settings.vocab_size, shape, generator=draw).to(settings.device) for _ in range(2)
    )
    contestants = []
    for path in paths:
        torch.manual_seed(settings.seed)
        contestants.append(_peer(settings, tokens, targets) if path == "peer" else _ours(settings, path))
    peaks = {}
    for one in contestants:
        report(f"N {N}, {one.name}: memory")
        peaks[one.name] = peak_memory(partial(_run, settings, one, tokens, targets), torch.device(settings.device))
        one.model.zero_grad(set_to_none=True)
    times: dict[str, list[tuple[float, float]]] = {one.name: [] for one in contestants}
    for turn in range(settings.warmup + settings.repeats):
        for one in contestants:
            if turn not in settings.turns(one.name):
                continue
            report(f"N {N}, {one.name}: {'warm-up' if turn < settings.warmup else 'time'}")
            taken = _run(settings, one, tokens, targets)
            one.model.zero_grad(set_to_none=True)
            if turn >= settings.warmup:
                times[one.name].append(taken)
    rows = []
    for one in contestants:
        totals = [forward + backward for forward, backward in times[one.name]]
        rows.append(
            {
                "length": N,
                "path": one.name,
                **({} if one.mode is None else {"mode": one.mode}),
                "parameters": sum(p.numel() for p in one.model.parameters()),
                "forward_s": statistics.median(forward for forward, _ in times[one.name]),
                **(
                    {"backward_s": statistics.median(backward for _, backward in times[one.name])}
                    if settings.backward
                    else {}
                ),
                "total_s": statistics.median(totals),
                "fastest_s": min(totals),
                "slowest_s": max(totals),
                "tokens_per_s": settings.batch_size * N / statistics.median(totals),
                "peak_bytes": peaks[one.name],
            }
        )
    return rows


def _run(settings: ScanSettings, one: Contestant, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """Seconds of a forward and a backward pass."""
    device = torch.device(settings.device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    with (
        torch.set_grad_enabled(settings.backward),
        torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"),
    ):
        loss = one.loss(tokens, targets)
    between = now()
    if not settings.backward:
        return between - start, 0.0
    loss.backward()
    return between - start, now() - between


def _ours(settings: ScanSettings, path: str) -> Contestant:
    model = LanguageModel(settings.config("standard" if path == "standard" else "recurrent")).to(settings.device)
    if path != "standard":
        model.scan = path

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        found = model(tokens, targets=targets).loss
        assert found is not None
        return found

    return Contestant(path, model, loss)


def _peer(settings: ScanSettings, tokens: Tensor, targets: Tensor) -> Contestant:
    """The peer at our shape with what it adds to the paper's layer switched off, in the mode that is faster here."""
    import importlib

    model = importlib.import_module(PEER_MODULE).RecurrentTransformer(
        num_tokens=settings.vocab_size, dim=settings.d_model, depth=settings.n_layers, heads=settings.n_heads,
        dim_head=settings.d_model // settings.n_heads, recurrent=True, block_size=1,
        attn_gate=False, use_value_mlp=False, use_intra_block_rnn=False,
    ).to(settings.device)  # fmt: skip
    modes = []
    for mode in ("naive", "tiled"):

        def loss(tokens: Tensor, targets: Tensor, mode: str = mode) -> Tensor:
            return model(tokens, labels=targets, recurrent_mode=mode)

        one = Contestant("peer", model, loss, mode)
        modes.append((sum(_run(settings, one, tokens, targets)), one))
        model.zero_grad(set_to_none=True)
    return min(modes, key=lambda pair: pair[0])[1]


# --- table and picture -----------------------------------------------------------------------------------------------


def _shape(s: dict[str, Any]) -> str:
    pass_ = "forward and backward" if s["backward"] else "forward"
    return (
        f"B {s['batch_size']}, D {s['d_model']}, L {s['n_layers']}, H {s['n_heads']}, {s['dtype']}, "
        f"{pass_}, {s['device']}"
    )


def show_scan(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 80 columns."""
    s, cells, last = results["settings"], [], None
    slowest = {row["length"]: row["total_s"] for row in results["rows"] if row["path"] == "reference"}
    for row in results["rows"]:
        times = [milliseconds(row.get(part)) for part in ("forward_s", "backward_s", "total_s")]
        against = slowest.get(row["length"])
        cells.append(
            [
                "" if row["length"] == last else str(row["length"]),
                row["path"] + (f" ({row['mode']})" if "mode" in row else ""),
                *times,
                f"{row['tokens_per_s']:,.0f}",
                bytes_text(row["peak_bytes"]),
                "-" if against is None else f"{against / row['total_s']:.2f}x",
            ]
        )
        last = row["length"]
    notes = [
        f"{_shape(s)}.",
        f"Milliseconds: medians of {s['repeats']} after {s['warmup']} to warm up. Speed is against the reference.",
        *remarks(results),
    ]
    headings = ["N", "path", "forward", "backward", "total", "tokens/s", "peak", "speed"]
    show_table(console, "Recurrent layers under each scan, beside standard ones", headings, cells, notes)


def draw_scan(results: dict[str, Any]) -> bytes:
    """Return a PNG of time and peak memory: bars at one length, curves over several."""
    rows, s = results["rows"], results["settings"]
    lengths = sorted({row["length"] for row in rows})
    quantities = (("total_s", 1e3, "milliseconds"), ("peak_bytes", 2.0**-20, "peak memory (MiB)"))
    if len(lengths) == 1:
        panels = [(label, {row["path"]: scale * row[name] for row in rows}, None) for name, scale, label in quantities]
        return draw_bars(panels, f"N {lengths[0]}, {_shape(s)}", results["machine"])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, (name, scale, label) in zip(figure.subplots(1, 2), quantities, strict=True):
        for n, path in enumerate(dict.fromkeys(row["path"] for row in rows)):
            values = {row["length"]: scale * row[name] for row in rows if row["path"] == path}
            colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
            axes.plot(list(values), list(values.values()), color=colour, marker=marker, label=path)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="positions N", ylabel=label)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    set_title(figure, _shape(s), results["machine"])
    return png(figure)
