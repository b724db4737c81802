"""Perplexity of a model on held-out tokens: every token counts once, whatever the batch size."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from recurformer.model import IGNORE, LanguageModel

if TYPE_CHECKING:
    from recurformer.data import TokenDataset


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float  # nats a token: the sum over all predicted tokens / their number
    tokens: int  # predicted tokens
    bytes: float  # of source text that these tokens stand for: the data's average where only a part was read
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits spent on each byte of the source text: comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        """Every number under its own name, ready for JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": round(self.bytes),
            "seconds": self.seconds,
        }


def evaluate(
    model: LanguageModel,
    dataset: TokenDataset,
    *,
    window: int,
    batch_size: int,
    max_batches: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Mean loss of a model over a dataset, cut into windows that do not see each other.

    Args:
        model: may be in training mode: it is evaluated in evaluation mode and given back as it came.
        dataset: tokens; every one but the very first is predicted once.
        window: N, the positions of one sequence. A longer window gives each token more context.
        batch_size: sequences at once; changes speed and memory, not the result.
        max_batches: stop after this many batches; None: read everything.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: for another vocabulary than the model's, or a size below 1.
    """
    from recurformer.data import evaluation_batches

    for name, value in {"window": window, "batch_size": batch_size, "max_batches": max_batches}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_vocabulary(model.config.vocab_size, dataset)
    device = model.embedding.weight.device
    nats, tokens, began = 0.0, 0, time.perf_counter()
    with evaluating(model), _counter(dataset.n_tokens, progress) as advance:
        for batch in islice(evaluation_batches(dataset, window, batch_size), max_batches):
            count = int((batch.targets != IGNORE).sum())
            if count == 0:
                continue
            inputs = {
                name: None if tensor is None else tensor.to(device)
                for name in ("tokens", "targets", "attention_mask", "document_ids")
                for tensor in [getattr(batch, name)]
            }
            loss = model(**inputs, return_logits=False).loss
            nats += float(loss) * count
            tokens += count
            advance(count)
    if tokens == 0:
        raise ValueError(f"the data hold {dataset.n_tokens} tokens; at least 2 are needed to predict one")
    return Evaluation(
        loss=nats / tokens,
        tokens=tokens,
        bytes=max(dataset.n_bytes * tokens / dataset.n_tokens, 1e-9),
        seconds=time.perf_counter() - began,
    )


def check_vocabulary(vocab_size: int, dataset: TokenDataset) -> None:
    """Raise ValueError when a dataset's ids come from another vocabulary than a model's."""
    if dataset.vocab_size != vocab_size:
        raise ValueError(
            f"the data's vocabulary has {dataset.vocab_size} ids, the model's {vocab_size}; "
            "prepare the text again with the tokenizer of the model's folder"
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _counter(total: int, progress: bool):
    """A function that counts tokens on a progress bar, or does nothing."""
    if not progress:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
