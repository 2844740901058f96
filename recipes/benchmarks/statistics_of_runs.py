"""Statistics of paired runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values (n − 1 in the variance); NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


# Up to so many pairs all signs are tried; for more, so many patterns are drawn.
EXACT_PAIRS, DRAWN_PATTERNS = 14, 100_000


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of paired differences under random signs.

    All 2ⁿ ways to flip signs are equally likely if the arms do not differ; the p-value is the share of them whose
    mean is at least as far from 0 as the one seen. With n = 5 it cannot be below 2/32 = 0.0625. For more than 14 pairs
    100,000 patterns are drawn, the same for the same number of pairs, and the one seen counts as one more.
    """
    values = np.asarray(differences, dtype=float)
    observed = abs(values.sum()) - 1e-12
    if len(values) <= EXACT_PAIRS:
        signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
        return float((np.abs(signs @ values) >= observed).mean())
    signs = np.random.default_rng(0).integers(0, 2, (DRAWN_PATTERNS, len(values))) * 2.0 - 1.0
    return float((1 + (np.abs(signs @ values) >= observed).sum()) / (1 + DRAWN_PATTERNS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method, in the order given.

    The smallest of m is multiplied by m, the next by m − 1 and so on; none becomes smaller than one before it, or
    larger than 1. Of those below α then, with probability 1 − α, none is a chance finding.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
