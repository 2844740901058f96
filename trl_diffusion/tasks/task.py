"""What an evaluation needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

# A completion's text and its row → named scores in [0, 1]; the first is the headline.
Score = Callable[[str, dict[str, Any]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A task by name: its rows and what a completion is worth.

    Args:
        name: what it is called on command lines.
        load: `load(split, source=None, limit=None, prompt="plain")` gives a data set with a column `prompt`
            (conversational; a last assistant message is a beginning to be continued, as in d1's `<reasoning>`) and
            what `score` reads. `source` is `None` for the data set on the Hub, the path of a local file, or
            `"embedded"` for a generator that works offline.
        score: the library's own protocol; any text gets scores, and no text raises.
        score_d1: the protocol of d1 (2504.12216), where it has one; other tables can be compared under it.
        prompts: names that `load` takes as `prompt`.
        embedded: whether `source="embedded"` exists.
    """

    name: str
    load: Callable[..., Dataset]
    score: Score
    score_d1: Score | None = None
    prompts: tuple[str, ...] = ("plain",)
    embedded: bool = False
