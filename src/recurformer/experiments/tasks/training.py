"""Training on batches from a function, and scoring: shared by tasks, hybrids and stability."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recurformer.experiments.tasks.generators import Task
from recurformer.loss import IGNORE
from recurformer.model import LanguageModel
from recurformer.training.config import OptimizerConfig, ScheduleConfig
from recurformer.training.optimizer import clip_gradients, make_optimizer, set_rates


@dataclass
class Fit:
    """Records of a training, an entry for each step."""

    losses: list[float] = field(default_factory=list)  # nats per target
    gradient_norms: list[float] = field(default_factory=list)  # before clipping
    seconds: float = 0.0
    diverged_at: int | None = None  # the step whose loss or gradient was not finite; it changed no weight


def fit(
    model: nn.Module,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
    limit_s: float | None = None,
) -> Fit:
    """Train a model in place.

    Args:
        model: a `LanguageModel`, or anything that is called like one.
        batch: tokens and targets (B, N) of a step.
        schedule: number of steps, and the course of the learning rate.
        optimizer: settings of AdamW. None: the defaults of a training run.
        report: called after each step with its number, from 1, and its loss.
        limit_s: seconds of training at most. Where the steps would take longer, some of them are left out, and the
            schedule ends with the time. `batch` and `report` get the numbers of the steps that are made.
    """
    optimizer = OptimizerConfig() if optimizer is None else optimizer
    adam, result, began = make_optimizer(model, optimizer), Fit(), time.perf_counter()
    model.train()
    step = 0
    while step < schedule.steps:
        tokens, targets = batch(step)
        loss = model(tokens, targets, return_logits=False, validate=not result.losses).loss
        assert loss is not None
        adam.zero_grad()
        loss.backward()
        norm = clip_gradients(model.parameters(), optimizer.grad_clip)
        if not math.isfinite(norm.item()) or not math.isfinite(loss.item()):
            result.diverged_at = step
            break
        set_rates(adam, step, optimizer, schedule)
        adam.step()
        result.losses.append(loss.item())
        result.gradient_norms.append(norm.item())
        report(step + 1, result.losses[-1])
        step += 1
        if limit_s is not None:
            step = max(step, int(schedule.steps * (time.perf_counter() - began) / limit_s))
    result.seconds = time.perf_counter() - began
    model.eval()
    return result


@torch.no_grad()
def accuracy(
    model: LanguageModel, task: Task, length: int, *, count: int = 256, seed: int, batch_size: int = 64
) -> float:
    """Return the share of right answers in the second half of the positions. The most probable token is the answer.

    At twice the training length, the second half holds exactly the positions that training never reached.

    Args:
        model: answers at every position.
        task: draws the sequences and their answers.
        length: positions of a sequence.
        count: number of sequences, drawn with `seed`.
        batch_size: sequences at once. It does not change the result.
    """
    tokens, targets = task.sample(count, length, seed)
    device = model.embedding.weight.device
    right = answers = 0
    for some, wanted in zip(tokens.split(batch_size), targets.split(batch_size), strict=True):
        logits = model(some.to(device)).logits
        assert logits is not None
        found, wanted = logits.argmax(-1).cpu()[:, length // 2 :], wanted[:, length // 2 :]
        right += int((found == wanted).sum())
        answers += int((wanted != IGNORE).sum())
    return right / max(1, answers)
