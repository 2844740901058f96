"""Scores of MATH as an `evaluate` module: `accuracy`, and `format`, the share that states an answer."""

import datasets

from trl_diffusion.evaluation.metrics import task_metric


class MATH500(task_metric.TaskMetric):
    task = "math500"
    description = "Share of MATH problems whose answer, the one stated last, means the same as the gold one."
    row = {"answer": datasets.Value("string")}
