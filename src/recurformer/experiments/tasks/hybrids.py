"""Placements of recurrent layers among standard ones: loss and cost of each, on a task or on text."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge

from recurformer.config import LayerKind, ModelConfig, Position
from recurformer.experiments.bench.common import Progress, ScanName, record, show_table, silent
from recurformer.experiments.tasks.generators import make_task
from recurformer.experiments.tasks.sweep import TEST_SEED, train_on_task
from recurformer.experiments.tasks.text import VOCABULARY, held_out_loss, quickstart_bytes, random_windows
from recurformer.experiments.tasks.training import Fit, accuracy, fit
from recurformer.model import LanguageModel
from recurformer.report import COLOURS, png
from recurformer.settings import Count, Positive, Seeds, Settings, Text, setting, shown
from recurformer.training.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "text"  # the name of the bytes inside the package, beside the tasks' names


def placements(n_layers: int) -> dict[str, tuple[LayerKind, ...]]:
    """Return the placements of interest: names (R recurrent, S standard) -> kinds of the layers, first to last.

    They are: none recurrent, each single layer, the first k, the last k, every other layer, all.
    """

    def letters(chosen: set[int]) -> str:
        return "".join("R" if n in chosen else "S" for n in range(n_layers))

    every = range(n_layers)
    sets = [set(), *({n} for n in every)]
    sets += [set(every[:k]) for k in range(2, n_layers)] + [set(every[-k:]) for k in range(2, n_layers)]
    sets += [set(every[0::2]), set(every[1::2]), set(every)]
    kinds: dict[str, LayerKind] = {"R": "recurrent", "S": "standard"}
    return {name: tuple(kinds[c] for c in name) for name in dict.fromkeys(map(letters, sets))}


@dataclass(frozen=True, kw_only=True)
class HybridSettings(Settings):
    """Models that differ in nothing but the places of their recurrent layers."""

    on: Text = setting(TEXT, "text, the bytes inside the package, or the name of a task.", option=None)
    n_layers: Count = setting(4, "Number of layers of every model.")
    d_model: Count = setting(64, "Width of every model.")
    n_heads: Count = setting(8, "Number of heads of every model.")
    position: Position = setting("alibi", "Positions of every model.", option=None)
    length: Count = setting(64, "Positions of the training sequences.")
    batch_size: Count = setting(64, "Sequences of a training step.")
    steps: Count = setting(200, "Training steps of each model.")
    lr: Positive = setting(4e-3, "Peak learning rate.")
    seeds: Seeds = setting((0,), "Random seed of weights and data, a run each.", option="--seed", repeated=True)
    only: tuple[Text, ...] = setting(
        (), "Placement to train: R recurrent and S standard, first to last. The Transformer is always trained.",
        option="--placement", metavar="LETTERS", repeated=True, unset="all of interest",
    )  # fmt: skip
    extra_steps: tuple[Annotated[int, Ge(2)], ...] = setting(
        (2, 4), "Multiples of the steps for further runs of the Transformer, to compare at equal cost.", option=None
    )
    scan: ScanName = setting("auto", "Scan of the recurrent layers.", metavar="NAME")
    device: Text = setting("cpu", "Device to train on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.only:
            if name not in placements(self.n_layers):
                raise ValueError(
                    f"only holds {shown(name)}; the placements of {self.n_layers} layers are "
                    f"{', '.join(placements(self.n_layers))}"
                )
        if self.on != TEXT:
            shortest = make_task(self.on).shortest
            if self.length < shortest:
                raise ValueError(f"length is {self.length}; {self.on} needs at least {shortest}")
        self.model_config(("standard",) * self.n_layers)

    def model_config(self, layers: tuple[LayerKind, ...]) -> ModelConfig:
        """Return the shape of one model."""
        vocabulary = VOCABULARY if self.on == TEXT else make_task(self.on).vocab_size
        return ModelConfig(
            vocab_size=vocabulary, d_model=self.d_model, n_layers=self.n_layers, n_heads=self.n_heads, layers=layers,
            position=self.position,
        )  # fmt: skip

    def optimizer(self) -> OptimizerConfig:
        """Return the settings of AdamW: those of a training run, without weight decay."""
        return OptimizerConfig(lr=self.lr, weight_decay=0.0)


def run_hybrids(settings: HybridSettings, report: Progress = silent) -> dict[str, Any]:
    """Train every placement and return loss, accuracy (of a task) and cost, ready for JSON.

    The Transformer is always among them: the other placements are compared with it. The cost on a CPU is the processor
    time of the training, which other processes hardly disturb. Elsewhere it is wall time.

    Args:
        settings: models and training.
        report: called with the present work, steps done and steps in all.
    """
    s, rows = settings, []
    every = placements(s.n_layers)
    base = "S" * s.n_layers
    jobs = [(name, kinds, 1) for name, kinds in every.items() if not s.only or name in (base, *s.only)]
    jobs += [(base, every[base], times) for times in s.extra_steps]
    total, done = len(s.seeds) * s.steps * sum(times for _, _, times in jobs), 0
    for seed in s.seeds:
        for name, kinds, times in jobs:
            torch.manual_seed(seed)
            model = LanguageModel(s.model_config(kinds)).to(s.device)
            model.scan = s.scan
            longer = replace(s, steps=s.steps * times)
            clock = time.process_time if model.embedding.weight.device.type == "cpu" else time.perf_counter
            began = clock()
            result = _train(model, longer, seed, lambda step, _, name=name, done=done: report(name, done + step, total))
            cost = clock() - began
            done += longer.steps
            about = {"layers": name, "times": times, "seed": seed, "cost_s": cost, "diverged_at": result.diverged_at}
            rows.append({**about, **_scores(s, model, result)})
    return record("hybrids", s, rows)


def _scores(s: HybridSettings, model: LanguageModel, result: Fit) -> dict[str, float]:
    """Return the loss of a trained model, and on a task its accuracy at and beyond the training length."""
    if s.on == TEXT:
        return {"loss": held_out_loss(model, s.length)}
    task = make_task(s.on)
    last = result.losses[-max(1, s.steps // 10) :]
    return {
        "loss": statistics.fmean(last) if last else math.nan,
        "accuracy": accuracy(model, task, s.length, seed=TEST_SEED),
        "accuracy_4x": accuracy(model, task, 4 * s.length, seed=TEST_SEED + 1),
    }


def _train(model: LanguageModel, settings: HybridSettings, seed: int, report: Callable[[int, float], None]) -> Fit:
    """Train one model on text or on a task."""
    if settings.on != TEXT:
        return train_on_task(model, make_task(settings.on), settings, seed, report)
    text, generator = quickstart_bytes("train"), torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device

    def batch(step: int):
        tokens, targets = random_windows(text, settings.batch_size, settings.length, generator)
        return tokens.to(device), targets.to(device)

    return fit(model, batch, ScheduleConfig(steps=settings.steps), settings.optimizer(), report)


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry for each placement, the Transformer first: means over seeds, smallest and greatest values."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        grouped.setdefault((row["layers"], row["times"]), []).append(row)
    numbers = [key for key in ("loss", "cost_s", "accuracy", "accuracy_4x") if key in results["rows"][0]]
    return [
        {
            "layers": layers, "times": times,
            **{key: statistics.fmean(row[key] for row in rows) for key in numbers},
            **{f"{key}_range": (min(row[key] for row in rows), max(row[key] for row in rows)) for key in numbers},
        }
        for (layers, times), rows in sorted(grouped.items(), key=lambda item: ("R" in item[0][0], item[0][1] > 1))
    ]  # fmt: skip


def show_hybrids(results: dict[str, Any], console: Console) -> None:
    """Print a table that fits 80 columns."""
    s, entries = results["settings"], summary(results)
    base = entries[0]
    cells = [
        [
            e["layers"] + (f", {e['times']} times the steps" if e["times"] > 1 else ""),
            f"{e['loss']:.4f}", f"{e['loss'] - base['loss']:+.4f}",
            *([f"{100 * e['accuracy']:.1f}", f"{100 * e['accuracy_4x']:.1f}"] if "accuracy" in e else []),
            f"{e['cost_s'] / base['cost_s']:.2f}",
        ]
        for e in entries
    ]  # fmt: skip
    unit = "held-out, nats a byte" if s["on"] == TEXT else "mean of the last tenth of training, nats an answer"
    notes = [
        f"R recurrent, S standard, first to last. Loss: {unit}; mean of {len(s['seeds'])} seed(s).",
        f"Cost: training time. That of {base['layers']}, {base['cost_s']:.0f} s, is 1.",
        f"Width {s['d_model']}, length {s['length']}, {s['steps']} steps of {s['batch_size']}, lr {s['lr']:g}.",
    ]
    scores = ["accuracy", "at 4x"] if "accuracy" in base else []
    headings = ["layers", "loss", "difference", *scores, "cost"]
    show_table(console, f"Which layers are recurrent ({s['on']})", headings, cells, notes, left=1)


def draw_hybrids(results: dict[str, Any]) -> bytes:
    """Draw, for each placement, loss on text or accuracy beyond the training length, and its cost; return a PNG."""
    from matplotlib.figure import Figure

    s, entries = results["settings"], summary(results)
    text = s["on"] == TEXT
    what, scale = ("loss", 1) if text else ("accuracy_4x", 100)
    figure = Figure(figsize=(9.5, 1.3 + 0.3 * len(entries)), layout="constrained")
    (quality, cost) = figure.subplots(1, 2, sharey=True)
    names = [e["layers"] if e["times"] == 1 else f"{e['layers']}, {e['times']} times the steps" for e in entries]
    kinds = (("standard layers alone", 4), ("first layer recurrent", 0), ("first layer standard", 1))
    drawn: set[str] = set()
    for height, e in enumerate(reversed(entries)):
        label, colour = kinds[0] if "R" not in e["layers"] else kinds[1] if e["layers"][0] == "R" else kinds[2]
        low, high = (scale * end for end in e[f"{what}_range"])
        quality.plot([low, high], [height, height], color=COLOURS[colour], linewidth=1.5, alpha=0.6)
        quality.plot(scale * e[what], height, "o", color=COLOURS[colour], label=label if label not in drawn else None)
        cost.plot(e["cost_s"] / entries[0]["cost_s"], height, "o", color=COLOURS[colour])
        drawn.add(label)
    quality.set_yticks(range(len(names)), reversed(names), fontsize=9)
    quality.set_xlabel("held-out loss, nats a byte" if text else f"accuracy at length {4 * s['length']}, %")
    cost.set_xlabel(f"training time, {entries[0]['layers']} = 1")
    cost.set_xlim(left=0)
    for axes in (quality, cost):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = "1 seed" if len(s["seeds"]) == 1 else f"{len(s['seeds'])} seeds (bars: worst to best)"
    shape = f"{s['n_layers']} layers of width {s['d_model']}, length {s['length']}, {s['steps']} steps"
    figure.suptitle(f"{s['on']}: {shape}, {seeds}; R recurrent, S standard", fontsize=9.5)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return png(figure)
