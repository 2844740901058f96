"""Scores of the task that the metric's configuration names: `evaluate.load(metric_path(name), name)`."""

from trl_diffusion.evaluation.metrics import task_metric


class AnyTask(task_metric.TaskMetric):
    """The task is `config_name`."""
