"""Perplexity of a model on held-out tokens. Every token counts once, for any batch size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import torch

from recurformer.data import TokenDataset, evaluation_batches, prepare
from recurformer.data.sidecar import SIDECAR
from recurformer.data.vocabulary import check_vocabulary
from recurformer.generation.modes import evaluating
from recurformer.loss import IGNORE
from recurformer.model import LanguageModel
from recurformer.reading import read_table

if TYPE_CHECKING:
    from recurformer.data import Batch, TokenDataset, Tokenizer


class Processes(Protocol):
    """The processes that share the batches of an evaluation."""

    rank: int
    size: int

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of every process, in the order of ranks."""
        ...


class InterruptedEvaluationError(Exception):
    """An evaluation was ended early, as its caller wished."""


@dataclass(frozen=True)
class Evaluation:
    """Loss of a model on a text, and what follows from it."""

    loss: float  # nats a token: the mean over all predicted tokens
    tokens: int  # predicted tokens
    bytes: float  # bytes of source text behind these tokens, by the average of the data; nan where it is unknown
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the source text, comparable between tokenizers; nan where unknown."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, float | None]:
        """Return every number under its own name, ready for JSON; None where it is unknown or not finite."""
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "seconds")
        values = {name: getattr(self, name) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def evaluate(
    model: LanguageModel,
    dataset: TokenDataset,
    *,
    window: int,
    batch_size: int,
    max_batches: int | None = None,
    progress: bool = False,
    processes: Processes | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> Evaluation:
    """Return the mean loss of a model over a dataset. Each window holds a part of one document and is read by itself.

    Args:
        model: runs in evaluation mode, and has its own mode again afterwards.
        dataset: tokens. Each one but a document's first is predicted once, from those before it in its window.
        window: N, positions of one sequence. A longer window gives each token more context.
        batch_size: sequences at once. It changes speed and memory, not the result.
        max_batches: stop after this many batches; None: read everything.
        progress: show a progress bar on stderr.
        processes: the processes that share the batches. Each of them gets the same result.
        interrupted: called before each batch; True ends the evaluation. All processes call it together.

    Raises:
        InterruptedEvaluationError: when `interrupted` has returned True.
        ValueError: for another vocabulary than the model's, or a size below 1.
    """

    for name, value in {"window": window, "batch_size": batch_size, "max_batches": max_batches}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_vocabulary(dataset, model.config.vocab_size)
    device = model.embedding.weight.device
    nats, tokens, began = 0.0, 0, time.perf_counter()
    predictable = dataset.n_tokens - (dataset.n_documents or 0)  # all but each document's first
    with evaluating(model), torch.no_grad(), counting(predictable, progress) as advance:
        batches = islice(evaluation_batches(dataset, window, batch_size), max_batches)
        for batch, counts in _shares(batches, processes):
            if interrupted is not None and interrupted():
                raise InterruptedEvaluationError
            count = int((batch.targets != IGNORE).sum()) if counts else 0
            inputs = {
                name: None if tensor is None else tensor.to(device)
                for name in ("tokens", "targets", "attention_mask", "document_ids")
                for tensor in [getattr(batch, name)]
            }
            loss = model(**inputs, return_logits=False).loss
            nats += float(loss) * count
            tokens += count
            advance(count)
    if processes is not None:
        nats, tokens = (sum(parts) for parts in zip(*processes.gather(nats, tokens), strict=True))
    return Evaluation(
        loss=nats / tokens,
        tokens=int(tokens),
        bytes=math.nan if dataset.n_bytes is None else dataset.n_bytes * tokens / predictable,
        seconds=time.perf_counter() - began,
    )


def _shares(batches: Iterator[Batch], processes: Processes | None) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches of this process, and whether each one counts.

    All processes get equally many, because processes with sharded weights must call the model together. The last
    round may therefore give two processes the same batch, which counts once.
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    while group := list(islice(batches, size)):
        yield group[min(rank, len(group) - 1)], rank < len(group)


@contextmanager
def open_data(
    path: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    folder: str | Path | None = None,
    text_field: str = "text",
) -> Iterator[TokenDataset]:
    """Open the tokens that a path means, for as long as the block runs.

    Args:
        path: a prepared folder; a raw `.npy` shard or a folder of them; or a file that `prepare` reads, whose text is
            tokenized into a temporary folder.
        tokenizer: the tokenizer of the model, for text. None: the model has none, and text is refused.
        vocab_size: vocabulary size of the model.
        folder: the model's folder, for messages.
        text_field: field of a JSON line, or column of a table, that holds the text.

    Raises:
        ValueError: for any other path, and for data of another tokenizer than the model's.
    """

    path = Path(path)
    if not path.exists():
        raise ValueError(f"the data {str(path)!r} do not exist; give a prepared folder or a text file")
    if path.is_dir() or path.suffix == ".npy":
        dataset = TokenDataset(path) if (path / SIDECAR).is_file() else TokenDataset(path, vocab_size=vocab_size)
        check_vocabulary(dataset, vocab_size, tokenizer, folder)
        yield dataset
        return
    if tokenizer is None:
        raise ValueError(f"{path} is text, but the model's folder has no tokenizer; give a prepared folder")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in the model's folder has {tokenizer.vocab_size} ids, the model's {vocab_size}: "
            "they do not belong together; give a prepared folder"
        )
    with TemporaryDirectory(prefix="recurformer-") as temporary:
        made = prepare(
            [path],
            Path(temporary) / "data",
            tokenizer,
            append_eos=tokenizer.eos_id is not None,
            text_field=text_field,
            progress=False,
        )
        yield TokenDataset(made.folder)


def run_of(folder: str | Path) -> Path | None:
    """Return the training run that a folder belongs to: the run itself, or one of its checkpoints; None without one."""
    folder = Path(folder).resolve()
    for candidate in (folder, *list(folder.parents)[:3]):
        if (candidate / "config.json").is_file() and (candidate / "checkpoints").is_dir():
            return candidate
    return None


def run_setting(folder: str | Path, section: str, name: str) -> Any:
    """Return a setting of the training run that a folder belongs to; None when it belongs to no run."""
    run = run_of(folder)
    table = {} if run is None else read_table(run / "config.json").get(section, {})
    return table.get(name) if isinstance(table, dict) else None


def locate(path: str, run: Path) -> str:
    """Return a path in a run's configuration as it leads to the data from here.

    A relative path holds from the folder in which the run was started. That folder is this one, or most often one above
    the run.

    Raises:
        ValueError: when the path leads nowhere from any of these folders.
    """
    if Path(path).is_absolute() or Path(path).exists():
        return path
    for folder in run.resolve().parents:
        if (folder / path).exists():
            return str(folder / path)
    raise ValueError(
        f"the run {run} names the data {path!r}, which are neither in {Path.cwd()} nor in a folder above the run; give "
        "their path with --data or --set data.train=, data.validation="
    )


@contextmanager
def counting(total: int, progress: bool, unit: str = "tokens") -> Iterator[Callable[[int], Any]]:
    """Yield a function that advances a progress bar on stderr, or does nothing."""
    if not progress:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
