"""Scores of the embedded model's word problems as an `evaluate` module; they are GSM8K's."""

from trl_diffusion.evaluation.metrics import task_metric


class WordProblems(task_metric.TaskMetric):
    name_of_task = "word_problems"
