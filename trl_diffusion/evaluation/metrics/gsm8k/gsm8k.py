"""Scores of GSM8K as an `evaluate` module: `accuracy`, and `format`, the share with a readable number."""

from trl_diffusion.evaluation.metrics import task_metric


class GSM8K(task_metric.TaskMetric):
    name_of_task = "gsm8k"
