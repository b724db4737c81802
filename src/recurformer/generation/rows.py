"""The loop of generation: one pass over the prompts, then one token of every row a step.

Shapes: B prompts, S samples of each, N prompt slots, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from recurformer.checks import check_inputs, widened
from recurformer.generation.decoder import keep_engine, make_decoder
from recurformer.generation.modes import evaluating
from recurformer.generation.sampling import Sampling, tokens_seen
from recurformer.generation.stopping import RowEnds, end_ids, pad_id, stop_texts
from recurformer.model import LanguageModel
from recurformer.settings import Count, Natural, setting

LOOK_EVERY = {"cuda": 16}  # steps between two looks at which rows have ended, where a look waits for the device


class NonFiniteLogitsError(ValueError):
    """The model's logits are NaN or infinite, so that no token can be drawn."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Sampling):
    """Options of one call of generation."""

    max_new_tokens: Natural = setting(0, "New tokens of each row at most; 0 returns the prompts.")
    num_samples: Count = setting(1, "Independent continuations of each prompt, neighbours in the result.")
    eos_token_id: Any = setting(None, "Id or ids that end a row, the prompt aside; none: rows never end.")
    pad_token_id: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = setting(
        None, "Id that follows the end of a row; none: the first end id, else the tokenizer's end, else 0."
    )
    stop: Any = setting(None, "Text or texts that end a row, wherever in its new text. They need a tokenizer.")
    seed: Annotated[int, Ge(-(2**63)), Lt(2**64)] | None = setting(
        None, "Seed of this call's random generator; none: drawn from PyTorch's generator."
    )
    prefill_chunk: Count | None = setting(
        None, "Positions of the prompts that go through the layers at once; none: as many as memory allows."
    )
    step: Literal["auto", "model", "plain", "fused"] = setting(
        "auto", "Maker of a token: a decode engine (plain, fused), calls of the model, or auto, which picks."
    )


@dataclass(frozen=True)
class Generated:
    """Prompts with their new tokens, and where each row ended."""

    tokens: Tensor  # (B * S, N + new) int64
    lengths: list[int]  # new tokens of each row, with the one that ended it and without pads
    ended: list[bool]  # by an end id or a stop text, not by the limit


def generate(model: LanguageModel, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """Return the tokens of `generate_rows`, which has the options: (B * num_samples, N + new) int64."""
    return generate_rows(model, tokens, max_new_tokens, **options).tokens


def generate_rows(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    stream: Callable[[Tensor], Any] | None = None,
    **options: Any,
) -> Generated:
    """Continue prompts.

    Args:
        model: runs in evaluation mode and without gradients. Its mode is restored.
        tokens: (B, N) integer ids. Prompts of unequal length are padded (see `pad_prompts`), best on the left, so that
            the new tokens follow the old ones in the result. Pads at any other place give the same new tokens.
        max_new_tokens: steps at most; 0 returns the prompts.
        attention_mask: (B, N) bool or 0/1; 0 marks padding. None: no padding.
        tokenizer: makes text for `stop` with its `decode(ids)`: ours or any other.
        stream: function that is called with the ids (B * S,) of each step.
        options: fields of `GenerationSettings`, among them temperature, top_k, top_p, min_p, repetition_penalty,
            eos_token_id, stop, num_samples and seed.

    Returns:
        Generated: prompts and new tokens, new <= max_new_tokens. Generation stops when every row has ended. The id that
        ends a row is kept, as is the token that completes a stop text; `pad_token_id` follows.

    Raises:
        ValueError: for an option outside its limits, an empty prompt, input that the model refuses, or a model whose
            logits are not numbers.
    """
    settings = GenerationSettings(max_new_tokens=max_new_tokens, **options)
    ends, stops = end_ids(settings.eos_token_id, model.config.vocab_size), stop_texts(settings.stop)
    if stops and not hasattr(tokenizer, "decode"):
        raise ValueError(f"stop is {settings.stop!r}, but the tokenizer is {tokenizer!r}; give one that can decode")
    pad = pad_id(settings.pad_token_id, ends, tokenizer)
    tokens, attention_mask = widened(tokens), None if attention_mask is None else widened(attention_mask)
    valid = check_inputs(model.config, tokens, device=model.embedding.weight.device, attention_mask=attention_mask)
    if valid is not None and not (real := valid.any(1)).all():
        raise ValueError(f"prompt {int(real.int().argmin())} is all padding; a prompt needs at least one token")
    tokens, S = tokens.long(), settings.num_samples
    prompts = tokens.repeat_interleave(S, dim=0)
    if max_new_tokens == 0:
        return Generated(prompts, [0] * len(prompts), [False] * len(prompts))
    rows = RowEnds(real_prompts(prompts, valid, S) if stops else [()] * len(prompts), ends, stops, tokenizer)
    with torch.no_grad(), evaluating(model):
        new = _new_tokens(model, tokens, valid, settings, rows, pad, stream)
    lengths = [length or len(new) for length in rows.lengths]
    made = torch.stack(new[: max(lengths)], dim=1)
    if rows.may_end:
        slots = torch.arange(made.shape[1], device=made.device)
        made = made.masked_fill(slots >= torch.tensor(lengths, device=made.device)[:, None], pad)
    return Generated(torch.cat([prompts, made], dim=1), lengths, [length is not None for length in rows.lengths])


def _new_tokens(
    model: LanguageModel,
    tokens: Tensor,
    valid: Tensor | None,
    settings: GenerationSettings,
    rows: RowEnds,
    pad: int,
    stream: Callable[[Tensor], Any] | None,
) -> list[Tensor]:
    """Return the new tokens, (B * S,) for each step, until every row has ended; `rows` learns where each one ended."""
    (B, N), S, limit, device = tokens.shape, settings.num_samples, settings.max_new_tokens, tokens.device
    generator = torch.Generator(device)
    generator.manual_seed(int(torch.randint(2**63 - 1, ())) if settings.seed is None else settings.seed)
    look_every = LOOK_EVERY.get(device.type, 1) if stream is None else 1
    seen = None
    if settings.repetition_penalty != 1:
        seen = tokens_seen(tokens, valid, model.config.vocab_size).repeat_interleave(S, dim=0)
    decoder = make_decoder(model, settings.step, B * S, N, limit, padded=valid is not None)
    logits = decoder.prefill(tokens, valid, samples=S, chunk=settings.prefill_chunk)
    new: list[Tensor] = []
    unread: list[Tensor] = []  # the same tokens, -1 where the logits were no numbers: one read tells both
    while True:
        token, are_numbers = settings.draw(logits, seen, generator)
        new.append(token)
        unread.append(token.masked_fill(~are_numbers, -1))
        n = len(new)
        if n == limit or (n % look_every == 0 and (rows.may_end or look_every == 1)):
            ids = torch.stack(unread, dim=1).tolist()  # waits for the device
            check_numbers(ids, n)
            unread = []
            if rows.may_end:
                rows.look(ids)
        if stream is not None:
            stream(rows.padded(token, n, pad))
        if n == limit or rows.all_ended:
            break
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        logits = decoder.step(token)
    keep_engine(model, decoder)
    return new


def real_prompts(prompts: Tensor, valid: Tensor | None, samples: int) -> list[list[int]]:
    """Return the ids of prompts (B * S, N) without pads; valid (B, N) is False at pads."""
    if valid is None:
        return prompts.tolist()
    masks = valid.repeat_interleave(samples, dim=0).tolist()
    return [[id for id, real in zip(*row, strict=True) if real] for row in zip(prompts.tolist(), masks, strict=True)]


def check_numbers(ids: list[list[int]], n: int) -> None:
    """Raise ValueError where the logits of a new token were no numbers.

    Args:
        ids: the last new tokens of each row, -1 where the logits were not finite.
        n: new tokens so far.
    """
    for place, step in enumerate(zip(*ids, strict=True), n - len(ids[0]) + 1):
        if -1 in step:
            raise NonFiniteLogitsError(
                f"the logits of new token {place} are not finite numbers; the model's weights hold NaN or infinity, or "
                "its dtype overflows: use an earlier checkpoint, or float32"
            )
