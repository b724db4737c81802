"""Tokens on disk to batches: the windows of training and their order, and the windows of evaluation."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from recurformer.data.dataset import TokenDataset
from recurformer.loss import IGNORE
from recurformer.settings import Count, Natural, check

Packing = Literal["concat", "documents"]


@dataclass(frozen=True)
class Batch:
    """B windows of N positions, with the names that `LanguageModel.forward` gives them."""

    tokens: torch.Tensor
    """(B, N) int64."""
    targets: torch.Tensor
    """(B, N) int64: the token to predict at each position, already shifted; -100: nothing is predicted there."""
    document_ids: torch.Tensor | None
    """(B, N) int64, non-decreasing along a row: the model keeps documents apart. None: it does not."""
    window_ids: torch.Tensor
    """(B,) int64: numbers of the windows."""
    attention_mask: torch.Tensor | None = None
    """(B, N) bool, False at padding; None: no padding."""


class TrainingWindows:
    """Fixed windows of a dataset, in an order that depends on the seed and the epoch alone.

    Window w of a shard has the tokens w N ... w N + N - 1 as inputs and the token after each of them as its target. A
    window therefore reads N + 1 tokens. Each epoch, every token of a shard is a target once, except the first token
    and a rest at the end that fills no window. No window crosses a shard.

    There is no state. The number of windows that training has consumed is the whole position in the data. Global index
    i means window `window_id(i)`, and indices go on from epoch to epoch.

    Args:
        dataset: the tokens.
        window: N, inputs of a window.
        seed: any integer.
        packing: "concat": a window is one stretch of text in which documents see each other, as in the paper.
            "documents": `document_ids` tell documents apart, and no target lies across a border.

    Raises:
        ValueError: no shard has N + 1 tokens, or "documents" meets raw shards without an end token.
    """

    def __init__(self, dataset: TokenDataset, window: int, seed: int, packing: Packing = "concat"):
        check("window", window, Count)
        check("packing", packing, Packing)
        if packing == "documents" and dataset.n_documents is None and dataset.eos_id is None:
            raise ValueError("packing 'documents' needs the end of each document; give the raw shards' eos_id")
        counts = [(shard.n_tokens - 1) // window for shard in dataset.shards]
        if not any(counts):
            longest = max(shard.n_tokens for shard in dataset.shards)
            raise ValueError(
                f"the corpus has {dataset.n_tokens} tokens, {longest} in its longest file, but a window of {window} "
                f"needs {window + 1} from one file; shorten the window or prepare more text"
            )
        self.dataset, self.window, self.seed, self.packing = dataset, window, seed, packing
        self._ends = np.cumsum(counts, dtype=np.int64)  # number of the window after each shard's last

    def __len__(self) -> int:
        """Number of windows in an epoch."""
        return int(self._ends[-1])

    def order(self, epoch: int) -> np.ndarray:
        """Return the windows of a whole epoch in the order of training, (len(self),) int64."""
        return shuffled(np.arange(len(self)), len(self), f"{self.seed} {epoch}")

    def window_id(self, index: int) -> int:
        """Return the number of the window with the global index `index`."""
        return int(self._window_ids(index, 1)[0])

    def batch(self, start: int, count: int) -> Batch:
        """Return the windows with the global indices start ... start + count - 1."""
        check("count", count, Count)
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
            targets[documents[:, 1:] == 1] = IGNORE  # nothing precedes the first token of a document
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
        """Yield batches without end, from the global index `start` on.

        Args:
            start: windows that all ranks together have consumed.
            batch_size: windows of a global batch, over all ranks. Each rank yields its share of
                batch_size / world_size. Together they consume the same windows, whatever the number of ranks.
            rank: number of this process.
            world_size: number of processes.
            num_workers: threads that read ahead. They change when a batch is read, never which one comes next.

        Raises:
            ValueError: the ranks cannot share a batch evenly.
        """
        for name, value in {"batch_size": batch_size, "world_size": world_size}.items():
            check(name, value, Count)
        for name, value in {"start": start, "rank": rank, "num_workers": num_workers}.items():
            check(name, value, Natural)
        if rank >= world_size:
            raise ValueError(f"rank {rank} of {world_size}; it must be from 0 to {world_size - 1}")
        if batch_size % world_size:
            raise ValueError(
                f"batch size {batch_size} is not divisible by {world_size} ranks; it counts the windows of all ranks"
            )
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
    """Yield windows that score each token but a document's first exactly once, for every `window` and `batch_size`.

    A window holds tokens of one document. The next one begins with the last target of the window before, so consecutive
    windows overlap by one token. The score of a text then does not depend on its neighbours in the file. Rows are as
    long as the longest of their batch, rounded up to a multiple of 64 but no longer than `window`. Shorter rows are
    padded on the right.

    Args:
        dataset: the tokens.
        window: N, the most positions of a row.
        batch_size: the most rows of a batch.

    Raises:
        ValueError: no document has two tokens.
    """
    check("window", window, Count)
    check("batch_size", batch_size, Count)
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
    """Return where a permutation of 0 ... n - 1, chosen by `key`, sends each of `indices`, (k,) int64.

    The permutation is a Feistel network over the next even number of bits. A result outside 0 ... n - 1 goes through
    the network again until it falls inside. Any place of an epoch is therefore found at once, without the epoch in
    memory. The order rests on integer arithmetic alone: a new version of a library cannot change it.

    Args:
        indices: (k,) integers from 0 to n - 1.
        n: size of the permutation.
        key: any text.
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
    """Return the finalizer of splitmix64: every bit of the result depends on every bit of `bits`."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
