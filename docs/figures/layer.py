"""Draws docs/figures/layer.png: where the keys and values of a layer come from. Run it from anywhere."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

GREY, BLUE, ORANGE, INK = "#8a8a8a", "#0072b2", "#d55e00", "#222222"
COLUMNS, BOX = (0.0, 2.6, 5.2), (1.5, 0.62)  # centres of positions 1, 2, 3; width and height of a box
X, ATTENTION, MLP, Z = 0.0, 1.75, 3.0, 4.25  # heights


def node(axes, x: float, y: float, text: str) -> None:
    axes.add_patch(Circle((x, y), 0.36, facecolor="white", edgecolor=INK, linewidth=1.2, zorder=3))
    axes.text(x, y, text, ha="center", va="center", fontsize=12, zorder=4)


def box(axes, x: float, y: float, text: str) -> None:
    corner = (x - BOX[0] / 2, y - BOX[1] / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, *BOX, boxstyle=style, facecolor="#f1f1f1", edgecolor=INK, zorder=3))
    axes.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)


def arrow(axes, start, end, colour=GREY, bend=0.0, style: object = "-", width=1.4, path=None) -> None:
    curve = None if path is None else Path(path, [Path.MOVETO] + [Path.CURVE4] * (len(path) - 1))
    axes.add_patch(
        FancyArrowPatch(
            start, end, path=curve, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=11,
            edgecolor=colour, facecolor=colour if path is None else "none", linestyle=style, linewidth=width,
            shrinkA=0, shrinkB=0, zorder=2,
        )
    )  # fmt: skip


def layer(axes, title: str, recurrent: bool) -> None:
    for i, x in enumerate(COLUMNS):
        node(axes, x, X, f"$x_{i + 1}$")
        box(axes, x, ATTENTION, "attention")
        box(axes, x, MLP, "MLP")
        node(axes, x, Z, f"$z_{i + 1}$")
        arrow(axes, (x, X + 0.36), (x, ATTENTION - 0.31))
        arrow(axes, (x, ATTENTION + 0.31), (x, MLP - 0.31))
        arrow(axes, (x, MLP + 0.31), (x, Z - 0.36))
        # The position's own pair: of its input in both kinds of layer.
        own = (ORANGE, (0, (2.2, 1.4))) if recurrent else (BLUE, "-")
        arrow(axes, (x + 0.22, X + 0.29), (x + 0.22, ATTENTION - 0.31), own[0], style=own[1], width=1.8)
        for j, later in enumerate(COLUMNS[i + 1 :]):
            if recurrent:  # from the finished output down to every later attention, between the boxes
                drop = [(x + 0.36, Z), (x + 1.1, Z), (x + 1.15, 3.4), (x + 1.25, 2.9)]
                if j == 0:
                    land = [(x + 1.35, 2.3), (x + 1.5, 2.0), (later - BOX[0] / 2, ATTENTION + 0.15)]
                else:
                    land = [(x + 1.35, 2.4), (x + 1.8, 2.4), (x + 2.7, 2.38)]
                    land += [(x + 3.6, 2.36), (x + 4.0, 2.0), (later - BOX[0] / 2, ATTENTION - 0.08)]
                arrow(axes, None, None, ORANGE, width=1.8, path=drop + land)
            else:
                into = (later - 0.5, ATTENTION - 0.31)
                arrow(axes, (x + 0.33, X + 0.14), into, BLUE, bend=0.08 + 0.05 * j, width=1.8)
    axes.set_title(title, fontsize=12, pad=10)
    axes.set_xlim(-1.1, 6.3)
    axes.set_ylim(-0.6, 4.85)
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5.1))
    layer(left, "Transformer layer", recurrent=False)
    layer(right, "Recurrent Transformer layer", recurrent=True)
    left.text(
        2.6, -0.95, "keys and values made from the inputs $x$", ha="center", va="center", color=BLUE, fontsize=10.5
    )
    right.text(
        2.6, -0.85, "persistent keys and values made from the outputs $z$;\ndashed: the position's own, made from $x$",
        ha="center", va="center", color=ORANGE, fontsize=10.5,
    )  # fmt: skip
    figure.text(0.5, 0.01, "grey: query and residual stream", ha="center", color="#6a6a6a", fontsize=9.5)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.92, bottom=0.14, wspace=0.02)
    figure.savefig(pathlib.Path(__file__).with_name("layer.png"), dpi=110, metadata={"Software": ""})


if __name__ == "__main__":
    main()
