"""Score completions that are already on disk under d1's protocol and the library's own, and explain every difference.

    python recipes/rescore.py ../shared/data/llada_8b_instruct_{gsm8k,math500,countdown,sudoku}_{128,512}.jsonl \
        --gold ../shared/data/gsm8k_test.jsonl --list

Reads d1's published form: JSON lines with `question`, `generation`, `ground_truth`; the task is taken from the name of
the file. No model is needed. docs/pages/evaluation_protocols.md shows the result.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trl_diffusion.evaluation import wilson_interval
from trl_diffusion.tasks import TASKS, Task, d1, gsm8k
from trl_diffusion.tasks.answers import last_answer
from trl_diffusion.tasks.latex import how_same
from trl_diffusion.tasks.rows import read_rows
from trl_diffusion.tasks.sudoku import stated_grid

# The scores that are compared; Sudoku's number in d1's tables is the share of cells.
HEADLINES = {"sudoku": "cells_correct"}


@dataclass(frozen=True)
class Difference:
    """A completion that the protocols score differently.

    Args:
        number: its line in the file.
        own: score of the library's own protocol.
        d1: score of d1's.
        read: what the own protocol reads.
        read_by_d1: what d1's reads.
        gold: the right answer.
        reason: why they differ.
    """

    number: int
    own: float
    d1: float
    read: Any
    read_by_d1: Any
    gold: Any
    reason: str


@dataclass(frozen=True)
class Rescored:
    """Scores of one file: total of the headline under both protocols, puzzles solved, and what differs."""

    task: str
    rows: int
    own: float
    d1: float
    solved: float | None
    differences: list[Difference]


def task_of(path: Path) -> Task:
    """The task whose name stands in a file's name.

    Raises:
        ValueError: if there is none.
    """
    for name, task in TASKS.items():
        if name in path.name and task.score_d1 is not None:
            return task
    raise ValueError(f"No task in the file name {path.name!r}; expected one of {', '.join(TASKS)} in it.")


def row_of(task: str, record: dict[str, Any], gold: dict[str, str]) -> dict[str, Any]:
    """The row that a task's scores read.

    Args:
        task: its name.
        record: a line of d1's file.
        gold: GSM8K's answers by question. d1's own are used for d1's score, and where this has none.
    """
    truth = record["ground_truth"]
    if task == "countdown":
        return {"numbers": truth[0], "target": truth[1]}
    if task == "sudoku":
        return {"puzzle": re.findall(r"\d{16}", record["question"])[-1], "solution": truth}
    return {"answer": gold.get(record["question"], truth)}


def rescore(path: Path, gold: dict[str, str]) -> Rescored:
    """Scores of a file under both protocols."""
    task = task_of(path)
    assert task.score_d1 is not None
    name = HEADLINES.get(task.name, "accuracy")
    own = by_d1 = solved = 0.0
    differences = []
    records = read_rows(path, ("question", "generation", "ground_truth"), task.name)
    for number, record in enumerate(records, start=1):
        text, row = record["generation"], row_of(task.name, record, gold)
        d1_row = row_of(task.name, record, {})
        scores, score_d1 = task.score(text, row), task.score_d1(text, d1_row)[name]
        own, by_d1, solved = own + scores[name], by_d1 + score_d1, solved + scores.get("puzzles_solved", 0.0)
        if scores[name] != score_d1:
            read, read_by_d1, reason = EXPLAIN[task.name](text, row, d1_row)
            truth = row.get("answer", row.get("solution", list(row.values())))
            differences.append(Difference(number, scores[name], score_d1, read, read_by_d1, truth, reason))
    return Rescored(task.name, len(records), own, by_d1, solved if task.name == "sudoku" else None, differences)


Explanation = tuple[Any, Any, str]


def explain_gsm8k(text: str, row: dict[str, Any], d1_row: dict[str, Any]) -> Explanation:
    read, number = last_answer(text), d1.read_gsm8k(text)
    if d1_row["answer"] is None:
        reason = "d1 has no gold answer for the question (it is negative)"
    elif number is None:
        reason = "d1 finds no closed box or tags with a number"
    elif len(set(re.findall(r"\\boxed\{([^{}]*)\}", text))) > 1:
        reason = "several boxes: d1 takes the first, own the last"
    else:
        reason = "d1 takes the first digits of the box: up to a comma, a space or an operator"
    return read, number, reason


def explain_math(text: str, row: dict[str, Any], d1_row: dict[str, Any]) -> Explanation:
    read, read_by_d1 = last_answer(text), d1.read_math(text)
    if read_by_d1 is None or "\\boxed" not in text:
        return read, None, "d1 finds no box"
    how = how_same(read or "", row["answer"])
    return (
        read,
        read_by_d1,
        {
            "string": "the same but for layout, units, or a leading name",
            "number": "the same number, written in another way",
            "math-verify": "the same value or meaning by math-verify, another string",
            None: "equal as d1's strings only",
        }[how],
    )


def explain_countdown(text: str, row: dict[str, Any], d1_row: dict[str, Any]) -> Explanation:
    read, read_by_d1 = last_answer(text), d1.read_countdown(text)
    reason = "d1 finds no box" if "\\boxed" not in text else "another expression is read"
    return read, read_by_d1 if "\\boxed" in text else None, reason


def explain_sudoku(text: str, row: dict[str, Any], d1_row: dict[str, Any]) -> Explanation:
    read, read_by_d1, puzzle = stated_grid(text), d1.read_sudoku(text), row["puzzle"]
    if read is None:
        reason = "not 16 digits in 0..4: d1 cuts or pads"
    elif any(clue not in ("0", digit) for clue, digit in zip(puzzle, read, strict=True)):
        reason = "clues were changed: own gives nothing"
    else:
        reason = "the puzzle has another solution that fits better"
    return read, read_by_d1, reason


EXPLAIN: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], Explanation]] = {
    "gsm8k": explain_gsm8k,
    "math500": explain_math,
    "countdown": explain_countdown,
    "sudoku": explain_sudoku,
}


def gold_answers(path: Path | None) -> dict[str, str]:
    """GSM8K's gold answers by question; nothing without a file."""
    if path is None:
        return {}
    rows = read_rows(path, ("question", "answer"), "GSM8K")
    return {row["question"]: gsm8k.extract_answer(row["answer"]) or "" for row in rows}


def percent(score: float, rows: int) -> str:
    low, high = wilson_interval(score, rows)
    return f"{100 * score / rows:.2f} ({100 * low:.1f} – {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON-lines files in d1's form")
    parser.add_argument("--gold", type=Path, help="GSM8K's test file, for questions whose answer d1 could not read")
    parser.add_argument("--list", action="store_true", help="print every completion that is scored differently")
    args = parser.parse_args()
    gold = gold_answers(args.gold)
    results = {path: rescore(path, gold) for path in args.files}

    console = Console()
    table = Table("file", "rows", "score", "d1", "own", "puzzles solved", "differ")
    for path, result in results.items():
        solved = "" if result.solved is None else percent(result.solved, result.rows)
        name = HEADLINES.get(result.task, "accuracy")
        scores = (percent(result.d1, result.rows), percent(result.own, result.rows), solved)
        table.add_row(path.stem, str(result.rows), name, *scores, str(len(result.differences)))
    console.print(table)
    for path, result in results.items():
        for reason, count in Counter(difference.reason for difference in result.differences).most_common():
            console.print(f"{path.stem}: {count} × {escape(reason)}")
        if args.list:
            for found in result.differences:
                console.print(f"  line {found.number}: d1 {found.d1:g}, own {found.own:g}; {escape(found.reason)}")
                console.print(
                    f"    own reads {escape(repr(found.read))}, d1 {escape(repr(found.read_by_d1))}", end="; "
                )
                console.print(f"gold {escape(repr(found.gold))}")


if __name__ == "__main__":
    main()
