"""Generates 4×4 Sudoku that is solved in three sweeps: texts with a middle, and difficulties for a curriculum.

A puzzle is four rows, 0 for a blank. Its solution is three grids. In every grid those blanks of the one before are
filled to which their row, column and box left one digit, so that no blank needs a guess, and the others stay:

    1203        1243        1243        1243
    3010        3010        3412        3412
    2000        2034        2134        2134
    0321        4321        4321        4321
    puzzle      sweep 1     sweep 2     sweep 3

The grids stand one below the other. A wrong digit in one is copied and misleads the next. With few blanks most are
forced at once; the more there are, the more wait for others, and the more places can go wrong. Rewards and scores are
Sudoku's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Value

from trl_diffusion.tasks.generated import generated_loader
from trl_diffusion.tasks.rows import check_split
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.sudoku import CELLS, format_reward, score, solve_sudoku, solved_reward
from trl_diffusion.tasks.task import Task

__all__ = ["TASK", "format_reward", "load_sudoku_sweeps", "score", "solve_in_sweeps", "solved_reward"]

BLANKS = range(3, 10)
MOST_BLANKS = 10  # of puzzles with more, few are solved in three sweeps
SWEEPS = 3
SLIP_RATE = 0.15

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


def load_sudoku_sweeps(
    split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False, blanks: Sequence[int] = BLANKS
) -> Dataset:
    """Generate puzzles that three sweeps solve; no puzzle is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let some blanks in `completion` be filled with the next digit (1 after 4), which later grids copy.
        blanks: the numbers of blanks to draw from, each from 1 to 10: `range(3, 6)` for easy puzzles, `range(3, 10)`
            for all. A number that is given twice is drawn twice as often.

    Returns:
        Columns `prompt` (one user message), `puzzle` and `solution` (16 digits), `difficulty` (int, number of blanks),
        `completion` (one assistant message).

    Raises:
        ValueError: for another split, or numbers of blanks out of range.
    """
    check_split(split, "sudoku_sweeps")
    if not blanks or not all(1 <= count <= MOST_BLANKS for count in blanks):
        raise ValueError(f"blanks must be numbers from 1 to {MOST_BLANKS}, got {list(blanks)}.")
    rng, solutions = np.random.default_rng([seed, split == "test"]), solve_sudoku("0" * CELLS)
    rows: list[dict] = []
    while len(rows) < size:
        solution, count = solutions[rng.integers(len(solutions))], blanks[int(rng.integers(len(blanks)))]
        grids = None
        # Until there is one with this number, so that puzzles with many blanks are as frequent as was asked for.
        while grids is None:
            blank = rng.choice(CELLS, size=count, replace=False)
            puzzle = "".join("0" if cell in blank else digit for cell, digit in enumerate(solution))
            grids = solve_in_sweeps(puzzle)
        # Drawn even if there is nothing to decide, so that slips leave the puzzles as they are.
        slip = rng.random(CELLS) < SLIP_RATE
        if held_out(puzzle) == (split == "test"):
            rows.append(_row(puzzle, solution, [_slipped(grid, puzzle, slip) for grid in grids] if slips else grids))
    return Dataset.from_list(rows)


def solve_in_sweeps(puzzle: str) -> list[str] | None:
    """Return the three grids of a puzzle's solution, or `None` if the last one has blanks.

    Args:
        puzzle: 16 digits, 0 for a blank.
    """
    grids = [puzzle]
    for _ in range(SWEEPS):
        grids.append("".join(_filled(grids[-1], cell) for cell in range(CELLS)))
    return None if "0" in grids[-1] else grids[1:]


def _filled(grid: str, cell: int) -> str:
    left = {"1", "2", "3", "4"} - {grid[peer] for peer in PEERS[cell]}
    return left.pop() if grid[cell] == "0" and len(left) == 1 else grid[cell]


def _slipped(grid: str, puzzle: str, slip: np.ndarray) -> str:
    """Replace the digits of blanks that slip; a blank that has not been filled yet stays one."""
    following = {"0": "0", "1": "2", "2": "3", "3": "4", "4": "1"}
    return "".join(
        following[digit] if puzzle[cell] == "0" and slip[cell] else digit for cell, digit in enumerate(grid)
    )


def _row(puzzle: str, solution: str, grids: list[str]) -> dict:
    return {
        "prompt": [{"role": "user", "content": _board(puzzle)}],
        "puzzle": puzzle,
        "solution": solution,
        "difficulty": puzzle.count("0"),
        "completion": [{"role": "assistant", "content": "\n\n".join(map(_board, grids))}],
    }


def _board(grid: str) -> str:
    return "\n".join(grid[start : start + 4] for start in range(0, CELLS, 4))


TASK = Task(
    name="sudoku_sweeps",
    description="Share of puzzles solved, of blanks filled in right, and of completions that state a grid.",
    load=generated_loader("sudoku_sweeps", load_sudoku_sweeps, "sudoku"),
    score=score,
    # Not the share of right cells: only the end of the text is judged, and what decides it lies in the middle.
    rewards=(solved_reward, format_reward),
    columns={"puzzle": Value("string"), "solution": Value("string")},
    generate=load_sudoku_sweeps,
)
