"""Compares pairs of mathematical answers with math-verify, in a process of its own that can be killed.

Started by `trl_diffusion.tasks.latex` as a script, so that it loads neither torch nor this package; in a folder of its
own, so that nothing beside it hides a module of the standard library. It reads lines
`{"gold": …, "given": …}` and answers each with a line `1` or `0`. A comparison may take two seconds of the processor:
time on the wall would make scores depend on how busy a machine is.
"""

import json
import logging
import resource
import signal
import sys

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

SECONDS = 2.0
MEMORY = 4 * 2**30
TARGETS = [LatexExtractionConfig(), ExprExtractionConfig()]


class OutOfTime(BaseException):
    """Not an `Exception`: sympy and math-verify catch those."""


def _stop(signum, frame):
    raise OutOfTime


def same(gold: str, given: str) -> bool:
    """Whether math-verify takes both for the same; `False` when the time is up."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        # Its own timeouts are signal alarms on wall time.
        left, right = (parse(f"${text}$", TARGETS, parsing_timeout=None) for text in (gold, given))
        return bool(left and right and verify(left, right, timeout_seconds=None))
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
