"""Averages a task's scores over completions, each with its Wilson interval: the base of all metrics."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from trl_diffusion.evaluation.statistics import wilson_interval
from trl_diffusion.tasks import TASKS, Task

INPUTS = """
Args:
    predictions: texts of completions.
    references: what the task's `score` reads of a row, in the same order.
    protocol: `"own"`, or `"d1"` for the rules of the tables of d1 (2504.12216).

Returns:
    Every score of the task in [0, 1], with `NAME_low` and `NAME_high`, the ends of its 95 % Wilson interval, and
    `total`, the number of completions. A score that is a share, such as right cells, varies less than a coin with the
    same mean: its interval is on the safe side.
"""


class TaskMetric(evaluate.Metric):
    """A task's scores; subclasses state its name in `TASKS`, which holds the rest."""

    name_of_task: str | None = None  # the metric's configuration names it if it is not given here

    @property
    def task(self) -> Task:
        return TASKS[self.name_of_task or self.config_name]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.task.description,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": self.task.columns}),
        )

    def _compute(
        self, predictions: list[str], references: list[dict[str, Any]], protocol: str = "own"
    ) -> dict[str, float]:
        scorers = {"own": self.task.score, "d1": self.task.score_d1}
        score = scorers.get(protocol)
        if score is None:
            known = [name for name, scorer in scorers.items() if scorer is not None]
            raise ValueError(f"{self.task.name} has the protocols {known}, got {protocol!r}.")
        return summarize([score(text, row) for text, row in zip(predictions, references, strict=True)])


def summarize(scores: list[dict[str, float]]) -> dict[str, float]:
    """Return the means of named scores with the ends of their 95 % Wilson intervals, and `total`.

    Raises:
        ValueError: if there are none.
    """
    if not scores:
        raise ValueError("There are no completions to score; a metric needs at least one.")
    result: dict[str, float] = {}
    for name in scores[0]:
        total = sum(score[name] for score in scores)
        low, high = wilson_interval(total, len(scores))
        result |= {name: total / len(scores), f"{name}_low": low, f"{name}_high": high}
    return {**result, "total": len(scores)}
