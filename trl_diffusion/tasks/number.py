"""The number that an answer gives: with commas, signs, decimals, currencies, units, LaTeX, as a fraction or a sum."""

from __future__ import annotations

import re
from fractions import Fraction

from trl_diffusion.tasks.arithmetic import LONGEST_EXPRESSION, evaluate_expression, without_latex
from trl_diffusion.tasks.text import readable

# Text, fonts and boxes around a number: their contents count.
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boxed|fbox)\s*\{([^{}]*)\}")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
_MIXED_PLAIN = re.compile(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])")
# A degree sign is no exponent; a power behind letters belongs to a unit.
_DEGREES = re.compile(r"\^\s*\{?\s*(?:\\circ|°)\s*\}?")
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z])\s*(?:\^\s*(?:\{\s*-?\d\s*\}|-?\d)|[²³])")
_POWER = re.compile(r"\^|\*\*|[⁰¹²³⁴-⁹]")
_SIGNS = re.compile(r"\\[()\[\]]|\\%|\\\$|[$€£¥%°{}]|\\[;:,! ]|~")
_EQUALS = re.compile(r"=|\\approx|≈")
# As long as possible from digit to digit, with a sign or bracket before: "about 12 + 3 apples" has one.
_RUN = re.compile(r"(?:(?<!\w)[-+(][-+( ]*)?(?:\d|\.\d)(?:[-+*/(). ]*(?:\d|\.\d|[)]))*")


def parse_number(answer: str) -> Fraction | None:
    """The exact number that an answer of a few words gives.

    Behind an equals sign only the last side counts. An expression is evaluated. Words are passed over, as long as one
    number or expression stands among them: `$1,234.50 per day`, `12 apples` and `\\frac{1}{2}\\text{ hour}` are
    numbers, `2 hours and 30 minutes` is none.

    Args:
        answer: what `last_answer` found.

    Returns:
        The number, or `None` if there is none or more than one, for a power, or for more than 200 characters.
    """
    if len(answer) > LONGEST_EXPRESSION:
        return None
    text = readable(answer)
    for _ in range(3):  # wrappers in wrappers
        text = _WRAPPER.sub(r" \1 ", text)
    sides = [side for side in _EQUALS.split(text) if any(character.isdigit() for character in side)]
    if not sides:
        return None
    text = _MIXED.sub(r"(\1+\2/\3)", sides[-1])
    text = _UNIT_POWER.sub("", _DEGREES.sub("", text))
    if _POWER.search(text):
        return None
    text = _SIGNS.sub(" ", without_latex(_spaced(text)))
    text = _MIXED_PLAIN.sub(r"(\1+\2/\3)", text).strip(" ,:;").rstrip(".")
    value = evaluate_expression(text)
    if value is not None:
        return value
    runs = _RUN.findall(text)
    return evaluate_expression(_balanced(runs[0])) if len(runs) == 1 else None


def _spaced(text: str) -> str:
    """LaTeX's thin spaces between digits are thousands separators; other backslashes stay."""
    return re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", "", text)


def _balanced(run: str) -> str:
    """Without brackets at the ends that have no partner, as in `(about 12` and `12)`."""
    run = run.strip()
    while run.startswith("(") and run.count("(") > run.count(")"):
        run = run[1:]
    while run.endswith(")") and run.count(")") > run.count("("):
        run = run[:-1]
    return run
