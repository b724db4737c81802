"""HBM traffic of attention in a recurrent layer, naive against tiled, as the model in `scan.schedule` has it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from recurformer.bench.common import bytes_text, show_table
from recurformer.scan.schedule import Schedule, attention_traffic, naive_schedule

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class TrafficSettings:
    """One layer's attention, and how long its sequences are.

    Args:
        lengths: N, positions.
        batch_size, n_heads, head_dim: B, H, K; n_kv_heads: G, None: H.
        element_bytes: of queries, keys, values and outputs.
        chunk, leaf: C and S of the tiled schedule; None and 1 are the paper's pure tiling.
    """

    lengths: tuple[int, ...] = tuple(1 << e for e in range(6, 17))
    batch_size: int = 1
    n_heads: int = 16
    head_dim: int = 64
    n_kv_heads: int | None = None
    element_bytes: int = 2
    chunk: int | None = None
    leaf: int = 1

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths are {self.lengths}; give at least one, each at least 1")
        for name in ("batch_size", "n_heads", "head_dim", "element_bytes", "n_kv_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")


def bench_traffic(settings: TrafficSettings) -> dict[str, Any]:
    """Bytes, FLOP and arithmetic intensity of both schedules at each length; ready for JSON."""
    s, rows = settings, []
    for N in sorted(set(s.lengths)):
        row: dict[str, Any] = {"length": N}
        for name, schedule in (("naive", naive_schedule(N)), ("tiled", Schedule(N, 0, s.chunk, s.leaf))):
            traffic = attention_traffic(schedule, s.batch_size, s.n_heads, s.head_dim, s.n_kv_heads, s.element_bytes)
            row |= {f"{name}_bytes": traffic.bytes, f"{name}_intensity": traffic.intensity, "flops": traffic.flops}
        rows.append(row)
    return {"benchmark": "traffic", "settings": asdict(settings), "rows": rows}


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
    import matplotlib

    from recurformer.report import COLOURS

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, s = results["rows"], results["settings"]
    lengths = [row["length"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
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
    figure.suptitle(
        "Attention of one recurrent layer, forward, modelled: "
        f"B {s['batch_size']}, H {s['n_heads']}, K {s['head_dim']}, {s['element_bytes']} bytes an element",
        fontsize=11,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": ""})
    plt.close(figure)
    return buffer.getvalue()


def _guide(axes: Any, lengths: Sequence[int], shape: Sequence[float], end: float, label: str, style: str) -> None:
    """A grey curve of the given shape that ends a little above `end`."""
    scale = 1.6 * end / shape[-1]
    axes.plot(lengths, [scale * value for value in shape], color="#777777", linestyle=style, linewidth=1.2, label=label)
