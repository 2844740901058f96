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


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Return the exact two-sided p-value of paired differences under random signs.

    All 2ⁿ ways to flip signs are equally likely if the arms do not differ; the p-value is the share of them whose
    mean is at least as far from 0 as the one seen. With n = 5 it cannot be below 2/32 = 0.0625.
    """
    values = np.asarray(differences, dtype=float)
    signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
    sums = np.abs(signs @ values)
    return float((sums >= abs(values.sum()) - 1e-12).mean())
