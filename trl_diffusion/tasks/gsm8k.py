"""GSM8K (2110.14168): grade-school word problems whose answer is a number.

The data set writes the answer on a last line `#### n`, and the plain prompt asks for the same. d1's prompts ask for
`\\boxed{n}` between answer tags. Rewards and scores read all of these; the answer stated last counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Value

from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks import d1_scores as d1
from trl_diffusion.tasks.parsing.answers import last_answer
from trl_diffusion.tasks.parsing.number import parse_number
from trl_diffusion.tasks.parsing.text import Completion, completion_text
from trl_diffusion.tasks.rows import check_split, read_rows
from trl_diffusion.tasks.task import EMBEDDED, Task

HUB_ID = "openai/gsm8k"
INSTRUCTION = "Solve the problem step by step. End with a last line `#### n`, where n is the answer as a number."

_ANSWER_LINE = re.compile(r"####[ \t]*(.*)")
_BOXED = re.compile(r"\\boxed\s*\{(.*)\}")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(/[0-9]+)?")


def load_gsm8k(
    path_or_id: str | Path = HUB_ID,
    split: str = "train",
    instruction: str = INSTRUCTION,
    limit: int | None = None,
    prompt: str = prompts.PLAIN,
) -> Dataset:
    """Load GSM8K, or any data set with its columns, as conversational prompts.

    Args:
        path_or_id: a data set on the Hub, or a local JSON-lines file with `question` and `answer`.
        split: split of the data set on the Hub; a local file has only one, which is taken whatever the split.
        instruction: put before every question of the plain prompt; an empty string for none.
        limit: keep the first rows only.
        prompt: `"plain"`, `"d1"` (d1's evaluation) or `"d1_train"`; see `trl_diffusion.tasks.d1_prompts`.

    Returns:
        Columns `prompt` (one user message; with `"d1"` also the beginning of an answer), `answer` (the gold number as
        a string, without commas), `completion` (one assistant message: the worked solution, for supervised training).

    Raises:
        FileNotFoundError: if a path to a JSON-lines file does not exist.
        ValueError: if a line is not JSON, `question` or `answer` is missing, an answer has no `#### n`, or there is no
            such prompt.
    """
    prompts.check(prompt)
    rows = read_rows(path_or_id, ("question", "answer"), "GSM8K", split, name="main")

    def write(question: str) -> prompts.Prompt:
        if prompt != prompts.PLAIN:
            return prompts.gsm8k(question, prompt)
        return prompts.user(f"{instruction}\n\n{question}" if instruction else question)

    return Dataset.from_list([_as_row(row, write) for row in rows[:limit]])


def _as_row(row: dict[str, Any], write: Callable[[str], prompts.Prompt]) -> dict[str, Any]:
    gold = extract_answer(row["answer"])
    if gold is None:
        raise ValueError(f"GSM8K answer without `#### n`: {row['answer'][-80:]!r}; expected the gold number there.")
    return {
        "prompt": write(row["question"]),
        "answer": gold,
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def extract_answer(text: str) -> str | None:
    """Return what follows the last `####`, without dollar signs, commas between digits, `\\boxed{}` and trailing dots.

    The data set writes its gold answers so. A completion may state its answer otherwise; `last_answer` reads it.

    Returns:
        The answer, or `None` if there is no `####` with something after it.
    """
    found = _ANSWER_LINE.findall(text)
    if not found:
        return None
    answer = found[-1].replace("\\$", "").replace("$", "").strip()
    if boxed := _BOXED.search(answer):
        answer = boxed.group(1).strip()
    answer = re.sub(r"(?<=\d),(?=\d)", "", answer).rstrip(" .")
    return answer or None


def same_answer(given: str | None, gold: str) -> bool:
    """Return whether two answers are the same number, as `trl_diffusion.tasks.parsing.number` reads them.

    Args:
        given: the stated answer, or `None`.
        gold: the right one.
    """
    if given is None:
        return False
    if given == gold:
        return True
    number = parse_number(given)
    return number is not None and number == parse_number(gold)


def correctness_reward(
    completions: list[Completion], answer: list[str | None], log_extra: Callable | None = None, **kwargs: Any
) -> list[float | None]:
    """Return 1 for every completion whose last answer (`#### n`, `\\boxed{n}` or tags) is the gold number, else 0.

    Args:
        completions: texts or messages.
        answer: gold answers, same length; `None`, in a mixture of tasks, where there is none: no reward there.
        log_extra: TRL's; the answers found are logged as `extracted_answer`.
    """
    given = [last_answer(completion_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("extracted_answer", [found or "" for found in given])
    return [
        None if gold is None else float(same_answer(found, str(gold)))
        for found, gold in zip(given, answer, strict=True)
    ]


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """Return 1 for every completion with exactly one `####`, on its last line and followed by a number, else 0."""
    return [float(_well_formed(completion_text(completion))) for completion in completions]


def _well_formed(text: str) -> bool:
    lines = text.strip().splitlines()
    if text.count("####") != 1 or not lines[-1].startswith("####"):
        return False
    answer = extract_answer(lines[-1])
    return answer is not None and _NUMBER.fullmatch(answer) is not None


def score(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `accuracy` (the answer stated last is the number in `row["answer"]`) and `format` (it is a number)."""
    given = last_answer(text)
    return {
        "accuracy": float(same_answer(given, str(row["answer"]))),
        "format": float(given is not None and parse_number(given) is not None),
    }


def load(
    split: str, source: str | None = None, limit: int | None = None, prompt: str = prompts.PLAIN, seed: int = 0
) -> Dataset:
    """See `trl_diffusion.tasks.Task`; there is no generator, `word_problems` stands for it offline."""
    if source == EMBEDDED:
        raise ValueError("gsm8k has no embedded data; the task `word_problems` generates problems in its format.")
    return load_gsm8k(source or HUB_ID, check_split(split, "GSM8K"), limit=limit, prompt=prompt)


TASK = Task(
    name="gsm8k",
    description="Share of GSM8K problems whose answer, the one stated last, is the gold number.",
    load=load,
    score=score,
    rewards=(correctness_reward, format_reward),
    columns={"answer": Value("string")},
    score_d1=d1.score_gsm8k,
    prompts=prompts.NAMES,
    hub_id=HUB_ID,
)
