"""The gradient of one optimizer step: micro-batches, precision, and the copy of a batch to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.loss import IGNORE
from recurformer.model import LanguageModel
from recurformer.training.config import TrainConfig
from recurformer.training.distributed import OneProcess
from recurformer.training.optimizer import clip_gradients

if TYPE_CHECKING:
    from recurformer.data import Batch


def gradient_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    device: torch.device,
    processes: OneProcess,
) -> tuple[float, float, int]:
    """Leave the clipped gradient of the step's mean loss in `.grad`.

    The mean is over all targets of the step. Micro-batches and processes may hold different numbers of targets.

    Returns:
        This process's part of the step's loss (nats per target; the parts sum to the loss), the norm of the step's
        gradient before clipping, and the step's number of targets.
    """
    targets = processes.sum(int((batch.targets != IGNORE).sum()))
    optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []

    def backward(part: dict[str, Tensor], after: tuple[int, Tensor] | None = None) -> None:
        # The model's loss is a mean over the part's own targets; the step's loss weighs the parts by their targets.
        share = int((part["targets"] != IGNORE).sum()) / max(1, targets)
        with autocast(config, device):
            loss = model(**on_device(part, device), return_logits=False, after=after).loss
        assert loss is not None
        loss = loss * share
        loss.backward()
        losses.append(loss.detach())

    size = config.micro_batch_size or len(batch.tokens)
    for part in micro_batches(batch, config.recurrent_micro_batch_size or size):
        parts = micro_batches(part, size)
        if config.recurrent_micro_batch_size is None:
            for few in parts:
                backward(few)
            continue
        # The recurrent layers at the bottom take the whole part at once, the layers above them `size` sequences.
        depth = config.model.recurrent_depth
        inputs: dict[str, Any] = on_device({name: part[name] for name in part if name != "targets"}, device)
        with autocast(config, device):
            x = model.residual_stream(**inputs, depth=depth)
        entries = [entry.requires_grad_(x.requires_grad) for entry in x.detach().split(size)]
        for few, entry in zip(parts, entries, strict=True):
            backward(few, (depth, entry))
        if x.requires_grad:
            x.backward(torch.cat([entry.grad for entry in entries if entry.grad is not None]))
    processes.sum_gradients(model)
    norm = clip_gradients(model.parameters(), config.optimizer.grad_clip)
    # One transfer for both numbers: it is the only time in a step that the CPU waits for the GPU.
    loss, norm = torch.stack([torch.stack(losses).sum().double(), norm.double()]).tolist()
    return loss, norm, targets


def micro_batches(batch: Batch | dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the model's inputs, at most `size` sequences at a time."""
    if not isinstance(batch, dict):
        batch = {name: getattr(batch, name) for name in ("tokens", "targets", "attention_mask", "document_ids")}
    for start in range(0, len(batch["tokens"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items() if tensor is not None}


def on_device(part: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors to a device. A copy from pinned memory does not make the CPU wait for the GPU's queue."""
    pin = device.type == "cuda"
    return {
        name: (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True) for name, tensor in part.items()
    }


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """Return a context in which matrix products run in bf16, if the configuration asks for bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else nullcontext()
