"""Draws tiles.png, mirror.png and traffic.png for docs/algorithm.md, all from recurformer's own schedule.

Run it from anywhere: `python docs/figures/algorithm.py`.
"""

import pathlib
from collections.abc import Iterator

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from recurformer.experiments.bench.traffic import TrafficSettings, bench_traffic, draw_traffic
from recurformer.scan.schedule import Block, Schedule

HERE = pathlib.Path(__file__).parent
# Okabe and Ito's colours, one for each side of a tile; the numbers inside tell them apart once more.
SIDES = {1: "#f0e442", 2: "#e69f00", 4: "#56b4e9", 8: "#0072b2"}
PULL, READ, OWN, INK, FAINT = "#cc79a7", "#009e73", "#555555", "#222222", "#ececec"


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 120 else INK


def grid(axes, schedule: Schedule, title: str) -> None:
    """The frame: queries downwards, keys to the right, the own temporary pairs on the diagonal."""
    N, P = schedule.length, schedule.past
    for i in range(N):
        axes.add_patch(Rectangle((i, i), 1, 1, facecolor=OWN, edgecolor="white", linewidth=0.8))
    axes.set_xlim(-P - 0.1, N + 0.1)
    axes.set_ylim(N + 0.1, -0.1)
    axes.set_aspect("equal")
    axes.set_xticks([i + 0.5 for i in range(-P, N)], [str(i) for i in range(-P, N)], fontsize=8)
    axes.set_yticks([i + 0.5 for i in range(N)], [str(i) for i in range(N)], fontsize=8)
    axes.tick_params(length=0)
    axes.set_xlabel("key and value of position")
    axes.set_ylabel("query of position")
    axes.set_title(title, fontsize=11)
    for side in axes.spines.values():
        side.set_visible(False)


def tile(axes, block: Block, colour: str, label: str = "", edge: str = "white", width: float = 1.2) -> None:
    """One rectangle of (query, key) pairs."""
    x, y = block.keys.start, block.queries.start
    w, h = block.keys.stop - x, block.queries.stop - y
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=edge, linewidth=width, zorder=2))
    size = 7 + 2 * min(w, h, 4)
    axes.text(x + w / 2, y + h / 2, label, ha="center", va="center", fontsize=size, color=ink_on(colour), zorder=3)


def pushes(schedule: Schedule) -> Iterator[tuple[int, Block]]:
    """Position and tile of every push."""
    return ((step.positions.stop - 1, step.push) for step in schedule.leaves() if step.push is not None)


def side(block: Block) -> int:
    return block.keys.stop - block.keys.start


def tiles() -> None:
    """The paper's tiling, and the two-level schedule behind a memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.2, 6.3), width_ratios=(16, 20), layout="constrained")
    pure = Schedule(16)
    grid(left, pure, "Pure tiling of 16 positions")
    for position, block in pushes(pure):
        tile(left, block, SIDES[side(block)], str(position))
    left.text(
        15.8, 0.6, "number: the position after which\nthe tile is pushed", ha="right", va="top", fontsize=9.5, color=INK
    )
    left.legend(
        handles=[
            *(Patch(facecolor=colour, label=f"push, side {T}") for T, colour in SIDES.items()),
            Patch(facecolor=OWN, label="own temporary pair"),
        ],
        loc="upper right", bbox_to_anchor=(1.0, 0.87), frameon=False, fontsize=9,
    )  # fmt: skip

    mixed = Schedule(16, past=4, chunk=8, leaf=4)
    grid(right, mixed, "Chunks of 8 and leaves of 4, behind 4 remembered positions")
    for step in mixed.leaves():
        first, end = step.positions.start, step.positions.stop
        if step.pull is not None:
            tile(right, step.pull, PULL, f"pull\nbefore {first}")
        for position in range(first + 1, end):
            tile(right, Block(slice(first, position), slice(position, position + 1)), READ)
    for position, block in pushes(mixed):
        tile(right, block, SIDES[side(block)], f"push\nafter {position}")
    right.axvline(0, color=INK, linewidth=1.5)
    right.legend(
        handles=[
            Patch(facecolor=PULL, label="pull: everything before the chunk"),
            Patch(facecolor=SIDES[4], label="push: a tile inside the chunk"),
            Patch(facecolor=READ, label="read: the query's own leaf"),
            Patch(facecolor=OWN, label="own temporary pair"),
        ],
        loc="upper right", frameon=False, fontsize=9,
    )  # fmt: skip
    save(figure, "tiles.png")


def mirror() -> None:
    """The same tiles half way through the forward and through the backward pass."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.2, 6.6), layout="constrained")
    schedule, now = Schedule(16), 7
    grid(left, schedule, f"Forward, after position {now}: pairs go into later queries")
    grid(right, schedule, f"Backward, before position {now}: gradients go into earlier pairs")
    for position, block in pushes(schedule):
        for axes, done in ((left, position < now), (right, position > now)):
            running = position == now
            colour = SIDES[side(block)] if done or running else FAINT
            tile(axes, block, colour, "" if running else str(position), "white", 1.2)
            if running:
                corner = (block.keys.start, block.queries.start)
                frame = Rectangle(corner, side(block), 8, fill=False, edgecolor="#d55e00", linewidth=3, zorder=4)
                axes.add_patch(frame)
    texts = {
        left: "keys and values 0-7\ninto the running softmax\nof queries 8-15",
        right: "gradients of queries 8-15\ninto the gradients of\nkeys and values 0-7",
    }
    for axes, done in ((left, range(now + 1)), (right, range(now + 1, 16))):
        for i in range(16):
            colour = OWN if i in done else FAINT
            axes.add_patch(Rectangle((i, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8, zorder=2))
        axes.text(4, 12, texts[axes], color="white", fontsize=12, va="center", ha="center", zorder=5)
    arrow(left, (11.5, 2.2), (15.0, 5.7))
    left.text(14.6, 2.6, "positions\n0, 1, 2, ...", ha="center", fontsize=10)
    arrow(right, (15.0, 5.7), (11.5, 2.2))
    right.text(14.6, 2.6, "positions\n15, 14, 13, ...", ha="center", fontsize=10)
    figure.supxlabel(
        "coloured: done, or at work (orange frame); grey: still to come. Number: position after (forward) or before "
        "(backward) which a tile has its turn",
        fontsize=9.5, color="#555555",
    )  # fmt: skip
    save(figure, "mirror.png")


def arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=16, color=INK, linewidth=2))


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=110, metadata={"Software": ""})
    plt.close(figure)


def main() -> None:
    tiles()
    mirror()
    (HERE / "traffic.png").write_bytes(draw_traffic(bench_traffic(TrafficSettings())))


if __name__ == "__main__":
    main()
