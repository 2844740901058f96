"""Generates Countdown problems whose solutions try operators line by line. Rewards and scores are Countdown's.

A problem is `Make 17 from 2, 3, 5.` with an answer that keeps the order of its numbers. Its solution writes up to four
attempts, each with its value and whether that is the target, and then the answer:

    2+3+5=10 no
    2-3+5=04 no
    2+3*5=17 yes
    <answer>2+3*5</answer>

Values have two digits, so that all attempts are equally long. The attempts before the right one are random, so a
network learns to check an attempt and has to guess what to try. What it tries decides whether it finds the answer
before its attempts are used up.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from datasets import Dataset, Sequence, Value

from trl_diffusion.tasks.countdown import correctness_reward, evaluate_expression, format_reward, score
from trl_diffusion.tasks.generated import generated_loader
from trl_diffusion.tasks.rows import check_split
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.task import Task

__all__ = ["TASK", "correctness_reward", "format_reward", "load_countdown_search", "score", "write_search"]

LARGEST_NUMBER = 5
MOST_ATTEMPTS = 4
SLIP_RATE = 0.5
OPERATORS = ("++", "+-", "-+", "--", "+*", "*+", "-*", "*-")


def load_countdown_search(
    split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False, attempts: int = MOST_ATTEMPTS
) -> Dataset:
    """Generate Countdown problems of three numbers in 1..5; no problem is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let some solutions in `completion` take the right attempt for a wrong one, and answer with another, if
            there is room for one.
        attempts: most attempts of a solution, from 1 to 4; how many it has is drawn uniformly.

    Returns:
        Columns `prompt` (one user message), `numbers` (list of int), `target` (int), `completion` (one assistant
        message).

    Raises:
        ValueError: for another split, or a number of attempts out of range.
    """
    check_split(split, "countdown_search")
    if not 1 <= attempts <= MOST_ATTEMPTS:
        raise ValueError(f"attempts must be from 1 to {MOST_ATTEMPTS}, got {attempts}.")
    rng = np.random.default_rng([seed, split == "test"])
    rows: list[dict] = []
    while len(rows) < size:
        numbers = rng.integers(1, LARGEST_NUMBER + 1, size=3).tolist()
        tried = [OPERATORS[index] for index in rng.permutation(len(OPERATORS))]
        count, slip = int(rng.integers(1, attempts + 1)), rng.random() < SLIP_RATE
        values = {operators: _value(numbers, operators) for operators in tried}
        positive = [operators for operators in tried if values[operators] > 0]
        target = values[positive[0]]
        if held_out(sorted(numbers), target) != (split == "test"):
            continue
        wrong = [operators for operators in positive if values[operators] != target]
        search = [*wrong[: count - 1], positive[0]]
        # An attempt that is passed over needs another one after it.
        passed_over = len(search) - 1 if slips and slip and count < attempts and len(wrong) >= count else None
        if passed_over is not None:
            search.append(wrong[count - 1])
        rows.append(_row(numbers, target, search, passed_over))
    return Dataset.from_list(rows)


def _row(numbers: list[int], target: int, search: list[str], passed_over: int | None) -> dict:
    a, b, c = numbers
    return {
        "prompt": [{"role": "user", "content": f"Make {target:02} from {a}, {b}, {c}."}],
        "numbers": numbers,
        "target": target,
        "completion": [{"role": "assistant", "content": write_search(numbers, target, search, passed_over)}],
    }


def write_search(numbers: list[int], target: int, search: list[str], passed_over: int | None = None) -> str:
    """Write the lines of a search, and its last attempt as the answer.

    Args:
        numbers: three numbers, in the order in which attempts use them.
        target: the value to reach.
        search: the attempts, each two operators, such as `"+*"`.
        passed_over: the attempt, from 0, that is called wrong although it is right; `None` for none.
    """
    lines = ""
    for index, operators in enumerate(search):
        value = _value(numbers, operators)
        found = value == target and index != passed_over
        lines += f"{_write(numbers, operators)}={value:02} {'yes' if found else 'no'}\n"
    return f"{lines}<answer>{_write(numbers, search[-1])}</answer>"


def _write(numbers: list[int], operators: str) -> str:
    return f"{numbers[0]}{operators[0]}{numbers[1]}{operators[1]}{numbers[2]}"


def _value(numbers: list[int], operators: str) -> int:
    return _evaluate(_write(numbers, operators))


@cache  # there are 1,000
def _evaluate(expression: str) -> int:
    value = evaluate_expression(expression)
    assert value is not None
    return int(value)


TASK = Task(
    name="countdown_search",
    description="Share of Countdown problems solved, of expressions stated, and of those with the right numbers.",
    load=generated_loader("countdown_search", load_countdown_search, "countdown"),
    score=score,
    rewards=(correctness_reward, format_reward),
    columns={"numbers": Sequence(Value("int64")), "target": Value("int64")},
    generate=load_countdown_search,
)
