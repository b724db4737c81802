"""Draws the pictures of docs/retrofit.md from the runs that the page describes.

`python docs/figures/retrofit.py` draws retrofit-gpu.png from docs/figures/gpu/retrofit.json.
`python docs/figures/retrofit.py RUNS`, where RUNS holds the runs control, first and frozen, draws retrofit.png.
"""

import json
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
    "all": ("all layers recurrent", "#d55e00", "D"),
}


def draw(records: dict[str, list[dict]], batch_tokens: int, name: str) -> None:
    """One picture, and the numbers of its table on stdout.

    Args:
        records: of each run, what its metrics.jsonl holds.
        batch_tokens: tokens of a step.
        name: of the picture's file.
    """
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    evaluations = {run: [r for r in records[run] if r["event"] == "evaluation"] for run in RUNS if run in records}
    before = evaluations["control"][0]["validation_loss"]  # nothing was converted there
    axes.axhline(before, color="#bbbbbb", linewidth=1)
    axes.text(4, before - 0.01, "before the conversion", ha="left", va="top", fontsize=8, color="#777777")
    for run, mine in evaluations.items():
        label, colour, marker = RUNS[run]
        steps, losses = zip(*((r["step"], r["validation_loss"]) for r in mine), strict=True)
        axes.plot(steps, losses, color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        recovered = next((s for s, loss in zip(steps, losses, strict=True) if loss <= before and s > 0), None)
        by_step = ", ".join(f"{s}: {loss:.4f}" for s, loss in zip(steps, losses, strict=True))
        print(f"{run}: back at step {recovered}; {by_step}")
    axes.set_xlabel(f"steps after the conversion ({batch_tokens:,} tokens each)")
    axes.set_ylabel("validation loss, nats a byte")
    axes.grid(color="#ececec")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(HERE / name, dpi=150, metadata={"Software": ""})


def main(arguments: list[str]) -> None:
    """From runs, or from what is stored of them."""
    if arguments:
        folder = pathlib.Path(arguments[0])
        draw({name: read_metrics(folder / name) for name in RUNS if (folder / name).is_dir()}, 2048, "retrofit.png")
        return
    stored = json.loads((HERE / "gpu" / "retrofit.json").read_text())
    draw(stored["runs"], stored["batch_tokens"], "retrofit-gpu.png")


if __name__ == "__main__":
    main(sys.argv[1:])
