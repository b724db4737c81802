"""The ends of rows: end ids, and texts that are found as tokens arrive, wherever the borders between tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from recurformer.data.tokenizer import TextStream, Tokenizer
from recurformer.settings import check, shown


def end_ids(eos_token_id: int | Sequence[int] | None, vocabulary: int) -> list[int]:
    """Return the ids that end a row, as a list.

    Raises:
        ValueError: for an id outside the vocabulary.
    """
    if eos_token_id is None:
        return []
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    return [check("eos_token_id", token, Annotated[int, Ge(0), Le(vocabulary - 1)]) for token in ids]


def pad_id(given: int | None, ends: Sequence[int], tokenizer: Any) -> int:
    """Return the id after the end of a row: the given one, else the first end id, else the tokenizer's end, else 0."""
    candidates = [given, *ends[:1], getattr(tokenizer, "eos_id", None), getattr(tokenizer, "eos_token_id", None), 0]
    return next(candidate for candidate in candidates if candidate is not None)


def stop_texts(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts as a tuple; empty for None.

    Raises:
        ValueError: for an empty text, or an entry that is not text.
    """
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop holds {shown(text)}; each must be a text of at least one character")
    return texts


def text_stream(tokenizer: Any, context: Sequence[int] = ()) -> TextStream:
    """Return an incremental decoder behind a context: our tokenizer's own, or one around any other's `decode`."""
    return tokenizer.stream(context) if isinstance(tokenizer, Tokenizer) else TextStream(tokenizer.decode, context)


def special_stops(stops: Sequence[str], tokenizer: Any) -> dict[str, int]:
    """Return the ids of the stops that are special tokens of the tokenizer, which have no text to be found in.

    Raises:
        ValueError: for a stop that holds a special token beside other text, because nothing would ever match it.
    """
    special = tokenizer.special_tokens() if isinstance(tokenizer, Tokenizer) else {}
    for stop in stops:
        inside = next((token for token in special if token and token in stop), None)
        if inside is not None and stop not in special:
            raise ValueError(
                f"stop is {shown(stop)}, which holds the special token {inside!r}; special tokens have no text, "
                f"so give {inside!r} as a stop of its own"
            )
    return {stop: special[stop] for stop in stops if stop in special}


class StopFinder:
    """The text of one row, up to the first stop that is complete.

    Args:
        stops: texts that end the row. A special token's spelling stands for the token.
        tokenizer: its `decode` makes text of ids.
        context: ids of the row's prompt, whose text does not count.

    Attributes:
        text: the text so far, without the stop and the text after it. An end that may begin a stop is held back.
        found: whether a stop is complete.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any, context: Sequence[int] = ()) -> None:
        special = special_stops(stops, tokenizer)
        self._ids = frozenset(special.values())
        self._stops = [stop for stop in stops if stop not in special]
        self._stream = text_stream(tokenizer, context)
        self.text, self.found = "", False
        self._held = ""  # the longest end of the text so far that begins a stop

    def feed(self, token: int) -> str:
        """Return what the token adds to `text`; "" once a stop was found."""
        if self.found:
            return ""
        if token in self._ids:
            rest = self.finish()
            self.found = True
            return rest
        return self._take(self._stream.feed(token))

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        if self.found:
            return ""
        last, rest = self._take(self._stream.finish()), self._held
        self.text, self._held = self.text + rest, ""
        return last + rest

    def _take(self, new: str) -> str:
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held, certain = True, "", text[: min(places)]
        else:
            held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            certain, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += certain
        return certain


class RowEnds:
    """Which rows have ended, and where, on the host. The loop may run ahead, for the end of a row changes no other.

    Args:
        prompts: ids of each row's prompt, without pads. Their text does not count.
        ends: ids that end a row.
        stops: texts that end a row.
        tokenizer: makes text of ids; None without stops.

    Attributes:
        lengths: new tokens of each row up to its end, the last one included; None for a row without an end.
        looked: number of new tokens that have been looked at.
        may_end: whether rows can end before the limit.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], ends: Sequence[int], stops: Sequence[str], tokenizer: Any
    ) -> None:
        self.lengths: list[int | None] = [None] * len(prompts)
        self.looked = 0
        self._ends = frozenset(ends)
        self._finders = [StopFinder(stops, tokenizer, prompt) for prompt in prompts] if stops else None
        self.may_end = bool(ends or stops)

    @property
    def all_ended(self) -> bool:
        """Whether every row has ended."""
        return self.may_end and None not in self.lengths

    def look(self, ids: list[list[int]]) -> None:
        """Look at the next tokens of every row."""
        for row, tokens in enumerate(ids):
            for place, token in enumerate(tokens, self.looked + 1):
                if self.lengths[row] is None and self._ended(row, token):
                    self.lengths[row] = place
        self.looked += len(ids[0])

    def _ended(self, row: int, token: int) -> bool:
        if token in self._ends:
            return True
        if self._finders is None:
            return False
        self._finders[row].feed(token)
        return self._finders[row].found

    def padded(self, token: Tensor, n: int, pad: int) -> Tensor:
        """Return the n-th new tokens (rows,), with pads in the rows that ended before."""
        over = [length is not None and length < n for length in self.lengths]
        return token.masked_fill(torch.tensor(over, device=token.device), pad) if any(over) else token
