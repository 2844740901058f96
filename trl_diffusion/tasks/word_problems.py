"""Generates word problems in GSM8K's format, small enough for the bundled model. Rewards and scores are GSM8K's.

A solution can be made to slip on purpose. The bundled model is trained on such solutions, so that reinforcement
learning has something to repair: half of the kinds of problem come out wrong more often than right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from datasets import Dataset, Value

from trl_diffusion.tasks.generated import generated_loader
from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward, score
from trl_diffusion.tasks.rows import check_split
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.task import Task

__all__ = ["TASK", "correctness_reward", "format_reward", "load_word_problems", "score"]


NAMES = ("Tom", "Ann", "Sam", "Mia", "Leo", "Eva")
THINGS = ("apples", "pens", "books", "coins", "cards", "eggs")


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Args:
        text: template with {name}, {other}, {things}, {a}, {b} and, with two steps, {c}.
        operations: one operator per step; each step continues with the last result.
        numbers: ranges of a, b, c.
        slip: how its solutions go wrong.
        slip_rate: how often they do, when slips are asked for.
    """

    text: str
    operations: str
    numbers: tuple[range, ...]
    slip: str
    slip_rate: float


FEW, DIGIT, MANY = range(2, 6), range(2, 10), range(5, 13)
RARE, OFTEN = 0.42, 0.64

KINDS = (
    Kind("{name} has {a} {things} and gets {b} more. How many {things} now?", "+", (DIGIT, DIGIT), "next", OFTEN),
    Kind("{name} has {a} {things}. {other} has {b}. How many in all?", "+", (DIGIT, DIGIT), "mark", OFTEN),
    Kind("{name} has {a} {things} and loses {b}. How many are left?", "-", (MANY, DIGIT), "next", RARE),
    Kind("{name} has {a} {things}. {other} has {b} less. How many has {other}?", "-", (MANY, DIGIT), "mark", OFTEN),
    Kind("{name} has {a} boxes of {b} {things}. How many in all?", "*", (FEW, DIGIT), "next", OFTEN),
    Kind("{name} has {a} {things}, gets {b} and loses {c}. How many are left?", "+-", (FEW, FEW, FEW), "mark", RARE),
)
APPLY: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


def load_word_problems(split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False) -> Dataset:
    """Generate word problems; no question is in both splits, whatever the seed.

    The same numbers may occur in both, with other names or things: a network this small learns its sums by heart, so a
    test on numbers it never saw would measure what it cannot do.

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
    check_split(split, "word_problems")
    pools = [list(_numbers(kind)) for kind in KINDS]
    rng = np.random.default_rng([seed, split == "test"])
    rows: list[dict] = []
    while len(rows) < size:
        index = int(rng.integers(len(KINDS)))
        row = _row(KINDS[index], pools[index][rng.integers(len(pools[index]))], rng, slips)
        if held_out(row["prompt"][0]["content"]) == (split == "test"):
            rows.append({**row, "kind": index})
    return Dataset.from_list(rows)


def _numbers(kind: Kind) -> Iterator[tuple[int, ...]]:
    """Yield all numbers of a kind whose results are positive."""
    for numbers in product(*kind.numbers):
        if min(result for *_, result in _steps(kind, numbers)) > 0:
            yield numbers


def _row(kind: Kind, numbers: tuple[int, ...], rng: np.random.Generator, slips: bool) -> dict:
    name, other = rng.choice(NAMES, size=2, replace=False)
    question = kind.text.format(
        name=name, other=other, things=rng.choice(THINGS), **dict(zip("abc", numbers, strict=False))
    )
    # Drawn even if there is nothing to decide, so that slips leave the questions as they are.
    slip = rng.random() < kind.slip_rate and slips
    solution = write_solution(kind, numbers, kind.slip if slip else None)
    return {
        "prompt": [{"role": "user", "content": question}],
        "answer": str(_steps(kind, numbers)[-1][-1]),
        "completion": [{"role": "assistant", "content": solution}],
    }


def _steps(kind: Kind, numbers: tuple[int, ...], error: int = 0) -> list[tuple[int, str, int, int]]:
    """Return (left, operator, right, result) of every step; the last result is off by `error`."""
    steps, value = [], numbers[0]
    for operation, right in zip(kind.operations, numbers[1:], strict=True):
        result = APPLY[operation](value, right)
        steps.append((value, operation, right, result))
        value = result
    return [*steps[:-1], (*steps[-1][:-1], value + error)]


def write_solution(kind: Kind, numbers: tuple[int, ...], slip: str | None = None) -> str:
    """Write the worked solution, for example `"7 + 5 = 12\\n#### 12"`.

    Args:
        kind: the kind of problem.
        numbers: a, b and, with two steps, c.
        slip: `None` for the right solution; `"next"` is one too large in the last step, `"mark"` writes `##`
            where `####` belongs. A slip changes no other token: sampling several tokens at once would mix up solutions
            that differ in many.
    """
    steps = _steps(kind, numbers, error=int(slip == "next"))
    lines = [f"{left} {operation} {right} = {result}" for left, operation, right, result in steps]
    mark = "##" if slip == "mark" else "####"
    return "\n".join([*lines, f"{mark} {steps[-1][-1]}"])


TASK = Task(
    name="word_problems",
    description="Share of generated word problems whose answer, the one stated last, is the gold number.",
    load=generated_loader("word_problems", load_word_problems, "gsm8k"),
    score=score,
    rewards=(correctness_reward, format_reward),
    columns={"answer": Value("string")},
    generate=load_word_problems,
)
