"""Decoding: milliseconds a token over batch and context, against what reading weights and cache once allows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import MinLen

from recurformer.config import ModelConfig
from recurformer.experiments.bench.common import Dtype, Progress, record, remarks, set_title, show_table, silent
from recurformer.experiments.bench.timing import DTYPES, Times, Work, build_model, copy_bandwidth, release, time_runs
from recurformer.generation.engine import DecodeEngine
from recurformer.model import LanguageModel
from recurformer.report import COLOURS, MARKERS, png
from recurformer.settings import Count, Counts, Seed, Settings, Text, Texts, setting
from recurformer.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

WORK_BYTES = 2**30  # left free for what a step needs besides weights and cache
StepName = Literal["auto", "plain", "fused"]


@dataclass(frozen=True, kw_only=True)
class DecodeSettings(Settings):
    """One measurement of decoding."""

    models: Texts = setting(
        ("300m-6", "300m-24:standard"), "Presets with the kind of their layers, recurrent where none is given.",
        metavar="PRESET:KIND",
    )  # fmt: skip
    batch_sizes: Counts = setting((1, 64), "Rows that continue at once, each tried.", metavar="B")
    contexts: Counts = setting(
        (1024,), "Slots that the last timed token sees, with its own slot, each tried.", metavar="N"
    )
    steps: Annotated[tuple[StepName, ...], MinLen(1)] = setting(
        ("auto",), "Decode steps: auto, plain (PyTorch operations) or fused (kernels), a row each.", option="--step",
        metavar="NAME",
    )  # fmt: skip
    tokens: Count = setting(16, "Tokens of one timed run.")
    huggingface: bool = setting(
        False, "Rows for generate of Hugging Face and ours, on the same weights, for one row of prompts at the "
        "smallest context."
    )  # fmt: skip
    dtype: Dtype = setting("bf16", "Dtype of weights, products and cache.")
    repeats: Count = setting(5, "Timed runs, of which the median counts.")
    warmup: Count = setting(3, "Runs before the timed ones.")
    seed: Seed = setting(0, "Random seed of weights and cache.")
    device: Text = setting("cpu", "Device to measure on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.contexts) < self.tokens:
            raise ValueError(
                f"the context {min(self.contexts)} is shorter than the {self.tokens} tokens of a run; "
                "time fewer tokens or a longer context"
            )
        for model in self.models:
            _ = model_config(model)


def model_config(name: str) -> ModelConfig:
    """The configuration of "PRESET:KIND"; KIND is recurrent where it is left out, and may hold a colon (first:1)."""
    preset, _, kind = name.partition(":")
    return ModelConfig.preset(preset, layers=kind or "recurrent")


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the matrices that every token meets, each once: those of the layers and the output layer."""
    D, F_ = config.d_model, config.mlp_width
    Q, KV = config.n_heads * config.head_width, config.kv_heads * config.head_width
    layer = 2 * D * Q + 2 * D * KV + (3 if config.activation == "swiglu" else 2) * D * F_
    return (config.n_layers * layer + D * config.padded_vocab_size) * dtype.itemsize


def limit_seconds(config: ModelConfig, dtype: torch.dtype, batch_size: int, context: int, bandwidth: float) -> float:
    """The time of a step that reads the weights and the pairs of `context` slots of every row once, and does no more.

    Args:
        bandwidth: bytes a second, as `copy_bandwidth`.
    """
    kv = batch_size * context * config.kv_bytes_per_token(dtype.itemsize)
    return (weight_bytes(config, dtype) + kv) / bandwidth


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def bench_decode(settings: DecodeSettings, progress: Progress = silent) -> dict[str, Any]:
    """Measure; all rows, and what they were made under, ready for JSON.

    A run makes the logits of `tokens` tokens of every row, one after the other: what draws a token from them is not in
    it. The cache is filled with random pairs.

    Args:
        progress: called with what is being done, rows done and rows in all.
    """
    s, device, dtype = settings, torch.device(settings.device), DTYPES[settings.dtype]
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    total = len(s.models) * (len(s.batch_sizes) * len(s.contexts) * len(s.steps) + 2 * s.huggingface)

    def report(what: str) -> None:
        progress(what, len(rows), total)

    for name in dict.fromkeys(s.models):
        config = model_config(name)
        report(f"{name}: weights")
        torch.manual_seed(s.seed)
        model = build_model(config, device).to(dtype).eval()
        for step in s.steps:
            for B in s.batch_sizes:
                report(f"{name}, batch {B}")
                for row in _rows(s, name, model, step, B, notes):
                    row["limit_s"] = limit_seconds(config, dtype, B, row["context"], bandwidth)
                    if "step_s" in row:
                        row["of_limit"] = row["step_s"] / row["limit_s"]
                        row["tokens_per_s"] = B / row["step_s"]
                    rows.append(row)
                    report(f"{name}, batch {B}, context {row['context']}")
                release(device)
        if s.huggingface:
            rows += _generate_rows(s, name, model, bandwidth)
            report(f"{name}, Hugging Face")
        del model
        release(device)
    return record("decode", s, rows, copy_bytes_per_s=bandwidth, notes=notes)


def _row(name: str, config: ModelConfig, dtype: torch.dtype, step: str, B: int, context: int) -> dict[str, Any]:
    kv = config.kv_bytes_per_token(dtype.itemsize)
    return {
        "model": name, "step": step, "batch_size": B, "context": context, "kv_bytes_per_token": kv,
        "kv_bytes": B * context * kv, "weight_bytes": weight_bytes(config, dtype),
    }  # fmt: skip


def _rows(
    s: DecodeSettings, name: str, model: LanguageModel, step: str, B: int, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """One row a context, shortest first, all on one engine as long as memory lasts."""
    device, dtype, config = torch.device(s.device), DTYPES[s.dtype], model.config
    for context in sorted(set(s.contexts)):
        row = _row(name, config, dtype, step, B, context)
        free = free_bytes(device)
        if free is not None and row["kv_bytes"] + WORK_BYTES * (device.type == "cuda") > free:
            yield {**row, "failed": "no room", "free_bytes": free}
            continue
        try:
            engine = DecodeEngine(model, B, context, dtype=dtype, step=step)
            note = f"auto is {engine.step_name}: {engine.why}"
            if step == "auto" and note not in notes:
                notes.append(note)
            row["step"] = engine.step_name
            yield {**row, **_time_steps(s, engine, context).to_dict("step")}
        except torch.OutOfMemoryError:
            yield {**row, "failed": "no room"}
        engine = None
        release(device)


def _time_steps(s: DecodeSettings, engine: DecodeEngine, context: int) -> Times:
    """Seconds of a step, of runs whose last step sees `context` slots."""
    first = context - s.tokens
    fill(engine, first)

    def prepare(_: int) -> Work:
        engine.crop(first)

        def steps() -> None:
            for _ in range(s.tokens):
                engine.step()

        return steps

    for number in range(s.warmup):
        prepare(number)()
    times = time_runs(prepare, engine.device, s.repeats, warmup=1)
    if not engine.state.logits.isfinite().all():
        raise ValueError(f"logits of {engine} are not finite")
    return Times(tuple(seconds / s.tokens for seconds in times.runs))


def fill(engine: DecodeEngine, n: int) -> None:
    """Random pairs in the first n slots, and random tokens to feed, in place of a prompt."""
    engine.reset()
    engine.reserve(n)
    state = engine.state
    for buffer in (state.keys, state.values):
        for layer in buffer:
            layer.normal_()
    state.tokens.random_(0, engine.config.vocab_size)
    engine.length = n
    state.place(n)


def _generate_rows(s: DecodeSettings, name: str, model: LanguageModel, bandwidth: float) -> list[dict[str, Any]]:
    """Whole greedy generations of one row, ours and Hugging Face's, of the same weights from the same prompt.

    Milliseconds a token are what a longer generation takes beyond a shorter one, so that the prompt does not count.
    """
    from recurformer.hf import RecurformerForCausalLM

    device, config, context = torch.device(s.device), model.config, min(s.contexts)
    short, long = max(1, s.tokens // 4), max(1, s.tokens // 4) + s.tokens
    prompt = torch.randint(0, config.vocab_size, (1, max(1, context - long)), device=device)
    theirs: Any = RecurformerForCausalLM.from_model(model)

    def ours(count: int) -> Work:
        return lambda: model.generate(prompt, count, temperature=0)

    def huggingface(count: int) -> Work:
        options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "eos_token_id": None}
        return lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    rows = []
    for step, way in (("generate", ours), ("HF generate", huggingface)):
        row = _row(name, config, DTYPES[s.dtype], step, 1, context)
        runs = [time_runs(lambda _, n=n, way=way: way(n), device, s.repeats, s.warmup) for n in (short, long)]
        step_s = max(runs[1].median - runs[0].median, 0.0) / (long - short)
        row["limit_s"] = limit_seconds(config, DTYPES[s.dtype], 1, context, bandwidth)
        if step_s > 0:
            row |= {"step_s": step_s, "of_limit": step_s / row["limit_s"], "tokens_per_s": 1 / step_s}
        else:
            row["failed"] = "too short"
        rows.append(row)
    return rows


# --- table and picture -----------------------------------------------------------------------------------------------


def short_ms(seconds: float) -> str:
    """Milliseconds with three digits or more, in few characters."""
    return f"{1e3 * seconds:,.{3 if seconds < 0.01 else 1 if seconds < 1 else 0}f}"


def show_decode(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 100 columns."""
    s = results["settings"]
    cells = [
        [
            row["model"],
            row["step"],
            f"{row['batch_size']}",
            f"{row['context']:,}",
            short_ms(row["step_s"]) if "step_s" in row else row["failed"],
            f"{row['tokens_per_s']:,.0f}" if "step_s" in row else "-",
            short_ms(row["limit_s"]),
            f"{row['of_limit']:.2f}" if "step_s" in row else "-",
            bytes_text(row["kv_bytes_per_token"]),
            bytes_text(row["kv_bytes"]),
        ]
        for row in results["rows"]
    ]
    notes = [
        f"{s['dtype']}, {s['device']}. Milliseconds a token of every row, to its logits: medians of {s['repeats']}",
        f"runs of {s['tokens']} tokens; the last of them sees the context. KV: keys and values of all layers and rows.",
        "Limit: weights and cache are read once, at the bandwidth of a copy, measured here: "
        f"{results['copy_bytes_per_s'] / 1e12:.3g} TB/s.",
        *remarks(results),
    ]
    headings = ["model", "step", "B", "context", "ms", "tokens/s", "limit", "x limit", "KV/token", "KV"]
    show_table(console, "Decoding", headings, cells, notes, left=2)


def draw_decode(results: dict[str, Any]) -> bytes:
    """Milliseconds a token over the context, one panel a batch size, the limits dashed; a PNG."""
    from matplotlib.figure import Figure

    s = results["settings"]
    rows = [row for row in results["rows"] if "step_s" in row]
    lines = list(dict.fromkeys((row["model"], row["step"]) for row in rows))
    sizes = sorted({row["batch_size"] for row in rows}) or [0]
    columns = min(3, len(sizes))
    figure = Figure(figsize=(4.8 * columns, 3.8 * -(-len(sizes) // columns) + 0.6), layout="constrained")
    panels = figure.subplots(-(-len(sizes) // columns), columns, squeeze=False)
    for axes in panels.flat[len(sizes) :]:
        axes.set_axis_off()
    for axes, B in zip(panels.flat, sizes, strict=False):
        for n, (name, step) in enumerate(lines):
            mine = [r for r in rows if (r["model"], r["step"], r["batch_size"]) == (name, step, B)]
            mine.sort(key=lambda row: row["context"])
            contexts = [row["context"] for row in mine]
            # Curves of one shape lie on each other: earlier ones are wider, with larger, hollow marks.
            below = max(0, len(lines) - 1 - n)
            style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "fillstyle": "none"}
            size = {"markersize": 5 + 1.5 * below, "linewidth": 1.2 + 0.9 * below, "alpha": 0.8}
            axes.plot(contexts, [1e3 * r["step_s"] for r in mine], label=f"{name}, {step} step", **style, **size)
            axes.plot(contexts, [1e3 * r["limit_s"] for r in mine], ":", color=style["color"], linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        contexts = sorted({row["context"] for row in rows if row["batch_size"] == B})
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts], fontsize=8)
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis("{x:g}")
        axes.set(title=f"batch {B}", xlabel="context, tokens", ylabel="milliseconds a token")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if rows:
        panels[0, 0].legend(fontsize=8)
    title = f"Time of a decode step, {s['dtype']}; dotted: weights and cache read once"
    set_title(figure, title, results["machine"])
    return png(figure)
