"""Proportions with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean score with its 95 % Wilson interval.

    Args:
        value: the mean, in [0, 1].
        low: lower end of the interval.
        high: upper end.
        total: independent trials that the interval counts. Several completions of one prompt are not independent, so
            these are prompts.
    """

    value: float
    low: float
    high: float
    total: int

    @classmethod
    def of(cls, correct: float, total: int) -> Estimate:
        """Return the estimate from `correct` successes (or the sum of scores) in `total` trials.

        Raises:
            ValueError: if not 0 ≤ correct ≤ total, or there are no trials.
        """
        low, high = wilson_interval(correct, total)
        return cls(correct / total, low, high, total)

    @property
    def correct(self) -> float:
        """The sum of the scores: the number of successes, if each score is 0 or 1."""
        return round(self.value * self.total, 6)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson_interval(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, 95 % by default; unlike the normal one it stays within [0, 1].

    Args:
        correct: number of successes. For scores between 0 and 1 their sum: such scores vary less than successes of the
            same mean, so the interval is then too wide rather than too narrow.
        total: number of independent trials.
        z: quantile of the normal distribution.

    Raises:
        ValueError: if not 0 ≤ correct ≤ total, or there are no trials.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"An interval needs 0 ≤ correct ≤ total and total > 0, got {correct} of {total}.")
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    # The interval always holds the share; at 0 and at 1 rounding can place an end on its wrong side.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))
