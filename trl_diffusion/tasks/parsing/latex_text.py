"""Writes mathematical answers in one spelling, where LaTeX and plain text have many, and compares them as strings."""

from __future__ import annotations

import re
import unicodedata

from trl_diffusion.tasks.parsing.number import MAGNITUDES

# What other alphabets, keyboards and programs write, in LaTeX.
_SPELLINGS = {
    "π": r"\pi ",
    "θ": r"\theta ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "°": r"^\circ ",
    "∅": r"\emptyset ",
    r"\varnothing": r"\emptyset ",
    "²": "^2",
    "³": "^3",
    "<=": r"\le ",
    ">=": r"\ge ",
    r"\imath": " i ",
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\!": "",
    r"\$": "",
    "$": "",
    "{,}": ",",
}
_FUNCTION = re.compile(r"(?<![a-zA-Z\\])(pi|sin|cos|tan|log|ln|arcsin|arccos|arctan)(?![a-zA-Z])")
_DOTS = re.compile(r"\\(?:[lc]dots|dots[bcimo]?)(?![a-zA-Z])|\.{3,}|…")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|bigl|bigr|Bigl|Bigr|big|Big)(?![a-zA-Z])|(?<!\\)\\[()\[\]]")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|\s|~)+")
_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.]? ?\d)")

# With braces of two more levels inside, as in \mathbf{\frac{1}{\sqrt{2}}}.
_FONT = re.compile(
    r"\\(?:mathbf|textbf|boldsymbol|bm|mathit|textit|mathsf|emph)\s*"
    r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
# These may hold a unit or a variable. Single letters that are units: metres, grams, seconds …
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*([^{}]*?)\s*\}")
_UNIT_LETTERS = frozenset("mgshtdlLVAWNJKCF")

_SMALL_ARGUMENTS = re.compile(r"\\(frac|binom)\s*(\d)\s*(\d)")
_SMALL_SCRIPT = re.compile(r"([_^])\s*(\d)(?!\d)")
_MIXED = re.compile(r"(?<![\d.])(\d+) (\d+)\s*/\s*(\d+)(?!\d)")
_ROOT_OF_DIGITS = re.compile(r"√\s*(\d+)")
_ROOT_OF_BRACKET = re.compile(r"\\?(?<![a-zA-Z])(?:sqrt|√)\s*(\[\d\])?\s*\(([^()]*)\)")
_REPEATING = re.compile(r"(?<!\d)(\d{0,9})\.(\d{0,9})\\(?:overline|bar)\s*\{?(\d{1,9})\}?")

_BASE_IN_WORDS = re.compile(
    r"(?<=\d)(?:\s*_\s*\{?\s*\\text\s*\{\s*(?:base)?\s*(\w+)\s*\}\s*\}?|\s*(?:\\text\s*\{\s*)?base\s*\}?\s*(\w+)\s*\}?)$"
)
_BASE = re.compile(r"\d\s*_\s*\{?\s*(\w+)\s*\}?")
_WORDS_OF_BASES = {
    word: str(base)
    for base, word in enumerate(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), start=2
    )
}

_NAME = re.compile(r"^\s*([a-zA-Z])\s*(?:=|\\in(?![a-z]))\s*")
# After a number: percent and degree signs, or words in \text.
_SIGN = re.compile(r"(?<=[\d}])\s*(?:\\?%|\^\s*\\circ|\^\s*\{\s*\\circ\s*\})\s*$")
_UNIT = re.compile(r"(?<=[\d}])\s*\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$")
# The same without \text: words of four letters, and the shorter ones that are known. `12 xy` is a product.
_SHORT_UNITS = "cm mm km ft yd mi kg mg lb lbs oz ml mL hr hrs min sec mph am pm day cup way men"
_BARE_UNIT = re.compile(
    rf"(?<=[\d}}])\s*(?:(?:(?<=\s)[a-zA-Z]{{4,}}|(?:{_SHORT_UNITS.replace(' ', '|')})(?![a-zA-Z]))"
    r"(?:[\s/-]+[a-zA-Z]{2,})*)\.?(?:\s*\^\s*\{?\d\}?)?\s*$"
)
_NO_UNIT = re.compile(
    rf"(?<![a-zA-Z])(?:(?:{'|'.join(MAGNITUDES)})s?|if|or|and|base|sqrt|times|choose|where|when)(?![a-zA-Z])",
    re.IGNORECASE,
)


def plain_latex(text: str) -> str:
    """Write an answer with one spelling for fonts, spaces, fractions, roots, signs and dots; its meaning stays.

    Args:
        text: LaTeX or plain text, at most a few hundred characters.
    """
    text = _DOTS.sub(r" \\ldots ", text.strip())
    text = _ROOT_OF_DIGITS.sub(r"\\sqrt{\1}", text)
    for written, latex in _SPELLINGS.items():
        text = text.replace(written, latex)
    if not text.isascii():
        text = "".join(map(_fraction, text))
    text = _SPACE.sub(" ", _LAYOUT.sub("", text)).strip().removesuffix(".").strip()
    text = _BASE_IN_WORDS.sub(lambda found: f"_{{{_digits(found[1] or found[2])}}}", text)
    text = _TEXT.sub(_opened, _FONT.sub(r"\1", text))
    text = _SMALL_SCRIPT.sub(r"\1{\2}", _SMALL_ARGUMENTS.sub(r"\\\1{\2}{\3}", text))
    text = _ROOT_OF_BRACKET.sub(r"\\sqrt\1{\2}", _REPEATING.sub(_repeating, text))
    text = _FUNCTION.sub(r"\\\1 ", text)
    text = _THOUSANDS.sub(lambda found: found.group().replace(" ", ""), _SPACE.sub(" ", text))
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text).strip()


def _fraction(character: str) -> str:
    numerator, slash, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}" if slash and denominator else character


def _digits(word: str) -> str:
    return _WORDS_OF_BASES.get(word.lower(), word)


def _opened(found: re.Match[str]) -> str:
    """Return what a `\\text{…}` holds if that is a number or a variable and no unit."""
    held = found[1]
    variable = len(held) == 1 and held.isalpha() and held not in _UNIT_LETTERS
    return f" {held} " if variable or any(character.isdigit() for character in held) else found.group()


def _repeating(found: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as `\frac{15}{90}`."""
    whole, once, again = found.groups()
    numerator = int(whole + once + again) - int("0" + whole + once)
    return rf"\frac{{{numerator}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"


def same_string(given: str, gold: str) -> bool:
    """Return whether two answers, as `plain_latex` writes them, are one string but for spaces, units and a name.

    A name, as in `x = 5`, does not count where one of them has none; `y = 5` is not `x = 5`. A space between two
    digits counts: `1 2` is not `12`.
    """
    names = [_NAME.match(text) for text in (given, gold)]
    if all(names) and len({name[1] for name in names if name}) > 1:
        names = [None, None]
    left, right = (
        _tight(without_word_unit(_SIGN.sub("", text[name.end() :] if name else text)))
        for text, name in zip((given, gold), names, strict=True)
    )
    return left == right


def _tight(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def without_word_unit(text: str) -> str:
    r"""Return an answer without the words after its number: `32,348 dollars`, `5\text{ cm}`; not so `1.8 million`."""
    for pattern in (_UNIT, _BARE_UNIT):
        found = pattern.search(text)
        if found is not None and not _NO_UNIT.search(found.group()):
            return text[: found.start()]
    return text


def lost_by_math_verify(given: str, gold: str) -> bool:
    """Return whether two answers differ in something that math-verify does not look at.

    It adds numbers with a space between them, and drops the base of a number. A base that only one of them has is no
    difference: the problem names it.
    """
    if re.search(r"\d \d", given + "|" + gold):
        return True
    bases = [[_digits(base) for base in _BASE.findall(text)] for text in (given, gold)]
    return all(bases) and bases[0] != bases[1]


def for_math_verify(text: str) -> str:
    """Write an answer as math-verify should read it: dots, which it drops, as a symbol, and every `i` by itself."""
    return re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", " i ", text.replace(r"\ldots", r" \xi_{99} "))
