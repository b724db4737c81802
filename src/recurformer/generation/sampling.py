"""Drawing a token from a row of logits.

The steps, in this order: repetition penalty, temperature, top-k, top-p, min-p, and a draw from what is left. Shapes: B
rows, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recurformer.layer import accumulation_dtype
from recurformer.settings import Fraction, Natural, NonNegative, Positive, Settings, setting

GREEDY_BELOW = 1e-5  # a lower temperature would magnify the rounding errors of float32 logits


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How a token is drawn from logits."""

    temperature: NonNegative = setting(1.0, "Divisor of the logits. Below 1e-5 the most probable token is taken.")
    top_k: Natural = setting(0, "Most probable tokens to draw from; 0: all.")
    top_p: Fraction = setting(
        1.0, "Probability that the most probable tokens to draw from reach together; 0: one token."
    )
    min_p: Fraction = setting(0.0, "Least probability of a token to draw, as a part of the largest probability.")
    repetition_penalty: Positive = setting(
        1.0,
        "Divisor of positive logits, and factor of negative ones, of tokens that the row or its prompt holds.",
    )

    def draw(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return one token for each row (B,), and whether the row's logits were numbers (B,) bool.

        Args:
            logits: (B, V).
            seen: (B, V) bool, the tokens that each row holds; None without a penalty.
            generator: of random numbers.
        """
        logits = logits.to(accumulation_dtype(logits.dtype))
        if seen is not None:
            logits = penalise(logits, seen, self.repetition_penalty)
        if self.temperature < GREEDY_BELOW:
            token = logits.argmax(-1)  # the place of a NaN, where there is one
            return token, logits.gather(-1, token[:, None])[:, 0].isfinite()
        probabilities = self.warp(logits).softmax(-1)
        # The first of V exponential clocks with these rates: a multinomial draw that never waits for the device.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / clocks).argmax(-1), probabilities[:, 0].isfinite()  # one NaN makes a whole row NaN

    def warp(self, logits: Tensor) -> Tensor:
        """Return logits divided by the temperature; -inf for tokens that top-k, top-p and min-p exclude in turn."""
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = keep_min_p(logits, self.min_p)
        return logits


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V); for tokens in `seen` (B, V), divided by the penalty if positive, else multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (B, V) with all but the k largest at -inf."""
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(k).indices, True)
    return logits.masked_fill(~kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) with all but the smallest set of probable tokens that reaches probability p at -inf."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the more probable tokens together
    kept = before < p
    kept[..., 0] = True
    return logits.masked_fill(~torch.zeros_like(kept).scatter(-1, order, kept), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) with the tokens below p times the largest probability at -inf."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), float("-inf"))


def tokens_seen(tokens: Tensor, valid: Tensor | None, vocabulary: int) -> Tensor:
    """Return (B, V) bool: the ids that tokens (B, N) hold, without those at pads."""
    ids = tokens if valid is None else tokens.masked_fill(~valid, vocabulary)
    seen = torch.zeros(tokens.shape[0], vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return seen.scatter_(1, ids, True)[:, :vocabulary]
