"""Countdown: combine three numbers, each used once, into a target. Solutions stand in `<answer>…</answer>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations, product

import numpy as np
from datasets import Dataset

from trl_diffusion.tasks.split import held_out

LARGEST_NUMBER = 9
SLIP_RATE = 0.4

_TOKEN = re.compile(r"\s*(\d+|[-+*/()×÷])")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LONGEST_EXPRESSION = 200


def load_countdown(split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False) -> Dataset:
    """Seeded Countdown problems of three numbers in 1..9; no problem is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let some solutions in `completion` have one wrong operator.

    Returns:
        Columns `prompt` (one user message), `numbers` (list of int), `target` (int), `completion` (one assistant
        message, for example `<answer>3+5*2</answer>`).

    Raises:
        ValueError: for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Countdown has the splits 'train' and 'test', got {split!r}.")
    rng = np.random.default_rng([seed, split == "test"])
    rows: list[dict] = []
    while len(rows) < size:
        numbers = rng.integers(1, LARGEST_NUMBER + 1, size=3).tolist()
        operations = "".join(rng.choice(list("+-*"), size=2, p=(0.4, 0.4, 0.2)))
        target = evaluate_expression(_write(rng.permutation(numbers).tolist(), operations))
        if target is None or target <= 0 or held_out(sorted(numbers), int(target)) != (split == "test"):
            continue
        rows.append(_row(numbers, int(target), slips and rng.random() < SLIP_RATE))
    return Dataset.from_list(rows)


def _row(numbers: list[int], target: int, slip: bool) -> dict:
    expression = solve_countdown(numbers, target)
    if slip:
        # always the same way, so that the wrong operator is a habit and not noise
        swap = {"+": "-", "-": "+", "*": "+"}
        at = max(expression.rfind(operator) for operator in swap)
        expression = expression[:at] + swap[expression[at]] + expression[at + 1 :]
    a, b, c = numbers
    return {
        "prompt": [{"role": "user", "content": f"Make {target} from {a}, {b}, {c}."}],
        "numbers": numbers,
        "target": target,
        "completion": [{"role": "assistant", "content": f"<answer>{expression}</answer>"}],
    }


def _write(numbers: Sequence[int], operations: Sequence[str]) -> str:
    return f"{numbers[0]}" + "".join(f"{op}{n}" for op, n in zip(operations, numbers[1:], strict=True))


def solve_countdown(numbers: Sequence[int], target: int) -> str:
    """The first expression without brackets, of `+`, `-` and `*`, that makes the target from all the numbers.

    Raises:
        ValueError: if there is none.
    """
    for operations in product("+-*", repeat=len(numbers) - 1):
        for order in permutations(numbers):
            expression = _write(order, operations)
            if evaluate_expression(expression) == target:
                return expression
    raise ValueError(f"No expression of +, - and * without brackets makes {target} from {list(numbers)}.")


def extract_expression(text: str) -> str | None:
    """The expression in the last `<answer>…</answer>`, or `None`."""
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def check_countdown(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the answer in a completion uses exactly the given numbers, each once, and makes the target.

    Args:
        text: the completion.
        numbers: the numbers to use.
        target: the value to reach.
    """
    expression = extract_expression(text)
    if expression is None or evaluate_expression(expression) != target:
        return False
    return sorted(int(number) for number in re.findall(r"\d+", expression)) == sorted(numbers)


def evaluate_expression(text: str) -> Fraction | None:
    """The exact value of an expression of whole numbers, `+ - * /` and brackets.

    Args:
        text: anything, for example what a network wrote.

    Returns:
        The value, or `None` for anything else than such an expression, a division by zero or more than 200 characters.
    """
    tokens = _tokenize(text)
    if tokens is None:
        return None
    try:
        value, rest = _sum(tokens, 0)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return value if rest == len(tokens) else None


def _tokenize(text: str) -> list[str] | None:
    text = text.strip()
    if not text or len(text) > _LONGEST_EXPRESSION:
        return None
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match.group(1).translate(str.maketrans("×÷", "*/")))
        position = match.end()
    return tokens


def _sum(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _term(tokens, at)
    while at < len(tokens) and tokens[at] in "+-":
        right, after = _term(tokens, at + 1)
        value, at = (value + right if tokens[at] == "+" else value - right), after
    return value, at


def _term(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at)
    while at < len(tokens) and tokens[at] in "*/":
        right, after = _factor(tokens, at + 1)
        value, at = (value * right if tokens[at] == "*" else value / right), after
    return value, at


def _factor(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if tokens[at] == "-":
        value, at = _factor(tokens, at + 1)
        return -value, at
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1)
        if tokens[at] != ")":
            raise ValueError(f"expected a closing bracket, found {tokens[at]}")
        return value, at + 1
    return Fraction(int(tokens[at])), at + 1
