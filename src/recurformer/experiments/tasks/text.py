"""The text inside the package as bytes: windows for training, and held-out windows."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import torch
from torch import Generator, Tensor

from recurformer.model import LanguageModel

VOCABULARY = 256


@cache
def quickstart_bytes(split: str) -> Tensor:
    """Return one long row of bytes (n,) int64, with a zero byte between documents.

    Args:
        split: "train" or "validation".
    """
    lines = (resources.files("recurformer") / "quickstart" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    joined = "\0".join(json.loads(line)["text"] for line in lines)
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def random_windows(text: Tensor, count: int, length: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return tokens and next tokens, (count, length) each, at random places of a text."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    windows = text[starts + torch.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def held_out_loss(model: LanguageModel, length: int, *, count: int = 256, batch_size: int = 64, seed: int = 0) -> float:
    """Return the loss in nats a byte on `count` windows of the held-out text, which are the same for every model."""
    tokens, targets = random_windows(quickstart_bytes("validation"), count, length, torch.Generator().manual_seed(seed))
    total, device = 0.0, model.embedding.weight.device
    for some, wanted in zip(tokens.split(batch_size), targets.split(batch_size), strict=True):
        loss = model(some.to(device), wanted.to(device), return_logits=False).loss
        assert loss is not None
        total += loss.item() * len(some)
    return total / count
