"""Scores of MATH as an `evaluate` module: `accuracy`, and `format`, the share that states an answer."""

from trl_diffusion.evaluation.metrics import task_metric


class MATH500(task_metric.TaskMetric):
    name_of_task = "math500"
