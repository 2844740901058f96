"""GSM8K (2110.14168): grade-school word problems whose answer stands on a last line `#### n`."""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

INSTRUCTION = "Solve the problem step by step. End with a last line `#### n`, where n is the answer as a number."

# A completion is what TRL hands to a reward function: text, or messages.
Completion = str | list[dict[str, Any]] | None

# math-verify warns once that its timeouts are off; see `same_answer` for why they are.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_ANSWER_LINE = re.compile(r"####[ \t]*(.*)")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(/\d+)?")
_BOXED = re.compile(r"\\boxed\s*\{(.*)\}")
_UNIT = re.compile(r"(?<=\d)\s+[a-zA-Z][a-zA-Z ]*$")
# Powers, factorials and other functions can keep sympy busy for hours, so only fractions and roots reach it.
_SAFE_EXPRESSION = re.compile(r"(?:[-+*/(){}.%=\s]|\d{1,15}(?!\d)|\\(?:[dt]?frac|sqrt|cdot|times|div|%))*")
_LONGEST_EXPRESSION = 64


def load_gsm8k(
    path_or_id: str | Path = "openai/gsm8k",
    split: str = "train",
    instruction: str = INSTRUCTION,
    limit: int | None = None,
) -> Dataset:
    """GSM8K, or any data set with its columns, as conversational prompts.

    Args:
        path_or_id: a data set on the Hub, or a local JSON-lines file with `question` and `answer`.
        split: split of the data set on the Hub; a local file has only one, which is taken whatever the split.
        instruction: put before every question; an empty string for none.
        limit: keep the first rows only.

    Returns:
        Columns `prompt` (one user message), `answer` (the gold number as a string, without commas), `completion` (one
        assistant message: the worked solution, for supervised training).

    Raises:
        FileNotFoundError: if a path to a JSON-lines file does not exist.
        ValueError: if `question` or `answer` is missing, or an answer has no `#### n`.
    """
    if str(path_or_id).endswith((".jsonl", ".json")):
        if not Path(path_or_id).is_file():
            raise FileNotFoundError(f"No GSM8K file at {path_or_id}; give a JSON-lines file or a Hub data set id.")
        rows = load_dataset("json", data_files=str(path_or_id), split="train")
    else:
        rows = load_dataset(str(path_or_id), "main", split=split)
    if missing := {"question", "answer"} - set(rows.column_names):
        raise ValueError(
            f"{path_or_id} has columns {sorted(rows.column_names)}, but GSM8K needs `question` and `answer`: "
            f"{sorted(missing)} missing; rename the columns or use a file in GSM8K's format."
        )
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return rows.map(lambda row: _as_row(row, instruction), remove_columns=rows.column_names)


def _as_row(row: dict[str, Any], instruction: str) -> dict[str, Any]:
    gold = extract_answer(row["answer"])
    if gold is None:
        raise ValueError(f"GSM8K answer without `#### n`: {row['answer'][-80:]!r}; expected the gold number there.")
    question = f"{instruction}\n\n{row['question']}" if instruction else row["question"]
    return {
        "prompt": [{"role": "user", "content": question}],
        "answer": gold,
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def completion_text(completion: Completion) -> str:
    """The text of a completion in any of TRL's forms; an empty string for none."""
    if not completion:
        return ""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "")


def extract_answer(text: str) -> str | None:
    """What follows the last `####`, without dollar signs, commas between digits, `\\boxed{}` and trailing dots.

    Returns:
        The answer, or `None` if there is no `####` with something behind it.
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
    """Whether two answers are the same number.

    Plain numbers are compared exactly, with or without a unit (`12 apples`). Everything else goes to math-verify
    without its timeouts, which are signal alarms and fail outside of the main thread: only short expressions without
    powers get there instead.

    Args:
        given: the extracted answer, or `None`.
        gold: the right one.
    """
    if given is None:
        return False
    if given == gold:
        return True
    given = _UNIT.sub("", given)
    number, right = _number(given), _number(gold)
    if number is not None and right is not None:
        return number == right
    if len(given) > _LONGEST_EXPRESSION or not _SAFE_EXPRESSION.fullmatch(given):
        return False
    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    parsed = [parse(f"${text}$", targets, parsing_timeout=None) for text in (gold, given)]
    return bool(verify(*parsed, timeout_seconds=None))


def _number(text: str) -> Fraction | None:
    if len(text) > _LONGEST_EXPRESSION or not _NUMBER.fullmatch(text):
        return None
    numerator, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        return None
    return Fraction(numerator) / int(denominator or 1)


def correctness_reward(completions: list[Completion], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for every completion whose last `#### n` equals the gold answer, else 0.

    Args:
        completions: texts or messages.
        answer: gold answers, same length.
    """
    return [
        float(same_answer(extract_answer(completion_text(completion)), str(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def format_reward(completions: list[Completion], **kwargs: Any) -> list[float]:
    """1 for every completion with exactly one `####`, on its last line and followed by a number, else 0."""
    return [float(_well_formed(completion_text(completion))) for completion in completions]


def _well_formed(text: str) -> bool:
    lines = text.strip().splitlines()
    if text.count("####") != 1 or not lines[-1].startswith("####"):
        return False
    answer = extract_answer(lines[-1])
    return answer is not None and _number(answer) is not None
