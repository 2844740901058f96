"""Where a completion states its answer: `\\boxed{…}`, `<answer>…</answer>` or a line `#### …`. The last one counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from trl_diffusion.tasks.text import readable

# Where an answer begins with its mark, and the ends of what it says. Never the text itself: boxes can be nested, and
# copying each would take quadratic time and memory.
Span = tuple[int, int, int]

_BRACES = re.compile(r"\\[{}]|\\(?:boxed|fbox)[ \t]*\{|[{}]")
_BARE_BOX = re.compile(r"\\boxed[ \t]+([^\s{}$]+)")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"####[# \t]*([^\n]*)")
_PLACEHOLDER = re.compile(r"[^\w∅∞]*")
_LONGEST_UNOPENED = 200


def last_answer(text: str) -> str | None:
    """The answer that a completion states last.

    An answer tag that is never closed reaches to the end, one that is never opened from the start of its line; a box
    needs its closing brace. Answers without a letter or digit (`\\boxed{...}`, copied from a prompt) are passed over.
    A box within tags or behind `####` is found by itself, because it begins later.

    Args:
        text: anything.

    Returns:
        The answer without white space around it, or `None`.
    """
    text = readable(text)
    return _last(text, [*_boxes(text), *_tagged(text), *_lines(text)])


def tagged_answer(text: str) -> str | None:
    """What stands in the last `<answer>…</answer>` that is not empty, closed or not; `None` without such a tag."""
    text = readable(text)
    return _last(text, _tagged(text))


def _last(text: str, answers: Iterable[Span]) -> str | None:
    for _, start, end in sorted(answers, reverse=True):
        if not _PLACEHOLDER.fullmatch(text, start, end):
            return text[start:end].strip()
    return None


def _boxes(text: str) -> Iterator[Span]:
    """Every box whose braces balance; one pass, whatever the nesting."""
    opened: list[tuple[int, int] | None] = []
    for found in _BRACES.finditer(text):
        if found.group() in (r"\{", r"\}"):
            continue
        if found.group() == "}":
            box = opened.pop() if opened else None
            if box is not None:
                yield *box, found.start()
        else:
            opened.append(None if found.group() == "{" else found.span())
    for found in _BARE_BOX.finditer(text):
        yield found.start(), *found.span(1)


def _tagged(text: str) -> Iterator[Span]:
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            # Opened again before it was closed: what stands between is no answer.
            opened = tag
        elif opened is not None:
            yield *opened.span(), tag.start()
            opened = None
        else:
            earliest = max(0, tag.start() - _LONGEST_UNOPENED)
            line = text[earliest : tag.start()].rstrip()
            start = earliest + line.rfind("\n") + 1
            yield start, start, tag.start()
    if opened is not None:
        yield *opened.span(), len(text)


def _lines(text: str) -> Iterator[Span]:
    for found in _ANSWER_LINE.finditer(text):
        yield found.start(), *found.span(1)
