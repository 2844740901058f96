"""Scores completions by the rules of d1 (2504.12216), which other published tables follow too.

Published numbers can be compared under these rules only. They are not the library's own: they take the first box of a
GSM8K answer and the first number in it, read equations out of the whole text where there is no answer, cut or pad
Sudoku grids, and compare MATH answers as strings. The page on evaluation protocols lists what that changes.

Three things differ on purpose. Countdown expressions are evaluated exactly and without Python's `eval`, and `**` and
`//` are refused. Only the first 100,000 characters are read. A completion that was decoded without special tokens ends
where its text ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from trl_diffusion.tasks.parsing.arithmetic import LONGEST_NUMBER, evaluate_expression
from trl_diffusion.tasks.parsing.text import LONGEST_TEXT

CELLS = 16

_NUMBER = re.compile(r"-?\d+\.?\d*")
_CODE = re.compile(r"[\d\s]+")
_GRID_BEFORE_TAG = re.compile(r"(\d{16})\s*</answer>")
_GRID = re.compile(r"\b(\d{16})\b")
_ENDS = ("<|eot_id|>", "<|endoftext|>")


def score_gsm8k(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `accuracy`, 1 if d1 reads the number in `row["answer"]` (`None`: d1 could not read the gold answer)."""
    given, gold = read_gsm8k(text), row["answer"]
    return {"accuracy": float(given is not None and gold is not None and given == _float(str(gold)))}


def read_gsm8k(text: str) -> float | None:
    """Return the number of the first box that has one, else the last number between answer tags."""
    text = text[:LONGEST_TEXT]
    for box in _boxes_on_a_line(text):
        box = box.strip()
        if box.strip("."):
            number = _float(box)
            if number is None:
                found = _NUMBER.search(box)
                number = _float(found.group()) if found else None
            if number is not None:
                return number
    answer = _between_tags(text)
    if not answer:
        return None
    number = _float(answer)
    if number is None and (numbers := _NUMBER.findall(answer)):
        number = _float(numbers[-1])
    return number


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _boxes_on_a_line(text: str) -> Iterator[str]:
    """Yield the text between `\\boxed{` and the next `}`, where both stand on one line."""
    at = 0
    while (start := text.find("\\boxed{", at)) >= 0:
        start += len("\\boxed{")
        end = text.find("}", start)
        if end < 0:
            return
        at = start
        if text.find("\n", start, end) < 0:
            yield text[start:end]
            at = end + 1


def _between_tags(text: str) -> str | None:
    """Return the text between the first `<answer>` and the next `</answer>`."""
    _, opened, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed else None


def _last_box(text: str) -> str | None:
    """Return the contents of the last box, or what follows `\\boxed` and a space.

    Without any box this is the whole text, so that answer tags are never looked at. If the braces of the last box do
    not balance, it is `None`.
    """
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$", 1)[0]
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox") if "\\boxed" not in text else -1)
    if start < 0:
        return text
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            box = text[start : start + brace.end()]
            return box[len("\\boxed{") : -1] if box.startswith("\\boxed{") else box
    return None


def score_math(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `accuracy`, 1 if the last box, else the text between answer tags, is `row["answer"]` as a MATH string."""
    answer = read_math(text)
    return {"accuracy": float(answer is not None and same_math_string(answer, row["answer"]))}


def read_math(text: str) -> str | None:
    """Return the last box, else the text between answer tags; the whole text where there is no box at all."""
    text = text[:LONGEST_TEXT]
    return _last_box(text) or _between_tags(text)


def same_math_string(given: str, gold: str) -> bool:
    """Return whether two answers are the same string after the normalisation of the MATH data set (2103.03874).

    Where the normalisation of either fails, the strings themselves are compared.
    """
    try:
        return normal_math_string(given) == normal_math_string(gold)
    except ValueError:
        return given == gold


def normal_math_string(text: str) -> str:
    """Return an answer without layout, units, percent and degree signs, and with braces in fractions and roots.

    Raises:
        ValueError: for more than one `\\text{ `, a root or fraction of nothing, or a slash between other things than
            two whole numbers.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    for size in ("tfrac", "dfrac"):
        text = text.replace(size, "frac")
    for layout in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(layout, "")
    if "\\text{ " in text:
        text, *units = text.split("\\text{ ")
        if len(units) != 1:
            raise ValueError("more than one unit")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    if text.count("/") != 1:
        return text
    numerator, denominator = (int(number) for number in text.split("/"))
    return f"\\frac{{{numerator}}}{{{denominator}}}" if text == f"{numerator}/{denominator}" else text


def _braced_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    if not all(rest):
        raise ValueError("a root of nothing")
    return first + "".join(f"\\sqrt{part if part[0] == '{' else '{' + part[0] + '}' + part[1:]}" for part in rest)


def _braced_fractions(text: str) -> str:
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if not part:
            raise ValueError("a fraction of nothing")
        if part[0] != "{":
            if len(part) < 2:
                return text
            numerator, denominator = part[0], part[1]
            part = f"{{{numerator}}}" + (denominator if denominator == "{" else f"{{{denominator}}}") + part[2:]
        parts.append(part)
    return "\\frac".join(parts)


def score_countdown(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `accuracy`, 1 if d1's equation uses `row["numbers"]`, each once, and makes `row["target"]`."""
    equation = read_countdown(text)
    # Longer numbers than these are never right, and Python refuses to read thousands of digits.
    numbers = re.findall(r"\d+", equation)
    readable = all(len(number) <= LONGEST_NUMBER for number in numbers)
    if not readable or sorted(map(int, numbers)) != sorted(row["numbers"]):
        return {"accuracy": 0.0}
    value = evaluate_expression(equation) if re.fullmatch(r"[\d+\-*/().\s]+", equation) else None
    return {"accuracy": float(value is not None and abs(value - row["target"]) < 1e-5)}


def read_countdown(text: str) -> str:
    """Return the last box, else the text between answer tags, else all of it; of an equation, its left side."""
    text = text[:LONGEST_TEXT]
    equation = _last_box(text)
    if equation is None:
        equation = _between_tags(text)
    if equation is None:
        equation = text
    for latex, plain in ((r"\div", "/"), (r"\times", "*"), (r"\cdot", "*")):
        equation = equation.replace(latex, plain)
    # `[0-9+\-*/() ]+=[0-9. ]+` as a regular expression takes quadratic time on a long run of digits.
    sides = equation.split("=")
    for left, right in pairwise(sides):
        expression = left[len(left.rstrip("0123456789+-*/() ")) :]
        if expression and right and right[0] in "0123456789. ":
            return expression.strip()
    return equation


def score_sudoku(text: str, row: dict[str, Any]) -> dict[str, float]:
    """Return `cells_correct`, the number in d1's tables: the share of blanks with the digit of the published solution.

    Puzzles can have other solutions, which d1 does not count; the library's own score does.

    `puzzles_solved`, which d1 does not report, is 1 if that holds for all blanks.
    """
    grid = re.sub(r"\s", "", read_sudoku(text)).ljust(CELLS, "0")
    blanks = [cell for cell, digit in enumerate(row["puzzle"]) if digit == "0"]
    right = sum(grid[cell] == row["solution"][cell] for cell in blanks)
    share = right / len(blanks) if blanks else 0.0
    return {"cells_correct": share, "puzzles_solved": float(share == 1)}


def read_sudoku(text: str) -> str:
    """Return the contents of the first of five places that holds anything: not always digits, and not always 16."""
    text = text[:LONGEST_TEXT]
    for found in (_code_block, _open_answer, _after_answer):
        if answer := found(text).strip():
            return answer
    for pattern in (_GRID_BEFORE_TAG, _GRID):
        if grid := pattern.search(text):
            return grid[1]
    return ""


def _code_block(text: str) -> str:
    _, _, rest = text.partition("<answer>")
    at = 0
    while (start := rest.find("```", at)) >= 0:
        at = start + 1
        digits = _CODE.match(rest, start + 3)
        if digits and rest.startswith("```", digits.end()):
            return digits.group()
    return ""


def _open_answer(text: str) -> str:
    return _until_end(text.partition("<answer>")[2], (*_ENDS, "</answer>"))


def _after_answer(text: str) -> str:
    return _until_end(text.partition("</answer>")[2], _ENDS)


def _until_end(text: str, ends: tuple[str, ...]) -> str:
    return text[: min((text.find(end) for end in ends if end in text), default=len(text))]
