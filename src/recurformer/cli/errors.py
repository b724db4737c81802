"""Words for an error that ends a command: one line, whatever library raised it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

LONGEST_MESSAGE = 1500  # characters
TRACEBACK = "RECURFORMER_TRACEBACK"  # environment variable: 1 lets unexpected errors pass, with their traceback

LESS_MEMORY = {
    "train": "lower micro_batch_size, recurrent_micro_batch_size, evaluation.batch_size or data.window, or set "
    "recompute (a resumed run also needs --allow-change NAME)",
    "eval": "lower --batch-size or --window",
    "generate": "give fewer prompts at once or a shorter one, or lower --samples or --max-new-tokens",
    "prepare": "lower --workers",
    "convert": "use a machine with more memory: the whole model is held once",
    "bench": "lower the batch size, the length or the micro-batch sizes",
    "tasks": "lower --batch-size or --d-model",
    "demo": "close other programs, or lower --set batch_size=N",
}
"""Name of a verb -> the options by which it takes less memory."""


def in_words(error: BaseException, words: Sequence[str]) -> str | None:
    """Return one line that says what went wrong and what helps, or None for an error that should pass.

    An error of a library, which is neither a ValueError nor an OSError, is unexpected: the line names its class. It
    passes where the environment variable `TRACEBACK` is 1.

    Args:
        error: ended the command.
        words: of the command line, without the program's name.
    """
    from recurformer.hardware import is_out_of_memory
    from recurformer.reading import brief

    if isinstance(error, click.ClickException):
        return one_line(error.format_message())
    if is_out_of_memory(error):
        verb = next((word for word in words if not word.startswith("-")), "")
        remedy = LESS_MEMORY.get(verb, "lower the batch size or the length")
        return one_line(f"out of memory ({brief(error)}); {remedy}")
    if isinstance(error, UnicodeEncodeError | UnicodeDecodeError):
        return one_line(f"text that is no {error.encoding}: {error}; correct the text, or set PYTHONUTF8=1")
    if isinstance(error, ValueError | OSError):
        return one_line(str(error) or type(error).__name__)
    if os.environ.get(TRACEBACK) == "1":
        return None
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    return one_line(f"unexpected {kind}: {brief(error)}; {TRACEBACK}=1 shows its origin")


def comes_from_interrupt(error: BaseException) -> bool:
    """Return whether an error is Ctrl-C, or was raised because of it: an import of torch turns it into other errors."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


def one_line(message: str) -> str:
    """Return a message without line breaks, cut in the middle where it is long: the remedy stands at its end."""
    text = " ".join(message.split())
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"
