"""Reading a prompt: tokens a second against what streaming the weights once a position allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from recurformer.cache import KVCache
from recurformer.choose import SCAN_CHOICES, choose_scan, choose_step
from recurformer.config import ModelConfig
from recurformer.experiments.bench.common import (
    Dtype,
    Progress,
    draw_bars,
    milliseconds,
    record,
    remarks,
    show_table,
    silent,
    spread,
)
from recurformer.experiments.bench.timing import (
    DTYPES,
    Work,
    build_model,
    copy_bandwidth,
    forget_compiled,
    peak_memory_of,
    release,
    time_runs,
)
from recurformer.generation.engine import DecodeEngine
from recurformer.settings import Count, Seed, Settings, Text, Texts, setting
from recurformer.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

ENGINE = "engine"  # stands where the name of a scan does
PromptScan = Literal["auto", "reference", "tiled", "fused", "wavefront", "engine"]


@dataclass(frozen=True, kw_only=True)
class PrefillSettings(Settings):
    """One measurement of reading prompts."""

    presets: Texts = setting(("300m-6", "300m-24"), "Presets to measure.")
    scans: tuple[PromptScan, ...] = setting(
        ("auto",), "Scans of the recurrent layers, a row each. engine is the decode engine, which generation uses.",
        metavar="NAME",
    )  # fmt: skip
    standard: bool = setting(True, "A row for the same shape in standard layers.")
    length: Count = setting(2048, "Positions of a prompt.", metavar="N")
    batch_size: Count = setting(1, "Prompts in a batch.")
    inputs: Count = setting(3, "Number of different prompts that the runs take in turn.")
    dtype: Dtype = setting("bf16", "Dtype of weights and products.")
    repeats: Count = setting(5, "Timed runs, of which the median counts.")
    warmup: Count = setting(3, "Runs before the timed ones.")
    seed: Seed = setting(0, "Random seed of weights and tokens.")
    device: Text = setting("cpu", "Device to measure on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.scans or self.standard):
            raise ValueError("there is nothing to measure; give a scan or the standard layers")
        for preset in self.presets:
            _ = ModelConfig.preset(preset)


def sequential_weights(config: ModelConfig) -> int:
    """Weights that every position of a layer must meet by itself: attention output, MLP, persistent keys and values.

    11 D^2 for the paper's shapes. Queries and temporary pairs are made for all positions at once.
    """
    D, HK, GK, F_ = (
        config.d_model, config.n_heads * config.head_width, config.kv_heads * config.head_width, config.mlp_width,
    )  # fmt: skip
    matrices = 3 if config.activation == "swiglu" else 2
    return D * HK + matrices * D * F_ + 2 * D * GK


def streaming_limit(config: ModelConfig, dtype: torch.dtype, bandwidth: float, batch_size: int = 1) -> float:
    """Tokens a second when every position of a prompt reads the sequential weights of every layer from memory once.

    Args:
        bandwidth: bytes a second, as `copy_bandwidth`.
        batch_size: prompts that share the reading.
    """
    return batch_size * bandwidth / (config.n_layers * sequential_weights(config) * dtype.itemsize)


def bench_prefill(settings: PrefillSettings, progress: Progress = silent) -> dict[str, Any]:
    """Measure; all rows, and what they were made under, ready for JSON.

    A run reads the prompts into a new cache and makes the logits of their last positions, as generation does.

    Args:
        progress: called with what is being done, rows done and rows in all.
    """
    s, device = settings, torch.device(settings.device)
    bandwidth = copy_bandwidth(device)
    paths = [*dict.fromkeys(s.scans), *["standard"] * s.standard]
    plan = [(preset, path) for preset in dict.fromkeys(s.presets) for path in paths]
    rows: list[dict[str, Any]] = []
    notes = []
    for done, (preset, path) in enumerate(plan):
        progress(f"{preset} {path}", done, len(plan))
        scan, kind = ("", path) if path == "standard" else (path, "recurrent")
        config = ModelConfig.preset(preset, layers=kind)
        row: dict[str, Any] = {"preset": preset, "path": path}
        if kind == "recurrent":
            row["limit_tokens_per_s"] = streaming_limit(config, DTYPES[s.dtype], bandwidth, s.batch_size)
            if scan == "auto":
                choice = choose_scan("auto", config, device, batch_size=s.batch_size, length=s.length)
                notes.append(f"auto for {preset} is {': '.join(choice)}")
        try:
            if path == ENGINE:
                choice = choose_step("auto", config, device, DTYPES[s.dtype], s.batch_size)
                notes.append(f"engine for {preset}: its step is {': '.join(choice)}")
            row |= _measure(s, config, scan, device)
            if kind == "recurrent":
                row["of_limit"] = row["tokens_per_s"] / row["limit_tokens_per_s"]
        except torch.OutOfMemoryError:
            row["failed"] = "no memory"
        release(device)
        rows.append(row)
    return record("prefill", s, rows, copy_bytes_per_s=bandwidth, notes=notes)


@torch.no_grad()
def _measure(s: PrefillSettings, config: ModelConfig, scan: str, device: torch.device) -> dict[str, Any]:
    """Entries of one row."""
    forget_compiled()
    torch.manual_seed(s.seed)
    dtype = DTYPES[s.dtype]
    with peak_memory_of(device) as peak:
        model = build_model(config, device, scan if scan in SCAN_CHOICES else "auto").to(dtype).eval()
        engine = DecodeEngine(model, s.batch_size, s.length) if scan == ENGINE else None
        pool = torch.randint(0, config.vocab_size, (s.batch_size + s.inputs - 1, s.length), device=device)

        def prepare(number: int) -> Work:
            tokens = pool[number % s.inputs :][: s.batch_size]

            def read() -> None:
                if engine is not None:
                    engine.reset()
                    engine.prefill(tokens)
                    return
                cache = KVCache(config, s.batch_size, max_length=s.length, dtype=dtype, device=device)
                model.logits(model.hidden(tokens, None, cache=cache)[:, -1])

            return read

        for number in range(s.warmup):
            prepare(number)()
    times = time_runs(prepare, device, s.repeats, warmup=1)
    tokens_per_s = s.batch_size * s.length / times.median
    return {**times.to_dict("prefill"), "tokens_per_s": tokens_per_s, "peak_bytes": peak.bytes}


# --- table and picture -----------------------------------------------------------------------------------------------


def show_prefill(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 100 columns."""
    s = results["settings"]
    cells = [
        [
            row["preset"],
            row["path"],
            milliseconds(row.get("prefill_s")),
            spread(row, "prefill"),
            f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "-",
            f"{row['limit_tokens_per_s']:,.0f}" if "limit_tokens_per_s" in row else "-",
            f"{row['of_limit']:.2f}" if "of_limit" in row else "-",
            bytes_text(row["peak_bytes"]) if "peak_bytes" in row else row["failed"],
        ]
        for row in results["rows"]
    ]
    notes = [
        f"B {s['batch_size']}, N {s['length']}, {s['dtype']}, {s['device']}; prompts go into a new cache.",
        f"Milliseconds: medians of {s['repeats']} after {s['warmup'] + 1} to warm up, fastest..slowest.",
        "Limit: every position reads its layers' sequential weights once, at the bandwidth of a copy, measured here:",
        f"{results['copy_bytes_per_s'] / 1e12:.3g} TB/s read and written.",
        *remarks(results),
    ]
    headings = ["preset", "path", "time", "range", "tokens/s", "limit", "of limit", "peak"]
    show_table(console, "Reading a prompt", headings, cells, notes)


def draw_prefill(results: dict[str, Any]) -> bytes:
    """Bars of tokens a second, one panel a preset, the limit a dashed line; a PNG."""
    panels = []
    for preset in dict.fromkeys(row["preset"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["preset"] == preset]
        limit = next((row["limit_tokens_per_s"] for row in rows if "limit_tokens_per_s" in row), None)
        values = {row["path"]: row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
        panels.append((f"{preset}: tokens/s", values, limit))
    s = results["settings"]
    shape = f"B {s['batch_size']}, N {s['length']}, {s['dtype']}, {s['device']}"
    title = f"Reading a prompt: {shape}; dashed: weights read once a position"
    return draw_bars(panels, title, results["machine"])
