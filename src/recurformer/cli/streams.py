"""Standard streams that may be closed, full, left by their reader, or of an encoding that lacks characters."""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Open the standard streams that are closed, and let stdout show every character.

    The next file that is opened would otherwise take the number of a closed stream, and receive its text. A character
    that the encoding of stdout lacks becomes an escape like \\u20ac, as on stderr. So are the bytes of a file
    name that are not UTF-8.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Send the rest of stdout nowhere: what is still in its buffer can't be written, and Python tries at its exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout without a number, as in a test
        return


def say(text: str) -> None:
    """Print one line on stderr, if anybody reads it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def lacks_characters() -> str | None:
    """Return the name of stdout's encoding where it lacks characters of some languages, else None."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return None if encoding.lower().replace("-", "").replace("_", "").startswith("utf") else encoding
