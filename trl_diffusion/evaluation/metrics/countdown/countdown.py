"""Scores of Countdown as an `evaluate` module: `accuracy`, `format` (an expression), `validity` (right numbers)."""

from trl_diffusion.evaluation.metrics import task_metric


class Countdown(task_metric.TaskMetric):
    name_of_task = "countdown"
