"""The method in a model card: its name, the papers that it and its parts come from, and how to cite them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """A paper that a method, or a part of one, comes from.

    Args:
        name: of what comes from it.
        paper: its arXiv `id`, and where they are known its `title` and BibTeX `citation`.
    """

    name: str
    paper: dict[str, str]

    @property
    def link(self) -> str:
        """The name with a link to the paper."""
        return f"{self.name}, [{self.paper['id']}](https://arxiv.org/abs/{self.paper['id']})"


def sources_of_methods(base: type) -> dict[str, Source]:
    """Return the papers of all trainers that are defined, by arXiv id.

    Args:
        base: the class that all of them inherit.
    """
    found: dict[str, Source] = {}
    for trainer in _subclasses(base):
        paper = vars(trainer).get("_paper")
        if paper:
            found.setdefault(paper["id"], Source(trainer._name, paper))
    return found


def _subclasses(base: Any) -> Iterator[Any]:
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def method_text(name: str, paper: dict[str, str], choices: dict[str, str], others: Sequence[Source]) -> str:
    """Describe a method in a line.

    Args:
        name: of the method.
        paper: its own; empty for none.
        choices: what it is composed of, if it is composed for this run.
        others: what else it uses.
    """
    text = Source(name, paper).link if paper else name
    if choices:
        text += "; composed: " + ", ".join(f"{kind} `{what}`" for kind, what in choices.items())
    if others:
        text += "; uses " + "; ".join(source.link for source in others)
    return text


def citations(others: Sequence[Source]) -> str:
    """Return how to cite what a method uses in addition to its own paper, as Markdown; empty for nothing."""
    parts = []
    for source in others:
        if "citation" in source.paper:
            parts.append(f"Cite {source.name} as:\n\n```bibtex\n{source.paper['citation']}\n```\n\n")
        else:
            parts.append(f"Cite {source.name} by arXiv:{source.paper['id']}.\n\n")
    return "".join(parts)
