"""4×4 Sudoku with a unique solution, written as 16 digits, row by row, 0 for a blank."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import permutations

import numpy as np
from datasets import Dataset

from trl_diffusion.tasks.split import held_out

FEWEST_BLANKS, MOST_BLANKS = 3, 8
SLIP_RATE = 0.5
CELLS = 16


def load_sudoku(split: str = "train", size: int = 1000, seed: int = 0, slips: bool = False) -> Dataset:
    """Seeded puzzles with 3 to 8 blanks; no puzzle is in both splits, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let some solutions in `completion` repeat, in the last blank, the digit of the first.

    Returns:
        Columns `prompt` (one user message), `puzzle` and `solution` (16 digits), `completion` (one assistant message).

    Raises:
        ValueError: for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Sudoku has the splits 'train' and 'test', got {split!r}.")
    rng = np.random.default_rng([seed, split == "test"])
    rows: list[dict] = []
    while len(rows) < size:
        solution = _grids()[rng.integers(len(_grids()))]
        puzzle = _blank(solution, rng)
        if puzzle is None or held_out(puzzle) != (split == "test"):
            continue
        rows.append(_row(puzzle, solution, slips and rng.random() < SLIP_RATE))
    return Dataset.from_list(rows)


def _blank(solution: str, rng: np.random.Generator) -> str | None:
    """The grid with random blanks, or `None` if that leaves more than one solution."""
    blanks = rng.choice(CELLS, size=rng.integers(FEWEST_BLANKS, MOST_BLANKS + 1), replace=False)
    puzzle = "".join("0" if cell in blanks else digit for cell, digit in enumerate(solution))
    return puzzle if len(solve_sudoku(puzzle)) == 1 else None


def _row(puzzle: str, solution: str, slip: bool) -> dict:
    written = solution
    if slip:
        first, last = puzzle.index("0"), puzzle.rindex("0")
        written = solution[:last] + solution[first] + solution[last + 1 :]
    return {
        "prompt": [{"role": "user", "content": f"Solve this Sudoku: {puzzle}"}],
        "puzzle": puzzle,
        "solution": solution,
        "completion": [{"role": "assistant", "content": written}],
    }


@lru_cache
def _grids() -> list[str]:
    """The 288 complete grids."""
    rows = ["".join(row) for row in permutations("1234")]

    def extend(grid: str) -> list[str]:
        if len(grid) == CELLS:
            return [grid]
        return [full for row in rows if _fits(grid + row) for full in extend(grid + row)]

    return extend("")


def _fits(grid: str) -> bool:
    """Whether a grid of whole rows has no digit twice in a column or box."""
    columns = [grid[column::4] for column in range(4)]
    boxes = [
        grid[4 * row + column : 4 * row + column + 2] + grid[4 * row + column + 4 : 4 * row + column + 6]
        for row in range(0, len(grid) // 4, 2)
        for column in (0, 2)
    ]
    return all(len(set(group)) == len(group) for group in columns + boxes)


def solve_sudoku(puzzle: str) -> list[str]:
    """All solutions of a puzzle of 16 digits, 0 for a blank."""
    pattern = re.compile(puzzle.replace("0", "."))
    return [grid for grid in _grids() if pattern.fullmatch(grid)]


def extract_grid(text: str) -> str | None:
    """The last 16 digits in 1..4 that stand together in a text (white space between them allowed), or `None`."""
    found = re.findall(r"(?<!\d)(?:[1-4]\s*){15}[1-4](?!\d)", text)
    return re.sub(r"\s", "", found[-1]) if found else None


def check_sudoku(text: str, solution: str) -> bool:
    """Whether the grid in a completion is the solution.

    Args:
        text: the completion.
        solution: 16 digits.
    """
    return extract_grid(text) == solution
