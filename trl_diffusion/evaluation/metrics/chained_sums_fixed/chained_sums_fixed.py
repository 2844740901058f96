"""Scores of chained sums whose hard lines are fixed as an `evaluate` module; they are GSM8K's."""

from trl_diffusion.evaluation.metrics import task_metric


class ChainedSumsFixed(task_metric.TaskMetric):
    name_of_task = "chained_sums_fixed"
