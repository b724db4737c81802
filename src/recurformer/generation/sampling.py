"""Sampling from a `LanguageModel`: one pass over the prompts, then one token a step from the cache.

`generate_rows` is the loop, a `Decoder` makes the logits. What becomes of a row of logits is in `Sampling`, made of
small pure functions, in this order: repetition penalty, temperature, top-k, top-p, min-p. Shapes: B prompts, S samples
of each, N prompt slots, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recurformer.checks import check_inputs
from recurformer.choose import STEP_CHOICES
from recurformer.generation.engine import DecodeEngine
from recurformer.generation.engine import engine_obstacle as obstacle
from recurformer.generation.prompt import read_prompt
from recurformer.generation.stopping import StopFinder, stop_texts
from recurformer.layer import accumulation_dtype
from recurformer.model import LanguageModel
from recurformer.modules import Norm

GREEDY_BELOW = 1e-5  # a lower temperature would magnify the rounding errors of float32 logits: it means greedy
LOOK_EVERY = {"cuda": 16}  # steps between two looks at which rows have ended, where a look waits for the device
ROOM = 1024  # new tokens that an engine has room for before it grows
ROOM_MULTIPLE = 256  # of its slots: calls of about one length use one engine
KEPT_BYTES = 2**28  # keys and values up to which a model keeps the engine of its last call on a GPU


@dataclass(frozen=True)
class Generated:
    """What generation made, and where each row ended."""

    tokens: Tensor  # (B * S, N + new) int64
    lengths: list[int]  # new tokens of each row, the one that ended it included, pads not
    ended: list[bool]  # by an end id or a stop text, not by the limit


def generate(model: LanguageModel, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """Continue prompts: the tokens of `generate_rows`, which has the options. (B * num_samples, N + new) int64."""
    return generate_rows(model, tokens, max_new_tokens, **options).tokens


def generate_rows(
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
    stop: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    num_samples: int = 1,
    seed: int | None = None,
    stream: Callable[[Tensor], Any] | None = None,
    prefill_chunk: int | None = None,
    step: str = "auto",
) -> Generated:
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
        pad_token_id: None: the (first) eos id; without one the tokenizer's, else 0.
        stop: a text or texts that end a row, wherever in its new text, across borders of tokens too. The token that
            completes one is kept, as an eos id is. The prompt's text doesn't count. Needs `tokenizer`.
        tokenizer: whose `decode(ids)` makes text, ours or any other.
        attention_mask: (B, N) bool or 0/1, 0 = padding.
        num_samples: S, independent continuations of each prompt, neighbours in the result.
        seed: of this call's own generator. Equal seeds and batches give equal results; None draws one from torch's.
        stream: called with the ids (B * S,) of each step.
        prefill_chunk: positions of the prompts that go through the layers at once, to bound memory; None: many.
        step: how a token is made: by a `DecodeEngine` ("plain", "fused", or "auto", which picks), or by calls of the
            model itself ("model"; "auto" where the model is more than a plain one).

    Returns:
        Generated: prompts and new tokens, new <= max_new_tokens.

    Raises:
        ValueError: for an option outside its limits, an empty prompt, or input that the model refuses.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_whole("max_new_tokens", max_new_tokens, 0)
    check_whole("num_samples", num_samples, 1)
    if prefill_chunk is not None:
        check_whole("prefill_chunk", prefill_chunk, 1)
    if step not in ("model", *STEP_CHOICES):
        raise ValueError(f"step is {step!r}; choose one of 'model', {', '.join(map(repr, STEP_CHOICES))}")
    if seed is not None:
        check_whole("seed", seed, -(2**63), 2**64 - 1)
    ends = end_ids(eos_token_id, model.config.vocab_size)
    stops = stop_texts(stop)
    if stops and not hasattr(tokenizer, "decode"):
        raise ValueError(f"stop is {stop!r}, but the tokenizer is {tokenizer!r}; give one whose decode makes text")
    if pad_token_id is not None:
        check_whole("pad_token_id", pad_token_id, -(2**63), 2**63 - 1)
    pad = pad_id(pad_token_id, ends, tokenizer)
    valid = check_inputs(model.config, tokens, device=model.embedding.weight.device, attention_mask=attention_mask)
    if valid is not None and not (real := valid.any(1)).all():
        raise ValueError(f"prompt {int(real.int().argmin())} is all padding; a prompt needs at least one token")

    (B, N), S = tokens.shape, num_samples
    device, tokens = tokens.device, tokens.long()
    prompts = tokens.repeat_interleave(S, dim=0)
    if max_new_tokens == 0:
        return Generated(prompts, [0] * (B * S), [False] * (B * S))
    generator = torch.Generator(device)
    generator.manual_seed(int(torch.randint(2**63 - 1, ())) if seed is None else seed)
    rows = Rows(B * S, ends, stops, tokenizer)
    look_every = LOOK_EVERY.get(device.type, 1) if stream is None else 1

    with torch.no_grad(), evaluating(model):
        seen = None
        if repetition_penalty != 1:
            seen = tokens_seen(tokens, valid, model.config.vocab_size).repeat_interleave(S, dim=0)
        decoder = make_decoder(model, step, B * S, N, max_new_tokens, padded=valid is not None)
        logits = decoder.prefill(tokens, valid, samples=S, chunk=prefill_chunk)
        new: list[Tensor] = []
        while True:
            token = sampling.draw(logits, seen, generator)
            new.append(token)
            n = len(new)
            if rows.may_end and (n % look_every == 0 or n == max_new_tokens):
                rows.look(torch.stack(new[rows.looked :], dim=1))
            if stream is not None:
                stream(rows.padded(token, n, pad))
            if n == max_new_tokens or rows.all_ended:
                break
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            logits = decoder.step(token)
    keep(model, decoder)
    lengths = [length or len(new) for length in rows.lengths]
    made = torch.stack(new[: max(lengths)], dim=1)
    if rows.may_end:
        slots = torch.arange(made.shape[1], device=device)
        made = made.masked_fill(slots >= torch.tensor(lengths, device=device)[:, None], pad)
    return Generated(torch.cat([prompts, made], dim=1), lengths, [length is not None for length in rows.lengths])


class Rows:
    """Which rows have ended, and where. On the host: the loop may run ahead of it, for a row's end changes no other.

    Args:
        count: of rows.
        ends: ids that end one.
        stops: texts that end one.
        tokenizer: makes text of ids.

    Attributes:
        lengths: new tokens of each row up to its end, that included; None while there is none.
        looked: new tokens that have been looked at.
    """

    def __init__(self, count: int, ends: Sequence[int], stops: Sequence[str], tokenizer: Any) -> None:
        self.lengths: list[int | None] = [None] * count
        self.looked = 0
        self._ends = frozenset(ends)
        self._finders = [StopFinder(stops, tokenizer) for _ in range(count)] if stops else None
        self.may_end = bool(ends or stops)

    @property
    def all_ended(self) -> bool:
        return self.may_end and None not in self.lengths

    def look(self, block: Tensor) -> None:
        """Look at the next tokens (rows, n); waits for their device."""
        for row, ids in enumerate(block.tolist()):
            for place, token in enumerate(ids, self.looked + 1):
                if self.lengths[row] is None and self._ended(row, token):
                    self.lengths[row] = place
        self.looked += block.shape[1]

    def _ended(self, row: int, token: int) -> bool:
        if token in self._ends:
            return True
        if self._finders is None:
            return False
        self._finders[row].feed(token)
        return self._finders[row].found

    def padded(self, token: Tensor, n: int, pad: int) -> Tensor:
        """The n-th new tokens (rows,), with pads in the rows that ended before."""
        over = [length is not None and length < n for length in self.lengths]
        return token.masked_fill(torch.tensor(over, device=token.device), pad) if any(over) else token


# --- where logits come from ------------------------------------------------------------------------------------------


class Decoder(Protocol):
    """Reads prompts, then one token of every row at a time. `DecodeEngine` is one."""

    def prefill(self, tokens: Tensor, valid: Tensor | None, *, samples: int, chunk: int | None) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...


class ModelDecoder:
    """Calls of the model itself, whatever it is wrapped in."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def prefill(self, tokens: Tensor, valid: Tensor | None, *, samples: int, chunk: int | None) -> Tensor:
        """Logits (B * samples, V) after each prompt."""
        model, B, device = self.model, len(tokens), tokens.device
        self.cache = model.new_cache(B)
        logits = model.logits(read_prompt(model, self.cache, tokens, valid, chunk))
        if samples > 1:
            self.cache = self.cache.select(torch.arange(B, device=device).repeat_interleave(samples))
        return logits.repeat_interleave(samples, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B * samples, V) after one more token of every row."""
        return self.model.logits(self.model.hidden(tokens[:, None], None, cache=self.cache)[:, 0])


KEPT = "_decode_engine"  # where a model keeps its engine


def make_decoder(
    model: LanguageModel, step: str, rows: int, prompt: int, max_new_tokens: int, *, padded: bool
) -> Decoder:
    """The decoder of one call: the engine that the model kept if it serves, else a new one, else the model itself.

    Args:
        step: as `generate_rows` takes it.
        rows: B * S.
        prompt: N, slots of the prompts.
        padded: some of them are pads.
    """
    if step == "model" or (step == "auto" and obstacle(model) is not None):
        return ModelDecoder(model)
    kept: DecodeEngine | None = vars(model).pop(KEPT, None)  # taken out: a call inside this one makes its own
    slots = -(-(prompt + min(max_new_tokens, ROOM)) // ROOM_MULTIPLE) * ROOM_MULTIPLE
    if (
        kept is not None
        and obstacle(model) is None
        and kept.serves(model, rows, step)
        and slots <= kept.capacity
        and padded == (kept.state.valid is not None)
    ):
        kept.reset()
        kept.refresh()
        return kept
    return DecodeEngine(model, rows, slots, step=step, padded=padded)


def keep(model: LanguageModel, decoder: Decoder) -> None:
    """Let a model keep a small engine, for its graphs take longer to record than many steps. Copies don't have it."""
    if not isinstance(decoder, DecodeEngine) or not decoder.on_gpu:
        return
    own = all(type(m) in (nn.Linear, Norm) for layer in model.layers for m in layer.children())  # not: adapters
    uncast = decoder.dtype == model.embedding.weight.dtype  # the engine holds no second copy of the weights
    if own and uncast and decoder.nbytes <= KEPT_BYTES:
        vars(model)[KEPT] = decoder
    else:
        decoder.settle()


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


def pad_id(given: int | None, ends: Sequence[int], tokenizer: Any) -> int:
    """What follows the end of a row: what was given, else the first end id, else the tokenizer's end, else 0."""
    candidates = [given, *ends[:1], getattr(tokenizer, "eos_id", None), getattr(tokenizer, "eos_token_id", None), 0]
    return next(candidate for candidate in candidates if candidate is not None)


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
