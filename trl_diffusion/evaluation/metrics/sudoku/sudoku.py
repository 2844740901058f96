"""Scores of 4×4 Sudoku as an `evaluate` module: `puzzles_solved` and `cells_correct`, which are not the same."""

import datasets

from trl_diffusion.evaluation.metrics import task_metric


class Sudoku(task_metric.TaskMetric):
    task = "sudoku"
    description = "Share of puzzles solved and, apart from it, share of blanks filled in right."
    row = {"puzzle": datasets.Value("string"), "solution": datasets.Value("string")}
