"""Whether two mathematical answers mean the same, for MATH: as strings, as numbers, else by math-verify."""

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

from trl_diffusion.tasks.number import parse_number
from trl_diffusion.tasks.text import readable

LONGEST_ANSWER = 300
SECONDS_TO_START = 120.0
# The worker stops by itself after two seconds of processor time; this is for what it cannot interrupt.
SECONDS_TO_ANSWER = 120.0

_WORKER = Path(__file__).with_name("math_verify_worker")
# Behind a number: words, percent and degree signs.
_UNIT = re.compile(
    r"(?<=[\d}])\\?\s*(?:\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?|\\?%|\^\s*\\circ|\^\s*\{\\circ\}|°)\s*$"
)
_NAME = re.compile(r"^\s*[a-zA-Z]\s*(?:=|\\in(?![a-z]))\s*")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|[,!;: ])(?![a-zA-Z])|\\[()\[\]]|\$|\s|~|\\\$")
_SMALL_FRACTION = re.compile(r"\\[dt]frac")
_DIGITS_FRACTION = re.compile(r"\\frac(\d)(\d)")
# Towers of powers, exponents of five digits, large or repeated factorials, numbers of more than 30 digits.
_TOO_LARGE = re.compile(r"(?:\^|\*\*)\s*[-({\s]*(?:\d{5}|\w+[)}\s]*(?:\^|\*\*))|\d{4}\s*!|!\s*!|\d{31}")


def same_latex(given: str, gold: str) -> bool:
    """Whether an answer means the same as the right one.

    Layout, a unit behind a number, degree and percent signs and a leading `x =` do not count. Two plain numbers are
    compared exactly. What remains goes to math-verify, in a process of its own: at most 300 characters, no towers of
    powers, no exponents of five digits, two seconds of processor time. Beyond that answers are taken as different.

    Args:
        given: what a completion stated.
        gold: the right answer.
    """
    return how_same(given, gold) is not None


@lru_cache(maxsize=65536)
def how_same(given: str, gold: str) -> str | None:
    """What shows that two answers are the same: `"string"`, `"number"` or `"math-verify"`; `None` if nothing does."""
    given, gold = readable(given), readable(gold)
    if len(given) > LONGEST_ANSWER:
        return None
    if given.strip() == gold.strip() or _normal(given) == _normal(gold):
        return "string"
    if _plain_number(given) and _plain_number(gold):
        return "number" if parse_number(given) == parse_number(gold) else None
    if _TOO_LARGE.search(given) or not re.search(r"\w", given):
        return None
    return "math-verify" if _JUDGE.same(gold, given) else None


def _normal(text: str) -> str:
    text = _SMALL_FRACTION.sub(r"\\frac", text.strip().rstrip("."))
    text = _UNIT.sub("", _NAME.sub("", text))
    return _DIGITS_FRACTION.sub(r"\\frac{\1}{\2}", _LAYOUT.sub("", text))


def _plain_number(text: str) -> bool:
    return re.fullmatch(r"\s*\$?\s*[-+]?[\d.,]+\s*\$?\.?\s*", text) is not None and parse_number(text) is not None


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
        """The next line, or `None` if there is none in time or the worker has ended."""
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
