"""Finds the answer that a completion states last: `\\boxed{…}`, `<answer>…</answer>` or a line `#### …`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from trl_diffusion.tasks.parsing.text import readable


class Span(NamedTuple):
    """The place of an answer, never its text: boxes can be nested, and copies would take quadratic memory.

    Args:
        mark: where its mark begins; the answer whose mark begins last counts.
        start: where the answer begins.
        end: where it ends.
        doubtful: whether it may be a heading or a sentence about the marks; counts only if there is no other answer.
    """

    mark: int
    start: int
    end: int
    doubtful: bool = False


_BRACES = re.compile(r"\\[{}]|\\(?:boxed|fbox)[ \t]*\{|[{}]")
_BARE_BOX = re.compile(r"\\boxed[ \t]+([^\s{}$]+)")
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"####[# \t]*([^\n]*)")
# Nothing, or the word between the tags in "I put it between <answer> and </answer>".
_PLACEHOLDER = re.compile(r"[^\w∅∞]*(?:(?:and|or)[^\w∅∞]*)?", re.IGNORECASE)
# Begins with a word, maybe numbered: "Verification", "2. Check", "I closed it". LaTeX begins with a backslash or a
# dollar sign.
_WORDS = re.compile(r"[^\w\\$]*(?:[0-9]+[.)]\s+[^\w\\$]*)?(?:[^\W\d_]\s+)?[^\W\d_]{2}")
_ANSWER_HEADING = re.compile(r"[*_ \t]*(?:the[ \t]+)?(?:final[ \t]+)?answer[*_: \t]*", re.IGNORECASE)
_NEXT_LINE = re.compile(r"\s*([^\n]*)")
_LONGEST_UNOPENED = 200

# Markdown around and within an answer. Longer answers are left as they are: no task reads them.
_LONGEST_MARKED_UP = 400
_FENCE = re.compile(r"(`{3,}|~{3,})(?:[\w+-]*\n)?(.*?)\1?", re.DOTALL)
# The stars of a power have a number on both sides: `2**3` is none, `**2**3` neither.
_BOLD = re.compile(r"(?<![\w)\]}*\\])(\*{2,3})(?=[^\s*])(.+?)(?<=[^\s*\\])\1(?![\w(\[{*])", re.DOTALL)
_ITALIC = re.compile(r"([*_]{1,3})(?=[^\s*_])(.+?)\1", re.DOTALL)
_LEFT_OVER = re.compile(r"^\*+\s*|(?<!\^)\*+(?=[.\s]*$)")
_HALF_BOX = re.compile(r"\\?(?:boxed|fbox)\s*\{")
_LABEL = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:answer|result|solution|expression)\s*(?:is\b|[:=])[\s:]*",
    re.IGNORECASE,
)


def last_answer(text: str) -> str | None:
    """Return the answer that a completion states last.

    An answer tag that is never closed reaches to the end, one that is never opened from the start of its line; a box
    needs its closing brace. Answers without a letter or digit (`\\boxed{...}`, copied from a prompt) are passed over.
    A box within tags or after `####` is found by itself, because it begins later. What may be a heading
    (`#### Verification`) or a sentence about the tags ("inside the <answer> tags"), because it begins with a word,
    counts only where nothing else states an answer. Markdown around an answer is removed.

    Args:
        text: anything.

    Returns:
        The answer without white space around it, or `None`.
    """
    text = readable(text)
    return _last(text, [*_boxes(text), *_tagged(text), *_lines(text)])


def tagged_answer(text: str) -> str | None:
    """Return the contents of the last `<answer>…</answer>` that is not empty, closed or not; `None` without one."""
    text = readable(text)
    return _last(text, _tagged(text))


def _last(text: str, answers: Iterable[Span]) -> str | None:
    chosen = None
    for span in sorted(answers, reverse=True):
        if not _PLACEHOLDER.fullmatch(text, span.start, span.end):
            chosen = span if chosen is None or not span.doubtful else chosen
            if not span.doubtful:
                break
    return None if chosen is None else _without_markup(text[chosen.start : chosen.end].strip())


def _without_markup(answer: str) -> str:
    """Remove Markdown's code fences, emphasis and quotes, an open box, and a label such as `Answer:`."""
    if len(answer) > _LONGEST_MARKED_UP:
        return answer
    if fenced := _FENCE.fullmatch(answer):
        answer = fenced[2].strip()
    answer = _BOLD.sub(r"\2", answer.replace("`", "")).strip()
    if italic := _ITALIC.fullmatch(answer):
        answer = italic[2]
    answer = _LEFT_OVER.sub("", answer).strip()
    answer = answer[found.end() :] if (found := _LABEL.match(answer)) else answer
    return _without_half_box(answer.strip().strip('"“”'))


def _without_half_box(answer: str) -> str:
    """Return the contents of a box that lost its backslash or closing brace, as in `boxed{18}` and `\\boxed{18>`."""
    found = _HALF_BOX.match(answer)
    if found is None:
        return answer
    answer = answer[found.end() :].strip()
    lost = answer.endswith(">") or (answer.endswith("}") and answer.count("}") > answer.count("{"))
    return answer[:-1].strip() if lost else answer


def _boxes(text: str) -> Iterator[Span]:
    """Yield every box whose braces balance, in one pass, whatever the nesting."""
    opened: list[tuple[int, int] | None] = []
    for found in _BRACES.finditer(text):
        if found.group() in (r"\{", r"\}"):
            continue
        if found.group() == "}":
            box = opened.pop() if opened else None
            if box is not None:
                yield Span(*box, found.start())
        else:
            opened.append(None if found.group() == "{" else found.span())
    for found in _BARE_BOX.finditer(text):
        yield Span(found.start(), *found.span(1))


def _tagged(text: str) -> Iterator[Span]:
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            # Opened again before it was closed: what stands between is no answer.
            opened = tag
        elif opened is not None:
            yield Span(*opened.span(), tag.start())
            opened = None
        else:
            earliest = max(0, tag.start() - _LONGEST_UNOPENED)
            line = text[earliest : tag.start()].rstrip()
            start = earliest + line.rfind("\n") + 1
            yield Span(start, start, tag.start(), _begins_with_words(text, start, tag.start()))
    if opened is not None:
        yield Span(*opened.span(), len(text), _begins_with_words(text, opened.end(), len(text)))


def _lines(text: str) -> Iterator[Span]:
    for found in _ANSWER_LINE.finditer(text):
        start, end = found.span(1)
        if _ANSWER_HEADING.fullmatch(text, start, end):  # "#### Final answer", and the answer below it
            below = _NEXT_LINE.match(text, end)
            assert below is not None  # it may be empty
            yield Span(found.start(), *below.span(1))
        else:
            heading = _begins_with_words(text, start, end) and "answer" not in text[start:end].lower()
            yield Span(found.start(), start, end, heading)


def _begins_with_words(text: str, start: int, end: int) -> bool:
    return _WORDS.match(text, start, end) is not None
