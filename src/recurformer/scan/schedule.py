"""Which tile when: the exact tiling of a recurrent layer as plain integers, and the HBM traffic that follows from it.

A recurrent layer reveals its persistent pairs one by one, and every later query must meet every pair (paper section 5).
The lower triangle of (query, earlier key) is covered by three kinds of blocks:

  pull   at the start of a chunk of C positions: all earlier keys, the past in the cache included, into the chunk's
         queries, in one flash-style block;
  push   after position t, T = lowbit(t + 1): the keys [t + 1 - T, t + 1) into the queries [t + 1, t + 1 + T), clipped
         at the end of the chunk;
  read   at position t: the keys of its own leaf, [t - t % S, t), directly.

A leaf of S = 1 has nothing to read and one chunk for all positions has nothing to pull: that is the paper's pure
tiling. Larger leaves and smaller chunks trade HBM traffic against launches. The backward runs the same list from its
end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

WAVEFRONT_CHUNK = (
    16  # positions that a layer is behind the one below on a GPU, and of a leaf: fewer fill the stack faster
)


def lowbit(n: int) -> int:
    """Largest power of two dividing n >= 1."""
    return n & -n


class Block(NamedTuple):
    """Keys [keys.start, keys.stop) meet queries [queries.start, queries.stop); negative keys are the past's slots."""

    keys: slice
    queries: slice

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        return (self.keys.stop - self.keys.start) * (self.queries.stop - self.queries.start)


class Step(NamedTuple):
    """What surrounds the computation of one position."""

    position: int
    pull: Block | None  # before it
    read: slice  # keys of its own leaf, before it: [leaf start, position)
    push: Block | None  # after its persistent pair is known


class LeafStep(NamedTuple):
    """What surrounds the positions of one leaf."""

    positions: slice
    pull: Block | None  # before them
    push: Block | None  # after them


@dataclass(frozen=True)
class Schedule:
    """The tiling of N positions behind P past ones.

    Args:
        length: N, positions.
        past: P, slots of a non-empty memory, keys -P..-1.
        chunk: C, a power of two; None: one chunk, i.e. pure tiling.
        leaf: S, a power of two, at most C.
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
        """Positions of a chunk, the whole length for pure tiling."""
        return self.length if self.chunk is None else min(self.chunk, self.length)

    def chunks(self) -> list[slice]:
        """The chunks, first to last."""
        side = self.chunk_length
        return [slice(start, min(start + side, self.length)) for start in range(0, self.length, side)]

    def pull(self, chunk: slice) -> Block | None:
        """What a chunk's queries meet at its start."""
        return Block(slice(-self.past, chunk.start), chunk) if self.past + chunk.start > 0 else None

    def read(self, position: int) -> slice:
        """Keys that a query reads directly."""
        return slice(position - position % self.leaf, position)

    def readers(self, position: int) -> slice:
        """Queries that read a key directly (the mirror of `read`)."""
        leaf_end = position - position % self.leaf + self.leaf
        return slice(position + 1, min(leaf_end, self.length))

    def push(self, position: int, chunk: slice) -> Block | None:
        """What is pushed once the pair of `position`, inside `chunk`, is known."""
        end = position + 1
        side = lowbit(end)
        if side < self.leaf or end >= chunk.stop:
            return None
        return Block(slice(end - side, end), slice(end, min(end + side, chunk.stop)))

    def steps(self) -> Iterator[Step]:
        """All positions in forward order; the backward is the exact reverse."""
        for chunk in self.chunks():
            for position in range(chunk.start, chunk.stop):
                pull = self.pull(chunk) if position == chunk.start else None
                yield Step(position, pull, self.read(position), self.push(position, chunk))

    def leaves(self) -> Iterator[LeafStep]:
        """The steps, leaf by leaf: inside one there are only reads."""
        for chunk in self.chunks():
            for start in range(chunk.start, chunk.stop, self.leaf):
                positions = slice(start, min(start + self.leaf, chunk.stop))
                pull = self.pull(chunk) if start == chunk.start else None
                yield LeafStep(positions, pull, self.push(positions.stop - 1, chunk))


# --- several layers side by side -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wave:
    """Consecutive layers at work side by side, each on `length` positions from its own start."""

    layers: range
    starts: list[int]  # multiples of the chunk, which each layer is behind the one before it
    length: int

    def spans(self) -> list[slice]:
        """The positions of each layer."""
        return [slice(start, start + self.length) for start in self.starts]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Each layer with its positions."""
        return zip(self.layers, self.spans(), strict=True)

    def part(self, offsets: slice) -> Wave:
        """The same layers at some of their positions, which count from each layer's start."""
        return Wave(self.layers, [start + offsets.start for start in self.starts], offsets.stop - offsets.start)


def waves(layers: int, length: int, chunk: int) -> list[Wave]:
    """A stack of layers over chunks of positions: layer l is at chunk w - l at step w; the backward is the reverse.

    All layers of a wave have as many positions to do, so that a last chunk that is shorter goes by itself.
    """
    count, found = -(-length // chunk), []
    for w in range(count + layers - 1):
        active = range(max(0, w - count + 1), min(layers, w + 1))
        starts = [(w - layer) * chunk for layer in active]
        rest = length - starts[0]
        if rest < chunk:
            found.append(Wave(active[:1], starts[:1], rest))
            active, starts = active[1:], starts[1:]
        if active:
            found.append(Wave(active, starts, chunk))
    return found


# --- HBM traffic -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """What the attention of one layer's forward pass moves and computes, over a whole batch."""

    bytes: int  # read from and written to HBM
    flops: int  # multiply-adds count twice

    @property
    def intensity(self) -> float:
        """Arithmetic intensity, FLOP a byte."""
        return self.flops / self.bytes


def attention_traffic(
    schedule: Schedule, batch: int, heads: int, head_dim: int, kv_heads: int | None = None, element_bytes: int = 2
) -> Traffic:
    """Bytes and arithmetic of the attention of one recurrent layer under a schedule (paper section 5).

    Model: nothing stays in cache between blocks. A block reads its keys and values once and its queries once, and
    reads and writes the running softmax state (m, l, acc; float32) of its queries. A position reads its query, its
    temporary pair, its leaf's pairs and its state, and writes its persistent pair and output. Products with weights
    are left out: they are the same under every schedule.

    Args:
        schedule: the tiling. The naive loop is a leaf as long as the sequence: every query reads all earlier keys.
        batch, heads, head_dim: B, H, K; kv_heads: G, default H.
        element_bytes: of queries, keys, values and outputs.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    pair = 2 * kv_heads * head_dim * element_bytes
    query = heads * head_dim * element_bytes
    state = heads * (head_dim + 2) * 4
    moved = met = 0
    for step in schedule.steps():
        leaf = step.read.stop - step.read.start
        moved += query + pair + leaf * pair + state + pair + query
        met += leaf + 1
        for block in (step.pull, step.push):
            if block is not None:
                keys, queries = block.keys.stop - block.keys.start, block.queries.stop - block.queries.start
                moved += keys * pair + queries * (query + 2 * state)
                met += block.pairs
    return Traffic(batch * moved, batch * met * heads * head_dim * 4)


def naive_schedule(length: int, past: int = 0) -> Schedule:
    """Every query reads every earlier key of the sequence: one leaf, Theta(N^2) traffic."""
    return Schedule(length, past, None, 1 << max(0, length - 1).bit_length())


def choose_schedule(length: int, past: int, leaf: int, head_dim: int, heads: int, kv_heads: int) -> Schedule:
    """The schedule of least modelled traffic among pure tiling and chunks of every power of two from `leaf` up."""
    leaf = min(leaf, 1 << max(0, length - 1).bit_length())
    sides = [None, *(1 << e for e in range(leaf.bit_length() - 1, length.bit_length()))]
    candidates = [Schedule(length, past, side, leaf) for side in sides]
    return min(candidates, key=lambda s: attention_traffic(s, 1, heads, head_dim, kv_heads, 4).bytes)
