"""Scores of GSM8K as an `evaluate` module: `accuracy`, and `format`, the share with a readable number."""

import datasets

from trl_diffusion.evaluation.metrics import task_metric


class GSM8K(task_metric.TaskMetric):
    task = "gsm8k"
    description = "Share of GSM8K problems whose answer, the one stated last, is the gold number."
    row = {"answer": datasets.Value("string")}
