"""Measurements of a model under training: the loss on held-out tokens, and a sample of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from recurformer.evaluation import Evaluation, InterruptedEvaluationError, evaluate
from recurformer.generation.modes import evaluating
from recurformer.generation.rows import NonFiniteLogitsError
from recurformer.model import LanguageModel
from recurformer.training.config import TrainConfig
from recurformer.training.distributed import OneProcess
from recurformer.training.steps import autocast

if TYPE_CHECKING:
    from recurformer.data import TokenDataset
    from recurformer.data.tokenizer import Tokenizer


def evaluate_model(
    model: LanguageModel,
    dataset: TokenDataset,
    config: TrainConfig,
    device: torch.device,
    processes: OneProcess,
    interrupted: Callable[[], bool] | None = None,
) -> Evaluation:
    """Return the loss on held-out tokens, in the precision of the training.

    Raises:
        InterruptedEvaluationError: when `interrupted` says so.
    """
    size, batches = config.evaluation.batch_size, config.evaluation.batches
    if size is None:
        # A process has room for its share of a step. So it takes fewer sequences at once, and more batches: all
        # processes together read as many sequences as one process would.
        whole, share = config.micro_batch_size or config.batch_size, config.batch_size // processes.size
        parts = next(n for n in range(1, whole + 1) if whole % n == 0 and whole <= n * share)
        size, batches = whole // parts, batches and batches * parts
    with autocast(config, device):
        return evaluate(
            model,
            dataset,
            window=config.data.window,
            batch_size=size,
            max_batches=batches,
            processes=processes,
            interrupted=interrupted,
        )


def sample_text(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    config: TrainConfig,
    device: torch.device,
    processes: OneProcess,
    interrupted: Callable[[], bool] = lambda: False,
) -> str | None:
    """Return a continuation of the prompt, drawn by the first process; every random state stays as it was.

    Returns:
        None in the other processes, for data without a tokenizer, and when `interrupted` says so between two tokens.
    """
    if tokenizer is None or (whole := processes.whole(model)) is None:
        return None
    prompt = tokenizer.encode(config.sample.prompt) or [tokenizer.eos_id or 0]

    def look(_: torch.Tensor) -> None:
        if interrupted():
            raise InterruptedEvaluationError

    try:
        with evaluating(whole), torch.no_grad(), autocast(config, device):
            tokens = whole.generate(
                torch.tensor([prompt], device=device),
                config.sample.tokens,
                temperature=config.sample.temperature,
                seed=config.sample.seed,
                stream=look,
            )
    except InterruptedEvaluationError:
        return None
    except NonFiniteLogitsError as error:  # the run itself stops, with its own message, at the next loss
        return f"({error})"
    return tokenizer.decode_after(prompt, tokens[0, len(prompt) :].tolist())
