"""Draws docs/figures/emulation.png: the error of emulation against the numbers that its assumptions sharpen.

Run it from anywhere: `python docs/figures/emulation.py`. Half a minute on one core.
"""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

from recurformer import LanguageModel, ModelConfig
from recurformer.experiments.theory import elman_cell, emulate_rnn, emulate_transformer
from recurformer.report import COLOURS, MARKERS

N = 256
SIZES = [10.0**e for e in range(1, 9)]
SHARPNESS = (1, 2, 4, 6, 8, 10, 14, 18, 22, 26, 30)
KNOTS = (4, 6, 8, 12, 16, 24, 32, 48, 64)


def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def transformer(**options) -> LanguageModel:
    """Two layers of width 32, every parameter redrawn with std 0.3 so that no branch is weak."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, layers="standard", **options))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return model


@torch.no_grad()
def main() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", sharey=True)
    tokens = torch.randint(97, (2, N), generator=torch.Generator().manual_seed(1))
    official = {"norm": "layer", "qk_norm": "full", "residual_scale": "none"}
    llama = {"activation": "swiglu", "position": "rope", "qk_norm": "none", "n_kv_heads": 2}
    cases = (
        ("defaults, float64", {}, torch.float64),
        ("official options, float64", official, torch.float64),
        ("Llama-like, float64", llama, torch.float64),
        ("defaults, float32", {}, torch.float32),
    )
    for n, (label, options, dtype) in enumerate(cases):
        model = transformer(**options).to(dtype)
        expected = model(tokens).logits
        errors = [largest(emulate_transformer(model, large=size)(tokens).logits, expected) for size in SIZES]
        # Curves of one precision lie on each other: earlier ones are wider, with larger, hollow marks.
        looks = {"markersize": 11 - 2 * n, "linewidth": 4 - 0.9 * n, "fillstyle": "none", "alpha": 0.8}
        left.plot(SIZES, errors, color=COLOURS[n], marker=MARKERS[n], label=label, **looks)
        print(label, [f"{error:.1e}" for error in errors])
    left.set_xscale("log")
    left.set_xlabel("large coordinate")
    left.set_ylabel("largest error of the logits / largest logit")
    left.set_title("A Transformer", fontsize=11)

    torch.manual_seed(0)
    cell = nn.RNNCell(5, 8).double()
    inputs, readout = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    tokens = tokens % 11
    state, states = torch.zeros(2, 8, dtype=torch.float64), []
    for i in range(N):
        state = cell(inputs[tokens[:, i]], state)
        states.append(state)
    expected = torch.stack(states, dim=1) @ readout.T
    fitted = elman_cell(cell, knots=64)
    for n, (label, wanted) in enumerate(
        (("its GELU form", fitted.run(inputs[tokens]) @ readout.T), ("the tanh cell", expected))
    ):
        errors = [
            largest(emulate_rnn(fitted, inputs, readout, sharpness=s, large=1e8)(tokens).logits, wanted)
            for s in SHARPNESS
        ]
        looks = {"markersize": 10 - 4 * n, "linewidth": 3.5 - 2 * n, "fillstyle": "none", "alpha": 0.8}
        middle.plot(SHARPNESS, errors, color=COLOURS[n], marker=MARKERS[n], label=label, **looks)
        print(label, [f"{error:.1e}" for error in errors])
    middle.set_xlabel("sharpness (lead of the previous position's score)")
    middle.set_title("An Elman cell, 64 GELUs for each tanh", fontsize=11)
    errors = [
        largest(emulate_rnn(elman_cell(cell, knots=knots), inputs, readout)(tokens).logits, expected) for knots in KNOTS
    ]
    print("knots", [f"{error:.1e}" for error in errors])
    right.plot(KNOTS, errors, color=COLOURS[1], marker=MARKERS[1], label="the tanh cell")
    right.set_xscale("log", base=2)
    right.set_xlabel("GELUs for each tanh (sharpness 40)")
    right.set_title("An Elman cell, width of the MLP", fontsize=11)
    for axes in (left, middle, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Emulation by recurrent layers: sequences of {N}, weights computed, not trained", fontsize=11)
    figure.savefig(pathlib.Path(__file__).with_name("emulation.png"), dpi=110, metadata={"Software": ""})


if __name__ == "__main__":
    main()
