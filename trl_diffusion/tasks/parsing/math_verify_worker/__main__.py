"""Compares pairs of mathematical answers with math-verify, in a separate process that can be killed.

Started by `trl_diffusion.tasks.parsing.latex` as a script, so that it loads neither torch nor this package; in a
separate folder, so that nothing next to it hides a module of the standard library. It reads lines
`{"gold": …, "given": …}` and answers each with a line `1` or `0`. A comparison may take two seconds of the processor:
time on the wall would make scores depend on how busy a machine is.
"""

import json
import logging
import resource
import signal
import sys

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, floor, log

SECONDS = 2.0
MEMORY = 4 * 2**30
# The whole answer or nothing: math-verify's reader of plain text takes the first number of `4\sqrt(2)`, and its rule
# for units cuts what follows a \text.
TARGETS = [
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
        )
    )
]
# Of a decimal for a fraction: 0.333333 is a third.
SIGNIFICANT_DIGITS = 6
# Differences below 1e-100 are none; math-verify's own 15 digits take 1/2^98 for 1/2^99.
PRECISION = 100


class OutOfTime(BaseException):
    """Not an `Exception`: sympy and math-verify catch those."""


def _stop(signum, frame):
    raise OutOfTime


def decimals(gold: Basic | str) -> int:
    """Return the decimal places to which a decimal must agree with the right answer: six, or more below 0.1."""
    if not isinstance(gold, Expr) or not (gold.is_number and gold.is_real and gold.is_finite) or gold.is_zero:
        return SIGNIFICANT_DIGITS
    leading = int(floor(log(abs(gold), 10).evalf(5)))  # sympy's numbers have no largest one, floats do
    return SIGNIFICANT_DIGITS + max(0, -1 - leading)


def same(gold: str, given: str) -> bool:
    """Return whether math-verify takes both for the same; `False` when the time is up."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        # Its own timeouts are signal alarms on wall time.
        left, right = (parse(f"${text}$", TARGETS, parsing_timeout=None) for text in (gold, given))
        return bool(left and right) and verify(
            left,
            right,
            float_rounding=decimals(left[0]),
            numeric_precision=PRECISION,
            allow_set_relation_comp=True,  # 2 <= x < 5 is [2, 5)
            timeout_seconds=None,
        )
    except OutOfTime:
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGVTALRM, _stop)
    # An interrupt on the terminal is for the process that asks; the end of its questions ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        print(int(same(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
