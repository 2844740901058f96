"""Score completions that are already on disk under d1's protocol and the library's own, and explain every difference.

Samples that `trl-diffusion evaluate` wrote, all tasks of its output folder that d1 has a protocol for:

    trl-diffusion rescore outputs/evaluation

Outputs that d1 publishes in its repository, and GSM8K's gold answers from the repository of that data set:

    git clone https://github.com/dllm-reasoning/d1
    git clone https://github.com/openai/grade-school-math
    trl-diffusion rescore d1/eval/eval_baselines/gsm8k_instruct_128_64_*.json \\
        --gold grade-school-math/grade_school_math/data/test.jsonl --list

The parts of one run of d1's, one per process, are one row of the table. JSON lines with `question`, `generation` and
`ground_truth` are read too. The task of both is taken from the file's name. No model is needed.
The page "Protocols" of the documentation shows the result.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trl_diffusion.evaluation import wilson_interval
from trl_diffusion.tasks import TASKS, Task, gsm8k
from trl_diffusion.tasks import d1_scores as d1
from trl_diffusion.tasks.parsing.answers import last_answer
from trl_diffusion.tasks.parsing.latex import how_same
from trl_diffusion.tasks.rows import read_rows
from trl_diffusion.tasks.sudoku import stated_grid

# The scores that are compared; Sudoku's number in d1's tables is the share of cells.
HEADLINES = {"sudoku": "cells_correct"}
COMPARED = [name for name, task in TASKS.items() if task.score_d1 is not None]
SAMPLES = "samples.jsonl"  # of trl-diffusion evaluate, next to settings.json
_PART = re.compile(r"(?:_\d+_generations)?\.jsonl?$")  # of d1's files


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


@dataclass(frozen=True)
class Outputs:
    """Completions of one task.

    Args:
        name: what they are called in the table.
        task: the task.
        rows: for every completion its text, and the row that the scores of the own protocol and of d1's read.
    """

    name: str
    task: Task
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]]


def task_of(path: Path) -> Task:
    """The task whose name stands in a file's name.

    Raises:
        ValueError: if there is none.
    """
    for name, task in TASKS.items():
        if name in path.name and task.score_d1 is not None:
            return task
    raise ValueError(f"No task in the file name {path.name!r}; expected one of {', '.join(COMPARED)} in it.")


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


def read_outputs(paths: Sequence[Path], gold: dict[str, str]) -> list[Outputs]:
    """Completions from files and folders; the parts of a run of d1's are put together.

    Args:
        paths: folders that `trl-diffusion evaluate` wrote, their `samples.jsonl`, or files of d1's.
        gold: GSM8K's answers by question, for d1's files.

    Raises:
        ValueError: if a file or folder is none of these.
    """
    outputs: list[Outputs] = []
    parts: dict[str, list[Path]] = {}
    for path in paths:
        if path.is_dir() or path.name == SAMPLES:
            outputs += _evaluated(path)
        else:
            parts.setdefault(_PART.sub("", path.name), []).append(path)
    return outputs + [_published(name, files, gold) for name, files in parts.items()]


def _evaluated(path: Path) -> list[Outputs]:
    """What `trl-diffusion evaluate` wrote into a folder, for the tasks that d1 has a protocol for."""
    files = sorted([*path.glob(SAMPLES), *path.glob(f"*/{SAMPLES}")]) if path.is_dir() else [path]
    outputs = []
    for file in files:
        task = json.loads((file.parent / "settings.json").read_text(encoding="utf-8"))["task"]
        if task in COMPARED:
            samples = read_rows(file, ("completion", "reference"), task)
            rows = [(sample["completion"], sample["reference"], sample["reference"]) for sample in samples]
            outputs.append(Outputs(file.parent.name, TASKS[task], rows))
    if not outputs:
        raise ValueError(
            f"{path} holds no {SAMPLES} of {', '.join(COMPARED)}; expected the output_dir of trl-diffusion evaluate, "
            "or a file of d1's. d1 has no protocol for other tasks."
        )
    return outputs


def _published(name: str, files: list[Path], gold: dict[str, str]) -> Outputs:
    task = task_of(files[0])
    return Outputs(
        name,
        task,
        [
            (record["generation"], row_of(task.name, record, gold), row_of(task.name, record, {}))
            for file in files
            for record in _records(file, task.name)
        ],
    )


def _records(file: Path, task: str) -> list[dict[str, Any]]:
    """Rows with `question`, `generation` and `ground_truth`."""
    if file.suffix == ".jsonl":
        return read_rows(file, ("question", "generation", "ground_truth"), task)
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "generations" not in found:
        raise ValueError(f"{file} has no `generations`; expected a file of d1's `eval/eval_baselines`, or JSON lines.")
    return [{**record, "generation": record["generations"]} for record in found["generations"]]


def rescore(outputs: Outputs) -> Rescored:
    """Scores of completions under both protocols."""
    task = outputs.task
    assert task.score_d1 is not None
    name = HEADLINES.get(task.name, "accuracy")
    own = by_d1 = solved = 0.0
    differences = []
    for number, (text, row, d1_row) in enumerate(outputs.rows, start=1):
        scores, score_d1 = task.score(text, row), task.score_d1(text, d1_row)[name]
        own, by_d1, solved = own + scores[name], by_d1 + score_d1, solved + scores.get("puzzles_solved", 0.0)
        if scores[name] != score_d1:
            read, read_by_d1, reason = EXPLAIN[task.name](text, row, d1_row)
            truth = row.get("answer", row.get("solution", list(row.values())))
            differences.append(Difference(number, scores[name], score_d1, read, read_by_d1, truth, reason))
    return Rescored(task.name, len(outputs.rows), own, by_d1, solved if task.name == "sudoku" else None, differences)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Score and print what differs.

    Args:
        arguments: of the command line, after `rescore`.
    """
    parser = argparse.ArgumentParser(
        "trl-diffusion rescore", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="output folders of trl-diffusion evaluate, or files of d1's",
    )
    parser.add_argument(
        "--gold", type=Path, help="GSM8K's test file, for questions whose answer is missing in d1's files"
    )
    parser.add_argument("--list", action="store_true", help="print every completion that is scored differently")
    args = parser.parse_args(arguments)
    results = {outputs.name: rescore(outputs) for outputs in read_outputs(args.paths, gold_answers(args.gold))}

    # Where there is no terminal, rich would squeeze the table into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("completions", "rows", "score", "d1", "own", "puzzles solved", "differ")
    for name, result in results.items():
        solved = "" if result.solved is None else percent(result.solved, result.rows)
        score = HEADLINES.get(result.task, "accuracy")
        scores = (percent(result.d1, result.rows), percent(result.own, result.rows), solved)
        table.add_row(name, str(result.rows), score, *scores, str(len(result.differences)))
    console.print(table)
    for name, result in results.items():
        for reason, count in Counter(difference.reason for difference in result.differences).most_common():
            console.print(f"{name}: {count} × {escape(reason)}")
        if args.list:
            for found in result.differences:
                console.print(f"  line {found.number}: d1 {found.d1:g}, own {found.own:g}; {escape(found.reason)}")
                console.print(
                    f"    own reads {escape(repr(found.read))}, d1 {escape(repr(found.read_by_d1))}", end="; "
                )
                console.print(f"gold {escape(repr(found.gold))}")


if __name__ == "__main__":
    main()
