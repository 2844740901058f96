"""Scores of 4×4 Sudoku solved in sweeps as an `evaluate` module; they are Sudoku's."""

from trl_diffusion.evaluation.metrics import task_metric


class SudokuSweeps(task_metric.TaskMetric):
    name_of_task = "sudoku_sweeps"
