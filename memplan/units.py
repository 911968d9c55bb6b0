"""Bytes, counts, shares and durations as text."""

from __future__ import annotations

GIB = 2**30


def gib(nbytes: int) -> str:
    """Bytes in GiB with two decimals and no unit. What is not nothing never reads 0.00."""
    if 0 < abs(nbytes) < 0.005 * GIB:
        return "<0.01" if nbytes > 0 else "-<0.01"
    return f"{nbytes / GIB:,.2f}"


def share(part: int, whole: int) -> str:
    """A part of a whole in per cent."""
    percent = 100 * part / whole if whole else 0.0
    return "<0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def count(number: int) -> str:
    """A number of parameters: 70.55 B, 103.55 M."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:,.2f} {letter}"
    return str(number)


def ratio(part: int, whole: int) -> str:
    """A part of a whole in per cent with two significant digits where it is small: 0.15 %, 0.0023 %."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def duration(seconds: float) -> str:
    """Seconds, or minutes where those are many."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
