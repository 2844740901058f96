"""Scores of 4×4 Sudoku as an `evaluate` module: `puzzles_solved` and `cells_correct`, which are not the same."""

from trl_diffusion.evaluation.metrics import task_metric


class Sudoku(task_metric.TaskMetric):
    name_of_task = "sudoku"
