"""Checks of single settings, with messages that name the setting, what was given and what is possible."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Check that a setting has one of the values that it can have.

    Args:
        name: of the setting, as users write it.
        value: given for it.
        choices: the possible values.

    Raises:
        ValueError: if it has another value; the message suggests the choice that is spelled nearly like it.
    """
    choices = list(choices)
    if value in choices:
        return
    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.{near(str(value), choices)}")


def near(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the choice that is spelled nearly like a name, or an empty text."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def at_least(name: str, value: float, least: float) -> None:
    """Check that a number is not too small.

    Args:
        name: of the setting, as users write it.
        value: given for it.
        least: the smallest possible value.

    Raises:
        ValueError: if the number is smaller, or NaN.
    """
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def clip_range(low: float, high: float) -> None:
    """Check that ratios can be clipped to [1 − low, 1 + high], which must be positive and hold 1.

    Args:
        low: `epsilon`, as users write it.
        high: `epsilon_high`, which is `epsilon` where it is not given.

    Raises:
        ValueError: if `low` is not in [0, 1), or `high` is negative.
    """
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(
            "Ratios are clipped to [1 - epsilon, 1 + epsilon_high], which must be positive and hold 1: epsilon must "
            f"lie in [0, 1) and epsilon_high be at least 0; got {low} and {high}."
        )
