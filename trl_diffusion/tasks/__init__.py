"""Tasks: data, prompts, rewards, scores. One file per task; what several share stands in files of its own."""

from trl_diffusion.tasks import countdown, gsm8k, math500, sudoku, word_problems
from trl_diffusion.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (gsm8k.TASK, math500.TASK, countdown.TASK, sudoku.TASK, word_problems.TASK)
}

__all__ = ["TASKS", "Task"]
