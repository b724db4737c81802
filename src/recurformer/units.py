"""Numbers in words for tables and messages: counts, bytes, rates, durations."""

from __future__ import annotations


def short_number(value: float) -> str:
    """1234 as 1,234 and 1234567 as 1.23M: six characters at most."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.2f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{value:,.0f}" if value < 100_000 else f"{value / 1000:.0f}k"


def bytes_text(count: float) -> str:
    """A number of bytes with three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.{max(0, 3 - len(str(int(count))))}f} {unit}"
        count /= 1024
    raise AssertionError


def rate_text(tokens: float) -> str:
    """Tokens a second."""
    return f"{tokens:,.0f} tokens/s" if tokens >= 10 else f"{tokens:.2g} tokens/s"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for limit, unit, size in (
        (63_072_000, "years", 31_536_000),
        (172_800, "days", 86_400),
        (7200, "hours", 3600),
        (120, "minutes", 60),
    ):
        if seconds >= limit:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
