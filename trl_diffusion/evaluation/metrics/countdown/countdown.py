"""Scores of Countdown as an `evaluate` module: `accuracy`, `format` (an expression), `validity` (right numbers)."""

import datasets

from trl_diffusion.evaluation.metrics import task_metric


class Countdown(task_metric.TaskMetric):
    task = "countdown"
    description = "Share of Countdown problems solved, of expressions stated, and of those with the right numbers."
    row = {"numbers": datasets.Sequence(datasets.Value("int64")), "target": datasets.Value("int64")}
