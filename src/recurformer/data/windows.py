"""Tokens on disk to batches: which windows there are, in which order training sees them, and how evaluation scores
each token once."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from recurformer.data.dataset import TokenDataset
from recurformer.loss import IGNORE
from recurformer.settings import suggest

Packing = Literal["concat", "documents"]


@dataclass(frozen=True)
class Batch:
    """B windows of N positions, as `LanguageModel.forward` takes them."""

    tokens: torch.Tensor
    """(B, N) int64."""
    targets: torch.Tensor
    """(B, N) int64: the token to predict at each position, already shifted; -100 where there is none."""
    document_ids: torch.Tensor | None
    """(B, N) int64, non-decreasing along a row: positions of different documents must not see each other. None: a row
    is one stretch."""
    window_ids: torch.Tensor
    """(B,) int64: which windows these are."""
    attention_mask: torch.Tensor | None = None
    """(B, N) bool, False at padding; None: no padding."""


class TrainingWindows:
    """Fixed windows of a dataset in an order that is a function of (seed, epoch) and nothing else.

    Window w of a shard has the tokens w N ... w N + N - 1 as inputs and their successors as targets, so it reads N + 1
    tokens, and every token of a shard but its first is a target exactly once an epoch, up to the rest that fills no
    window. Windows never cross a shard.

    There is no state: training counts the windows it has consumed, and this number is the whole position in the data.
    Global index i means window `window_id(i)`; indices go on from epoch to epoch.

    Args:
        dataset: the tokens.
        window: N, inputs of a window.
        seed: any integer.
        packing: "concat": a window is one stretch of text, documents run into each other, as in the paper;
            "documents": `document_ids` tell them apart and no target lies across a border.

    Raises:
        ValueError: when no shard has N + 1 tokens, or "documents" is asked of a raw shard without an end token.
    """

    def __init__(self, dataset: TokenDataset, window: int, seed: int, packing: Packing = "concat"):
        _at_least_one("window", window)
        if packing not in get_args(Packing):
            known = get_args(Packing)
            raise ValueError(f"packing is {packing!r}; choose one of {', '.join(known)}{suggest(packing, known)}")
        if packing == "documents" and dataset.n_documents is None and dataset.eos_id is None:
            raise ValueError("packing 'documents' needs to know where documents end; give the raw shards' eos_id")
        counts = [(shard.n_tokens - 1) // window for shard in dataset.shards]
        if not any(counts):
            longest = max(shard.n_tokens for shard in dataset.shards)
            raise ValueError(
                f"the corpus has {dataset.n_tokens} tokens, {longest} in its longest file, but a window of {window} "
                f"needs {window + 1} from one file; shorten the window or prepare more text"
            )
        self.dataset, self.window, self.seed, self.packing = dataset, window, seed, packing
        self._ends = np.cumsum(counts, dtype=np.int64)  # of each shard: the windows in it and before it

    def __len__(self) -> int:
        """Windows of an epoch."""
        return int(self._ends[-1])

    def order(self, epoch: int) -> np.ndarray:
        """The window ids of a whole epoch in the order of training, (len(self),) int64."""
        return shuffled(np.arange(len(self)), len(self), f"{self.seed} {epoch}")

    def window_id(self, index: int) -> int:
        """The window with the global index `index`."""
        return int(self._window_ids(index, 1)[0])

    def batch(self, start: int, count: int) -> Batch:
        """The windows with the global indices start ... start + count - 1."""
        _at_least_one("count", count)
        ids = self._window_ids(start, count)
        rows = np.empty((count, self.window + 1), dtype=np.int64)
        documents = np.zeros((count, self.window + 1), dtype=np.int64) if self.packing == "documents" else None
        for row, window in enumerate(ids):
            shard = int(np.searchsorted(self._ends, window, side="right"))
            before = int(self._ends[shard - 1]) if shard else 0
            begin = (int(window) - before) * self.window
            rows[row] = self.dataset.read(shard, begin, self.window + 1)
            if documents is not None:
                documents[row, self.dataset.document_starts(shard, begin, begin + self.window + 1) - begin] = 1
        tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
        if documents is not None:
            targets[documents[:, 1:] == 1] = IGNORE  # a document's first token follows from nothing
            documents = documents[:, :-1].cumsum(axis=1)
        return Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            document_ids=None if documents is None else torch.from_numpy(documents),
            window_ids=torch.from_numpy(ids),
        )

    def iterate(
        self, start: int, batch_size: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[Batch]:
        """Batches without end, from the global index `start` on.

        Args:
            start: windows consumed so far, by all ranks together.
            batch_size: windows of a global batch, over all ranks; each yields its share of batch_size / world_size, and
                together they consume the same windows whatever their number.
            rank, world_size: which share is this process's.
            num_workers: threads that read ahead. They change when a batch is read, never which one comes next.

        Raises:
            ValueError: when the ranks cannot share a batch evenly.
        """
        _at_least_one("batch_size", batch_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}; it must be from 0 to {world_size - 1}")
        if batch_size % world_size:
            raise ValueError(
                f"batch size {batch_size} is not divisible by {world_size} ranks; it counts the windows of all ranks"
            )
        if start < 0 or num_workers < 0:
            raise ValueError(f"start {start} and num_workers {num_workers} must be at least 0")
        share = batch_size // world_size
        return self._read_ahead(itertools.count(start + rank * share, batch_size), share, num_workers)

    def _read_ahead(self, begins: Iterator[int], share: int, num_workers: int) -> Iterator[Batch]:
        if num_workers == 0:
            yield from (self.batch(begin, share) for begin in begins)
            return
        pool = ThreadPoolExecutor(num_workers, thread_name_prefix="windows")
        pending: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(pending) < 2 * num_workers:
                    pending.append(pool.submit(self.batch, next(begins), share))
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _window_ids(self, start: int, count: int) -> np.ndarray:
        if start < 0:
            raise ValueError(f"index {start} is below 0; windows are counted from the start of training")
        ids, n = [], len(self)
        while count:
            epoch, first = divmod(start, n)
            stretch = min(count, n - first)
            ids.append(shuffled(np.arange(first, first + stretch), n, f"{self.seed} {epoch}"))
            start, count = start + stretch, count - stretch
        return np.concatenate(ids)


def evaluation_batches(dataset: TokenDataset, window: int, batch_size: int) -> Iterator[Batch]:
    """Windows that score each token but a document's first exactly once, whatever `window` and `batch_size` are.

    Document by document: a window holds tokens of one document, and the next one begins with the last token whose
    successor is still to be scored, so that consecutive windows overlap by one token. The score of a text then does not
    depend on its neighbours in the file; over the concatenation it would. Rows are as long as the batch's longest,
    rounded up to a multiple of 64 but no longer than `window`; what is short of that is padded on the right.

    Raises:
        ValueError: when no document has two tokens.
    """
    _at_least_one("window", window)
    _at_least_one("batch_size", batch_size)
    return _evaluation_batches(dataset, window, batch_size)


def _evaluation_batches(dataset: TokenDataset, window: int, batch_size: int) -> Iterator[Batch]:
    stretches = (
        (shard, begin, min(window + 1, stop - begin))
        for shard, start, stop in dataset.documents()
        for begin in range(start, stop - 1, window)
    )
    done = 0
    while group := list(itertools.islice(stretches, batch_size)):
        longest = max(count for _, _, count in group) - 1
        n = min(window, -(-longest // 64) * 64)
        tokens = np.full((len(group), n), dataset.eos_id or 0, dtype=np.int64)
        targets = np.full((len(group), n), IGNORE, dtype=np.int64)
        mask = np.zeros((len(group), n), dtype=np.bool_)
        for row, (shard, begin, count) in enumerate(group):
            text = dataset.read(shard, begin, count)
            tokens[row, : count - 1], targets[row, : count - 1], mask[row, : count - 1] = text[:-1], text[1:], True
        yield Batch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            document_ids=None,
            window_ids=torch.arange(done, done + len(group)),
            attention_mask=None if mask.all() else torch.from_numpy(mask),
        )
        done += len(group)
    if not done:
        raise ValueError("nothing to score: no document has two tokens; prepare longer documents")


def shuffled(indices: np.ndarray, n: int, key: str) -> np.ndarray:
    """Where a permutation of 0 ... n - 1, chosen by `key`, sends each of `indices`, (k,) int64.

    A Feistel network over the next even number of bits; what falls outside 0 ... n - 1 goes through again until it
    falls inside. So any place of an epoch is found at once, without the epoch in memory, and the order rests on integer
    arithmetic alone, not on a library's generator that a new version may change.
    """
    half = max(3, ((n - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    rounds = np.frombuffer(hashlib.sha512(key.encode()).digest(), dtype="<u8")
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=np.bool_)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & low
        for secret in rounds:
            left, right = right, left ^ (_mixed(right ^ secret) & low)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= n
    return values.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of `bits`."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
