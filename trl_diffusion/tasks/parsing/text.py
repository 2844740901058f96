"""Turns what a network wrote into text that a parser can read, in bounded time."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

# What TRL hands to a reward function: text, or messages.
Completion = str | list[dict[str, Any]] | None

# Far more than the canvas of any model here; only the end of a longer text is read, which bounds every parser.
LONGEST_TEXT = 100_000

_END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")
_UNUSUAL = re.compile(r"[^\x00-\x7f]")
_OPERATORS = {
    **dict.fromkeys("−–‒‐‑﹣➖", "-"),
    **dict.fromkeys("×∗⋅·∙•✕✖⨯⨉", "*"),
    **dict.fromkeys("÷∕⁄➗", "/"),
    "➕": "+",
}


def completion_text(completion: Completion) -> str:
    """Return the text of a completion in any of TRL's forms; an empty string for none."""
    if not completion:
        return ""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "")


def readable(text: str) -> str:
    """Return the text up to its first end token, its last 100,000 characters, with digits and operators in ASCII."""
    text = _END.split(text, maxsplit=1)[0][-LONGEST_TEXT:]
    return text if text.isascii() else _UNUSUAL.sub(lambda found: _in_ascii(found.group()), text)


@lru_cache(maxsize=4096)
def _in_ascii(character: str) -> str:
    """Return the ASCII digit, operator or space that a character stands for, else the character itself.

    Unicode's own compatibility forms would be wrong here: they read 3² as 32.
    """
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return str(digit)
    if "！" <= character <= "～":  # full-width forms
        return chr(ord(character) - ord("！") + ord("!"))
    if character.isspace():
        return " "
    if unicodedata.category(character) == "Cf":  # zero-width spaces and marks of direction
        return ""
    return _OPERATORS.get(character, character)
