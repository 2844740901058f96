"""Synthetic word problems in GSM8K's format, small enough for the embedded model. Rewards are GSM8K's.

A solution can be made to slip on purpose. The embedded model is trained on such solutions, so that reinforcement
learning has something to repair: half of the kinds of problem come out wrong more often than right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from datasets import Dataset

from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward
from trl_diffusion.tasks.split import held_out

__all__ = ["correctness_reward", "format_reward", "load_word_problems"]

NAMES = ("Tom", "Ann", "Sam", "Mia", "Leo", "Eva")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs")


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Args:
        text: template with {name}, {other}, {things}, {a}, {b} and, with two steps, {c}.
        operations: one operator per step; each step goes on from the last result.
        numbers: ranges of a, b, c.
        slip: how its solutions go wrong.
        slip_rate: how often they do, when slips are asked for.
    """

    text: str
    operations: str
    numbers: tuple[range, ...]
    slip: str
    slip_rate: float


DIGIT, FEW, MANY = range(2, 10), range(2, 6), range(5, 13)
RARE, OFTEN = 0.38, 0.56
NO_ANSWER_RATE = 0.06

KINDS = (
    Kind("{name} has {a} {things} and gets {b} more. How many {things} now?", "+", (DIGIT, DIGIT), "next", OFTEN),
    Kind("{name} has {a} {things}. {other} has {b}. How many in all?", "+", (DIGIT, DIGIT), "operation", OFTEN),
    Kind("{name} has {a} {things} and loses {b}. How many are left?", "-", (MANY, DIGIT), "next", RARE),
    Kind(
        "{name} has {a} {things}. {other} has {b} less. How many has {other}?", "-", (MANY, DIGIT), "operation", OFTEN
    ),
    Kind("{name} has {a} boxes of {b} {things}. How many in all?", "*", (FEW, DIGIT), "operation", RARE),
    Kind(
        "{name} has {a} {things}, gets {b} and loses {c}. How many are left?",
        "+-",
        (DIGIT, DIGIT, FEW),
        "operation",
        OFTEN,
    ),
)
WRONG_OPERATION = {"+": "-", "-": "+", "*": "+"}
APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def load_word_problems(split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False) -> Dataset:
    """Seeded word problems; no problem (kind and numbers) is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows, drawn with replacement from the kinds, then from their numbers.
        seed: seed of the draws.
        slips: let the solutions in `completion` go wrong at each kind's rate; `answer` stays right.

    Returns:
        Columns `prompt` (one user message), `answer` (string), `completion` (one assistant message), `kind` (int).

    Raises:
        ValueError: for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Word problems have the splits 'train' and 'test', got {split!r}.")
    pools = [
        [numbers for numbers in _numbers(kind) if held_out(kind.text, numbers) == (split == "test")] for kind in KINDS
    ]
    rng = np.random.default_rng([seed, split == "test"])
    rows = []
    for _ in range(size):
        index = int(rng.integers(len(KINDS)))
        numbers = pools[index][rng.integers(len(pools[index]))]
        rows.append({**_row(KINDS[index], numbers, rng, slips), "kind": index})
    return Dataset.from_list(rows)


def _numbers(kind: Kind) -> Iterator[tuple[int, ...]]:
    """All numbers of a kind whose results, also the wrong ones, are positive."""
    for numbers in product(*kind.numbers):
        if all(result > 0 for slip in (None, kind.slip) for *_, result in _steps(kind, numbers, slip)):
            yield numbers


def _row(kind: Kind, numbers: tuple[int, ...], rng: np.random.Generator, slips: bool) -> dict:
    name, other = rng.choice(NAMES, size=2, replace=False)
    question = kind.text.format(
        name=name, other=other, things=rng.choice(THINGS), **dict(zip("abc", numbers, strict=False))
    )
    fate = rng.random()
    slip = kind.slip if slips and fate < kind.slip_rate else None
    solution = write_solution(kind, numbers, slip)
    if slips and fate > 1 - NO_ANSWER_RATE:
        solution = solution[: solution.rindex("\n")]
    return {
        "prompt": [{"role": "user", "content": question}],
        "answer": str(_steps(kind, numbers)[-1][-1]),
        "completion": [{"role": "assistant", "content": solution}],
    }


def _steps(kind: Kind, numbers: tuple[int, ...], slip: str | None = None) -> list[tuple[int, str, int, int]]:
    """(left, operator, right, result) of every step; a slip changes the last one."""
    steps, value = [], numbers[0]
    for index, (operation, right) in enumerate(zip(kind.operations, numbers[1:], strict=True)):
        last = index == len(kind.operations) - 1
        if slip == "operation" and last:
            operation = WRONG_OPERATION[operation]
        result = APPLY[operation](value, right) + (slip == "next" and last)
        steps.append((value, operation, right, result))
        value = result
    return steps


def write_solution(kind: Kind, numbers: tuple[int, ...], slip: str | None = None) -> str:
    """The worked solution, for example `"7 + 5 = 12\\n#### 12"`.

    Args:
        kind: the kind of problem.
        numbers: a, b and, with two steps, c.
        slip: `None` for the right solution; `"operation"` takes the wrong operator in the last step, `"next"` is off
            by one there.
    """
    steps = _steps(kind, numbers, slip)
    lines = [f"{left} {operation} {right} = {result}" for left, operation, right, result in steps]
    return "\n".join([*lines, f"#### {steps[-1][-1]}"])
