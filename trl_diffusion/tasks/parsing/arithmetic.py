"""Evaluates expressions that a network wrote, exactly: numbers, `+ - * /` and brackets, and nothing else.

There is no `eval` here and no recursion. Powers, integer division and names are refused, and so are long or deeply
nested expressions, so no text costs more than a fraction of a millisecond.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from trl_diffusion.tasks.parsing.text import readable

LONGEST_EXPRESSION = 200
LONGEST_NUMBER = 30
DEEPEST_NESTING = 20

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
# A letter x between two numbers or brackets.
_TIMES = re.compile(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])")
_LATEX = {
    r"\times": "*",
    r"\cdot": "*",
    r"\ast": "*",
    r"\div": "/",
    r"\left": "",
    r"\right": "",
    r"\,": "",
    r"\!": "",
    r"\;": " ",
    r"\ ": " ",
    "{,}": ",",
    r"\*": "*",
    r"\(": " ",
    r"\)": " ",
    r"\[": " ",
    r"\]": " ",
    r"\$": "",
    "$": "",
    "[": "(",
    "]": ")",
}
# Binary operators bind as usual; a sign binds tighter than all of them.
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "sign": 3}


@dataclass(frozen=True)
class Expression:
    """An expression that could be read.

    Args:
        value: its exact value; `None` if it divides by zero.
        numbers: the numbers in it, as written, from left to right.
    """

    value: Fraction | None
    numbers: tuple[Fraction, ...]


def evaluate_expression(text: str) -> Fraction | None:
    """Return the exact value of an expression of numbers, `+ - * /` (also `−`, `×`, `x`, `÷`, LaTeX's) and brackets.

    Args:
        text: anything, for example what a network wrote.

    Returns:
        The value, or `None` for anything else than such an expression, a division by zero, more than 200 characters or
        20 nested brackets.
    """
    expression = parse_expression(text)
    return None if expression is None else expression.value


def parse_expression(text: str) -> Expression | None:
    """Return value and numbers of an expression, or `None` if it is none; see `evaluate_expression`."""
    if len(text) > LONGEST_EXPRESSION:
        return None
    tokens = _tokenize(without_latex(readable(text)).strip())
    if not tokens:
        return None
    numbers = tuple(Fraction(token) for token in tokens if token[-1] not in "+-*/()")
    try:
        return Expression(_evaluate(tokens), numbers)
    except ZeroDivisionError:
        return Expression(None, numbers)
    except SyntaxError:
        return None


def without_latex(text: str) -> str:
    """Write LaTeX's operators, fractions and spaces as plain ones, without thousands separators."""
    text = _THOUSANDS.sub("", text.replace("{,}", ","))
    if "\\" in text:
        for _ in range(DEEPEST_NESTING):  # from the inside outwards
            text, found = _FRACTION.subn(_as_division, text)
            if not found:
                break
    for latex, plain in _LATEX.items():
        text = text.replace(latex, plain)
    return _TIMES.sub("*", text)


def _as_division(found: re.Match[str]) -> str:
    numerator, denominator = found[1] or found[2] or "", found[3] or found[4] or ""
    return f"(({numerator})/({denominator}))"


def _tokenize(text: str) -> list[str] | None:
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(match[1]) > LONGEST_NUMBER:
            return None
        tokens.append(match[1].rstrip("."))
        position = match.end()
    return tokens


def _evaluate(tokens: list[str]) -> Fraction:
    """Two stacks, after Dijkstra's shunting yard."""
    values: list[Fraction] = []
    waiting: list[str] = []
    operand_next = True
    for token in tokens:
        if token == "(":
            if not operand_next or waiting.count("(") == DEEPEST_NESTING:
                raise SyntaxError("a bracket where an operator belongs, or too deep")
            waiting.append(token)
        elif token == ")":
            if operand_next:
                raise SyntaxError("a closing bracket where a number belongs")
            while waiting and waiting[-1] != "(":
                _apply(values, waiting.pop())
            if not waiting:
                raise SyntaxError("a closing bracket that was never opened")
            waiting.pop()
        elif token in ("+", "-") and operand_next:
            # A sign waits for its operand; plus signs change nothing.
            if token == "-":
                waiting.append("sign")
        elif token in _BINDING:
            if operand_next:
                raise SyntaxError("an operator where a number belongs")
            while waiting and waiting[-1] != "(" and _BINDING[waiting[-1]] >= _BINDING[token]:
                _apply(values, waiting.pop())
            waiting.append(token)
            operand_next = True
        else:
            if not operand_next:
                raise SyntaxError("a number where an operator belongs")
            values.append(Fraction(token))
            operand_next = False
    if operand_next or "(" in waiting:
        raise SyntaxError("the expression is not finished")
    while waiting:
        _apply(values, waiting.pop())
    return values[0]


def _apply(values: list[Fraction], operator: str) -> None:
    right = values.pop()
    if operator == "sign":
        values.append(-right)
        return
    left = values.pop()
    if operator == "+":
        values.append(left + right)
    elif operator == "-":
        values.append(left - right)
    elif operator == "*":
        values.append(left * right)
    else:
        values.append(left / right)
