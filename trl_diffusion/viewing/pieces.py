"""The text of each token among its neighbours, and how text is made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

# Decoders write this where bytes are no whole character.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# UTF-8 takes at most four bytes for a character, so it is spread over at most four tokens.
_MOST_TOKENS = 4
_VISIBLE = {"\n": "↵\n", "\t": "⇥   "}
# Controls of the writing direction, which would turn the text around them.
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def pieces(token_ids: Sequence[int], decode: Callable[[tuple[int, ...]], str]) -> list[str]:
    """Split the text of neighbouring tokens into the piece that each adds.

    What a token adds may depend on the token before it (a space between words), and a character of several bytes may
    be spread over several tokens. The first of these gets the character and the others get nothing. A part of a
    character without its other tokens becomes U+FFFD.

    Args:
        token_ids: ids that stand next to each other.
        decode: returns the text of ids.
    """
    found: list[str] = []
    while (first := len(found)) < len(token_ids):
        before = tuple(token_ids[max(first - 1, 0) : first])
        groups = [tuple(token_ids[first : first + size]) for size in range(1, _MOST_TOKENS + 1)]
        texts = ((len(group), _added(before, group, decode)) for group in groups)
        # The shortest group of whole characters; the token alone if there is none.
        alone = 1, _added(before, groups[0], decode)
        size, text = next(((size, text) for size, text in texts if INCOMPLETE not in text), alone)
        found += [text, *[""] * (min(size, len(token_ids) - first) - 1)]
    return found


def _added(before: tuple[int, ...], group: tuple[int, ...], decode: Callable[[tuple[int, ...]], str]) -> str:
    """Return the text that a group of tokens adds to the token before it."""
    known, text = decode(before) if before else "", decode(before + group)
    return text.removeprefix(known) if text.startswith(known) else decode(group)


def visible(text: str) -> str:
    """Mark line ends and tabs, and replace the control characters that would move a terminal's cursor or turn text."""
    return "".join(_VISIBLE.get(character) or _printable(character) for character in text)


def _printable(character: str) -> str:
    if unicodedata.category(character) == "Cc" and ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # Unicode has a picture of each
    hidden = unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _DIRECTIONS
    return INCOMPLETE if hidden else character
