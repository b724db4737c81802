"""The ends of rows: end ids, and texts that are found as tokens arrive, wherever the borders between tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from recurformer.data.tokenizer import TextStream
from recurformer.settings import check


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
            raise ValueError(f"stop holds {text!r}; each must be a text of at least one character")
    return texts


def text_stream(tokenizer: Any) -> Any:
    """Return an incremental decoder: the tokenizer's own, or one around the `decode` that every tokenizer has."""
    return tokenizer.stream() if hasattr(tokenizer, "stream") else TextStream(tokenizer.decode)


class StopFinder:
    """The text of one row, up to the first stop that is complete.

    Args:
        stops: texts that end the row.
        tokenizer: its `decode` makes text of ids.

    Attributes:
        text: the text so far, without the stop and the text after it. An end that may begin a stop is held back.
        found: whether a stop is complete.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any) -> None:
        self.stops, self.stream = tuple(stops), text_stream(tokenizer)
        self.text, self.found = "", False
        self._held = ""  # the longest end of the text so far that begins a stop

    def feed(self, token: int) -> str:
        """Return what the token adds to `text`; "" once a stop was found."""
        return "" if self.found else self._take(self.stream.feed(token))

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        if self.found:
            return ""
        shown, rest = self._take(self.stream.finish()), self._held
        self.text, self._held = self.text + rest, ""
        return shown + rest

    def _take(self, new: str) -> str:
        text = self._held + new
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held, shown = True, "", text[: min(places)]
        else:
            held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += shown
        return shown


class RowEnds:
    """Which rows have ended, and where, on the host. The loop may run ahead, for the end of a row changes no other.

    Args:
        count: number of rows.
        ends: ids that end a row.
        stops: texts that end a row.
        tokenizer: makes text of ids.

    Attributes:
        lengths: new tokens of each row up to its end, the last one included; None for a row without an end.
        looked: number of new tokens that have been looked at.
        may_end: whether rows can end before the limit.
    """

    def __init__(self, count: int, ends: Sequence[int], stops: Sequence[str], tokenizer: Any) -> None:
        self.lengths: list[int | None] = [None] * count
        self.looked = 0
        self._ends = frozenset(ends)
        self._finders = [StopFinder(stops, tokenizer) for _ in range(count)] if stops else None
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
