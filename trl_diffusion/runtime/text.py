"""Numbers as the start-up report writes them."""

from __future__ import annotations


def plural(number: int, noun: str) -> str:
    """Return a number with its noun: `1 update`, `1,000 updates`, `2 processes`, `4 micro-batches`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def count(number: float) -> str:
    """Return a number in millions or billions, with three digits."""
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def byte_size(number: float) -> str:
    """Return a number of bytes in KiB, MiB or GiB, with three digits."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= size:
            return f"{amount(number / size)} {unit}"
    return f"{number / 2**10:.3g} KiB"


def amount(number: float) -> str:
    """Return a number with three digits, or all of them before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
