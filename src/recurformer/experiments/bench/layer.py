"""One layer, or a stack of them, by itself: forward, and forward and backward, beside a standard layer and the official
code's blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.choose import choose_scan
from recurformer.config import OFFICIAL_OPTIONS, ModelConfig
from recurformer.experiments.bench.common import (
    Dtype,
    Progress,
    ScanName,
    draw_bars,
    milliseconds,
    record,
    remarks,
    show_table,
    silent,
    spread,
)
from recurformer.experiments.bench.official import load_block
from recurformer.experiments.bench.timing import Work, build_model, forget_compiled, peak_memory_of, release, time_runs
from recurformer.settings import Count, Seed, Settings, Text, setting
from recurformer.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

OFFICIAL = {"official": "recurrent", "official standard": "sequential"}  # rows, and its names of these blocks
OFFICIAL_DEVICES = ("cuda",)  # its code says so in many places
STACK_SCANS = ("wavefront",)  # those that advance several layers at once
PASSES = ("forward", "both")  # of the measurements: without gradients, and forward and backward


@dataclass(frozen=True, kw_only=True)
class LayerSettings(Settings):
    """One measurement of a layer, or of a stack of layers."""

    batch_size: Count = setting(64, "Sequences in a batch.")
    length: Count = setting(512, "Positions of a sequence.", metavar="N")
    d_model: Count = setting(1024, "Width of the residual stream.")
    n_heads: Count = setting(16, "Number of query heads.")
    n_kv_heads: Count | None = setting(None, "Number of key-value heads.", metavar="G", unset="as many as query heads")
    stack: Count = setting(1, "Layers on top of each other. Times are given for one of them.", metavar="L")
    scans: tuple[ScanName, ...] = setting(("auto",), "Scans of the recurrent layer, a row each.", metavar="NAME")
    standard: bool = setting(True, "A row for a standard layer.")
    official: Text | None = setting(
        None, "Folder with the code of github.com/geniucos/recurrent-transformer, for a row of its blocks.",
        metavar="CHECKOUT",
    )  # fmt: skip
    backward: bool = setting(True, "Forward and backward in addition to the forward alone.",
                             option="--backward/--forward-only")  # fmt: skip
    inputs: Count = setting(3, "Number of different inputs that the runs take in turn.")
    compile: bool | None = setting(None, "Fused element-wise steps of standard layers.", unset="on a GPU")
    dtype: Dtype = setting("bf16", "Compute dtype. bf16 is autocast: weights stay float32.")
    repeats: Count = setting(5, "Timed runs, of which the median counts.")
    warmup: Count = setting(3, "Runs before the timed ones.")
    seed: Seed = setting(0, "Random seed of weights and inputs.")
    device: Text = setting("cpu", "Device to measure on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for scan in self.scans:
            if scan in STACK_SCANS and self.stack == 1:
                raise ValueError(f"scans holds {scan!r} and stack is 1; {scan} takes a stack of 2 or more")
        if not self.scans and not self.standard and self.official is None:
            raise ValueError("there is nothing to measure; give a scan, the standard layer or a checkout")
        if self.official is not None and self.device.partition(":")[0] not in OFFICIAL_DEVICES:
            raise ValueError(
                f"the official blocks need an NVIDIA GPU, and device is {self.device!r}; drop the checkout"
            )
        if self.official is not None and (self.dtype != "bf16" or self.n_kv_heads not in (None, self.n_heads)):
            raise ValueError("the official blocks run in bf16 without shared key-value heads; drop one or the other")
        _ = self.config("standard")

    def config(self, kind: str) -> ModelConfig:
        """Our layers, with the official options and a vocabulary that costs nothing."""
        shape: dict[str, Any] = {"d_model": self.d_model, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads}
        options = {**OFFICIAL_OPTIONS, "vocab_size": 256, "vocab_multiple": 1}
        return ModelConfig(**options, **shape, n_layers=self.stack, layers=kind)


@dataclass
class Subject:
    """Something built and ready to run: `forward` of the n-th of the inputs."""

    forward: Callable[[Tensor], Tensor]
    inputs: Callable[[int], Tensor]
    clear: Callable[[], None]  # the gradients
    layers: int
    parameters: int
    how: str = ""


def bench_layer(settings: LayerSettings, progress: Progress = silent) -> dict[str, Any]:
    """Measure; all rows, and what they were made under, ready for JSON.

    A path that runs out of memory is a row that says so.

    Args:
        progress: called with what is being done, measurements done and measurements in all.
    """
    s, device = settings, torch.device(settings.device)
    names = [*dict.fromkeys(s.scans), *["standard"] * s.standard, *(OFFICIAL if s.official is not None else ())]
    passes = PASSES if s.backward else PASSES[:1]
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(names):
        row: dict[str, Any] = {"path": name}
        for n, which in enumerate(passes):
            progress(f"{name}: {which}", done * len(passes) + n, len(names) * len(passes))
            try:
                row |= _measure(s, name, which, device)
            except torch.OutOfMemoryError:
                row["failed"] = "no memory"
            release(device)
        rows.append(row)
    notes = [f"{row['path']}: {row['how']}" for row in rows if row.get("how")]
    if s.official is not None and s.stack > 1:
        notes.append("the official code evaluates layers one after another: its rows are one layer")
    return record("layer", s, rows, notes=notes)


def layer_passes(s: LayerSettings, name: str, device: torch.device) -> tuple[Subject, Callable[[int], Work]]:
    """Return the subject of a row, and a function from the number of a run to its timed work.

    The work is a forward and, where gradients are on, a backward.

    Args:
        s: shape and dtype.
        name: a scan, "standard" or a key of `OFFICIAL`.
        device: the place of the work.
    """
    gradients = torch.is_grad_enabled()
    gradient = torch.randn(s.batch_size, s.length, s.d_model, device=device) if gradients else None
    subject = _official(s, OFFICIAL[name], device) if name in OFFICIAL else _ours(s, name, device)

    def prepare(number: int) -> Work:
        subject.clear()
        x = subject.inputs(number)

        def work() -> None:
            z = subject.forward(x)
            if gradients:
                z.backward(gradient)

        return work

    return subject, prepare


def _measure(s: LayerSettings, name: str, which: str, device: torch.device) -> dict[str, Any]:
    """Entries of one row for one pass."""
    forget_compiled()
    torch.manual_seed(s.seed)
    with torch.set_grad_enabled(which == "both"):
        with peak_memory_of(device) as peak:
            subject, prepare = layer_passes(s, name, device)
            for number in range(s.warmup):
                prepare(number)()
        times = time_runs(prepare, device, s.repeats, warmup=1)
    per_layer = times.median / subject.layers
    return {
        **times.to_dict(which),
        f"{which}_layer_s": per_layer,
        f"{which}_position_us": 1e6 * per_layer / s.length,
        f"{which}_peak_bytes": peak.bytes,
        "layers": subject.layers,
        "parameters": subject.parameters,
        **({"how": subject.how} if subject.how else {}),
    }


def _pool(s: LayerSettings, device: torch.device) -> Callable[[int], Tensor]:
    """Inputs (B, N, D) that are windows over one pool of B + inputs - 1 sequences: different, at little memory."""
    pool = torch.randn(s.batch_size + s.inputs - 1, s.length, s.d_model, device=device)

    def take(number: int) -> Tensor:
        start = number % s.inputs
        return pool[start : start + s.batch_size].detach().requires_grad_(torch.is_grad_enabled())

    return take


def _ours(s: LayerSettings, name: str, device: torch.device) -> Subject:
    scan, kind = ("", name) if name == "standard" else (name, "recurrent")
    model = build_model(s.config(kind), device, scan or "auto", s.compile)
    why = ""
    if scan:
        dtype = torch.bfloat16 if s.dtype == "bf16" else torch.float32
        chosen, reason = choose_scan(scan, model.config, device, batch_size=s.batch_size, length=s.length, dtype=dtype)
        why = f"{chosen}, {reason}" if scan == "auto" else ""
        scan = chosen
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bf16")

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    parameters = sum(p.numel() for p in model.layers[0].parameters())
    if s.stack > 1:  # through the model, which knows scans of several layers; its embedding and last norm are small
        tokens = torch.randint(0, 256, (s.batch_size + s.inputs - 1, s.length), device=device)

        def rows(number: int) -> Tensor:
            return tokens[number % s.inputs :][: s.batch_size]

        def forward(x: Tensor) -> Tensor:
            with autocast:
                return model.hidden(x, None)

        return Subject(forward, rows, clear, s.stack, parameters, why)
    layer = model.layers[0]
    layout = model.layout(s.length)

    def forward_layer(x: Tensor) -> Tensor:
        with autocast:
            return layer(x, layout, scan)

    return Subject(forward_layer, _pool(s, device), clear, 1, parameters, why)


def _official(s: LayerSettings, kind: str, device: torch.device) -> Subject:
    assert s.official is not None
    block = load_block(s.official, kind, s.batch_size, s.length, s.d_model, s.n_heads, device)

    def clear() -> None:
        block.module.zero_grad(set_to_none=False)  # its backward writes into these very tensors

    parameters = sum(p.numel() for p in block.module.parameters())
    return Subject(block.forward, _pool(s, device), clear, 1, parameters, block.how)


# --- table and picture -----------------------------------------------------------------------------------------------


def _shape(s: dict[str, Any]) -> str:
    stack = f", stack of {s['stack']}" if s["stack"] > 1 else ""
    return (
        f"B {s['batch_size']}, N {s['length']}, D {s['d_model']}, H {s['n_heads']}{stack}, {s['dtype']}, {s['device']}"
    )


def show_layer(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 100 columns."""
    s, rows = results["settings"], results["rows"]
    which = "both" if s["backward"] else "forward"
    standard = next((row.get(f"{which}_layer_s") for row in rows if row["path"] == "standard"), None)
    cells = []
    for row in rows:
        one = row.get(f"{which}_layer_s")
        entries = [row["path"]]
        for part in PASSES:
            position = row.get(f"{part}_position_us")
            entries += [
                milliseconds(row.get(f"{part}_layer_s")),
                spread(row, part, row.get("layers", 1)),
                "-" if position is None else f"{position:,.{1 if position < 1000 else 0}f}",
            ]
        peak = row.get(f"{which}_peak_bytes")
        entries += [
            row.get("failed", "-") if peak is None else bytes_text(peak),
            "-" if one is None or standard is None else f"{one / standard:.2f}x",
        ]
        cells.append(entries)
    notes = [
        f"{_shape(s)}.",
        f"Milliseconds of one layer: medians of {s['repeats']} after {s['warmup'] + 1} to warm up, fastest..slowest.",
        "us/pos: microseconds a position. Peak: with weights, inputs and gradients. x std: time against standard.",
        *remarks(results),
    ]
    headings = ["path", "forward", "range", "us/pos", "fwd+bwd", "range", "us/pos", "peak", "x std"]
    show_table(console, "One layer", headings, cells, notes)


def draw_layer(results: dict[str, Any]) -> bytes:
    """Bars of both passes and of peak memory; a PNG."""
    rows = results["rows"]

    def values(key: str, scale: float) -> dict[str, float]:
        return {row["path"]: scale * row[key] for row in rows if key in row}

    panels = [("forward, ms a layer", values("forward_layer_s", 1e3), None)]
    if results["settings"]["backward"]:
        panels.append(("forward and backward, ms a layer", values("both_layer_s", 1e3), None))
    last = "both" if results["settings"]["backward"] else "forward"
    panels.append(("peak memory, GiB", values(f"{last}_peak_bytes", 2.0**-30), None))
    return draw_bars(panels, _shape(results["settings"]), results["machine"])
