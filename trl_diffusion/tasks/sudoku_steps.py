"""Generates 4×4 Sudoku whose blanks are filled one per line: texts with a middle, and difficulties for a curriculum.

A puzzle is four rows with their letters, 0 for a blank:

    a1203
    b3412
    c2041
    d0123

Its solution has a line for every blank, and then the grid as in the puzzle:

    a3=4
    …
    a1243
    …

The next line is always about the first blank, in reading order, to which its row, column and box leave one digit, so
that no line needs a guess. With few blanks those are the blanks in reading order. The more there are, the more often
one has to be passed over for now, and the more lines there are that can go wrong. Rewards and scores are Sudoku's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Value

from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks.rows import check_split
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.sudoku import CELLS, format_reward, score, solve_sudoku, solved_reward
from trl_diffusion.tasks.task import EMBEDDED, Task

__all__ = ["TASK", "forced_order", "format_reward", "load_sudoku_steps", "score", "solved_reward"]

TEST_SIZE = 256
BLANKS = range(3, 9)
MOST_BLANKS = 8  # more would need another canvas than the 64 positions of its model
SLIP_RATE = 0.3

# The seven other cells of a cell's row, column and box.
PEERS = [
    [
        other
        for other in range(CELLS)
        if other != cell
        and (
            other // 4 == cell // 4
            or other % 4 == cell % 4
            or (other // 8 == cell // 8 and other % 4 // 2 == cell % 4 // 2)
        )
    ]
    for cell in range(CELLS)
]


def load_sudoku_steps(
    split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False, blanks: Sequence[int] = BLANKS
) -> Dataset:
    """Generate puzzles that can be solved one forced blank at a time; no puzzle is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let some lines of `completion` repeat the digit of the line before; the grid then has it too.
        blanks: the numbers of blanks to draw from, each from 1 to 8: `range(3, 5)` for easy puzzles, `range(3, 9)` for
            all. A number that is given twice is drawn twice as often.

    Returns:
        Columns `prompt` (one user message), `puzzle` and `solution` (16 digits), `difficulty` (int, number of blanks),
        `completion` (one assistant message).

    Raises:
        ValueError: for another split, or numbers of blanks out of range.
    """
    check_split(split, "sudoku_steps")
    if not blanks or not all(1 <= count <= MOST_BLANKS for count in blanks):
        raise ValueError(f"blanks must be numbers from 1 to {MOST_BLANKS}, got {list(blanks)}.")
    rng, grids = np.random.default_rng([seed, split == "test"]), solve_sudoku("0" * CELLS)
    rows: list[dict] = []
    while len(rows) < size:
        solution, count = grids[rng.integers(len(grids))], blanks[rng.integers(len(blanks))]
        order = None
        # Until there is one with this number, so that puzzles with many blanks are as frequent as was asked for.
        while order is None:
            blank = rng.choice(CELLS, size=count, replace=False)
            puzzle = "".join("0" if cell in blank else digit for cell, digit in enumerate(solution))
            order = forced_order(puzzle)
        # Drawn even if there is nothing to decide, so that slips leave the puzzles as they are.
        chance = rng.random(count)
        if held_out(puzzle) == (split == "test"):
            written = _slip(order, chance) if slips else order
            rows.append(_row(puzzle, solution, written))
    return Dataset.from_list(rows)


def forced_order(puzzle: str) -> list[tuple[int, str]] | None:
    """Solve a puzzle by always filling the first blank to which its row, column and box leave one digit.

    Args:
        puzzle: 16 digits, 0 for a blank.

    Returns:
        Cells from 0 to 15 with their digits, in the order in which they were filled; `None` if at some point no blank
        was forced.
    """
    grid, order = list(puzzle), []
    while "0" in grid:
        left = ((cell, set("1234") - {grid[peer] for peer in PEERS[cell]}) for cell in range(CELLS))
        forced = next(((cell, min(digits)) for cell, digits in left if grid[cell] == "0" and len(digits) == 1), None)
        if forced is None:
            return None
        order.append(forced)
        grid[forced[0]] = forced[1]
    return order


def _slip(order: list[tuple[int, str]], chance: np.ndarray) -> list[tuple[int, str]]:
    written = order[:1]
    for (cell, digit), draw in zip(order[1:], chance[1:], strict=True):
        written.append((cell, written[-1][1] if draw < SLIP_RATE else digit))
    return written


def _row(puzzle: str, solution: str, written: list[tuple[int, str]]) -> dict:
    filled = dict(written)
    grid = "".join(filled.get(cell, digit) for cell, digit in enumerate(puzzle))
    lines = "".join(f"{'abcd'[cell // 4]}{cell % 4 + 1}={digit}\n" for cell, digit in written)
    return {
        "prompt": [{"role": "user", "content": _board(puzzle)}],
        "puzzle": puzzle,
        "solution": solution,
        "difficulty": len(written),
        "completion": [{"role": "assistant", "content": lines + _board(grid)}],
    }


def _board(grid: str) -> str:
    return "\n".join(f"{letter}{grid[4 * row : 4 * row + 4]}" for row, letter in enumerate("abcd"))


def load(
    split: str, source: str | None = None, limit: int | None = None, prompt: str = prompts.PLAIN, seed: int = 0
) -> Dataset:
    """See `trl_diffusion.tasks.Task`; its own data are the generated ones."""
    if source not in (None, EMBEDDED):
        raise ValueError(f"sudoku_steps is generated and reads no file, got source {source!r}; the task sudoku does.")
    if prompt != prompts.PLAIN:
        raise ValueError(f"sudoku_steps has the prompt 'plain' only, got {prompt!r}.")
    return load_sudoku_steps(split, limit or TEST_SIZE, seed)


TASK = Task(
    name="sudoku_steps",
    description="Share of puzzles solved, of blanks filled in right, and of completions that state a grid.",
    load=load,
    score=score,
    # Not the share of right cells: only the end of the text is judged, and what decides it lies in the middle.
    rewards=(solved_reward, format_reward),
    columns={"puzzle": Value("string"), "solution": Value("string")},
    generate=load_sudoku_steps,
)
