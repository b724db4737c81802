"""The whole Optimizer step of a model: tokens a second of recurrent models and hybrids against the Transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from annotated_types import MinLen

from recurformer.choose import choose_attention, choose_loss, choose_scan
from recurformer.config import ModelConfig
from recurformer.data.windows import Batch
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
from recurformer.experiments.bench.timing import Work, build_model, forget_compiled, peak_memory_of, release, time_runs
from recurformer.settings import Count, Counts, Seed, Settings, Text, Texts, setting
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
class ModelSettings(Settings):
    """One measurement of whole optimizer steps."""

    presets: Texts = setting(("150m-12",), "Presets to measure.")
    kinds: Texts = setting(KINDS, "Kinds of their layers: recurrent, standard or first:K.", metavar="KIND")
    tokens: Count = setting(262_144, "Tokens of one optimizer step, a multiple of the length.")
    length: Count = setting(512, "Positions of a sequence.", metavar="N")
    micro_batch_sizes: Counts = setting((64, 128), "Sequences in memory at once, each tried.", metavar="B")
    recurrent_micro_batch_sizes: tuple[Count, ...] = setting(
        (), "Sequences at once in the recurrent layers of a hybrid, each tried in addition to the micro-batch of all "
        "layers.", metavar="B",
    )  # fmt: skip
    recompute: Annotated[tuple[bool, ...], MinLen(1)] = setting(
        (False,), "Second evaluation of standard layers in the backward, each choice tried.", option=None
    )
    scan: ScanName = setting("auto", "Scan of the recurrent layers.", metavar="NAME")
    compile: bool | None = setting(None, "Fused element-wise steps of standard layers.", unset="on a GPU")
    dtype: Dtype = setting("bf16", "Compute dtype. bf16 is autocast: weights stay float32.")
    repeats: Count = setting(5, "Timed steps, of which the median counts.")
    warmup: Count = setting(3, "Steps before the timed ones.")
    seed: Seed = setting(0, "Random seed of weights and tokens.")
    device: Text = setting("cpu", "Device to measure on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens % self.length:
            raise ValueError(f"tokens {self.tokens} is no multiple of length {self.length}; a step has whole sequences")
        for preset, kind in self.models():
            _ = self.training(preset, kind, Candidate(1, None, False))

    def models(self) -> list[tuple[str, str]]:
        """Every preset in every kind, the Transformer first: the others are held against it."""
        kinds = sorted(dict.fromkeys(self.kinds), key=lambda kind: kind != "standard")
        return [(preset, kind) for preset in dict.fromkeys(self.presets) for kind in kinds]

    def candidates(self, kind: str) -> list[Candidate]:
        """Return the settings to try for one kind of layers."""
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


def bench_model(settings: ModelSettings, progress: Progress = silent) -> dict[str, Any]:
    """Measure; all rows, and what they were made under, ready for JSON.

    The step is the training's own: micro-batches to the device, forward, loss, backward, clipping, fused AdamW. A
    candidate that runs out of memory is a row that says so; each model's fastest candidate is marked.

    Args:
        progress: called with the present work, steps done and steps in all.
    """
    s, device = settings, torch.device(settings.device)
    plan = [(preset, kind, one) for preset, kind in s.models() for one in s.candidates(kind)]
    rows: list[dict[str, Any]] = []
    steps = s.warmup + s.repeats
    for number, (preset, kind, candidate) in enumerate(plan):
        work = f"{preset} {kind}, micro-batches of {candidate.micro_batch_size}"

        def report(step: int, work: str = work, first: int = number * steps) -> None:
            progress(f"{work}, step {step + 1} of {steps}", first + step, len(plan) * steps)

        row: dict[str, Any] = {"preset": preset, "layers": kind, **candidate._asdict()}
        try:
            row |= _measure(s, s.training(preset, kind, candidate), device, report)
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


def _measure(
    s: ModelSettings, config: TrainConfig, device: torch.device, report: Callable[[int], None]
) -> dict[str, Any]:
    """Return the entries of one row. `report` is called before each step with its number: a step may take minutes."""
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

        def prepare(number: int) -> Work:
            report(number)
            return step

        for number in range(s.warmup):
            prepare(number)()
    times = time_runs(lambda number: prepare(s.warmup + number), device, s.repeats, warmup=0)
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
        f"One Optimizer step of {s['tokens']:,} tokens in sequences of {s['length']}, {s['dtype']}, {s['device']}.",
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
    title = f"Optimizer step of {s['tokens']:,} tokens, N {s['length']}, {s['dtype']}, {s['device']}"
    return draw_bars(panels, title, results["machine"])
