"""Unpack gzip and Zstandard streams in pieces of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from recurformer.data.extras import require

WINDOW = 31
"""Binary logarithm of the largest Zstandard window, `zstd --long=31`. The format allows more, the library does not."""

STEP = 1 << 24
"""Most bytes of gzip output at a time."""

ZSTD_INPUT = 1 << 11
"""Bytes of Zstandard input at a time. The library returns all that they unpack to: at most 64 MiB, since 4 bytes can
stand for a block of 128 KiB."""


class UnreadableError(Exception):
    """The bytes or the text cannot be read. Whoever counts the lines turns it into a ValueError."""


def unpack_gzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of gzip members laid end to end.

    The standard library's reader takes a member that stops short for a whole one; here it is an error.

    Raises:
        UnreadableError: the data are damaged or cut short.
    """
    member = None
    for chunk in chunks:
        while chunk:
            if member is None:
                chunk = chunk.lstrip(b"\0")  # gzip files may be padded with zeros
                if not chunk:
                    break
                member = zlib.decompressobj(wbits=31)
            try:
                yield member.decompress(chunk, STEP)
            except zlib.error as error:
                raise _damaged(error) from error
            chunk = member.unused_data if member.eof else member.unconsumed_tail
            member = None if member.eof else member
    if member is not None:
        raise UnreadableError("the compressed data is cut short; the file is incomplete")


def unpack_zstd(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Yield the content of Zstandard frames laid end to end.

    The library's own reader takes a frame that stops short for a whole one; here it is an error.

    Args:
        chunks: the compressed bytes.
        name: the file, for the message that the library is missing.

    Raises:
        UnreadableError: the data are damaged or cut short, or need a larger window than the library reads.
    """
    zstandard: Any = require("zstandard", f"{name} (.zst)")
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW)
    frame = None
    for whole in chunks:
        for start in range(0, len(whole), ZSTD_INPUT):
            chunk = whole[start : start + ZSTD_INPUT]
            while chunk:
                frame = frame or unpacker.decompressobj()
                try:
                    yield frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    if "too much memory" in str(error):
                        raise UnreadableError(
                            f"its window is larger than 2^{WINDOW} bytes, the most that is read; pack the file again "
                            "with a smaller `zstd --long`"
                        ) from error
                    raise _damaged(error) from error
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise UnreadableError("the compressed data is cut short; the file is incomplete")


def _damaged(error: Exception) -> UnreadableError:
    return UnreadableError(f"the compressed data is damaged ({error})")
