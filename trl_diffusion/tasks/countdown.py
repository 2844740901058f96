"""Countdown: combine given numbers, each used once, into an expression that makes a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Sequence, Value

from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks import d1_scores as d1
from trl_diffusion.tasks.parsing.answers import last_answer
from trl_diffusion.tasks.parsing.arithmetic import Expression, evaluate_expression, parse_expression
from trl_diffusion.tasks.parsing.text import Completion, completion_text
from trl_diffusion.tasks.rows import check_split, is_file, read_rows
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.task import EMBEDDED, Task

__all__ = [
    "TASK",
    "check_countdown",
    "correctness_reward",
    "evaluate_expression",
    "format_reward",
    "load_countdown",
    "read_countdown",
    "score",
    "solve_countdown",
]

HUB_ID = "Jiayi-Pan/Countdown-Tasks-3to4"
INSTRUCTION = (
    "Combine the numbers with +, -, *, / and brackets into an expression that makes the target. Use each number "
    "exactly once. Think step by step, then write the expression alone as <answer>expression</answer>."
)
TEST_SIZE = 256
LARGEST_NUMBER = 9
SLIP_RATE = 0.4
Numbers = list[int] | tuple[int, ...]

MOST_SIDES = 4  # of an equation such as (3*7)+25 = 21+25 = 46


def load_countdown(split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False) -> Dataset:
    """Generate Countdown problems of three numbers in 1..9; no problem is in both splits, whatever the seed.

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
    check_split(split, "Countdown")
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
        # Always in the same way, so that the wrong operator is a habit and not noise.
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


def _write(numbers: Numbers, operations: Iterable[str]) -> str:
    return f"{numbers[0]}" + "".join(f"{op}{n}" for op, n in zip(operations, numbers[1:], strict=True))


def solve_countdown(numbers: Numbers, target: int) -> str:
    """Find the first expression without brackets, of `+`, `-` and `*`, that makes the target from all the numbers.

    Raises:
        ValueError: if there is none.
    """
    for operations in product("+-*", repeat=len(numbers) - 1):
        for order in permutations(numbers):
            expression = _write(order, operations)
            if evaluate_expression(expression) == target:
                return expression
    raise ValueError(f"No expression of +, - and * without brackets makes {target} from {list(numbers)}.")


def read_countdown(
    path_or_id: str | Path = HUB_ID,
    split: str = "train",
    limit: int | None = None,
    prompt: str = prompts.PLAIN,
    exclude: str | Path | None = None,
    count: int = 3,
) -> Dataset:
    """Load Countdown problems from a file or the Hub.

    Args:
        path_or_id: a JSON-lines file with `nums` and `target`, or in d1's form with `input` (`"30,100,93"`) and
            `output`; or a data set on the Hub with `nums` and `target` and one split.
        split: of the Hub's data, `"test"` is 256 problems that a hash holds out, `"train"` all that it does not; a
            file is taken whole.
        limit: keep the first rows only.
        prompt: `"plain"`, `"d1"` or `"d1_train"`; see `trl_diffusion.tasks.d1_prompts`.
        exclude: a file whose problems (numbers in any order, and target) are left out, for example d1's test file
            when training.
        count: how many numbers a problem has; others are left out.

    Returns:
        Columns `prompt`, `numbers` (list of int), `target` (int).

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for another split or prompt, a missing column, or numbers that are none.
    """
    check_split(split, "Countdown")
    prompts.check(prompt)
    problems = [problem for problem in _problems(path_or_id) if len(problem[0]) == count]
    if not is_file(path_or_id):
        problems = [problem for problem in problems if held_out(*_identity(problem)) == (split == "test")]
        problems = problems[:TEST_SIZE] if split == "test" else problems
    if exclude is not None:
        known = {_identity(problem) for problem in _problems(exclude)}
        problems = [problem for problem in problems if _identity(problem) not in known]
    return Dataset.from_list(
        [
            {"prompt": _prompt(numbers, target, prompt), "numbers": numbers, "target": target}
            for numbers, target in problems[:limit]
        ]
    )


def _problems(source: str | Path) -> list[tuple[list[int], int]]:
    if is_file(source):
        rows = read_rows(source, (), "Countdown", optional=("nums", "target", "input", "output"))
        if {"input", "output"} <= set(rows[0]):
            rows = read_rows(source, ("input", "output"), "Countdown")
            return [
                ([_whole(number) for number in str(row["input"]).split(",")], _whole(row["output"])) for row in rows
            ]
    rows = read_rows(source, ("nums", "target"), "Countdown")
    return [([_whole(number) for number in row["nums"]], _whole(row["target"])) for row in rows]


def _whole(number: Any) -> int:
    try:
        return int(number)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Countdown needs whole numbers, got {number!r}.") from error


def _identity(problem: tuple[list[int], int]) -> tuple[tuple[int, ...], int]:
    return tuple(sorted(problem[0])), problem[1]


def _prompt(numbers: list[int], target: int, name: str) -> prompts.Prompt:
    if name != prompts.PLAIN:
        return prompts.countdown(numbers, target, name)
    return prompts.user(f"{INSTRUCTION}\n\nNumbers: {', '.join(map(str, numbers))}\nTarget: {target}")


def check_countdown(text: str, numbers: Numbers, target: int) -> bool:
    """Return whether the answer in a completion uses exactly the given numbers, each once, and makes the target.

    Args:
        text: the completion; the answer is the last box or what stands between the last answer tags.
        numbers: the numbers to use.
        target: the value to reach.
    """
    return _solves(_stated(text), numbers, target)


def _solves(expression: Expression | None, numbers: Numbers, target: int) -> bool:
    return expression is not None and _valid(expression, numbers) and expression.value == target


def _stated(text: str) -> Expression | None:
    """Return the expression stated last; of an equation, the side with most numbers: `3 + 5 = 8` states `3 + 5`."""
    answer = last_answer(text)
    if answer is None:
        return None
    sides = [parse_expression(side) for side in answer.split("=", MOST_SIDES) if side.strip()]
    if not sides or len(sides) > MOST_SIDES or None in sides:
        return None
    return max((side for side in sides if side is not None), key=lambda side: len(side.numbers))


def _valid(expression: Expression, numbers: Numbers) -> bool:
    return sorted(expression.numbers) == sorted(numbers)


def correctness_reward(
    completions: list[Completion],
    numbers: list[Numbers | None],
    target: list[int | None],
    log_extra: Callable | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Return 1 for every completion whose expression uses each number once and makes the target, else 0.

    Args:
        completions: texts or messages.
        numbers: the numbers of every row; `None`, in a mixture of tasks, where there are none: no reward.
        target: the targets.
        log_extra: TRL's; the answers found are logged as `extracted_answer`.
    """
    texts = [completion_text(completion) for completion in completions]
    if log_extra is not None:
        log_extra("extracted_answer", [last_answer(text) or "" for text in texts])
    return [
        None if given is None or goal is None else float(check_countdown(text, given, goal))
        for text, given, goal in zip(texts, numbers, target, strict=True)
    ]


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """Return 1 for every completion that states an expression (in a box or answer tags), right or wrong, else 0."""
    return [float(_stated(completion_text(completion)) is not None) for completion in completions]


def score(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `accuracy` (valid, equal to the target), `format` (an expression is stated), `validity` (its numbers)."""
    expression = _stated(text)
    return {
        "accuracy": float(_solves(expression, row["numbers"], row["target"])),
        "format": float(expression is not None),
        "validity": float(expression is not None and _valid(expression, row["numbers"])),
    }


def load(
    split: str, source: str | None = None, limit: int | None = None, prompt: str = prompts.PLAIN, seed: int = 0
) -> Dataset:
    """See `trl_diffusion.tasks.Task`. With embedded data the plain prompt is the one that the bundled model knows."""
    if source != EMBEDDED:
        return read_countdown(source or HUB_ID, split, limit, prompt)
    rows = load_countdown(split, limit or TEST_SIZE, seed)
    if prompts.check(prompt) == prompts.PLAIN:
        return rows
    return rows.map(lambda row: {"prompt": prompts.countdown(row["numbers"], row["target"], prompt)})


TASK = Task(
    name="countdown",
    description="Share of Countdown problems solved, of expressions stated, and of those with the right numbers.",
    load=load,
    score=score,
    rewards=(correctness_reward, format_reward),
    columns={"numbers": Sequence(Value("int64")), "target": Value("int64")},
    score_d1=d1.score_countdown,
    prompts=prompts.NAMES,
    hub_id=HUB_ID,
    generate=load_countdown,
)
