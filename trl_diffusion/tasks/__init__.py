"""Tasks: data, prompts, rewards and scores. One file per task; what several tasks share has files of its own.

To add a task, write its file and add its `TASK` to the list below. Nothing else names the tasks one by one.
"""

from trl_diffusion.tasks import (
    chained_sums,
    countdown,
    countdown_search,
    gsm8k,
    math500,
    sudoku,
    sudoku_sweeps,
    word_problems,
)
from trl_diffusion.tasks.task import EMBEDDED, Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        gsm8k.TASK,
        math500.TASK,
        countdown.TASK,
        sudoku.TASK,
        word_problems.TASK,
        chained_sums.MOVING,
        chained_sums.FIXED,
        sudoku_sweeps.TASK,
        countdown_search.TASK,
    )
}

__all__ = ["EMBEDDED", "TASKS", "Task"]
