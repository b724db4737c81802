"""Windows: which there are, their order, their borders, their batches; and evaluation windows, which score once."""

from __future__ import annotations

import itertools
import json
import pickle
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recurformer.data import TokenDataset, TrainingWindows, evaluation_batches, prepare
from recurformer.data.windows import shuffled
from recurformer.loss import IGNORE


def raw(
    folder: Path, *shards: list[int] | np.ndarray, vocab_size: int = 60000, eos_id: int | None = None
) -> TokenDataset:
    """A dataset of raw uint16 shards."""
    paths = [folder / f"part-{number}.npy" for number in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        np.array(shard, dtype="<u2").tofile(path)
    return TokenDataset(paths, vocab_size=vocab_size, eos_id=eos_id)


def prepared(folder: Path, texts: list[str], shard_tokens: int = 1000, append_eos: bool = True) -> TokenDataset:
    """A dataset of documents as bytes."""
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "in.jsonl"], folder / "out", shard_tokens=shard_tokens, append_eos=append_eos, overwrite=True)
    return TokenDataset(folder / "out")


@pytest.fixture
def numbered(tmp_path: Path) -> TrainingWindows:
    """64 windows of 8 in two shards; window w begins with token 8 w (the second shard's with 8 w + 1)."""
    return TrainingWindows(raw(tmp_path, np.arange(40 * 8 + 1), np.arange(40 * 8 + 1, 64 * 8 + 5)), 8, seed=3)


# --- the order --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_shuffled_is_a_permutation(n: int, key: str):
    assert np.array_equal(np.sort(shuffled(np.arange(n), n, key)), np.arange(n))


def test_shuffled_is_frozen_and_any_part_of_it_can_be_had():
    """A changed order would break the resumption of every run that is under way."""
    assert shuffled(np.arange(10), 10, "0 0").tolist() == [0, 6, 5, 1, 7, 3, 9, 8, 4, 2]
    whole = shuffled(np.arange(1000), 1000, "7 2")
    assert np.array_equal(shuffled(np.arange(300, 420), 1000, "7 2"), whole[300:420])
    huge = shuffled(np.arange(3), 10**12, "0 0")
    assert len(set(huge.tolist())) == 3
    assert 0 <= huge.min() <= huge.max() < 10**12


def test_shuffled_looks_random():
    n, keys = 64, 4000
    orders = np.stack([shuffled(np.arange(n), n, f"{seed} 0") for seed in range(keys)])
    for place in (0, 1, 31, 63):  # every window is about equally likely in every place
        counts = np.bincount(orders[:, place], minlength=n)
        chi_square = ((counts - keys / n) ** 2 / (keys / n)).sum()
        assert chi_square < 120  # 63 degrees of freedom: beyond this once in 100,000
    follows = np.mean(orders[:, 1:] == orders[:, :-1] + 1)
    assert abs(follows - 1 / n) < 0.002


def test_epochs_and_seeds_differ_and_repeat(numbered: TrainingWindows):
    assert len(numbered) == 64
    orders = [numbered.order(epoch).tolist() for epoch in range(4)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert TrainingWindows(numbered.dataset, 8, seed=4).order(0).tolist() != orders[0]
    assert TrainingWindows(numbered.dataset, 8, seed=3).order(2).tolist() == orders[2]
    assert [numbered.window_id(index) for index in range(256)] == list(itertools.chain(*orders))


def test_ranks_and_workers_share_each_epoch_without_repeats_or_gaps(numbered: TrainingWindows):
    """Two ranks of two workers see what one process sees, in the same global order."""

    def global_order(world_size: int, num_workers: int) -> list[int]:
        ranks = [numbered.iterate(0, 8, rank, world_size, num_workers) for rank in range(world_size)]
        steps = [torch.cat([next(rank).window_ids for rank in ranks]) for _ in range(24)]
        for rank in ranks:
            rank.close()  # pyright: ignore[reportAttributeAccessIssue]
        return torch.cat(steps).tolist()

    alone = global_order(1, 0)
    assert alone == [numbered.window_id(index) for index in range(192)]
    for epoch in range(3):
        assert sorted(alone[64 * epoch : 64 * epoch + 64]) == list(range(64))
    assert global_order(2, 2) == alone
    assert global_order(4, 1) == alone
    assert global_order(1, 3) == alone


def test_resuming_at_any_window_continues_the_order(numbered: TrainingWindows):
    straight = [batch for batch, _ in zip(numbered.iterate(0, 6), range(40), strict=False)]
    for done in (1, 10, 11, 32):  # within the first, second and third epoch
        resumed = next(numbered.iterate(done * 6, 6, num_workers=2))
        assert torch.equal(resumed.tokens, straight[done].tokens)
        assert torch.equal(resumed.window_ids, straight[done].window_ids)
    halves = [next(numbered.iterate(60, 6, rank, 2)).window_ids for rank in range(2)]  # another world size
    assert torch.equal(torch.cat(halves), straight[10].window_ids)


def test_readers_end_with_their_iterator(numbered: TrainingWindows):
    batches = numbered.iterate(0, 4, num_workers=2)
    next(batches)
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("windows")]


# --- what a window holds ----------------------------------------------------------------------------------------------


def test_windows_read_their_tokens_and_never_cross_a_shard(numbered: TrainingWindows):
    batch = numbered.batch(0, 64)
    first = torch.where(batch.window_ids < 40, batch.window_ids * 8, batch.window_ids * 8 + 1)
    assert torch.equal(batch.tokens, first[:, None] + torch.arange(8))
    assert torch.equal(batch.targets, batch.tokens + 1)
    assert batch.document_ids is None
    assert batch.attention_mask is None
    assert batch.tokens.dtype == batch.targets.dtype == batch.window_ids.dtype == torch.int64
    # 321 + 195 tokens: all but each shard's first, and the two that fill no window, are targets once
    assert Counter(batch.targets.flatten().tolist()) == dict.fromkeys([*range(1, 321), *range(322, 514)], 1)


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 33, 64])
def test_documents_are_told_apart(window: int, tmp_path: Path):
    lengths = [3, 7, 1, 8, 33, 1, 1, 20]
    texts = [chr(97 + number) * length for number, length in enumerate(lengths)]
    dataset = prepared(tmp_path, texts, append_eos=False)
    windows = TrainingWindows(dataset, window, seed=0, packing="documents")
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    batch = windows.batch(0, len(windows))
    assert batch.document_ids is not None
    for tokens, targets, ids, number in zip(
        batch.tokens, batch.targets, batch.document_ids, batch.window_ids.tolist(), strict=True
    ):
        here = document_of[number * window : number * window + window + 1]
        assert torch.equal(tokens, torch.from_numpy(here[:-1] + 97))
        assert ids[0] == 0
        assert np.array_equal(ids.numpy(), here[:-1] - here[0])
        same = here[1:] == here[:-1]
        assert np.array_equal(targets.numpy(), np.where(same, here[1:] + 97, IGNORE))


def test_end_tokens_are_predicted_but_nothing_is_predicted_from_them(tmp_path: Path):
    dataset = prepared(tmp_path, ["ab", "cd", "ef"])
    batch = TrainingWindows(dataset, 8, seed=0, packing="documents").batch(0, 1)
    a, b, c, d, e, f = (ord(letter) for letter in "abcdef")
    assert batch.tokens.tolist() == [[a, b, 0, c, d, 0, e, f]]
    assert batch.targets.tolist() == [[b, 0, IGNORE, d, 0, IGNORE, f, 0]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    plain = TrainingWindows(dataset, 8, seed=0).batch(0, 1)
    assert plain.targets.tolist() == [[b, 0, c, d, 0, e, f, 0]]


def test_raw_shards_are_packed_by_their_end_token(tmp_path: Path):
    dataset = raw(tmp_path, [5, 6, 9, 7, 9, 9, 8, 4, 3], vocab_size=10, eos_id=9)
    batch = TrainingWindows(dataset, 4, seed=0, packing="documents").batch(0, 2)
    rows = {number: row for row, number in enumerate(batch.window_ids.tolist())}
    assert batch.targets[rows[0]].tolist() == [6, 9, IGNORE, 9]
    assert batch.targets[rows[1]].tolist() == [IGNORE, IGNORE, 4, 3]
    assert batch.document_ids is not None
    assert batch.document_ids[rows[0]].tolist() == [0, 0, 0, 1]
    assert batch.document_ids[rows[1]].tolist() == [0, 1, 2, 2]


def test_windows_can_be_pickled(numbered: TrainingWindows):
    copy = pickle.loads(pickle.dumps(numbered))
    assert torch.equal(copy.batch(5, 3).tokens, numbered.batch(5, 3).tokens)


def test_a_corpus_of_exactly_one_window_and_of_one_token_less(tmp_path: Path):
    dataset = raw(tmp_path, np.arange(9), np.arange(9))
    assert len(TrainingWindows(dataset, 8, seed=0)) == 2
    message = r"has 18 tokens, 9 in its longest file, but a window of 9 needs 10 from one file; shorten the window"
    with pytest.raises(ValueError, match=message):
        TrainingWindows(dataset, 9, seed=0)


def test_bad_requests_name_value_limit_and_remedy(numbered: TrainingWindows):
    dataset = numbered.dataset
    with pytest.raises(ValueError, match="window is 0; it must be a whole number of at least 1"):
        TrainingWindows(dataset, 0, seed=0)
    with pytest.raises(ValueError, match=r"packing is 'document'.*did you mean 'documents'"):
        TrainingWindows(dataset, 8, seed=0, packing="document")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="give the raw shards' eos_id"):
        TrainingWindows(dataset, 8, seed=0, packing="documents")
    with pytest.raises(ValueError, match="batch size 9 is not divisible by 2 ranks"):
        numbered.iterate(0, 9, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2; it must be from 0 to 1"):
        numbered.iterate(0, 8, 2, 2)
    with pytest.raises(ValueError, match="start is -1; it must be a whole number of at least 0"):
        numbered.iterate(-1, 8)
    with pytest.raises(ValueError, match="index -1 is below 0"):
        numbered.batch(-1, 2)
    with pytest.raises(ValueError, match="count is 0"):
        numbered.batch(0, 0)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 9, 64, 65, 200])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_token_but_a_documents_first_is_scored_once(window: int, batch_size: int, tmp_path: Path):
    """Tokens are numbers, so that a target says where it is from."""
    lengths, place = [1, 2, 8, 9, 10, 1, 65, 129, 3], 0
    stream, documents = [], []
    for length in lengths:  # ids go up within a document; the end token is 0
        documents.append([*range(place + 1, place + length), 0])
        stream += documents[-1]
        place += length
    dataset = raw(tmp_path, stream, [*range(500, 520)], vocab_size=600, eos_id=0)
    documents.append([*range(500, 520)])
    scored: list[tuple[int, int]] = []
    for batch in evaluation_batches(dataset, window, batch_size):
        assert batch.tokens.shape[0] <= batch_size
        assert batch.tokens.shape[1] <= window
        real = batch.targets != IGNORE
        mask = torch.ones_like(real) if batch.attention_mask is None else batch.attention_mask
        assert torch.equal(mask, real)
        assert not (mask[:, 1:] > mask[:, :-1]).any()  # padding is on the right
        for tokens, targets, row in zip(batch.tokens, batch.targets, real, strict=True):
            inputs, outputs = tokens[row].tolist(), targets[row].tolist()
            assert inputs[1:] == outputs[:-1]
            assert 0 not in inputs  # nothing lies beyond an end token: no other document is seen
            scored += zip(inputs, outputs, strict=True)
    expected = [pair for document in documents for pair in itertools.pairwise(document)]
    assert scored == expected  # in order, hence exactly once


def test_evaluation_counts_on_a_prepared_folder_of_several_shards(tmp_path: Path):
    texts = ["x" * length for length in (1, 30, 7, 64, 200, 2, 5)]
    dataset = prepared(tmp_path, texts, shard_tokens=50)
    assert len(dataset.shards) > 2
    for window in (4, 16, 63, 64, 65):
        batches = list(evaluation_batches(dataset, window, 4))
        assert sum(int((batch.targets != IGNORE).sum()) for batch in batches) == sum(map(len, texts))
        ids = torch.cat([batch.window_ids for batch in batches])
        assert torch.equal(ids, torch.arange(len(ids)))


def test_evaluation_finds_documents_across_the_stride_it_scans_in(tmp_path: Path):
    stream = np.full((1 << 20) + 10, 1)
    stream[[(1 << 20) - 1, 1 << 20]] = 0  # ends on both sides of the stride
    dataset = raw(tmp_path, stream, vocab_size=2, eos_id=0)
    assert list(dataset.documents()) == [
        (0, 0, 1 << 20),
        (0, 1 << 20, (1 << 20) + 1),
        (0, (1 << 20) + 1, (1 << 20) + 10),
    ]


def test_short_documents_make_short_rows(tmp_path: Path):
    dataset = prepared(tmp_path, ["ab", "c" * 70, "d" * 500])
    shapes = [tuple(batch.tokens.shape) for batch in evaluation_batches(dataset, 512, 1)]
    assert shapes == [(1, 64), (1, 128), (1, 512)]


def test_evaluation_refuses_what_cannot_be_scored(tmp_path: Path):
    dataset = raw(tmp_path, [1])
    with pytest.raises(ValueError, match="nothing to score"):
        list(evaluation_batches(dataset, 8, 1))
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluation_batches(dataset, 8, 0)
