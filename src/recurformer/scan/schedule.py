"""The exact tiling of a recurrent layer as plain integers, and the HBM traffic that follows from it.

The persistent pairs of a layer appear one position after the other, and each later query attends to each of them
(paper section 5). Three kinds of blocks cover all pairs of a query and an earlier key:

  pull   at the start of a chunk of C positions: all earlier keys, those of the cache included, into the chunk's
         queries;
  push   after position t, with T = lowbit(t + 1): the keys [t + 1 - T, t + 1) into the queries [t + 1, t + 1 + T),
         clipped at the end of the chunk;
  read   at position t: the earlier keys of its leaf, [t - t % S, t), directly.

With leaves of S = 1 nothing is read, and with one chunk for all positions nothing is pulled: that is the tiling of the
paper. Larger leaves need fewer launches, smaller chunks fewer small tiles; both cost HBM traffic. The backward goes
through the same blocks in reverse order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# On a GPU, the positions of a leaf in the wavefront, and how far each layer is behind the layer below. A shorter chunk
# brings all layers to work sooner.
WAVEFRONT_CHUNK = 16


def lowbit(n: int) -> int:
    """Return the largest power of two that divides n >= 1."""
    return n & -n


class Block(NamedTuple):
    """Every query of a range of positions together with every key of another. Negative keys are slots of the past."""

    keys: slice
    queries: slice

    @property
    def pairs(self) -> int:
        """The number of (query, key) pairs."""
        return (self.keys.stop - self.keys.start) * (self.queries.stop - self.queries.start)


class LeafStep(NamedTuple):
    """The positions of one leaf, and the blocks before and after them. Inside a leaf there are only reads."""

    positions: slice
    pull: Block | None  # before the first position
    push: Block | None  # after the last position


@dataclass(frozen=True)
class Schedule:
    """The tiling of N positions that follow P past ones.

    Args:
        length: N, the number of positions.
        past: P, the number of slots in the cache, which are the keys -P to -1.
        chunk: C, positions of a chunk, a power of two. None: one chunk, the tiling of the paper.
        leaf: S, positions of a leaf, a power of two, at most C.

    Raises:
        ValueError: naming the value, for a negative length or past and for a chunk or leaf that is not possible.
    """

    length: int
    past: int = 0
    chunk: int | None = None
    leaf: int = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.past < 0:
            raise ValueError(f"length {self.length} must be at least 1 and past {self.past} at least 0")
        for name, side in (("chunk", self.chunk), ("leaf", self.leaf)):
            if side is not None and (side < 1 or side != lowbit(side)):
                raise ValueError(f"{name} is {side}; it must be a power of two")
        if self.chunk is not None and self.leaf > self.chunk:
            raise ValueError(f"leaf {self.leaf} exceeds chunk {self.chunk}; make it at most as large")

    @property
    def chunk_length(self) -> int:
        """Positions of a chunk: the whole length where there is one chunk."""
        return self.length if self.chunk is None else min(self.chunk, self.length)

    def chunks(self) -> list[slice]:
        """Return the positions of each chunk, first to last."""
        side = self.chunk_length
        return [slice(start, min(start + side, self.length)) for start in range(0, self.length, side)]

    def pull(self, chunk: slice) -> Block | None:
        """Return the block that is pulled at the start of a chunk, None where nothing comes before the chunk."""
        return Block(slice(-self.past, chunk.start), chunk) if self.past + chunk.start > 0 else None

    def push(self, position: int, chunk: slice) -> Block | None:
        """Return the block that is pushed once the pair of a position in `chunk` is known, None where there is none."""
        end = position + 1
        side = lowbit(end)
        if side < self.leaf or end >= chunk.stop:
            return None
        return Block(slice(end - side, end), slice(end, min(end + side, chunk.stop)))

    def leaves(self) -> Iterator[LeafStep]:
        """Yield the leaves in forward order. The backward is the exact reverse."""
        for chunk in self.chunks():
            for start in range(chunk.start, chunk.stop, self.leaf):
                positions = slice(start, min(start + self.leaf, chunk.stop))
                pull = self.pull(chunk) if start == chunk.start else None
                yield LeafStep(positions, pull, self.push(positions.stop - 1, chunk))


# --- several layers together -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wave:
    """Consecutive layers that are evaluated together, each over `length` positions from a start of its own."""

    layers: range
    starts: list[int]  # multiples of the chunk; each layer is one chunk behind the layer below
    length: int

    def spans(self) -> list[slice]:
        """Return the positions of each layer."""
        return [slice(start, start + self.length) for start in self.starts]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield each layer with its positions."""
        return zip(self.layers, self.spans(), strict=True)

    def part(self, offsets: slice) -> Wave:
        """Return the same layers over some of their positions, counted from each layer's start."""
        return Wave(self.layers, [start + offsets.start for start in self.starts], offsets.stop - offsets.start)


def waves(layers: int, length: int, chunk: int) -> list[Wave]:
    """Return the waves of a stack of layers in forward order: in step w, layer l is at chunk w - l.

    All layers of a wave have equally many positions. A last chunk that is shorter is therefore a wave of one layer. The
    backward takes the waves in reverse order.
    """
    count, ordered = -(-length // chunk), []
    for w in range(count + layers - 1):
        active = range(max(0, w - count + 1), min(layers, w + 1))
        starts = [(w - layer) * chunk for layer in active]
        rest = length - starts[0]
        if rest < chunk:
            ordered.append(Wave(active[:1], starts[:1], rest))
            active, starts = active[1:], starts[1:]
        if active:
            ordered.append(Wave(active, starts, chunk))
    return ordered


# --- HBM traffic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes and arithmetic of the attention of one layer's forward pass, over a whole batch."""

    bytes: int  # read from and written to HBM
    flops: int  # one multiply-add counts as two

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes


def attention_traffic(
    schedule: Schedule, batch: int, heads: int, head_dim: int, kv_heads: int | None = None, element_bytes: int = 2
) -> Traffic:
    """Return the traffic and arithmetic of the attention of one recurrent layer under a schedule (paper section 5).

    The model assumes that nothing stays in a cache between two blocks. A block reads its keys, values and queries once.
    It reads and writes the softmax state (m, l, acc; float32) of its queries. A position reads its query, its temporary
    pair, the earlier pairs of its leaf and its state, and writes its persistent pair and its output. Products with
    weights are left out, for they are the same under every schedule.

    Args:
        schedule: the tiling. The naive loop is a leaf as long as the sequence: each query reads all earlier keys.
        batch: B.
        heads: H.
        head_dim: K.
        kv_heads: G. None: H.
        element_bytes: bytes of one element of queries, keys, values and outputs.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    pair = 2 * kv_heads * head_dim * element_bytes
    query = heads * head_dim * element_bytes
    state = heads * (head_dim + 2) * 4
    moved = scores = 0
    for step in schedule.leaves():
        positions = step.positions.stop - step.positions.start
        reads = positions * (positions - 1) // 2
        moved += positions * (query + pair + state + pair + query) + reads * pair
        scores += positions + reads
        for block in (step.pull, step.push):
            if block is not None:
                keys, queries = block.keys.stop - block.keys.start, block.queries.stop - block.queries.start
                moved += keys * pair + queries * (query + 2 * state)
                scores += block.pairs
    return Traffic(batch * moved, batch * scores * heads * head_dim * 4)


def naive_schedule(length: int, past: int = 0) -> Schedule:
    """Return the schedule in which each query reads each earlier key: one leaf, Theta(N^2) traffic."""
    return Schedule(length, past, None, 1 << max(0, length - 1).bit_length())


def choose_schedule(length: int, past: int, leaf: int, head_dim: int, heads: int, kv_heads: int) -> Schedule:
    """Return the schedule of least modelled traffic: one chunk, or chunks of a power of two from `leaf` up."""
    leaf = min(leaf, 1 << max(0, length - 1).bit_length())
    sides = [None, *(1 << e for e in range(leaf.bit_length() - 1, length.bit_length()))]
    candidates = [Schedule(length, past, side, leaf) for side in sides]
    return min(candidates, key=lambda s: attention_traffic(s, 1, heads, head_dim, kv_heads, 4).bytes)
