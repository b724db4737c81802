"""Gradients over distance, at initialisation and after training, and gradient norms while training (paper section 4).

Three measurements:
  - one layer with uniform attention at initialisation, against the bounds that its direct and multi-hop paths give;
  - whole models, recurrent and standard, and an Elman network as a foil, before and after a short training on text;
  - the norm of the parameters' gradient over training, for depths, widths and learning rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, MinLen
from torch import Tensor, nn

from recurformer.config import ModelConfig
from recurformer.experiments.bench.common import Progress, machine, show_table, silent
from recurformer.experiments.tasks.text import VOCABULARY, quickstart_bytes, random_windows
from recurformer.experiments.tasks.training import Fit, fit
from recurformer.experiments.theory.gradients import jacobian_gains, position_gradients
from recurformer.loss import IGNORE
from recurformer.model import LanguageModel, Layer, Output
from recurformer.report import COLOURS, MARKERS, png
from recurformer.scan.reference import attend
from recurformer.settings import Count, Counts, Positive, Seed, Settings, setting
from recurformer.training.config import OptimizerConfig, ScheduleConfig

if TYPE_CHECKING:
    from rich.console import Console

    from recurformer.experiments.theory.gradients import PositionGradients

SPIKE, BEFORE = 4.0, 20  # a spike is a norm of more than SPIKE times the median of the BEFORE steps before it
FOIL = "Elman"
MODELS = ("recurrent", "standard", FOIL)
Length = Annotated[int, Ge(2)]


@dataclass(frozen=True, kw_only=True)
class StabilitySettings(Settings):
    """One measurement of gradients over distance and of gradient norms while training."""

    d_model: Count = setting(64, "Width of the models whose gradients are followed over distance.")
    n_layers: Count = setting(2, "Number of layers of these models.")
    n_heads: Count = setting(4, "Number of heads of every model.")
    length: Length = setting(128, "Positions of a sequence. Distances are measured from the last one.")
    sequences: Count = setting(4, "Rows of random text.", option=None)
    probes: Count = setting(8, "Random directions for each Frobenius norm.", option=None)
    steps: Count = setting(100, "Training steps before the second measurement.")
    batch_size: Count = setting(16, "Sequences of a training step.", option=None)
    lr: Positive = setting(4e-3, "Learning rate of that training.")
    uniform_width: Count = setting(128, "Width of the single layer with uniform attention.")
    depths: tuple[Count, ...] = setting((1, 4), "Depths of the grid of training runs. None: no grid.", option=None)
    widths: Counts = setting((32, 96), "Widths of the grid.", option=None)
    rates: Annotated[tuple[Positive, ...], MinLen(1)] = setting(
        (1e-3, 4e-3, 1.6e-2), "Learning rates of the grid.", option=None
    )
    grid_steps: Count = setting(60, "Training steps of a run of the grid.", option=None)
    grid_length: Length = setting(32, "Positions of a sequence of the grid.", option=None)
    seed: Seed = setting(0, "Random seed of weights and data.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model_config("standard", self.n_layers, self.d_model)
        for depth, width, _, _ in self.grid():
            self.model_config("standard", depth, width)

    def grid(self) -> Iterator[tuple[int, int, float, str]]:
        """Depth, width, learning rate and kind of each training run."""
        for depth in self.depths:
            for width in self.widths:
                for rate in self.rates:
                    for layers in ("recurrent", "standard"):
                        yield depth, width, rate, layers

    def model_config(self, layers: str, n_layers: int, d_model: int) -> ModelConfig:
        """The shape of one model."""
        return ModelConfig(
            vocab_size=VOCABULARY, d_model=d_model, n_layers=n_layers, n_heads=self.n_heads, layers=layers
        )

    def optimizer(self, rate: float) -> OptimizerConfig:
        """AdamW as in a training run."""
        return OptimizerConfig(lr=rate)


class Elman(nn.Module):
    """The foil: s_i = tanh(W s_{i-1} + U x_i + b), one layer, called like a language model."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, d_model)
        self.input, self.state = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model, bias=False)
        self.head = nn.Linear(d_model, VOCABULARY, bias=False)
        for module in (self.embedding, self.input, self.state, self.head):
            nn.init.normal_(module.weight, std=d_model**-0.5)
        nn.init.zeros_(self.input.bias)

    def states(self, x: Tensor) -> Tensor:
        """(B, N, D) of the embedded tokens (B, N, D)."""
        driven, state, states = self.input(x), torch.zeros_like(x[:, 0]), []
        for i in range(x.shape[1]):
            state = torch.tanh(driven[:, i] + self.state(state))
            states.append(state)
        return torch.stack(states, dim=1)

    def forward(self, tokens: Tensor, targets: Tensor, **_: Any) -> Output:
        logits = self.head(self.states(self.embedding(tokens)))
        return Output(None, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))


# --- one layer with uniform attention --------------------------------------------------------------------------------


def uniform_layer(width: int, n_heads: int, layers: str, seed: int) -> LanguageModel:
    """A fresh layer whose scores are all zero: no positions, and queries of zeros."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=width, n_layers=1, n_heads=n_heads, layers=layers, position="none"
    )
    model = LanguageModel(config).double()
    first = model.layers[0]
    assert isinstance(first, Layer)
    nn.init.zeros_(first.q_proj.weight)
    return model


def measure_uniform(settings: StabilitySettings) -> dict[str, Any]:
    """Gains from every position i to the last, j, and the bounds; positions count from 1 in the formulas.

    The direct path (i's pair into j's attention, every other pair held fixed) is the lower bound. A path through
    the positions m < m' < ... has one more factor H / m' for each hop, H the map of a hop. If hops act like independent
    random maps of root-mean-square gain h, the squares of the paths add up to direct^2 * I_0(2 h ln(j / i)), and
    sqrt(I_0(2 x)) <= e^x gives the upper bound direct * (j / i)^h: a power of the ratio of positions, no exponential of
    their distance.
    """
    s, N = settings, settings.length
    recurrent = uniform_layer(s.uniform_width, s.n_heads, "recurrent", s.seed)
    standard = uniform_layer(s.uniform_width, s.n_heads, "standard", s.seed)
    tokens = torch.randint(VOCABULARY, (s.sequences, N), generator=torch.Generator().manual_seed(s.seed))
    layer = recurrent.layers[0]
    assert isinstance(layer, Layer)
    maths, layout = layer.maths(), recurrent.layout(N)
    x = recurrent.embedding.weight.detach()[tokens]
    z = layer(x, layout).detach()

    def after_one_hop(outputs: Tensor, x: Tensor) -> Tensor:
        """The last output (B, 1, D), given all positions' outputs as what earlier pairs are made of."""
        (k, v), (k_own, v_own) = (maths.pairs(maths.attention_input(u), None) for u in (outputs, x))
        q = maths.queries(maths.attention_input(x), None)
        keys = torch.cat([k[:, :, :-1], k_own[:, :, -1:]], dim=2)
        values = torch.cat([v[:, :, :-1], v_own[:, :, -1:]], dim=2)
        return maths.outputs(x[:, -1:], attend(q[:, :, -1:], keys, values, None))

    def direct(x: Tensor) -> Tensor:
        """The last output, whose earlier pairs depend on x at their own position alone, through one hop."""
        k, v = (t.detach() for t in maths.pairs(maths.attention_input(z), None))
        h = maths.attention_input(x)
        q, (k_own, v_own) = maths.queries(h, None), maths.pairs(h, None)
        alone = [
            attend(
                q[:, :, i : i + 1],
                torch.cat([k[:, :, :i], k_own[:, :, i : i + 1]], dim=2),
                torch.cat([v[:, :, :i], v_own[:, :, i : i + 1]], dim=2),
                None,
            )
            for i in range(N)
        ]
        return after_one_hop(maths.outputs(x, torch.cat(alone, dim=2)), x)

    def gains(found: PositionGradients) -> Tensor:
        return found.gains[0]

    options: dict[str, Any] = {"probes": s.probes, "seed": s.seed}
    hop = gains(jacobian_gains(lambda outputs: after_one_hop(outputs, x), z, [0], **options))[:-1] * N
    h = hop.square().mean().sqrt().item()
    one = gains(jacobian_gains(direct, x, [0], **options))
    ratio = N / torch.arange(1.0, N + 1, dtype=torch.float64)
    predicted = one * torch.special.i0(2 * h * ratio.log()).sqrt()
    measured = {
        "recurrent": gains(position_gradients(recurrent, tokens, **options)),
        "standard": gains(position_gradients(standard, tokens, **options)),
        "direct": one,
        "predicted": predicted,
        "bound": one * ratio**h,
    }
    return {"hop_gain": h, "gains": {name: value.tolist() for name, value in measured.items()}}


# --- whole models ----------------------------------------------------------------------------------------------------


def measure_models(settings: StabilitySettings, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Gains by distance of recurrent, standard and Elman models, before and after training."""
    s, rows = settings, []
    tokens, _ = random_windows(
        quickstart_bytes("validation"), s.sequences, s.length, torch.Generator().manual_seed(s.seed)
    )
    for name in MODELS:
        torch.manual_seed(s.seed)
        if name == FOIL:
            model = Elman(s.d_model)
        else:
            model = LanguageModel(s.model_config(name, s.n_layers, s.d_model))
        result: Fit | None = None
        for trained in (False, True):
            if trained:
                report(f"training {name}")
                result = _train(model, s, s.lr, s.steps, s.length)
            if isinstance(model, LanguageModel):
                found = position_gradients(model, tokens, probes=s.probes, seed=s.seed)
            else:
                x = model.embedding.weight.detach()[tokens]
                found = jacobian_gains(model.states, x, [s.length - 1], probes=s.probes, seed=s.seed)
            rows.append(
                {
                    "model": name, "trained": trained, "gains": found.over_distance().tolist(),
                    "loss": statistics.fmean(result.losses[-10:]) if result and result.losses else None,
                }
            )  # fmt: skip
    return rows


def _train(model: nn.Module, settings: StabilitySettings, rate: float, steps: int, length: int) -> Fit:
    generator = torch.Generator().manual_seed(settings.seed)
    text = quickstart_bytes("train")
    return fit(
        model,
        lambda step: random_windows(text, settings.batch_size, length, generator),
        ScheduleConfig(steps=steps),
        settings.optimizer(rate),
    )


# --- training --------------------------------------------------------------------------------------------------------


def spikes(norms: list[float]) -> int:
    """Steps whose gradient norm exceeds SPIKE times the median of the BEFORE steps before it."""
    return sum(
        norms[n] > SPIKE * statistics.median(norms[n - BEFORE : n]) for n in range(min(BEFORE, len(norms)), len(norms))
    )


def measure_training(settings: StabilitySettings, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Gradient norms of the training runs of the grid. The learning rate has no warm-up to hide behind but 10 %."""
    s, rows = settings, []
    for depth, width, rate, layers in s.grid():
        report(f"{layers}, {depth} layers of {width}, lr {rate:g}")
        torch.manual_seed(s.seed)
        result = _train(LanguageModel(s.model_config(layers, depth, width)), s, rate, s.grid_steps, s.grid_length)
        norms = result.gradient_norms
        rows.append(
            {
                "layers": layers, "n_layers": depth, "d_model": width, "lr": rate, "diverged_at": result.diverged_at,
                "median_norm": statistics.median(norms) if norms else None,
                "largest_norm": max(norms, default=None), "spikes": spikes(norms),
                "loss": statistics.fmean(result.losses[-10:]) if result.losses else None,
                "seconds": result.seconds, "norms": norms,
            }
        )  # fmt: skip
    return rows


# --- all of it -------------------------------------------------------------------------------------------------------


def bench_stability(settings: StabilitySettings, progress: Progress = silent) -> dict[str, Any]:
    """Return all three measurements, ready for JSON.

    Args:
        settings: sizes and lengths of the measurements.
        progress: called with the present work, measurements done and measurements in all.
    """
    done, total = 0, 1 + len(MODELS) + len(list(settings.grid()))

    def report(work: str) -> None:
        nonlocal done
        progress(work, done, total)
        done += 1

    report("one layer, uniform attention")
    return {
        "benchmark": "stability",
        "settings": asdict(settings),
        "machine": machine(),
        "uniform": measure_uniform(settings),
        "models": measure_models(settings, report),
        "training": measure_training(settings, report),
    }


def _shown_distances(length: int) -> list[int]:
    return [d for d in dict.fromkeys([0, 1, 4, 16, 64, 256, 1024, length - 1]) if d < length]


def show_stability(results: dict[str, Any], console: Console) -> None:
    """Three tables on a console of 80 columns."""
    s, uniform = results["settings"], results["uniform"]
    N = s["length"]
    distances = _shown_distances(N)
    headings = ["", *(f"{d}" for d in distances)]
    cells = [
        [name, *(f"{uniform['gains'][key][N - 1 - d]:.1e}" for d in distances)]
        for name, key in (
            ("standard", "standard"), ("recurrent", "recurrent"), ("lower: direct path", "direct"),
            ("random-hop model", "predicted"), ("upper: power law", "bound"),
        )
    ]  # fmt: skip
    notes = [
        "Gain |dz_j/dx_i| / sqrt(D) by distance j - i, j the last position. Lower bound: i's pair",
        f"into j's attention alone; upper: that times (j/i)^h, h = {uniform['hop_gain']:.2f} the gain of a hop.",
    ]
    show_table(console, f"One layer, uniform attention, fresh, D {s['uniform_width']}", headings, cells, notes, left=1)
    cells = [
        [
            f"{row['model']}, {'trained' if row['trained'] else 'fresh'}",
            *(f"{row['gains'][d]:.1e}" for d in distances),
            "-" if row["loss"] is None else f"{row['loss']:.2f}",
        ]
        for row in results["models"]
    ]
    notes = [
        f"{s['n_layers']} layers of width {s['d_model']} (Elman: 1), ALiBi; {s['steps']} steps of {s['batch_size']} "
        f"windows, lr {s['lr']:g}."
    ]
    show_table(console, "Gain by distance", [*headings, "loss"], cells, notes, left=1)
    if not results["training"]:
        return
    cells = [
        [
            row["layers"], f"{row['n_layers']} x {row['d_model']}", f"{row['lr']:g}",
            "-" if row["median_norm"] is None else f"{row['median_norm']:.2f}",
            "-" if row["largest_norm"] is None else f"{row['largest_norm']:.2f}",
            f"{row['spikes']}" if row["diverged_at"] is None else f"not finite at {row['diverged_at']}",
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
        ]
        for row in results["training"]
    ]  # fmt: skip
    notes = [
        f"{s['grid_steps']} steps of {s['batch_size']} windows of {s['grid_length']}. A spike: a norm of more than "
        f"{SPIKE:g} times",
        f"the median of the {BEFORE} steps before. The loss is the mean of the last ten.",
    ]
    headings = ["layers", "size", "lr", "median norm", "largest", "spikes", "loss"]
    show_table(console, "Norm of the parameters' gradient while training", headings, cells, notes, left=2)


def draw_stability(results: dict[str, Any]) -> bytes:
    """Gains of one uniform layer with bounds, of whole models, and gradient norms of the training runs; a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    s, gains = results["settings"], results["uniform"]["gains"]
    N = s["length"]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    (left, middle, right) = figure.subplots(1, 3)
    positions = list(range(1, N))  # i, from 1; the last one's own gain is of another kind
    left.fill_between(positions, gains["direct"][:-1], gains["bound"][:-1], color="#dddddd", label="between the bounds")
    for n, (key, label, style) in enumerate(
        (("recurrent", "recurrent", "-"), ("standard", "standard", "-"), ("predicted", "random-hop model", "--"))
    ):
        left.plot(positions, gains[key][:-1], style, color=COLOURS[n], label=label)
    left.set_xlabel(f"position i of the input; the output is at j = {N}\n(left: far back, right: close)")
    left.set_title(f"One fresh layer of width {s['uniform_width']}, uniform attention", fontsize=10)
    for n, row in enumerate(results["models"]):
        distances = range(1, N)
        middle.plot(
            distances, [g if g > 1e-9 else None for g in row["gains"][1:]],
            "-" if row["trained"] else ":", color=COLOURS[n // 2],
            label=f"{row['model']}, {'trained' if row['trained'] else 'fresh'}",
        )  # fmt: skip
    middle.set_xlabel("distance j - i from the last position\n(left: close, right: far back)")
    middle.set_title(f"{s['n_layers']} layers of width {s['d_model']}, fresh and after {s['steps']} steps", fontsize=10)
    sizes = list(dict.fromkeys((row["n_layers"], row["d_model"]) for row in results["training"]))
    for m, layers in enumerate(("recurrent", "standard")):
        for n, size in enumerate(sizes):
            chosen = [
                row for row in results["training"]
                if row["layers"] == layers and (row["n_layers"], row["d_model"]) == size and row["largest_norm"]
            ]  # fmt: skip
            right.plot(
                [row["lr"] for row in chosen], [row["largest_norm"] / row["median_norm"] for row in chosen],
                ("-", "--")[m], color=COLOURS[m], marker=MARKERS[n], label=f"{layers}, {size[0]} x {size[1]}",
            )  # fmt: skip
    right.set_xscale("log")
    right.set_xlabel("learning rate")
    right.set_ylabel("largest / median gradient norm")
    right.set_title(f"Gradient norms in {s['grid_steps']} training steps (layers x width)", fontsize=10)
    rates = sorted({row["lr"] for row in results["training"]})
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_ylabel(r"gain $\|\partial z_j / \partial x_i\|\,/\,\sqrt{D}$")
    for axes in (left, middle, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    if rates:
        right.set_xticks(rates, [f"{rate:g}" for rate in rates])
        right.set_yticks([2, 5, 10, 20], ["2", "5", "10", "20"])
        right.yaxis.set_minor_formatter(NullFormatter())
    return png(figure)
