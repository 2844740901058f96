"""Defines a task: its data, its prompt, its rewards, and when a completion is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_diffusion.tasks.rows import hold_out, is_file

EMBEDDED = "embedded"  # the source of generated problems that the bundled models know

# A completion's text and its row → named scores in [0, 1]; the first is the headline.
Score = Callable[[str, dict[str, Any]], dict[str, float]]
# TRL's form: completions and columns by name → one number or `None` per completion.
Reward = Callable[..., list[float | None]] | Callable[..., list[float]]


@dataclass(frozen=True)
class Task:
    """Everything that training, evaluation and analysis read of a task.

    A task is one file with a `Task` in it, and one entry in `trl_diffusion.tasks.TASKS`; the recipes, the metrics and
    the comparison of methods take it from there.

    Args:
        name: the name on command lines.
        description: one sentence about its scores, for the task's `evaluate` module.
        load: `load(split, source=None, limit=None, prompt="plain", seed=0)` returns a data set with a column `prompt`
            (conversational; a last assistant message is a beginning to be continued, as in d1's `<reasoning>`) and
            the `columns`. `source` is `None` for the task's own data, the path of a local file, a data set on the
            Hub, or `"embedded"` for a generator that works offline. `limit` is the number of rows to keep or to
            generate; `seed` is that of generated rows.
        score: the library's own protocol. Every text gets scores, and no text raises. A completion is right if its
            first score is 1.
        rewards: reward functions in TRL's form, for training. The first one is 1 if and only if a completion is
            right, so that success can be read from it.
        columns: the columns that `score` reads, as features of `datasets`.
        score_d1: the protocol of d1 (2504.12216), where it has one; other tables can be compared under it.
        prompts: the names that `load` takes as `prompt`.
        hub_id: the data set on the Hub that is the task's own; `None` if its own data are generated.
        generate: `generate(split, size, seed=0, slips=False)` returns generated problems with their solutions
            (`completion`), as the bundled models learn them; with `slips` some solutions are wrong on purpose. `None`
            for a task without a generator.
    """

    name: str
    description: str
    load: Callable[..., Dataset]
    score: Score
    rewards: tuple[Reward, ...]
    columns: dict[str, Any]
    score_d1: Score | None = None
    prompts: tuple[str, ...] = ("plain",)
    hub_id: str | None = None
    generate: Callable[..., Dataset] | None = None

    @property
    def embedded(self) -> bool:
        """True if `source="embedded"` exists."""
        return self.generate is not None

    def is_generated(self, source: str | None) -> bool:
        """Return whether a source's rows are generated, so that there are as many as one asks for."""
        return source == EMBEDDED or (source is None and self.hub_id is None)

    def data_name(self, source: str | None) -> str:
        """Return the name of a source's rows for people: an id on the Hub, a file's name, or the task's."""
        if self.is_generated(source):
            return f"{self.name}, generated problems"
        if source is not None:
            return Path(source).name if is_file(source) else source
        return str(self.hub_id)

    def is_correct(self, text: str, row: dict[str, Any]) -> bool:
        """Return whether a completion is right: whether its first score is full."""
        return next(iter(self.score(text, row).values())) == 1.0

    def training_rows(
        self, source: str | None, size: int | None, held_out: int, seed: int = 0, prompt: str = "plain"
    ) -> tuple[Dataset, Dataset]:
        """Return rows to train on and held-out rows.

        A local file has no splits, so its last rows are held out. The held-out rows do not change with the seed, so
        that runs can be compared.

        Args:
            source: see `load`.
            size: number of training rows: how many to generate, or the first ones; all if `None`.
            held_out: number of held-out rows.
            seed: seed of generated training rows.
            prompt: one of `prompts`.

        Raises:
            ValueError: if a file has too few rows; and as `load`.
        """
        if source is not None and is_file(source):
            rows, test = hold_out(self.load("train", source, prompt=prompt), held_out, source)
            return rows.select(range(min(len(rows), size or len(rows)))), test
        train = self.load("train", source, limit=size, prompt=prompt, seed=seed)
        return train, self.load("test", source, limit=held_out, prompt=prompt)
