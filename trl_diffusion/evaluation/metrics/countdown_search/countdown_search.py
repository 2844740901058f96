"""Scores of Countdown with a written search as an `evaluate` module; they are Countdown's."""

from trl_diffusion.evaluation.metrics import task_metric


class CountdownSearch(task_metric.TaskMetric):
    name_of_task = "countdown_search"
