"""The gradient of one optimizer step: micro-batches, precision, and the copy of a batch to the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.checks import check_inputs
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

    size, depth = config.micro_batch_size or len(batch.tokens), config.model.recurrent_depth

    def backward(part: dict[str, Tensor], entry: Tensor | None = None) -> None:
        """Add the gradient of a part's loss. `entry` is the output of its first `depth` layers, where there is one."""
        # The model's loss is a mean over the part's own targets; the step's loss weighs the parts by their targets.
        share = int((part["targets"] != IGNORE).sum()) / max(1, targets)
        part = on_device(part, device)
        with autocast(config, device):
            if entry is None:
                loss = model(**part, return_logits=False).loss
            else:
                loss = loss_above(model, entry, depth, part)
        assert loss is not None
        loss = loss * share
        loss.backward()
        losses.append(loss.detach())

    for part in micro_batches(batch, config.recurrent_micro_batch_size or size):
        parts = micro_batches(part, size)
        if config.recurrent_micro_batch_size is None:
            for few in parts:
                backward(few)
            continue
        # The recurrent layers at the bottom take the whole part at once, the layers above them `size` sequences.
        with autocast(config, device):
            x = output_below(model, depth, on_device(part, device))
        entries = [entry.requires_grad_(x.requires_grad) for entry in x.detach().split(size)]
        for few, entry in zip(parts, entries, strict=True):
            backward(few, entry)
        if x.requires_grad:
            x.backward(torch.cat([entry.grad for entry in entries if entry.grad is not None]))
    processes.sum_gradients(model)
    norm = clip_gradients(model.parameters(), config.optimizer.grad_clip)
    # One transfer for both numbers: it is the only time in a step that the CPU waits for the GPU.
    loss, norm = torch.stack([torch.stack(losses).sum().double(), norm.double()]).tolist()
    return loss, norm, targets


def output_below(model: LanguageModel, depth: int, part: dict[str, Any]) -> Tensor:
    """Return the output (B, N, D) of the first `depth` layers for a part of a batch."""
    valid, documents = check_inputs(model.config, **part, device=part["tokens"].device), part.get("document_ids")
    return model.run_layers(model.embed(part["tokens"].long(), valid), 0, depth, valid=valid, documents=documents)


def loss_above(model: LanguageModel, x: Tensor, depth: int, part: dict[str, Any]) -> Tensor:
    """Return the mean loss of a part of a batch, given the output x (B, N, D) of its first `depth` layers."""
    valid, documents = check_inputs(model.config, **part, device=part["tokens"].device), part.get("document_ids")
    return model.loss(model.finish(model.run_layers(x, depth, valid=valid, documents=documents)), part["targets"])


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
