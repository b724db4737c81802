"""The source of logits in generation: a decode engine, or calls of the model itself."""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor, nn

from recurformer.generation.engine import DecodeEngine, engine_obstacle
from recurformer.generation.prompt import read_prompt
from recurformer.model import LanguageModel
from recurformer.modules import Norm

ROOM = 1024  # new tokens that an engine has room for before it grows
ROOM_MULTIPLE = 256  # slots of an engine are a multiple of this, so that calls of about one length use one engine
KEPT_BYTES = 2**28  # keys and values up to which a model keeps the engine of its last call on a GPU

_lock = threading.Lock()


class Decoder(Protocol):
    """Reads prompts, then one token of every row at a time. `DecodeEngine` is one."""

    def prefill(self, tokens: Tensor, valid: Tensor | None, *, samples: int, chunk: int | None) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...


class ModelDecoder:
    """Calls of the model itself, however it is wrapped."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def prefill(self, tokens: Tensor, valid: Tensor | None, *, samples: int, chunk: int | None) -> Tensor:
        """Return logits (B * samples, V) after each prompt."""
        model, B, device = self.model, len(tokens), tokens.device
        self.cache = model.new_cache(B)
        logits = model.logits(read_prompt(model, self.cache, tokens, valid, chunk))
        if samples > 1:
            self.cache = self.cache.select(torch.arange(B, device=device).repeat_interleave(samples))
        return logits.repeat_interleave(samples, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Return logits (B * samples, V) after one more token of every row."""
        options = {"cache": self.cache, "return_logits": False, "return_hidden": True, "validate": False}
        return self.model.logits(self.model(tokens[:, None], **options).hidden[:, 0])  # a call: hooks fire


def make_decoder(
    model: LanguageModel, step: str, rows: int, prompt: int, max_new_tokens: int, *, padded: bool
) -> Decoder:
    """Return the decoder of one call: the engine that the model kept if it serves, a new engine, or the model itself.

    Args:
        model: its kept engine is taken out, so that a call inside this one, or in another thread, makes its own.
        step: as in `GenerationSettings`.
        rows: B * S.
        prompt: N, slots of the prompts.
        max_new_tokens: steps at most.
        padded: some slots of the prompts are pads.
    """
    if step == "model" or (step == "auto" and engine_obstacle(model) is not None):
        return ModelDecoder(model)
    with _lock:
        kept, model.kept_engine = model.kept_engine, None
    slots = -(-(prompt + min(max_new_tokens, ROOM)) // ROOM_MULTIPLE) * ROOM_MULTIPLE
    if (
        isinstance(kept, DecodeEngine)
        and engine_obstacle(model) is None
        and kept.serves(model, rows, step)
        and slots <= kept.capacity
        and padded == (kept.state.valid is not None)
    ):
        kept.reset()
        kept.refresh()
        return kept
    return DecodeEngine(model, rows, slots, step=step, padded=padded)


def keep_engine(model: LanguageModel, decoder: Decoder) -> None:
    """Let a model keep a small engine on a GPU: its graphs take longer to record than many steps take."""
    if not isinstance(decoder, DecodeEngine) or not decoder.on_gpu:
        return
    has_adapters = any(type(m) not in (nn.Linear, Norm) for layer in model.layers for m in layer.children())
    copies_weights = decoder.dtype != model.embedding.weight.dtype
    if has_adapters or copies_weights or decoder.nbytes > KEPT_BYTES:
        decoder.settle()
    else:
        model.kept_engine = decoder
