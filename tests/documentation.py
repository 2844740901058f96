"""The blocks of code in README and documentation, their markers, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").rglob("*.md"))]

MARKER = re.compile(r"^<!-- (?:run|skip)\b", re.MULTILINE)
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>run|skip)(?:: (?P<note>[^\n]+))? -->\n)?"
    r"```(?P<language>[^\n ]*)(?P<info>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
TITLE = re.compile(r'title="[^"]+')
# A command within a sentence; words in capitals stand for something that the reader puts in.
INLINE = re.compile(r"`((?:python recipes/|accelerate launch |trl-diffusion )[^`…]+)`")
PLACEHOLDER = re.compile(r"\b(?:[A-Z]{3,}|N)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: path of the page from the root.
        line: line of its opening fence.
        marker: `run`, `skip` or `None`.
        note: what follows the marker.
        language: after the fence.
        title: the file that it is a part of or changes; empty if it names none.
        code: its text.
    """

    page: str
    line: int
    marker: str | None
    note: str
    language: str
    title: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(
            name,
            text.count("\n", 0, match.start("language")) + 1,
            match["marker"],
            match["note"] or "",
            match["language"],
            (TITLE.search(match["info"]) or [""])[0].removeprefix('title="'),
            match["code"],
        )
        for match in BLOCK.finditer(text)
    ]


def inline_commands(page: Path) -> list[str]:
    """Commands in the sentences of a page, but those with placeholders."""
    sentences = BLOCK.sub("", page.read_text())
    found = [match[1].replace("\n", " ") for match in INLINE.finditer(sentences)]
    return [command for command in found if not PLACEHOLDER.search(command)]


def commands(code: str) -> list[list[str]]:
    """The words of each command, without comments and assignments of variables."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", "").splitlines()]
    return [[*words[_assignments(words) :]] for words in lines if words]


def _assignments(words: list[str]) -> int:
    return next(count for count, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))


def patched(text: str, diff: str) -> str:
    """Apply a diff without line numbers: lines that begin with `-` give way to the `+` lines after them.

    A `+` line without a `-` line before it comes after the context line (beginning with a space) before it.

    Raises:
        AssertionError: if a line to find is not there, or more than once.
    """
    lines = text.splitlines()
    place, replaces = 0, False
    for mark, line in ((line[:1], line[1:]) for line in diff.splitlines() if line):
        if mark == "+":
            lines[place : place + replaces] = [line]
            place, replaces = place + 1, False
            continue
        assert lines.count(line) == 1, f"{line!r} is there {lines.count(line)} times"
        place, replaces = lines.index(line) + (mark == " "), mark == "-"
    return "\n".join(lines) + "\n"
