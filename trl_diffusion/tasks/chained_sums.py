"""Generates chained sums modulo 10 whose every line is written out: texts with a middle, in which mistakes go on.

A problem is `Sum 4+7+3+… mod 10.` with eight numbers to add, and its solution has a line for each:

    4+7=1
    1+3=4
    …
    #### 6

Three of the eight lines add 7, 8 or 9. Solutions that slip are wrong on such lines only: their result is one too
large, and the lines after it continue with it. So a text is decided at three places, and is uncertain only there.
There are two layouts: the three lines are the same in all problems, or each problem has its own.

A network that only saw right solutions would learn to compute from the prompt alone, and to ignore what it has
written. It would also learn to copy a result from the line after it, which begins with it, long before it learned to
add. For practice there are solutions with lines that begin with another number: it is shown and not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from datasets import Dataset, Value

from trl_diffusion.tasks.generated import generated_loader
from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward, score
from trl_diffusion.tasks.rows import check_split
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.task import Task

__all__ = ["FIXED", "MOVING", "correctness_reward", "format_reward", "load_chained_sums", "score"]

LINES = 8
EASY, HARD = range(1, 7), range(7, 10)
HARD_LINES = 3
FIXED_LINES = (1, 4, 6)
# How often a line that adds 7, 8 or 9 slips.
SLIP_RATES = {7: 0.35, 8: 0.45, 9: 0.55}
LAYOUTS = ("moving", "fixed")


def load_chained_sums(
    split: str = "train",
    size: int = 1000,
    seed: int = 0,
    slips: bool = False,
    layout: str = "moving",
    restart_share: float = 0.0,
) -> Dataset:
    """Generate chained sums; no problem is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let lines of `completion` that add 7, 8 or 9 go wrong, at `SLIP_RATES`; `answer` stays right.
        layout: `"moving"`: every problem has its own three lines that add 7, 8 or 9. `"fixed"`: they are the second,
            fifth and seventh of every problem.
        restart_share: share of lines, of those after the first, that begin with a random number in place of the last
            result, see `unscored`.

    Returns:
        Columns `prompt` (one user message), `answer` (string), `completion` (one assistant message), `hard_lines`
        (list of ints from 0), and `unscored` (spans [start, end) of the completion's characters that masked SFT
        shows and does not score: the numbers drawn by `restart_share`).

    Raises:
        ValueError: for another split or layout, or a share outside of [0, 1].
    """
    check_split(split, "chained_sums")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if not 0 <= restart_share <= 1:
        raise ValueError(f"restart_share must lie in [0, 1], got {restart_share}.")
    rng = np.random.default_rng([seed, split == "test"])
    rows: list[dict] = []
    while len(rows) < size:
        row = _row(rng, layout, slips, restart_share)
        if held_out(row["prompt"][0]["content"]) == (split == "test"):
            rows.append(row)
    return Dataset.from_list(rows)


def _row(rng: np.random.Generator, layout: str, slips: bool, restart_share: float) -> dict:
    """Draw a problem and its solution; as many draws whatever is asked for, so that slips change no problem."""
    places = np.sort(rng.permutation(LINES)[:HARD_LINES])
    hard_lines = FIXED_LINES if layout == "fixed" else tuple(map(int, places))
    easy, hard = rng.integers(EASY.start, EASY.stop, LINES), rng.integers(HARD.start, HARD.stop, LINES)
    start = int(rng.integers(10))
    numbers = [int((hard if line in hard_lines else easy)[line]) for line in range(LINES)]
    chance, restarts, others = rng.random(LINES), rng.random(LINES) < restart_share, rng.integers(0, 10, LINES)
    errors = [int(slips and chance[line] < SLIP_RATES.get(number, 0.0)) for line, number in enumerate(numbers)]
    begins = [int(others[line]) if line and restarts[line] else None for line in range(LINES)]
    solution, unscored = write_solution(start, numbers, errors, begins)
    return {
        "prompt": [{"role": "user", "content": f"Sum {'+'.join(map(str, [start, *numbers]))} mod 10."}],
        "answer": str((start + sum(numbers)) % 10),
        "completion": [{"role": "assistant", "content": solution}],
        "hard_lines": list(hard_lines),
        "unscored": unscored,
    }


def write_solution(
    start: int, numbers: Sequence[int], errors: Sequence[int], begins: Sequence[int | None]
) -> tuple[str, list[list[int]]]:
    """Write the lines of a chained sum, and the spans of the numbers in them that were not computed.

    Args:
        start: the number that the first line begins with.
        numbers: what the lines add.
        errors: by how much the result of each line is too large; the next line continues with that result.
        begins: the number that each line begins with in place of the last result; `None` to continue.
    """
    text, spans, value = "", [], start
    for number, error, begin in zip(numbers, errors, begins, strict=True):
        if begin is not None:
            spans.append([len(text), len(text) + 1])
            value = begin
        result = (value + number + error) % 10
        text += f"{value}+{number}={result}\n"
        value = result
    return f"{text}#### {value}", spans


def _task(name: str, layout: str) -> Task:
    generate = partial(load_chained_sums, layout=layout)
    return Task(
        name=name,
        description="Share of generated chained sums whose answer, the one stated last, is the gold number.",
        load=generated_loader(name, generate, "gsm8k"),
        score=score,
        rewards=(correctness_reward, format_reward),
        columns={"answer": Value("string")},
        generate=generate,
    )


MOVING, FIXED = _task("chained_sums", "moving"), _task("chained_sums_fixed", "fixed")
