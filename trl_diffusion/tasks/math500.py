"""MATH (2103.03874): competition problems, its training split to train on and MATH-500 (2305.20050) to test on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Value

from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks import d1_scores as d1
from trl_diffusion.tasks.parsing.answers import last_answer
from trl_diffusion.tasks.parsing.latex import same_latex
from trl_diffusion.tasks.parsing.text import Completion, completion_text
from trl_diffusion.tasks.rows import check_split, read_rows
from trl_diffusion.tasks.task import EMBEDDED, Task

TRAIN_ID = "EleutherAI/hendrycks_math"
TEST_ID = "HuggingFaceH4/MATH-500"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
INSTRUCTION = "Solve the problem step by step. Put the final answer into \\boxed{}."


def load_math(
    split: str = "train",
    path_or_id: str | Path | None = None,
    exclude: str | Path | None = None,
    limit: int | None = None,
    prompt: str = prompts.PLAIN,
) -> Dataset:
    """Load MATH's training split without any problem of MATH-500, or MATH-500.

    Args:
        split: `"train"` or `"test"`.
        path_or_id: a JSON-lines file with `problem` and `answer` or `solution`, or a data set on the Hub; MATH's or
            MATH-500 if not given.
        exclude: a file or Hub data set whose problems are left out of the training split, compared without white space
            and capitals. MATH-500 if neither it nor `path_or_id` is given; a training file of one's own is only
            checked against what is given here.
        limit: keep the first rows only.
        prompt: `"plain"`, `"d1"` or `"d1_train"`; see `trl_diffusion.tasks.d1_prompts`.

    Returns:
        Columns `prompt`, `answer` (LaTeX), `problem`, `completion` (one assistant message: the solution).

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: for another split or prompt, a missing column or answer.
    """
    check_split(split, "MATH")
    prompts.check(prompt)
    rows = _read(path_or_id, split)
    if split == "train":
        if exclude is None and path_or_id is None:
            exclude = TEST_ID
        if exclude is not None:
            rows = _without(rows, _read(exclude, "test"))
    return Dataset.from_list([_as_row(row, prompt) for row in rows[:limit]])


def _read(path_or_id: str | Path | None, split: str) -> list[dict[str, Any]]:
    if path_or_id is None and split == "train":
        return [row for subject in SUBJECTS for row in _rows(TRAIN_ID, split, subject)]
    return _rows(path_or_id or TEST_ID, split)


def _rows(source: str | Path, split: str, name: str | None = None) -> list[dict[str, Any]]:
    return read_rows(source, ("problem",), "MATH", split, name, optional=("solution", "answer"))


def _without(rows: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {_identity(row) for row in others}
    return [row for row in rows if _identity(row) not in known]


def _identity(row: dict[str, Any]) -> str:
    return "".join(row["problem"].split()).lower()


def _as_row(row: dict[str, Any], prompt: str) -> dict[str, Any]:
    problem, solution = row["problem"], row.get("solution") or ""
    gold = row.get("answer") or last_answer(solution)
    if not gold:
        raise ValueError(
            f"MATH problem without an answer: {problem[:80]!r}; expected `answer` or a box in `solution`."
        )
    plain = prompt == prompts.PLAIN
    return {
        "prompt": prompts.user(f"{INSTRUCTION}\n\n{problem}") if plain else prompts.math(problem, prompt),
        "answer": gold,
        "problem": problem,
        "completion": [{"role": "assistant", "content": solution or f"\\boxed{{{gold}}}"}],
    }


def correctness_reward(
    completions: list[Completion], answer: list[str | None], log_extra: Callable | None = None, **kwargs: Any
) -> list[float | None]:
    """Return 1 for every completion whose last stated answer means the same as the gold one, else 0.

    Args:
        completions: texts or messages.
        answer: gold answers in LaTeX, same length; `None`, in a mixture of tasks, where there is none: no reward.
        log_extra: TRL's; the answers found are logged as `extracted_answer`.
    """
    given = [last_answer(completion_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("extracted_answer", [found or "" for found in given])
    return [None if gold is None else float(_right(found, gold)) for found, gold in zip(given, answer, strict=True)]


def _right(given: str | None, gold: str) -> bool:
    return given is not None and same_latex(given, str(gold))


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """Return 1 for every completion that states an answer (a box, answer tags or `####`), else 0."""
    return [float(last_answer(completion_text(completion)) is not None) for completion in completions]


def score(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `accuracy` (the answer stated last means the same as `row["answer"]`) and `format` (there is one)."""
    given = last_answer(text)
    return {
        "accuracy": float(_right(given, row["answer"])),
        "format": float(given is not None),
    }


def load(
    split: str, source: str | None = None, limit: int | None = None, prompt: str = prompts.PLAIN, seed: int = 0
) -> Dataset:
    """See `trl_diffusion.tasks.Task`; there is no generator."""
    if source == EMBEDDED:
        raise ValueError("math500 has no embedded data; give a JSON-lines file with `problem` and `solution`.")
    return load_math(split, source, limit=limit, prompt=prompt)


TASK = Task(
    name="math500",
    description="Share of MATH problems whose answer, the one stated last, means the same as the gold one.",
    load=load,
    score=score,
    rewards=(correctness_reward, format_reward),
    columns={"answer": Value("string")},
    score_d1=d1.score_math,
    prompts=prompts.NAMES,
    hub_id=TRAIN_ID,
)
