"""Sampling from a `LanguageModel`: one pass over the prompts, then one token a step from the cache.

`generate` is the loop. What becomes of a row of logits is in `Sampling`, made of small pure functions, in this order:
repetition penalty, temperature, top-k, top-p, min-p. Shapes: B prompts, S samples of each, N prompt slots, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recurformer.cache import KVCache
from recurformer.model import LanguageModel, accumulation_dtype, check_inputs, compute_dtype

GREEDY_BELOW = 1e-5  # a lower temperature would magnify the rounding errors of float32 logits: it means greedy


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    num_samples: int = 1,
    seed: int | None = None,
    stream: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """Continue prompts.

    Args:
        model: used in evaluation mode and without gradients; its mode is restored.
        tokens: (B, N) integer ids. Prompts of unequal length are padded (`pad_prompts` does it), best on the left, so
            that the new tokens follow the old ones in the result; any other place gives the same new tokens.
        max_new_tokens: at most this many steps; 0 returns the prompts.
        temperature: divides the logits. 0, and all that is below 1e-5, is greedy: the most probable token.
        top_k: keep the k most probable tokens; 0 keeps all, more than V means V.
        top_p: keep the most probable tokens until their probabilities reach this; 1 keeps all, 0 the first alone.
        min_p: keep the tokens of at least this times the largest probability.
        repetition_penalty: logits of the row's earlier tokens, prompt included, are divided by it when positive and
            multiplied when negative; 1 changes nothing.
        eos_token_id: the id or ids that end a row. The id itself is kept, `pad_token_id` follows; those of the prompt
            don't count. Generation stops when every row has ended. None: rows never end.
        pad_token_id: None: the (first) eos id.
        attention_mask: (B, N) bool or 0/1, 0 = padding.
        num_samples: S, independent continuations of each prompt, neighbours in the result.
        seed: of this call's own generator. Equal seeds and batches give equal results; None draws one from torch's.
        stream: called with the ids (B * S,) of each step.

    Returns:
        (B * S, N + new) int64: prompts and new tokens, new <= max_new_tokens.

    Raises:
        ValueError: for an option outside its limits, an empty prompt, or input that the model refuses.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_whole("num_samples", num_samples, 1)
    if seed is not None:
        check_whole("seed", seed, -(2**63), 2**64 - 1)
    ends = end_ids(eos_token_id, model.config.vocab_size)
    if pad_token_id is not None:
        check_whole("pad_token_id", pad_token_id, -(2**63), 2**63 - 1)
    elif ends:
        pad_token_id = ends[0]
    valid = check_inputs(model, tokens, None, attention_mask, None, None, False, True, None)
    if valid is not None and not (real := valid.any(1)).all():
        raise ValueError(f"prompt {int(real.int().argmin())} is all padding; a prompt needs at least one token")

    B, N = tokens.shape
    device, tokens = tokens.device, tokens.long()
    prompts = tokens.repeat_interleave(num_samples, dim=0)
    if max_new_tokens == 0:
        return prompts
    generator = torch.Generator(device)
    generator.manual_seed(int(torch.randint(2**63 - 1, ())) if seed is None else seed)

    with torch.no_grad(), evaluating(model):
        cache = KVCache(model.config, B, dtype=compute_dtype(model.embedding.weight), device=device)
        x = model.hidden(tokens, valid, cache=cache)
        slots = torch.arange(N, device=device)
        last = slots[-1:] if valid is None else (slots * valid).argmax(1)  # each prompt's last real token
        logits = model.logits(x[torch.arange(B, device=device), last]).repeat_interleave(num_samples, dim=0)
        if num_samples > 1:
            cache = cache.select(torch.arange(B, device=device).repeat_interleave(num_samples))

        seen = None
        if repetition_penalty != 1:
            seen = tokens_seen(tokens, valid, model.config.vocab_size).repeat_interleave(num_samples, dim=0)
        stops = torch.tensor(ends, device=device) if ends else None
        finished = torch.zeros(B * num_samples, dtype=torch.bool, device=device)
        new: list[Tensor] = []
        while True:
            token = fed = sampling.draw(logits, seen, generator)
            if stops is not None:
                assert pad_token_id is not None
                token = token.masked_fill(finished, pad_token_id)
                finished = finished | torch.isin(fed, stops)
            new.append(token)
            if stream is not None:
                stream(token)
            if len(new) == max_new_tokens or (stops is not None and bool(finished.all())):
                break
            if seen is not None:
                seen.scatter_(1, fed[:, None], True)
            logits = model.logits(model.hidden(fed[:, None], None, cache=cache)[:, 0])
    return torch.cat([prompts, torch.stack(new, dim=1)], dim=1)


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (B, N) int64, left-padded, and their mask (B, N) bool, from lists of ids of any lengths.

    Raises:
        ValueError: when there is no prompt, or an empty one.
    """
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    longest = max(map(len, prompts))
    tokens = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        if not len(ids):
            raise ValueError(f"prompt {row} is empty; a prompt needs at least one token, such as the end-of-text id")
        tokens[row, longest - len(ids) :] = torch.as_tensor(ids)
        mask[row, longest - len(ids) :] = True
    return tokens, mask


# --- from logits to a token ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; `generate` documents the options.

    Raises:
        ValueError: naming the option, its value and its limits.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_whole("top_k", self.top_k, 0)
        for name, low, high, limits in (
            ("temperature", 0.0, math.inf, "a finite number of at least 0"),
            ("top_p", 0.0, 1.0, "from 0 to 1"),
            ("min_p", 0.0, 1.0, "from 0 to 1"),
            ("repetition_penalty", 0.0, math.inf, "a finite number above 0"),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (name == "repetition_penalty" and value == 0):
                raise ValueError(f"{name} is {value!r}; it must be {limits}")

    def draw(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator) -> Tensor:
        """One token a row (B,), from logits (B, V) and the tokens seen (B, V) bool."""
        logits = logits.to(accumulation_dtype(logits.dtype))
        if seen is not None:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature < GREEDY_BELOW:
            return logits.argmax(-1)
        probabilities = self.warp(logits).softmax(-1)
        # The first of V exponential clocks with these rates: a multinomial draw that never waits for the device.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / clocks).argmax(-1)

    def warp(self, logits: Tensor) -> Tensor:
        """Temperature, then -inf for the tokens that top-k, top-p and min-p exclude, in this order."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        return logits


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) of the tokens in `seen` (B, V), divided by the penalty if positive, else multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with all but the k largest at -inf."""
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    return logits.masked_fill(~kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with all but the smallest set of probable tokens that reaches probability p at -inf."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the more probable tokens together
    kept = before < p
    kept[..., 0] = True
    return logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with the tokens below p times the largest probability at -inf."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def tokens_seen(tokens: Tensor, valid: Tensor | None, vocabulary: int) -> Tensor:
    """(B, V) bool: the ids that tokens (B, N) hold; what stands at pads doesn't count."""
    ids = tokens if valid is None else tokens.masked_fill(~valid, vocabulary)
    seen = torch.zeros(tokens.shape[0], vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, ids, True)[:, :vocabulary]


# --- around the loop -------------------------------------------------------------------------------------------------


def end_ids(eos_token_id: int | Sequence[int] | None, vocabulary: int) -> list[int]:
    """The ids that end a row, as a list."""
    if eos_token_id is None:
        return []
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    for token in ids:
        check_whole("eos_token_id", token, 0, vocabulary - 1)
    return ids


def check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ValueError unless the value is an int of at least `low` and at most `high`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; it must be a whole number {limits}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
