"""Texts that end a continuation: found as its tokens arrive, wherever the borders between tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def stop_texts(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts as a tuple; empty for None.

    Raises:
        ValueError: for what is no text, or an empty one.
    """
    texts = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop holds {text!r}; each must be a text of at least one character")
    return texts


def text_stream(tokenizer: Any) -> Any:
    """An incremental decoder: the tokenizer's own, or one around the `decode` that every tokenizer has."""
    from recurformer.data.tokenizer import TextStream

    return tokenizer.stream() if hasattr(tokenizer, "stream") else TextStream(tokenizer.decode)


class StopFinder:
    """The text of one row, up to the first stop that is complete.

    Args:
        stops: texts that end it.
        tokenizer: whose `decode` makes text of ids.

    Attributes:
        text: so far, without the stop and what came after it; what may be the beginning of a stop is not in it yet.
        found: whether a stop is complete.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any) -> None:
        self.stops, self.stream = tuple(stops), text_stream(tokenizer)
        self.text, self.found = "", False
        self._held = ""  # the longest end of the text so far that begins a stop

    def feed(self, token: int) -> str:
        """What the token adds to `text`; "" once a stop was found."""
        return "" if self.found else self._take(self.stream.feed(token))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
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
