"""Which papers the parts of a method come from."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, ClassVar


class FromPaper:
    """Base of the parts that methods are made of: credits, likelihoods, noises, choices of steps and losses.

    Attributes:
        paper: arXiv id of the paper that the part comes from; `None` for one that is common to many.
        extends: a setting adds the part to methods of other papers, so that it is cited in addition to theirs.
    """

    paper: ClassVar[str | None] = None
    extends: ClassVar[bool] = False


def parts_of(*values: Any) -> list[FromPaper]:
    """Return the parts among some values, and those that they are made of (their fields), outer ones first."""
    found = []
    for value in values:
        if isinstance(value, FromPaper):
            found.append(value)
        if is_dataclass(value) and not isinstance(value, type):
            found += parts_of(*(vars(value)[field.name] for field in fields(value) if field.name in vars(value)))
    return found
