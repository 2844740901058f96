"""4×4 Sudoku, written as 16 digits, row by row, 0 for a blank. Solved puzzles and right cells are different scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value

from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks import d1_scores as d1
from trl_diffusion.tasks.parsing.answers import tagged_answer
from trl_diffusion.tasks.parsing.text import Completion, completion_text, readable
from trl_diffusion.tasks.rows import check_split, read_rows
from trl_diffusion.tasks.split import held_out
from trl_diffusion.tasks.task import EMBEDDED, Task

INSTRUCTION = (
    "Fill in the 4x4 Sudoku so that every row, column and 2x2 box has the digits 1 to 4. It is given as 16 digits, "
    "row by row, 0 for a blank. Think step by step, then write the 16 digits of the solution as "
    "<answer>digits</answer>."
)
TEST_SIZE = 256
FEWEST_BLANKS, MOST_BLANKS = 3, 8
SLIP_RATE = 0.5
CELLS = 16

# 16 digits with nothing but layout between them; the digits of a larger number are no grid.
_GRID = re.compile(r"(?<![0-9])[0-4](?:[\s|,;:.+_&\\\[\](){}*\u2500-\u257f-]*[0-4]){15}(?![0-9])")
# A row of a board on a line of its own, maybe with its number or name: "Row 2: 3 4 1 2", "| R2 | 3 | 4 | 1 | 2 |".
_ROW = re.compile(
    r"[^\w\\]*(?:[a-z][a-z \t]{0,19}[\W_]*)?(?:([1-4])(?:st|nd|rd|th)?[\W_]+(?:row[\W_]+)?)?"
    r"([0-4](?:[\W_]*[0-4]){3})[\W_]*",
    re.IGNORECASE,
)
_RULER = re.compile(r"[\s|:+=\u2500-\u257f-]*")
_LONGEST_ROW = 100


def load_sudoku(
    split: str = "train",
    size: int = 1000,
    seed: int = 0,
    slips: bool = False,
    disjoint_by: str = "puzzle",
    exclude: Collection[str] = (),
) -> Dataset:
    """Generate puzzles with 3 to 8 blanks and one solution; the splits are disjoint, whatever the seed.

    Args:
        split: `"train"` or `"test"` (held out).
        size: number of rows.
        seed: seed of the draws.
        slips: let some solutions in `completion` repeat, in the last blank, the digit of the first.
        disjoint_by: `"puzzle"`: no puzzle is in both splits. `"solution"`: no solution is; its test split also holds
            none of the training puzzles of `"puzzle"`. There are 288 grids; symmetries of a grid count as others.
        exclude: solutions never to draw, for example those of a published test set.

    Returns:
        Columns `prompt` (one user message), `puzzle` and `solution` (16 digits), `completion` (one assistant message).

    Raises:
        ValueError: for another split or another `disjoint_by`, or if nothing is left to draw.
    """
    check_split(split, "Sudoku")
    if disjoint_by not in ("puzzle", "solution"):
        raise ValueError(f"disjoint_by must be 'puzzle' or 'solution', got {disjoint_by!r}.")
    by_solution = disjoint_by == "solution"
    if not any(_allowed(grid, split, by_solution, exclude) for grid in _grids()):
        raise ValueError(f"`exclude` leaves none of the {len(_grids())} grids for the {split} split; shorten it.")
    rng = np.random.default_rng([seed, split == "test"])
    rows: list[dict] = []
    while len(rows) < size:
        solution = _grids()[rng.integers(len(_grids()))]
        if not _allowed(solution, split, by_solution, exclude):
            continue
        puzzle = _blank(solution, rng)
        if puzzle is None:
            continue
        # Training by solution may use every puzzle; all else keeps to the split by puzzle.
        if not (by_solution and split == "train") and held_out(puzzle) != (split == "test"):
            continue
        rows.append(_row(puzzle, solution, slips and rng.random() < SLIP_RATE))
    return Dataset.from_list(rows)


def _allowed(solution: str, split: str, by_solution: bool, exclude: Collection[str]) -> bool:
    return solution not in exclude and (not by_solution or held_out(solution) == (split == "test"))


def _blank(solution: str, rng: np.random.Generator) -> str | None:
    """Return the grid with random blanks, or `None` if that leaves more than one solution."""
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
    """Return the 288 complete grids."""
    rows = ["".join(row) for row in permutations("1234")]

    def extend(grid: str) -> list[str]:
        if len(grid) == CELLS:
            return [grid]
        return [full for row in rows if _fits(grid + row) for full in extend(grid + row)]

    return extend("")


def _fits(grid: str) -> bool:
    """Return whether a grid of whole rows has no digit twice in a column or box."""
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


def read_sudoku(
    path: str | Path,
    split: str | None = None,
    limit: int | None = None,
    prompt: str = prompts.PLAIN,
    exclude: Collection[str] = (),
) -> Dataset:
    """Load puzzles from a CSV file with the columns `Puzzle` and `Solution`, as d1 publishes them.

    Published puzzles can have more than one solution, of which the file gives one.

    Args:
        path: the file.
        split: `None` for the whole file; `"train"` or `"test"` for the part that `load_sudoku` with
            `disjoint_by="solution"` counts to that split.
        limit: keep the first rows only.
        prompt: `"plain"`, `"d1"` or `"d1_train"`; see `trl_diffusion.tasks.d1_prompts`.
        exclude: solutions whose rows are left out.

    Returns:
        Columns `prompt`, `puzzle`, `solution`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a missing column, a row that is no 4×4 Sudoku or whose solution does not fit, another split or
            prompt.
    """
    prompts.check(prompt)
    if split is not None:
        check_split(split, "Sudoku")
    found = [_checked(row, path) for row in read_rows(path, ("Puzzle", "Solution"), "Sudoku")]
    return Dataset.from_list(
        [
            {"prompt": _prompt(puzzle, prompt), "puzzle": puzzle, "solution": solution}
            for puzzle, solution in found
            if (split is None or held_out(solution) == (split == "test")) and solution not in exclude
        ][:limit]
    )


def _checked(row: dict[str, Any], path: str | Path) -> tuple[str, str]:
    puzzle, solution = str(row["Puzzle"]).strip(), str(row["Solution"]).strip()
    if not re.fullmatch(r"[0-4]{16}", puzzle) or solution not in solve_sudoku(puzzle):
        raise ValueError(
            f"{path}: puzzle {puzzle!r} with solution {solution!r} is no 4×4 Sudoku; expected 16 digits each, 0 for a "
            "blank, and a solution that fits. Files of a spreadsheet may have lost leading zeros."
        )
    return puzzle, solution


def _prompt(puzzle: str, name: str) -> prompts.Prompt:
    if name != prompts.PLAIN:
        return prompts.sudoku(puzzle, name)
    return prompts.user(f"{INSTRUCTION}\n\nSudoku: {puzzle}")


def stated_grid(text: str) -> str | None:
    """Return the grid that a completion states: 16 digits in 0..4 with nothing but layout between them, or `None`.

    It is the last one between the last answer tags; without tags the last one of the text. Four rows on lines of their
    own may have names or numbers, and a table may have a heading.
    """
    text = readable(text)
    answer = tagged_answer(text)
    text = (text if answer is None else answer).replace("\\hline", "")
    # Where both end, the board has its rows' numbers left out.
    runs = [(run.end(), False, run.group()) for run in _GRID.finditer(text)]
    boards = [(end, True, rows) for end, rows in _boards(text)]
    return re.sub(r"[^0-4]", "", max(runs + boards)[2]) if runs or boards else None


def _boards(text: str) -> Iterator[tuple[int, str]]:
    """Yield the boards of a text, four lines one below the other with nothing but rulers between: (end, rows)."""
    rows: list[tuple[str | None, str]] = []
    ruled_after: list[int] = []  # numbers of rows
    end = 0
    for line in text.splitlines(keepends=True):
        start, end = end, end + len(line)
        found = _ROW.fullmatch(line) if len(line) <= _LONGEST_ROW else None
        if found is not None:
            rows.append((found[1], found[2]))
            if board := _board(rows, ruled_after):
                yield start + len(line.rstrip()), board
        elif _RULER.fullmatch(line):
            ruled_after += [len(rows)] if line.strip() else []
        else:
            rows, ruled_after = [], []


def _board(rows: list[tuple[str | None, str]], ruled_after: list[int]) -> str | None:
    """Return the last four rows if they are numbered 1 to 4, or have no numbers after whole boards or a heading."""
    numbers = [number for number, _ in rows[-4:]]
    if numbers == list("1234") or (numbers == [None] * 4 and (len(rows) % 4 == 0 or ruled_after[:1] == [1])):
        return "".join(cells for _, cells in rows[-4:])
    return None


def is_solution(grid: str, puzzle: str) -> bool:
    """Return whether a grid keeps the clues and has every digit once in every row, column and box."""
    return len(grid) == CELLS and grid in solve_sudoku(puzzle)


def cells_correct(grid: str | None, puzzle: str) -> float:
    """Return the share of the blanks that hold the digit of a solution; of several solutions, the best match counts.

    A grid that changes a clue is no answer to this puzzle: 0.
    """
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    if grid is None or not blanks or any(digit not in ("0", grid[cell]) for cell, digit in enumerate(puzzle)):
        return 0.0
    return max(sum(grid[cell] == solution[cell] for cell in blanks) for solution in solve_sudoku(puzzle)) / len(blanks)


def solved_reward(
    completions: list[Completion], puzzle: list[str | None], log_extra: Callable | None = None, **kwargs: Any
) -> list[float | None]:
    """Return 1 for every completion that states a solution of its puzzle, else 0.

    Args:
        completions: texts or messages.
        puzzle: 16 digits, same length; `None`, in a mixture of tasks, where there is none: such a row has no reward.
        log_extra: TRL's; the grids found are logged as `extracted_answer`.
    """
    grids = [stated_grid(completion_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("extracted_answer", [grid or "" for grid in grids])
    return [
        None if given is None else float(grid is not None and is_solution(grid, given))
        for grid, given in zip(grids, puzzle, strict=True)
    ]


def cells_reward(completions: list[Completion], puzzle: list[str | None], **kwargs: Any) -> list[float | None]:
    """Return the share of blanks filled in right, in [0, 1]; a puzzle can earn most of it without being solved."""
    return [
        None if given is None else cells_correct(stated_grid(completion_text(completion)), given)
        for completion, given in zip(completions, puzzle, strict=True)
    ]


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """Return 1 for every completion that states a grid, right or wrong, else 0."""
    return [float(stated_grid(completion_text(completion)) is not None) for completion in completions]


def score(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `puzzles_solved` (a solution of `row["puzzle"]`), `cells_correct` (of the blanks), `format` (a grid)."""
    grid = stated_grid(text)
    return {
        "puzzles_solved": float(grid is not None and is_solution(grid, row["puzzle"])),
        "cells_correct": cells_correct(grid, row["puzzle"]),
        "format": float(grid is not None),
    }


def load(
    split: str, source: str | None = None, limit: int | None = None, prompt: str = prompts.PLAIN, seed: int = 0
) -> Dataset:
    """See `trl_diffusion.tasks.Task`. There is no data set on the Hub: without a source the generator is used.

    A file is taken whole. The generator's splits are disjoint by solution. With embedded data the plain prompt is the
    one that the bundled model knows.
    """
    check_split(split, "Sudoku")
    if source not in (None, EMBEDDED):
        return read_sudoku(source, None, limit, prompt)
    rows = load_sudoku(split, limit or TEST_SIZE, seed, disjoint_by="solution")
    if prompts.check(prompt) == prompts.PLAIN and source == EMBEDDED:
        return rows
    return rows.map(lambda row: {"prompt": _prompt(row["puzzle"], prompt)})


TASK = Task(
    name="sudoku",
    description="Share of puzzles solved and, apart from it, share of blanks filled in right.",
    load=load,
    score=score,
    # The share of right cells says more than right or wrong of a puzzle that is hard to solve as a whole, and it is 1
    # for solved puzzles alone.
    rewards=(cells_reward, format_reward),
    columns={"puzzle": Value("string"), "solution": Value("string")},
    score_d1=d1.score_sudoku,
    prompts=prompts.NAMES,
    generate=load_sudoku,
)
