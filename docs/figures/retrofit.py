"""Draws retrofit.png for docs/retrofit.md from docs/figures/retrofit.json.

`python docs/figures/retrofit.py RUNS` first takes into that file what the runs in RUNS say, by their names below.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recurformer.files import replacing
from recurformer.store.runs import read_metrics

HERE = pathlib.Path(__file__).parent
KEPT = HERE / "retrofit.json"  # validation losses of each run: pairs of a step and nats a byte
# name of the run: (label, Okabe and Ito's colour, marker)
RUNS = {
    "control": ("standard, trained on", "#555555", "o"),
    "first": ("first layer recurrent", "#0072b2", "s"),
    "frozen": ("first layer recurrent, it alone learns", "#56b4e9", "^"),
    "all": ("all layers recurrent", "#d55e00", "D"),
}


def take(folder: pathlib.Path) -> None:
    """Keep the evaluations of new runs beside those that are kept already."""
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for name in RUNS:
        if (folder / name).is_dir():
            found = [r for r in read_metrics(folder / name) if r["event"] == "evaluation"]
            kept[name] = [[r["step"], r["validation_loss"]] for r in found]
    with replacing(KEPT) as temporary:
        temporary.write_text(json.dumps(kept) + "\n")


def main(arguments: list[str]) -> None:
    """The picture, and the numbers of the table on stdout."""
    if arguments:
        take(pathlib.Path(arguments[0]))
    kept = json.loads(KEPT.read_text())
    figure, axes = plt.subplots(figsize=(7.2, 4), layout="constrained")
    before = kept["control"][0][1]  # nothing was converted there
    axes.axhline(before, color="#bbbbbb", linewidth=1)
    axes.text(4, before - 0.01, "before the conversion", ha="left", va="top", fontsize=8, color="#777777")
    for name, (label, colour, marker) in RUNS.items():
        steps, losses = zip(*kept[name], strict=True)
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
    figure.savefig(HERE / "retrofit.png", dpi=150, metadata={"Software": ""})


if __name__ == "__main__":
    main(sys.argv[1:])
