"""The whole optimizer step of a model: tokens a second of recurrent models and hybrids against the Transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from recurformer.choose import SCAN_CHOICES, choose_attention, choose_loss, choose_scan
from recurformer.config import ModelConfig
from recurformer.data.windows import Batch
from recurformer.experiments.bench.common import (
    check_choice,
    check_counts,
    draw_bars,
    in_words,
    milliseconds,
    record,
    remarks,
    show_table,
    spread,
)
from recurformer.experiments.bench.timing import Work, build_model, forget_compiled, peak_memory_of, release, time_runs
from recurformer.training.config import TrainConfig
from recurformer.training.distributed import OneProcess
from recurformer.training.optimizer import make_optimizer, set_rates
from recurformer.training.steps import gradient_step
from recurformer.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("standard", "recurrent", "first:1", "first:3")


class Candidate(NamedTuple):
    """Settings of a training run that decide its speed and memory."""

    micro_batch_size: int
    recurrent_micro_batch_size: int | None
    recompute: bool


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """One measurement.

    Args:
        presets: names of shapes.
        kinds: of their layers, each "recurrent", "standard" or "first:K".
        tokens: of one optimizer step; a multiple of `length`.
        length: N, positions of a sequence.
        micro_batch_sizes: sequences in memory at once, each a candidate; those larger than the step are its size.
        recurrent_micro_batch_sizes: of the recurrent layers at the bottom of a hybrid, each a candidate beside one
            size for all layers; only with smaller micro-batches.
        recompute: whether standard layers are evaluated again in the backward, each a candidate.
        scan: how recurrent layers are evaluated.
        dtype: "bf16" (autocast: weights stay float32) or "fp32".
        compile: fuse the standard layers' element-wise steps; None: on a GPU.
        repeats, warmup: timed steps, of which the median counts, and steps before them.
        device, seed: where, and of weights and tokens.
    """

    presets: tuple[str, ...] = ("150m-12",)
    kinds: tuple[str, ...] = KINDS
    tokens: int = 262_144
    length: int = 512
    micro_batch_sizes: tuple[int, ...] = (64, 128)
    recurrent_micro_batch_sizes: tuple[int, ...] = ()
    recompute: tuple[bool, ...] = (False,)
    scan: str = "auto"
    dtype: str = "bf16"
    compile: bool | None = None
    repeats: int = 3
    warmup: int = 2
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "tokens", "length", "micro_batch_sizes", "repeats", "warmup")
        if self.recurrent_micro_batch_sizes:
            check_counts(self, "recurrent_micro_batch_sizes")
        if self.tokens % self.length:
            raise ValueError(f"tokens {self.tokens} is no multiple of length {self.length}; a step has whole sequences")
        check_choice("scan", self.scan, SCAN_CHOICES)
        for name in ("presets", "kinds", "recompute"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        for preset, kind in self.models():
            _ = self.training(preset, kind, Candidate(1, None, False))

    def models(self) -> list[tuple[str, str]]:
        """Every preset in every kind, the Transformer first: the others are held against it."""
        kinds = sorted(dict.fromkeys(self.kinds), key=lambda kind: kind != "standard")
        return [(preset, kind) for preset in dict.fromkeys(self.presets) for kind in kinds]

    def candidates(self, kind: str) -> list[Candidate]:
        """What to try for one kind of layers."""
        whole = self.tokens // self.length
        sizes = dict.fromkeys(min(size, whole) for size in self.micro_batch_sizes)
        again = (False,) if kind == "recurrent" else tuple(dict.fromkeys(self.recompute))
        wide = dict.fromkeys(min(size, whole) for size in self.recurrent_micro_batch_sizes)
        if kind in ("recurrent", "standard"):
            wide = {}
        return [
            Candidate(size, recurrent, recompute)
            for recompute in again
            for size in sizes
            for recurrent in (None, *wide)
            if recurrent is None or recurrent > size
        ]

    def training(self, preset: str, kind: str, candidate: Candidate) -> TrainConfig:
        """The training run of which one step is taken."""
        return TrainConfig(
            model=ModelConfig.preset(preset, layers=kind), batch_size=self.tokens // self.length, scan=self.scan,
            compile=self.compile, **candidate._asdict(),
            precision=self.dtype,  # pyright: ignore[reportArgumentType]
            device=self.device, seed=self.seed,
        )  # fmt: skip


def bench_model(settings: ModelSettings, progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Measure; all rows, and what they were made under, ready for JSON.

    The step is the training's own: micro-batches to the device, forward, loss, backward, clipping, fused AdamW. A
    candidate that runs out of memory is a row that says so; each model's fastest candidate is marked.

    Args:
        progress: called with what is being done, candidates done and candidates in all.
    """
    s, device = settings, torch.device(settings.device)
    plan = [(preset, kind, one) for preset, kind in s.models() for one in s.candidates(kind)]
    rows: list[dict[str, Any]] = []
    for done, (preset, kind, candidate) in enumerate(plan):
        if progress is not None:
            progress(f"{preset} {kind}, micro-batches of {candidate.micro_batch_size}", done, len(plan))
        row: dict[str, Any] = {"preset": preset, "layers": kind, **candidate._asdict()}
        try:
            row |= _measure(s, s.training(preset, kind, candidate), device)
        except torch.OutOfMemoryError:
            row["failed"] = "no memory"
        release(device)
        rows.append(row)
    for preset, kind in s.models():
        measured = [r for r in rows if (r["preset"], r["layers"]) == (preset, kind) and "step_s" in r]
        if measured:
            min(measured, key=lambda row: row["step_s"])["fastest"] = True
    standard = {row["preset"]: row["step_s"] for row in rows if row["layers"] == "standard" and row.get("fastest")}
    for row in rows:
        if "step_s" in row and row["preset"] in standard:
            row["ratio"] = standard[row["preset"]] / row["step_s"]
    dtype = {"bf16": torch.bfloat16}.get(s.dtype, torch.float32)
    notes = [f"loss {': '.join(choose_loss(device, dtype))}"]
    for preset in dict.fromkeys(s.presets):
        notes += scan_notes(s, preset, device, dtype)
        if s.kinds != ("recurrent",):
            config = ModelConfig.preset(preset)
            notes.append(f"standard layers of {preset} {': '.join(choose_attention(config, device))}")
    return record("model", s, rows, notes=notes)


def scan_notes(s: ModelSettings, preset: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """How recurrent layers are evaluated, and in which of the candidates if not in all alike."""
    found: dict[str, list[str]] = {}
    for kind in s.kinds:
        if kind == "standard":
            continue
        config = ModelConfig.preset(preset, layers=kind)
        for one in s.candidates(kind):
            rows = one.recurrent_micro_batch_size or one.micro_batch_size
            choice = choose_scan(
                s.scan, config, device, batch_size=rows, length=s.length, dtype=dtype, together=not one.recompute
            )
            again = ", recomputed" if one.recompute else ""
            found.setdefault(": ".join(choice), []).append(f"{kind}{again}, {rows} at a time")
    everywhere = len(found) == 1
    notes = []
    for choice, where in found.items():
        aside = "" if everywhere else f" ({'; '.join(dict.fromkeys(where))})"
        notes.append(f"recurrent layers of {preset}{aside} {choice}")
    return notes


def _measure(s: ModelSettings, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Entries of one row."""
    forget_compiled()
    torch.manual_seed(s.seed)
    with peak_memory_of(device) as peak:
        model = build_model(config.model, device, config.scan, config.compile, config.recompute)
        optimizer = make_optimizer(model, config.optimizer)
        batches = random_batches(config, s)

        def step() -> None:
            batch = next(batches)
            set_rates(optimizer, 0, config.optimizer, config.schedule)
            gradient_step(model, optimizer, batch, config, device, OneProcess())
            optimizer.step()

        def prepare(_: int) -> Work:
            return step

        for number in range(s.warmup):
            prepare(number)()
    times = time_runs(prepare, device, s.repeats, warmup=0)
    return {
        **times.to_dict("step"),
        "tokens_per_s": s.tokens / times.median,
        "peak_bytes": peak.bytes,
        "parameters": model.num_parameters(),
    }


def random_batches(config: TrainConfig, s: ModelSettings) -> Iterator[Batch]:
    """Steps' worth of random tokens, without end."""
    draw = torch.Generator().manual_seed(s.seed)
    while True:
        drawn = torch.randint(0, config.model.vocab_size, (config.batch_size, s.length + 1), generator=draw)
        ids = torch.arange(config.batch_size)
        yield Batch(tokens=drawn[:, :-1].clone(), targets=drawn[:, 1:].clone(), document_ids=None, window_ids=ids)


# --- table and picture -----------------------------------------------------------------------------------------------


def show_model(results: dict[str, Any], console: Console) -> None:
    """A table on a console of 100 columns."""
    s = results["settings"]
    cells = [
        [
            row["preset"],
            row["layers"] + (" *" if row.get("fastest") else ""),
            str(row["micro_batch_size"])
            + (f"/{row['recurrent_micro_batch_size']}" if row["recurrent_micro_batch_size"] else ""),
            "yes" if row["recompute"] else "no",
            milliseconds(row.get("step_s")),
            spread(row, "step"),
            f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "-",
            bytes_text(row["peak_bytes"]) if "peak_bytes" in row else row["failed"],
            f"{row['ratio']:.2f}" if "ratio" in row else "-",
        ]
        for row in results["rows"]
    ]
    notes = [
        f"One optimizer step of {s['tokens']:,} tokens in sequences of {s['length']}, {s['dtype']}, {s['device']}.",
        f"Milliseconds: medians of {s['repeats']} after {s['warmup']} to warm up, fastest..slowest. *: fastest row.",
        "Ratio: tokens/s against the Transformer's fastest row. Micro: sequences at once / in its recurrent layers.",
        "Again: standard layers are evaluated again in the backward. Peak: with weights and optimizer state.",
        *remarks(results),
    ]
    headings = ["preset", "layers", "micro", "again", "step", "range", "tokens/s", "peak", "ratio"]
    show_table(console, "Training steps", headings, cells, notes)


def draw_model(results: dict[str, Any]) -> bytes:
    """Bars of tokens a second and of peak memory, of each model's fastest row; a PNG."""
    best = [row for row in results["rows"] if row.get("fastest")]
    names = [f"{row['preset']} {row['layers']}" for row in best]

    def values(key: str, scale: float) -> dict[str, float]:
        return {name: scale * row[key] for name, row in zip(names, best, strict=True)}

    panels = [
        ("thousand tokens/s", values("tokens_per_s", 1e-3), None),
        ("peak memory, GiB", values("peak_bytes", 2.0**-30), None),
    ]
    s = results["settings"]
    title = f"optimizer step of {s['tokens']:,} tokens, N {s['length']}, {s['dtype']}, {s['device']}"
    return draw_bars(panels, f"{title}\n{in_words(results['machine'])}")
