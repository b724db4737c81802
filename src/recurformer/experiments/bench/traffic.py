"""HBM traffic of attention in a recurrent layer, naive against tiled, as the model in `scan.schedule` has it; and, with
NVIDIA's profiler, what the memory of a GPU really moves."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from recurformer.experiments.bench.common import Progress, in_words, record, set_title, show_table, silent
from recurformer.report import COLOURS, png
from recurformer.scan.schedule import Schedule, attention_traffic, naive_schedule
from recurformer.settings import Count, Counts, Positive, Settings, setting
from recurformer.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class TrafficSettings(Settings):
    """Attention of one layer, and the lengths of its sequences."""

    lengths: Counts = setting(
        tuple(1 << e for e in range(6, 17)), "Positions of a sequence.", option="--length", metavar="N", repeated=True,
        unset="powers of two from 64 to 65536; measured: 256 to 4096",
    )  # fmt: skip
    batch_size: Count = setting(1, "Sequences in a batch.", unset="1; measured: 16")
    n_heads: Count = setting(16, "Number of query heads.")
    n_kv_heads: Count | None = setting(None, "Number of key-value heads.", metavar="G", unset="as many as query heads")
    head_dim: Count = setting(64, "Width of a head.")
    element_bytes: Count = setting(2, "Bytes of an element of queries, keys, values and outputs.")
    chunk: Count | None = setting(
        None, "Positions of a chunk, a power of two.", metavar="C", unset="pure tiling, the paper's schedule"
    )
    leaf: Count = setting(1, "Positions that read each other directly, a power of two.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")


def bench_traffic(settings: TrafficSettings, progress: Progress = silent) -> dict[str, Any]:
    """Return bytes, FLOP and arithmetic intensity of both schedules at each length, ready for JSON."""
    s, rows = settings, []
    lengths = sorted(set(s.lengths))
    for done, N in enumerate(lengths):
        progress(f"N {N}", done, len(lengths))
        row: dict[str, Any] = {"length": N}
        for name, schedule in (("naive", naive_schedule(N)), ("tiled", Schedule(N, 0, s.chunk, s.leaf))):
            traffic = attention_traffic(schedule, s.batch_size, s.n_heads, s.head_dim, s.n_kv_heads, s.element_bytes)
            row |= {f"{name}_bytes": traffic.bytes, f"{name}_intensity": traffic.intensity, "flops": traffic.flops}
        rows.append(row)
    return {"benchmark": "traffic", "settings": asdict(settings), "rows": rows}


# --- measured --------------------------------------------------------------------------------------------------------

METRIC = "dram__bytes.sum"  # read from and written to the GPU's memory
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(Settings):
    """One layer whose traffic is read with Nsight Compute, in bf16 and pure tiling. The layer's width is H K."""

    lengths: Counts = setting((256, 512, 1024, 2048, 4096), "Positions of a sequence, each scanned by itself.",
                              option="--length", metavar="N", repeated=True)  # fmt: skip
    batch_size: Count = setting(16, "Sequences in a batch.")
    n_heads: Count = setting(16, "Number of heads.")
    head_dim: Count = setting(64, "Width of a head.")
    scan: Literal["reference", "tiled", "fused", "wavefront"] = setting(
        "fused", "Scan to measure with --measure, in pure tiling where it offers a choice.", metavar="NAME"
    )
    backward: bool = setting(False, "Forward and backward with --measure, or the forward alone.",
                             option="--backward/--forward-only")  # fmt: skip
    replay: Literal["app-range", "kernel"] = setting(
        "app-range", "Place of ncu's counters with --measure: around the whole scan, or around every kernel, which is "
        "slow."
    )  # fmt: skip
    timeout_s: Positive = setting(300.0, "Seconds of one run under the profiler at most.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.lengths)) < 4:
            raise ValueError(f"lengths are {self.lengths}; a fit of three terms needs at least four different ones")


class Fit(NamedTuple):
    """y = a + b N + c g(N) by least squares of the relative errors."""

    coefficients: tuple[float, float, float]
    fitted: tuple[float, ...]
    residual: float  # the largest relative deviation of a point


def fit(lengths: Sequence[int], measured: Sequence[float], growth: Callable[[float], float]) -> Fit:
    """Fit a + b N + c growth(N)."""
    N, y = np.asarray(lengths, dtype=float), np.asarray(measured, dtype=float)
    terms = np.stack([np.ones_like(N), N, [growth(n) for n in N]], axis=1)
    # Columns of equal size: N^2 beside 1 would be lost in rounding.
    weighted = terms / y[:, None]
    size = np.abs(weighted).max(axis=0)
    found = np.linalg.lstsq(weighted / size, np.ones_like(y), rcond=None)[0] / size
    fitted = terms @ found
    a, b, c = found.tolist()
    return Fit((a, b, c), tuple(fitted.tolist()), float(np.abs(fitted / y - 1).max()))


GROWTHS: dict[str, Callable[[float], float]] = {"n_log_n": lambda n: n * math.log2(n), "n_squared": lambda n: n * n}


def measure_traffic(settings: MeasureSettings, progress: Progress = silent) -> dict[str, Any]:
    """DRAM bytes of one layer's scan at each length beside the modelled bytes of its attention, and two fits.

    Args:
        progress: called with what is being done, lengths done and lengths in all.

    Raises:
        ValueError: when the profiler is not there, or can't read the counters (with its own words).
    """
    s, rows = settings, []
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("ncu (NVIDIA Nsight Compute) is not on the PATH; install it, or leave out --measure")
    lengths = sorted(set(s.lengths))
    for done, N in enumerate(lengths):
        progress(f"N {N}", done, len(lengths))
        traffic = attention_traffic(Schedule(N), s.batch_size, s.n_heads, s.head_dim, None, 2)
        rows.append({"length": N, "measured_bytes": profile(ncu, s, N), "modelled_bytes": traffic.bytes})
    fits = {name: fit(lengths, [row["measured_bytes"] for row in rows], growth) for name, growth in GROWTHS.items()}
    for row, fitted in zip(rows, fits["n_log_n"].fitted, strict=True):
        row["fitted_bytes"] = fitted
    fitted = {name: {"coefficients": f.coefficients, "residual": f.residual} for name, f in fits.items()}
    return record("traffic-measured", s, rows, fits=fitted)


def profile(ncu: str, s: MeasureSettings, length: int) -> float:
    """DRAM bytes of one scan, which a process of its own runs under the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        command = [
            ncu, "--metrics", METRIC, "--csv", "--print-units", "base", "--log-file", str(log),
            "--replay-mode", s.replay, "--cache-control", "none", "--clock-control", "none",
            "--target-processes", "application-only",
            *(("--profile-from-start", "off") if s.replay == "kernel" else ()),  # a range begins where it begins
            sys.executable, "-m", "recurformer.experiments.bench.profiled", json.dumps({**asdict(s), "length": length}),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=s.timeout_s)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"ncu took more than {s.timeout_s:.0f} seconds for N {length}; shorten or raise it"
            ) from None
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = counted(text)
    if done.returncode != 0 or not found:
        said = [line for line in f"{text}\n{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        errors = [line for line in said if "ERROR" in line or "Error" in line]
        raise ValueError(f"ncu read no {METRIC} for N {length}: {' '.join((errors or said)[-2:]) or 'it said nothing'}")
    return sum(found)


def counted(log: str) -> list[float]:
    """The values of the metric, in bytes, one for each kernel or range, in ncu's CSV among its other lines."""
    lines = log.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return [
        float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
        for row in csv.DictReader(line for line in lines[start:] if line.startswith('"'))
        if row["Metric Name"] == METRIC
    ]


def show_measured(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 80 columns."""
    s, fits = results["settings"], results["fits"]
    cells = [
        [
            str(r["length"]),
            bytes_text(r["measured_bytes"]),
            bytes_text(r["measured_bytes"] / r["length"]),
            bytes_text(r["modelled_bytes"]),
            f"{r['measured_bytes'] / r['modelled_bytes']:.2f}",
            f"{100 * (r['fitted_bytes'] / r['measured_bytes'] - 1):+.1f} %",
        ]
        for r in results["rows"]
    ]
    a, b, c = fits["n_log_n"]["coefficients"]
    passes = "forward and backward" if s["backward"] else "forward"
    notes = [
        f"B {s['batch_size']}, H {s['n_heads']}, K {s['head_dim']}, bf16; scan {s['scan']}, {passes}; {METRIC}.",
        "Measured: the whole layer, its products with weights too. Model: attention's forward alone, nothing cached.",
        f"Fit a + b N + c N log2 N: a {a:.3g}, b {b:.3g}, c {c:.3g} bytes; largest residual "
        f"{100 * fits['n_log_n']['residual']:.1f} %. N^2 instead: {100 * fits['n_squared']['residual']:.1f} %.",
        in_words(results["machine"]),
    ]
    headings = ["N", "measured", "a position", "model", "ratio", "fit"]
    show_table(console, "DRAM bytes of a recurrent layer in pure tiling", headings, cells, notes)


def draw_measured(results: dict[str, Any]) -> bytes:
    """Measured, fitted and modelled bytes against N; a PNG."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    lengths = [row["length"] for row in rows]
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, [r["measured_bytes"] for r in rows], "o", color=COLOURS[0], label="measured, whole layer")
    axes.plot(lengths, [r["fitted_bytes"] for r in rows], color=COLOURS[0], label="a + b N + c N log N")
    axes.plot(lengths, [r["modelled_bytes"] for r in rows], "--", color=COLOURS[1], label="modelled, attention")
    _guide(axes, lengths, [n * n for n in lengths], rows[-1]["measured_bytes"], "N²", ":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("positions N")
    axes.set_ylabel("DRAM bytes")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    s = results["settings"]
    shape = f"B {s['batch_size']}, H {s['n_heads']}, K {s['head_dim']}; scan {s['scan']}"
    set_title(figure, f"DRAM traffic of one recurrent layer: {shape}", results["machine"])
    return png(figure)


# --- table and picture of the model ----------------------------------------------------------------------------------


def show_traffic(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 80 columns."""
    s = results["settings"]
    cells = [
        [
            str(r["length"]),
            bytes_text(r["naive_bytes"]),
            bytes_text(r["tiled_bytes"]),
            f"{r['naive_bytes'] / r['tiled_bytes']:,.1f}",
            f"{r['naive_intensity']:.2f}",
            f"{r['tiled_intensity']:,.1f}",
        ]
        for r in results["rows"]
    ]
    tiling = "pure tiling" if s["chunk"] is None else f"chunks of {s['chunk']}"
    notes = [
        f"B {s['batch_size']}, H {s['n_heads']}, G {s['n_kv_heads'] or s['n_heads']}, K {s['head_dim']}, "
        f"{s['element_bytes']} bytes an element; {tiling}, leaves of {s['leaf']}.",
        "A model, not a measurement: attention of one layer's forward pass, nothing kept in cache.",
        "Intensity is FLOP a byte.",
    ]
    headings = ["N", "naive", "tiled", "ratio", "naive intensity", "tiled intensity"]
    show_table(console, "HBM traffic of attention in a recurrent layer", headings, cells, notes)


def draw_traffic(results: dict[str, Any]) -> bytes:
    """Bytes with guides of N² and N log N, and arithmetic intensity, against N; a PNG."""
    from matplotlib.figure import Figure

    rows, s = results["rows"], results["settings"]
    lengths = [row["length"] for row in rows]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    (left, right) = figure.subplots(1, 2)
    styles = {"naive": (COLOURS[1], "s"), "tiled": (COLOURS[0], "o")}
    for name, (colour, marker) in styles.items():
        left.plot(lengths, [row[f"{name}_bytes"] for row in rows], color=colour, marker=marker, label=name)
        right.plot(lengths, [row[f"{name}_intensity"] for row in rows], color=colour, marker=marker, label=name)
    _guide(left, lengths, [n * n for n in lengths], rows[-1]["naive_bytes"], "N²", "--")
    logarithmic = [n * max(1.0, math.log2(n)) for n in lengths]
    _guide(left, lengths, logarithmic, rows[-1]["tiled_bytes"], "N log N", ":")
    left.set_ylabel("bytes moved")
    right.set_ylabel("arithmetic intensity (FLOP a byte)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("positions N")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    set_title(
        figure,
        "Attention of one recurrent layer, forward, modelled: "
        f"B {s['batch_size']}, H {s['n_heads']}, K {s['head_dim']}, {s['element_bytes']} bytes an element",
    )
    return png(figure)


def _guide(axes: Any, lengths: Sequence[int], shape: Sequence[float], end: float, label: str, style: str) -> None:
    """A grey curve of the given shape that ends a little above `end`."""
    scale = 1.6 * end / shape[-1]
    axes.plot(lengths, [scale * value for value in shape], color="#777777", linestyle=style, linewidth=1.2, label=label)
