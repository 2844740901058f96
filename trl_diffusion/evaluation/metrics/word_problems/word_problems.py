"""Scores of the embedded model's word problems as an `evaluate` module; they are GSM8K's."""

import datasets

from trl_diffusion.evaluation.metrics import task_metric


class WordProblems(task_metric.TaskMetric):
    task = "word_problems"
    description = "Share of generated word problems whose answer, the one stated last, is the gold number."
    row = {"answer": datasets.Value("string")}
