"""Draws retrofit.png for docs/retrofit.md from the runs that the page describes.

`python docs/figures/retrofit.py RUNS`, where RUNS holds the runs control, first and frozen.
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recurformer.training import read_metrics

HERE = pathlib.Path(__file__).parent
# name of the run: (label, Okabe and Ito's colour, marker)
RUNS = {
    "control": ("standard, trained on", "#555555", "o"),
    "first": ("first layer recurrent", "#0072b2", "s"),
    "frozen": ("first layer recurrent, it alone learns", "#56b4e9", "^"),
}


def main(folder: pathlib.Path) -> None:
    """The picture, and the numbers of the table on stdout."""
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    evaluations = {name: [r for r in read_metrics(folder / name) if r["event"] == "evaluation"] for name in RUNS}
    before = evaluations["control"][0]["validation_loss"]  # nothing was converted there
    axes.axhline(before, color="#bbbbbb", linewidth=1)
    axes.text(4, before - 0.01, "before the conversion", ha="left", va="top", fontsize=8, color="#777777")
    for name, (label, colour, marker) in RUNS.items():
        steps, losses = zip(*((r["step"], r["validation_loss"]) for r in evaluations[name]), strict=True)
        axes.plot(steps, losses, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        recovered = next((s for s, loss in zip(steps, losses, strict=True) if loss <= before and s > 0), None)
        by_step = ", ".join(f"{s}: {loss:.4f}" for s, loss in zip(steps, losses, strict=True))
        print(f"{name}: back at step {recovered}; {by_step}")
    axes.set_xlabel("steps after the conversion (2,048 tokens each)")
    axes.set_ylabel("validation loss, nats a byte")
    axes.grid(color="#ececec")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(HERE / "retrofit.png", dpi=150)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
