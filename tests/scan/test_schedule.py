"""The schedule covers every pair exactly once and in time, forward and backward. Its traffic is counted right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recurformer.scan.schedule import Block, Schedule, attention_traffic, choose_schedule, lowbit, naive_schedule, waves


class Step(NamedTuple):
    """The blocks around one position."""

    position: int
    pull: Block | None  # before it
    read: slice  # earlier keys of its leaf
    push: Block | None  # after it


def steps(schedule: Schedule) -> Iterator[Step]:
    """Every position with its blocks, in forward order. This repeats the rules without `Schedule.leaves`."""
    for chunk in schedule.chunks():
        for i in range(chunk.start, chunk.stop):
            pull = schedule.pull(chunk) if i == chunk.start else None
            yield Step(i, pull, slice(i - i % schedule.leaf, i), schedule.push(i, chunk))


def readers(schedule: Schedule, position: int) -> slice:
    """The queries that read a key directly: the later ones of its leaf."""
    leaf_end = position - position % schedule.leaf + schedule.leaf
    return slice(position + 1, min(leaf_end, schedule.length))


SIDES = st.integers(0, 8).map(lambda e: 1 << e)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    length = draw(st.integers(1, 200))
    chunk = draw(st.none() | SIDES)
    leaf = draw(SIDES if chunk is None else SIDES.filter(lambda side: side <= chunk))
    return Schedule(length, draw(st.sampled_from([0, 1, 5, 37])), chunk, leaf)


def meetings(schedule: Schedule) -> np.ndarray:
    """How often each query (row) meets each key (column, slots of the past first).

    A pair is known after its own position. The function asserts that a query meets known pairs only, and that it meets
    them before its own position ends.
    """
    P, N = schedule.past, schedule.length
    count = np.zeros((N, P + N), dtype=int)

    def meet(queries: slice, keys: slice, known: int, now: int) -> None:
        assert keys.start < keys.stop <= known, "a key that is not known yet"
        assert now <= queries.start < queries.stop <= N, "a query that is already done"
        assert keys.start >= -P
        count[queries, keys.start + P : keys.stop + P] += 1

    for expected, step in enumerate(steps(schedule)):
        i = step.position
        assert i == expected
        if step.pull is not None:
            meet(step.pull.queries, step.pull.keys, known=i, now=i)
        assert step.read.stop == i
        if step.read.start < i:
            meet(slice(i, i + 1), step.read, known=i, now=i)
        if step.push is not None:
            meet(step.push.queries, step.push.keys, known=i + 1, now=i + 1)
    return count


def assert_exact(schedule: Schedule) -> None:
    P, N = schedule.past, schedule.length
    assert np.array_equal(meetings(schedule), np.tril(np.ones((N, P + N), dtype=int), P - 1))


@pytest.mark.parametrize("leaf", [1, 4, 16])
@pytest.mark.parametrize("chunk", [None, 16, 64], ids=lambda chunk: f"chunk-{chunk}")
@pytest.mark.parametrize("past", [0, 7])
def test_every_query_meets_every_earlier_key_once_and_in_time(past: int, chunk: int | None, leaf: int):
    for length in range(1, 201):
        assert_exact(Schedule(length, past, chunk, leaf))


@given(schedules())
@settings(max_examples=150, deadline=None)
def test_any_schedule_is_exact(schedule: Schedule):
    assert_exact(schedule)


@given(schedules())
@settings(max_examples=100, deadline=None)
def test_backwards_every_gradient_is_complete_when_its_position_comes(schedule: Schedule):
    """A query sends gradients after its own position. A pair must have all of them before its own position."""
    N, P = schedule.length, schedule.past
    received = np.zeros((N, N), dtype=int)  # pair, query

    def send(queries: slice, keys: slice, done: int) -> None:
        assert queries.start >= done, "a query that has not been processed"
        inside = slice(max(keys.start, 0), max(keys.stop, 0))
        received[inside, queries] += 1

    for step in reversed(list(steps(schedule))):
        i = step.position
        if step.push is not None:
            send(step.push.queries, step.push.keys, done=i + 1)
        later = readers(schedule, i)
        if later.start < later.stop:
            send(later, slice(i, i + 1), done=i + 1)
        assert np.array_equal(received[i], (np.arange(N) > i).astype(int)), "the pair's gradient is not complete"
        if step.pull is not None:
            send(step.pull.queries, step.pull.keys, done=i)
            assert step.pull.keys.start == -P
    assert received.sum() == N * (N - 1) // 2


@given(schedules())
@settings(max_examples=150, deadline=None)
def test_leaves_are_the_steps_with_nothing_inside_one(schedule: Schedule):
    in_order = steps(schedule)
    for positions, pull, push in schedule.leaves():
        inside = [next(in_order) for _ in range(positions.start, positions.stop)]
        assert [step.position for step in inside] == list(range(positions.start, positions.stop))
        assert all(step.read.start == positions.start for step in inside)
        assert [step.pull for step in inside] == [pull] + [None] * (len(inside) - 1)
        assert [step.push for step in inside] == [None] * (len(inside) - 1) + [push]
    assert next(in_order, None) is None


@given(schedules())
@settings(max_examples=50, deadline=None)
def test_readers_mirror_reads(schedule: Schedule):
    N = schedule.length
    reads = {(step.position, j) for step in steps(schedule) for j in range(step.read.start, step.read.stop)}
    assert reads == {(i, j) for j in range(N) for i in range(readers(schedule, j).start, readers(schedule, j).stop)}


def test_the_papers_tiling_of_eight_positions():
    pushes = [step.push for step in steps(Schedule(8))]
    assert pushes == [
        Block(slice(0, 1), slice(1, 2)),
        Block(slice(0, 2), slice(2, 4)),
        Block(slice(2, 3), slice(3, 4)),
        Block(slice(0, 4), slice(4, 8)),
        Block(slice(4, 5), slice(5, 6)),
        Block(slice(4, 6), slice(6, 8)),
        Block(slice(6, 7), slice(7, 8)),
        None,
    ]
    assert all(step.pull is None and step.read.start == step.position for step in steps(Schedule(8)))


def test_a_past_is_pulled_once_and_chunks_pull_what_came_before():
    pulls = {step.position: step.pull for step in steps(Schedule(10, past=3, chunk=4)) if step.pull is not None}
    assert pulls == {
        0: Block(slice(-3, 0), slice(0, 4)),
        4: Block(slice(-3, 4), slice(4, 8)),
        8: Block(slice(-3, 8), slice(8, 10)),
    }
    assert [step.pull for step in steps(Schedule(5))] == [None] * 5


def test_half_as_many_tiles_of_twice_the_side():
    sides = [step.push.keys.stop - step.push.keys.start for step in steps(Schedule(64)) if step.push is not None]
    assert {side: sides.count(side) for side in set(sides)} == {1: 32, 2: 16, 4: 8, 8: 4, 16: 2, 32: 1}


@pytest.mark.parametrize(("n", "bit"), [(1, 1), (2, 2), (3, 1), (12, 4), (64, 64), (96, 32)])
def test_lowbit(n: int, bit: int):
    assert lowbit(n) == bit


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(0), "length 0 must be at least 1"),
        (lambda: Schedule(4, past=-1), "past -1 at least 0"),
        (lambda: Schedule(4, chunk=3), "chunk is 3; it must be a power of two"),
        (lambda: Schedule(4, chunk=0), "chunk is 0; it must be a power of two"),
        (lambda: Schedule(4, leaf=6), "leaf is 6; it must be a power of two"),
        (lambda: Schedule(4, chunk=2, leaf=4), "leaf 4 exceeds chunk 2"),
    ],
    ids=["length", "past", "chunk", "zero", "leaf", "leaf-in-chunk"],
)
def test_a_schedule_that_is_none_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


# --- HBM traffic -----------------------------------------------------------------------------------------------------


def test_traffic_of_three_positions_by_hand():
    """N = 3, one head of width 2, 2-byte elements: a pair has 8 bytes, a query 4, a state (m, l, 2 values) 16."""
    traffic = attention_traffic(Schedule(3), batch=1, heads=1, head_dim=2)
    position = 4 + 8 + 16 + 8 + 4  # query, temporary pair, state; persistent pair and output
    first = 8 + (4 + 32)  # key 0 into query 1: the pair, the query, its state read and written
    second = 2 * 8 + (4 + 32)  # keys 0 and 1 into query 2, clipped
    assert traffic.bytes == 3 * position + first + second == 216
    assert traffic.flops == (3 + 3) * 2 * 4  # 3 own and 3 earlier pairs; 2 products of 2 multiply-adds
    assert traffic.intensity == 48 / 216


def test_traffic_of_a_chunk_a_leaf_and_shared_heads_by_hand():
    """N = 4 after 2 past positions, chunks and leaves of 2; H = 4, G = 2, K = 4, 4-byte elements."""
    traffic = attention_traffic(Schedule(4, 2, 2, 2), batch=3, heads=4, head_dim=4, kv_heads=2, element_bytes=4)
    pair, query, state = 2 * 2 * 4 * 4, 4 * 4 * 4, 4 * 6 * 4
    positions = 4 * (query + pair + state + pair + query) + 2 * pair  # positions 1 and 3 read one pair of their leaf
    pulls = (2 + 4) * pair + 2 * 2 * (query + 2 * state)
    assert traffic.bytes == 3 * (positions + pulls)
    assert traffic.flops == 3 * (4 + 6 + 4 * 2) * 4 * 4 * 4


@given(schedules())
@settings(max_examples=60, deadline=None)
def test_the_arithmetic_is_the_same_under_every_schedule(schedule: Schedule):
    N, P = schedule.length, schedule.past
    assert attention_traffic(schedule, 2, 3, 8).flops == 2 * 3 * 8 * 4 * (N * (N + 1) // 2 + N * P)


@pytest.mark.parametrize(
    "make", [Schedule, naive_schedule, lambda n: Schedule(n, 0, 16, 4)], ids=["tiled", "naive", "chunks"]
)
def test_more_positions_move_more(make):
    moved = [attention_traffic(make(n), 1, 2, 8).bytes for n in range(1, 130)]
    assert all(a < b for a, b in pairwise(moved))


def test_traffic_is_proportional_to_the_batch_and_grows_with_everything_else():
    base = {"batch": 1, "heads": 4, "head_dim": 8, "kv_heads": 2, "element_bytes": 2}
    moved = attention_traffic(Schedule(50), **base)
    assert attention_traffic(Schedule(50), **{**base, "batch": 7}).bytes == 7 * moved.bytes
    for name, value in {"heads": 8, "head_dim": 16, "kv_heads": 4, "element_bytes": 4}.items():
        assert attention_traffic(Schedule(50), **{**base, name: value}).bytes > moved.bytes
    assert attention_traffic(Schedule(50, past=1), **base).bytes > moved.bytes


def test_naive_traffic_is_quadratic_and_tiled_traffic_n_log_n():
    lengths = np.array([1 << e for e in range(9, 16)])
    naive, tiled = (
        np.array([attention_traffic(make(int(n)), 1, 4, 64).bytes for n in lengths])
        for make in (naive_schedule, Schedule)
    )
    # Closed forms: the naive loop reads N(N-1)/2 pairs, and everything else grows as N.
    pair, query, state = 2 * 4 * 64 * 2, 4 * 64 * 2, 4 * 66 * 4
    position = 2 * query + 2 * pair + state
    assert np.array_equal(naive, lengths * (lengths - 1) // 2 * pair + lengths * position)
    assert np.array_equal(
        tiled, lengths * np.log2(lengths).astype(int) // 2 * (pair + query + 2 * state) + lengths * position
    )
    slope = np.polyfit(np.log(lengths), np.log(naive), 1)[0]
    assert 1.95 < slope < 2.0
    per_position = tiled / lengths
    growth = np.diff(per_position)  # linear in log N: the same step at every doubling
    assert np.allclose(growth, growth[0])
    assert growth[0] > 0
    intensity = [attention_traffic(make(1 << 15), 1, 4, 64).intensity for make in (naive_schedule, Schedule)]
    assert 0.9 < intensity[0] < 1.0  # bandwidth-bound: about one FLOP a byte
    assert intensity[1] > 500


def test_the_naive_schedule_reads_everything_directly():
    for length in (1, 2, 3, 8, 100):
        in_order = list(steps(naive_schedule(length)))
        assert all(step.push is None and step.pull is None for step in in_order)
        assert all(step.read == slice(0, step.position) for step in in_order)


@pytest.mark.parametrize("past", [0, 100])
@pytest.mark.parametrize("length", [1, 2, 5, 100, 1000])
def test_the_chosen_schedule_moves_least(length: int, past: int):
    chosen = choose_schedule(length, past, 16, 32, 4, 2)
    least = attention_traffic(chosen, 1, 4, 32, 2, 4).bytes
    assert (chosen.length, chosen.past) == (length, past)
    for side in (None, *(chosen.leaf << e for e in range(math.ceil(math.log2(length)) + 1))):
        assert least <= attention_traffic(Schedule(length, past, side, chosen.leaf), 1, 4, 32, 2, 4).bytes


# --- layers side by side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_waves_do_everything_once_and_in_time(layers: int, chunk: int):
    """Each layer takes positions in order, after the layer below. The backward does the same from the other end."""
    for length in (1, 3, 4, 5, 16, 31, 64, 100):
        done = [0] * layers
        found = waves(layers, length, chunk)
        for wave in found:
            before = list(done)
            for layer, span in wave:
                assert span.start == before[layer]
                assert span.stop <= (length if layer == 0 else before[layer - 1])
                assert span.stop - span.start == wave.length <= chunk
                done[layer] = span.stop
            behind = {one - other for one, other in pairwise(wave.starts)}
            assert behind <= {chunk}
        assert done == [length] * layers
        # Backward: the layer above is done at these positions, and the layer itself at all later ones.
        passed = [length] * (layers + 1)
        passed[layers] = 0
        for wave in reversed(found):
            before = list(passed)
            for layer, span in wave:
                assert span.stop == before[layer]
                assert span.start >= before[layer + 1]
                passed[layer] = span.start
        assert passed == [0] * (layers + 1)


def test_a_part_of_a_wave_keeps_its_layers():
    wave = waves(3, 48, 16)[2]
    assert list(wave) == [(0, slice(32, 48)), (1, slice(16, 32)), (2, slice(0, 16))]
    assert list(wave.part(slice(4, 10))) == [(0, slice(36, 42)), (1, slice(20, 26)), (2, slice(4, 10))]
