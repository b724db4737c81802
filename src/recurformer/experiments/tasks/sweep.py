"""Models on tasks: trained at one length, and scored at this length and beyond."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from recurformer.config import ModelConfig, Position
from recurformer.experiments.bench.common import Progress, ScanName, record, show_table, silent
from recurformer.experiments.tasks.generators import Task, make_task
from recurformer.experiments.tasks.training import Fit, accuracy, fit
from recurformer.model import LanguageModel
from recurformer.report import png
from recurformer.settings import Count, Counts, Positive, Seeds, Settings, Text, Texts, setting
from recurformer.training.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from rich.console import Console

TEST_SEED = 10_000_019  # far from the seeds of training
RECENT, LEARNED = 20, 0.1  # steps, and their mean loss in nats an answer, at which a curriculum moves on
POINTS = 100  # of a stored curve


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """Models to train and tasks to train them on. Models of one depth have the same parameters, whatever their layers.

    The default has many heads, because ALiBi's steepest slope is 2^(-8/H). With few heads no head can look at the last
    positions alone, and the model's rule holds at the training length only.
    """

    tasks: Texts = setting((), "Tasks by name, with a difficulty after a colon.", option=None)
    layers: Texts = setting(
        ("recurrent", "first:1", "standard"), "Kind of layers: recurrent, standard or first:K. first:K is left out at "
        "depths below K.", metavar="KIND", repeated=True,
    )  # fmt: skip
    n_layers: Counts = setting((2,), "Number of layers.", repeated=True)
    d_model: Count = setting(64, "Width of every model.")
    n_heads: Count = setting(16, "Number of heads of every model.")
    position: Position = setting("alibi", "Positions of every model.")
    length: Count = setting(16, "Positions of the training sequences.")
    curriculum: tuple[Count, ...] = setting(
        (), "Shorter training length to learn first, rising. Each has an equal share of the steps at most.",
        metavar="N", repeated=True,
    )  # fmt: skip
    factors: Counts = setting(
        (1, 2, 4, 8), "Test length as a multiple of the training length.", option="--factor", repeated=True
    )
    steps: Count = setting(300, "Training steps of each model.")
    batch_size: Count = setting(64, "Sequences of a training step, all of them new.")
    lr: Positive = setting(3e-3, "Peak learning rate.")
    seeds: Seeds = setting((0,), "Random seed of weights and data, a run each.", option="--seed", repeated=True)
    test_count: Count = setting(256, "Sequences of each test.")
    minutes: Positive | None = setting(
        None, "Minutes of training of each model at most. The schedule then ends with the time.", unset="without limit"
    )
    scan: ScanName = setting("auto", "Scan of the recurrent layers.", metavar="NAME")
    device: Text = setting("cpu", "Device to train on.", option=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = (*self.curriculum, self.length)
        if any(a >= b for a, b in pairwise(rising)):
            raise ValueError(f"curriculum is {self.curriculum}; it must rise and stay below length {self.length}")
        for task in map(make_task, self.tasks):
            if rising[0] < task.shortest:
                name = "curriculum" if self.curriculum else "length"
                raise ValueError(f"{name} is {getattr(self, name)}; {task.name} needs at least {task.shortest}")
            for layers, depth in self.models():
                self.model_config(task, layers, depth)

    def models(self) -> list[tuple[str, int]]:
        """Kinds and depth of each model."""
        found = [
            (layers, depth)
            for depth in self.n_layers
            for layers in self.layers
            if not (layers.startswith("first:") and layers[6:].isdigit() and int(layers[6:]) > depth)
        ]
        if not found:
            raise ValueError(f"no model: layers {self.layers} fit no depth of {self.n_layers}")
        return found

    def model_config(self, task: Task, layers: str, n_layers: int) -> ModelConfig:
        """Return the shape of one model."""
        return ModelConfig(
            vocab_size=task.vocab_size, d_model=self.d_model, n_layers=n_layers, n_heads=self.n_heads, layers=layers,
            position=self.position,
        )  # fmt: skip

    def optimizer(self) -> OptimizerConfig:
        """Return the settings of AdamW: those of a training run, without weight decay, since every sequence is new."""
        return OptimizerConfig(lr=self.lr, weight_decay=0.0)


def run_tasks(settings: TaskSettings, report: Progress = silent) -> dict[str, Any]:
    """Train and score every model on every task with every seed, and return the results, ready for JSON.

    Args:
        settings: tasks, models and training.
        report: called with the present work, steps done and steps in all.
    """
    s, rows = settings, []
    jobs = [(name, *model, seed) for name in s.tasks for seed in s.seeds for model in s.models()]
    total = len(jobs) * s.steps
    for n, (name, layers, depth, seed) in enumerate(jobs):
        task, what = make_task(name), f"{name} {layers} x{depth} seed {seed}"
        torch.manual_seed(seed)
        model = LanguageModel(s.model_config(task, layers, depth)).to(s.device)
        model.scan = s.scan
        lesson = Lesson((*s.curriculum, s.length), s.steps)
        result = train_on_task(
            model, task, s, seed, lambda step, _, what=what, n=n: report(what, n * s.steps + step, total), lesson,
            None if s.minutes is None else 60 * s.minutes,
        )  # fmt: skip
        lengths = [s.length * factor for factor in s.factors]
        last = result.losses[-max(1, len(result.losses) // 10) :]
        rows.append(
            {
                "task": task.name, "layers": layers, "n_layers": depth, "d_model": s.d_model, "seed": seed,
                "length": s.length, "steps": len(result.losses) if s.minutes else s.steps,
                "parameters": model.num_parameters(), "seconds": result.seconds, "diverged_at": result.diverged_at,
                "loss": statistics.fmean(last) if last else None,
                "began": lesson.began, "curve": curve(result.losses),
                "accuracy": {
                    str(N): accuracy(model, task, N, count=s.test_count, seed=TEST_SEED + N) for N in lengths
                },
            }
        )  # fmt: skip
    return record("tasks", s, rows)


class Lesson:
    """The length of the training sequences: it rises when a length is learned or its share of the steps is over."""

    def __init__(self, lengths: tuple[int, ...], steps: int) -> None:
        self.lengths, self.share = lengths, steps / len(lengths)
        self.began = {str(lengths[0]): 0}  # length: steps made before it
        self.recent: list[float] = []
        self.made, self.since = 0, 0  # steps made; the step of the schedule at which this length began

    def length(self, step: int) -> int:
        """Return the length at a step of the schedule."""
        stage = len(self.began) - 1
        learned = len(self.recent) == RECENT and statistics.fmean(self.recent) < LEARNED
        if stage + 1 < len(self.lengths) and (learned or step - self.since >= self.share):
            self.began[str(self.lengths[stage + 1])] = self.made
            self.since, self.recent = step, []
        return self.lengths[len(self.began) - 1]

    def saw(self, loss: float) -> None:
        """Note the loss of a step."""
        self.made += 1
        self.recent = [*self.recent[1 - RECENT :], loss]


def curve(losses: list[float]) -> list[list[float]]:
    """Return at most `POINTS` pairs: steps made, and the mean loss since the previous pair."""
    size = max(1, -(-len(losses) // POINTS))
    ends = [min(n + size, len(losses)) for n in range(0, len(losses), size)]
    return [[end, statistics.fmean(losses[begin:end])] for begin, end in pairwise([0, *ends])]


def train_on_task(
    model: LanguageModel,
    task: Task,
    settings: Any,
    seed: int,
    report: Callable[[int, float], None],
    lesson: Lesson | None = None,
    limit_s: float | None = None,
) -> Fit:
    """Train a model on new sequences of a task.

    Args:
        model: trained in place.
        task: draws the sequences.
        settings: hold length, batch_size, steps and optimizer().
        seed: of the sequences.
        report: called after each step with its number and its loss.
        lesson: gives the length of each step. None: the settings' length.
        limit_s: see `fit`.
    """
    device, generator = model.embedding.weight.device, torch.Generator().manual_seed(seed)
    lesson = Lesson((settings.length,), settings.steps) if lesson is None else lesson

    def batch(step: int):
        tokens, targets = task.sample(settings.batch_size, lesson.length(step), generator)
        return tokens.to(device), targets.to(device)

    def seen(step: int, loss: float) -> None:
        lesson.saw(loss)
        report(step, loss)

    return fit(model, batch, ScheduleConfig(steps=settings.steps), settings.optimizer(), seen, limit_s)


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry for each task and model: mean, worst and best accuracy over the seeds, by length."""
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        width = row.get("d_model", results["settings"]["d_model"])  # joined measurements may differ in it
        grouped.setdefault((row["task"], row["layers"], row["n_layers"], width), []).append(row)
    several = len({width for *_, width in grouped}) > 1
    return [
        {
            "task": task, "model": f"{layers} x{depth}" + (f", width {width}" if several else ""),
            "parameters": rows[0]["parameters"],
            "length": rows[0]["length"], "steps": rows[0]["steps"], "seeds": len(rows),
            "seconds": statistics.fmean(row["seconds"] for row in rows),
            "accuracy": {
                N: (statistics.fmean(values), min(values), max(values))
                for N in rows[0]["accuracy"]
                for values in [[row["accuracy"][N] for row in rows]]
            },
        }
        for (task, layers, depth, width), rows in grouped.items()
    ]  # fmt: skip


def show_tasks(results: dict[str, Any], console: Console) -> None:
    """Print a table that fits 80 columns."""
    s, entries = results["settings"], summary(results)
    lengths = list(entries[0]["accuracy"])
    cells = [
        [
            e["task"], e["model"], f"{e['parameters']:,}",
            *(f"{100 * e['accuracy'][N][0]:.1f}" for N in lengths), f"{e['seconds']:.0f}",
        ]
        for e in entries
    ]  # fmt: skip
    notes = [
        "Accuracy in percent on the second half of the positions, by length;",
        f"trained at length {s['length']} for {s['steps']} steps of {s['batch_size']} fresh sequences, lr {s['lr']:g};",
        *([f"at {', '.join(map(str, s['curriculum']))} before, until learned;"] if s.get("curriculum") else []),
        f"mean of {len(s['seeds'])} seed(s); width {s['d_model']}, {s['n_heads']} heads.",
    ]
    headings = ["task", "layers", "params", *(f"{N}" for N in lengths), "s"]
    show_table(console, "State tracking", headings, cells, notes, left=2)


CHANCE = {"parity": 1 / 2, "s3": 1 / 6, "a5": 1 / 60, "s5": 1 / 120}  # of a guess, where all answers are as frequent


def chance_of(task: str) -> float | None:
    """Return the accuracy of a guess at a task, None where the answers are not equally frequent."""
    family, _, number = task.partition(":")
    return 1 / int(number) if family == "modular" and number else CHANCE.get(family)


def draw_tasks(results: dict[str, Any]) -> bytes:
    """Draw a heat map for each task, models downwards and test lengths to the right; return a PNG."""
    from matplotlib.figure import Figure

    entries = summary(results)
    tasks = list(dict.fromkeys(e["task"] for e in entries))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    tallest = max(sum(e["task"] == task for e in entries) for task in tasks)
    size = (1.4 + 3.9 * columns, 0.7 + rows * (1.2 + 0.42 * tallest))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.axis("off")
    image = None
    for axes, task in zip(grid.flat, tasks, strict=False):
        mine = [e for e in entries if e["task"] == task]
        lengths = list(mine[0]["accuracy"])
        values = [[100 * e["accuracy"][N][0] for N in lengths] for e in mine]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for y, e in enumerate(mine):
            for x, N in enumerate(lengths):
                mean, worst, best = e["accuracy"][N]
                text = f"{100 * mean:.0f}" if best - worst < 0.01 else f"{100 * worst:.0f}-{100 * best:.0f}"
                axes.text(x, y, text, ha="center", va="center", color="white" if mean < 0.55 else "black", fontsize=9)
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(mine)), [e["model"] for e in mine], fontsize=9)
        axes.set_xlabel("length of the test sequences", fontsize=8)
        seeds = "1 seed" if mine[0]["seeds"] == 1 else f"{mine[0]['seeds']} seeds"
        minutes = results["settings"].get("minutes")
        time = f"{minutes:.2g} minutes" if minutes else f"{mine[0]['steps']} steps"
        chance = chance_of(task)
        guess = "" if chance is None else f"; chance {100 * chance:.3g} %"
        axes.set_title(f"{task}: length {mine[0]['length']}, {time}, {seeds}{guess}", fontsize=8.5)
        axes.tick_params(length=0)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.7, label="accuracy, %")
    figure.suptitle("Accuracy on the second half of the positions, %, by length of the test sequences", fontsize=11)
    return png(figure)
