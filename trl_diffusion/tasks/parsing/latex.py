"""Decides whether two mathematical answers mean the same, for MATH: as strings, as numbers, else by math-verify."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from trl_diffusion.tasks.parsing.latex_text import (
    for_math_verify,
    lost_by_math_verify,
    plain_latex,
    same_string,
    without_word_unit,
)
from trl_diffusion.tasks.parsing.number import MAGNITUDES, parse_number
from trl_diffusion.tasks.parsing.text import readable

LONGEST_ANSWER = 300
SECONDS_TO_START = 120.0
# The worker stops by itself after two seconds of processor time; this is for what it cannot interrupt.
SECONDS_TO_ANSWER = 120.0

_WORKER = Path(__file__).with_name("math_verify_worker")
# Towers of powers, exponents of five digits, large or repeated factorials, numbers of more than 30 digits.
_TOO_LARGE = re.compile(r"(?:\^|\*\*)\s*[-({\s]*(?:\d{5}|\w+[)}\s]*(?:\^|\*\*))|\d{4}\s*!|!\s*!|\d{31}")


_NUMBER = re.compile(
    rf"[-+]?\s*[\d.,]+(?:\s*(?:\\text\s*\{{)?\s*(?:{'|'.join(MAGNITUDES)})s?\b[a-z ]*\}}?)?", re.IGNORECASE
)


def same_latex(given: str, gold: str) -> bool:
    """Return whether an answer means the same as the right one.

    Layout, fonts, a unit after a number, degree and percent signs do not count, nor does a leading `x =` that only one
    of them has. Two plain numbers are compared exactly. What remains goes to math-verify, in a separate process: at
    most 300 characters, no towers of powers, no exponents of five digits, two seconds of processor time. Beyond that
    answers are taken as different.

    Args:
        given: what a completion stated.
        gold: the right answer.
    """
    return how_same(given, gold) is not None


@lru_cache(maxsize=65536)
def how_same(given: str, gold: str) -> str | None:
    """Return what shows that two answers are the same: `"string"`, `"number"`, `"math-verify"`, or `None`: nothing."""
    given, gold = readable(given), readable(gold)
    if len(given) > LONGEST_ANSWER:
        return None
    given, gold = plain_latex(given), plain_latex(gold)
    if given == gold or same_string(given, gold):
        return "string"
    given, gold = without_word_unit(given), without_word_unit(gold)
    if _plain_number(given) and _plain_number(gold):
        return "number" if parse_number(given) == parse_number(gold) else None
    if _TOO_LARGE.search(given) or not re.search(r"\w", given) or lost_by_math_verify(given, gold):
        return None
    return "math-verify" if _JUDGE.same(for_math_verify(gold), for_math_verify(given)) else None


def _plain_number(text: str) -> bool:
    """Return whether this is a number in digits, maybe in thousands or millions."""
    return _NUMBER.fullmatch(text) is not None and parse_number(text) is not None


class _Judge:
    """Keeps one worker, starts it when first asked and again when it had to be killed or this process was forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def same(self, gold: str, given: str) -> bool:
        with self._lock:
            if self._worker is None or self._owner != os.getpid():
                self._start()
            question = json.dumps({"gold": gold, "given": given}) + "\n"
            worker = self._running()
            assert worker.stdin is not None
            try:
                worker.stdin.write(question.encode())
            except BrokenPipeError:
                answer = None
            else:
                answer = self._read(SECONDS_TO_ANSWER)
            if answer is None:
                self._stop()
            return answer == b"1"

    def _start(self) -> None:
        self._worker = subprocess.Popen(
            [sys.executable, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._owner = os.getpid()
        if self._read(SECONDS_TO_START) != b"ready":
            code = self._worker.poll()
            self._stop()
            raise RuntimeError(
                f"The math-verify worker did not start within {SECONDS_TO_START:.0f} s (exit code {code}). "
                f"`{sys.executable} {_WORKER}` shows why; math-verify must be installed."
            )

    def _read(self, seconds: float) -> bytes | None:
        """Return the next line, or `None` if there is none in time or the worker has ended."""
        worker = self._running()
        assert worker.stdout is not None
        if not select.select([worker.stdout], [], [], seconds)[0]:
            return None
        # Lines are a few bytes long and written at once.
        line = worker.stdout.readline()
        return line.strip() or None

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._worker is not None
        return self._worker

    def _stop(self) -> None:
        worker = self._running()
        worker.kill()
        worker.wait()
        self._worker = None


_JUDGE = _Judge()
