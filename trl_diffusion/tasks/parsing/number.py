"""Reads the number that an answer gives: commas, signs, decimals, currencies, units, LaTeX, fractions and sums."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from trl_diffusion.tasks.parsing.arithmetic import LONGEST_EXPRESSION, evaluate_expression, without_latex
from trl_diffusion.tasks.parsing.text import readable

# Text, fonts and boxes around a number: their contents count.
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boxed|fbox)\s*\{([^{}]*)\}")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")
_MIXED_PLAIN = re.compile(r"(?<![\d./])(\d+) (\d+)/(\d+)(?![\d/])")
# A degree sign is no exponent; a power after letters belongs to a unit.
_DEGREES = re.compile(r"\^\s*\{?\s*(?:\\circ|°)\s*\}?")
_UNIT_POWER = re.compile(r"(?<=[a-zA-Z])\s*(?:\^\s*(?:\{\s*-?\d\s*\}|-?\d)|[²³])")
_POWER = re.compile(r"\^|\*\*|[⁰¹²³⁴-⁹]")
_SIGNS = re.compile(r"\\[()\[\]]|\\%|\\\$|[$€£¥%°{}]|\\[;:,! ]|~")
_EQUALS = re.compile(r"=|\\approx|≈")
# Words that change the number before them, and what they multiply it by. A dozen is a unit: "12 dozen" answers "how
# many dozens?".
MAGNITUDES = {
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "lakh": Fraction(10**5),
    "million": Fraction(10**6),
    "crore": Fraction(10**7),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
    "tenth": Fraction(1, 10),
    "hundredth": Fraction(1, 100),
    "thousandth": Fraction(1, 1000),
    "millionth": Fraction(1, 10**6),
}
_MAGNITUDE = re.compile(rf"[\s-]*({'|'.join(MAGNITUDES)})s?(?![a-z])", re.IGNORECASE)
_LETTERS = {"k": Fraction(1000), "M": Fraction(10**6), "B": Fraction(10**9)}
# 18K, $18M, $18B without a space: "18 M" and "18m" are metres.
_LETTER = re.compile(r"\s?([kK])(?![a-zA-Z])|([MB])(?![a-zA-Z])")
_AND_A_PART = re.compile(
    r"(?<![\d.])(\d+)\s+and\s+(?:(?:a|one)[\s-]+(half|quarter)|(three)[\s-]+quarters)\b", re.IGNORECASE
)
_PARTS = {"half": "1/2", "quarter": "1/4", "three": "3/4"}
_MINUS = re.compile(r"\b(?:negative|minus)\s+(?=[\d.$(\\])", re.IGNORECASE)
# Words and signs in front of a number that change it.
_FUNCTION = re.compile(
    r"√|sqrt|\\(?:log|ln|sin|cos|tan|binom|overline|bar)\b"
    r"|\b(?:(?:half|third|quarter|square|cube|root|logarithm|reciprocal)\s+of|twice|double|triple)\s+(?:the\s+)?[\d$(\\]",
    re.IGNORECASE,
)

# As long as possible from digit to digit, with a sign or bracket before: "about 12 + 3 apples" has one.
_RUN = re.compile(r"(?:(?<!\w)[-+(][-+( ]*)?(?:\d|\.\d)(?:[-+*/(). ]*(?:\d|\.\d|[)]))*")


def parse_number(answer: str) -> Fraction | None:
    """Return the exact number that an answer of a few words gives.

    After an equals sign only the last side counts. An expression is evaluated. Words are passed over, as long as one
    number or expression stands among them: `$1,234.50 per day`, `12 apples` and `\\frac{1}{2}\\text{ hour}` are
    numbers, `2 hours and 30 minutes` is none. Words that change the number are read (`1.8 million`, `18K`, `2 and a
    half`, `minus 3`), or nothing is (`half of 36`).

    Args:
        answer: what `last_answer` found.

    Returns:
        The number, or `None` if there is none or more than one, for a power, or for more than 200 characters.
    """
    if len(answer) > LONGEST_EXPRESSION:
        return None
    text = _vulgar_fractions(readable(answer))
    for _ in range(3):  # wrappers in wrappers
        text = _WRAPPER.sub(r" \1 ", text)
    sides = [side for side in _EQUALS.split(text) if any(character.isdigit() for character in side)]
    if not sides:
        return None
    text = _MIXED.sub(r"(\1+\2/\3)", sides[-1])
    text = _UNIT_POWER.sub("", _DEGREES.sub("", text))
    if _POWER.search(text) or _FUNCTION.search(text):
        return None
    text = _SIGNS.sub(" ", without_latex(_spaced(_parts_and_signs(text))))
    text = _MIXED_PLAIN.sub(r"(\1+\2/\3)", text).strip(" ,:;").rstrip(".")
    value = evaluate_expression(text)
    if value is not None:
        return value
    runs = list(_RUN.finditer(text))
    if len(runs) != 1:
        return None
    value = evaluate_expression(_balanced(runs[0].group()))
    return None if value is None else value * _magnitude(text[runs[0].end() :])


def _vulgar_fractions(text: str) -> str:
    """Write `½` as `1/2`."""
    return text if text.isascii() else "".join(map(_as_fraction, text))


def _as_fraction(character: str) -> str:
    numerator, slash, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
    return f" {numerator}/{denominator} " if slash and denominator else character


def _parts_and_signs(text: str) -> str:
    """Write `2 and a half` as `(2+1/2)`, and `minus 3` as `-3`."""
    text = _AND_A_PART.sub(lambda found: f"({found[1]}+{_PARTS[(found[2] or found[3]).lower()]})", text)
    return _MINUS.sub("-", text)


def _magnitude(text: str) -> Fraction:
    """Return the factor that a text's first words give the number before it: 1000 for ` thousand dollars`."""
    if letter := _LETTER.match(text):
        return _LETTERS[letter[1].lower() if letter[1] else letter[2]]
    factor, position = Fraction(1), 0
    while word := _MAGNITUDE.match(text, position):
        factor, position = factor * MAGNITUDES[word[1].lower()], word.end()
    return factor


def _spaced(text: str) -> str:
    """Remove LaTeX's thin spaces between digits, its thousands separators; other backslashes stay."""
    return re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", "", text)


def _balanced(run: str) -> str:
    """Remove brackets at the ends that have no partner, as in `(about 12` and `12)`."""
    run = run.strip()
    while run.startswith("(") and run.count("(") > run.count(")"):
        run = run[1:]
    while run.endswith(")") and run.count(")") > run.count("("):
        run = run[:-1]
    return run
