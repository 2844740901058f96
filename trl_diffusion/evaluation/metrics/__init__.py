"""`evaluate` modules of the tasks: `evaluate.load(metric_path("countdown"))`."""

from pathlib import Path

from trl_diffusion.tasks import TASKS


def metric_path(task: str) -> str:
    """Return the path of a task's metric for `evaluate.load`.

    `evaluate` copies a script and imports the copy, so a script stands for one task. A task that has none uses the one
    for any task, which is told the name: `evaluate.load(metric_path(name), name)`.

    Raises:
        ValueError: if there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"There is no metric for the task {task!r}; there are {', '.join(sorted(TASKS))}.")
    folder = Path(__file__).parent
    own = folder / task / f"{task}.py"
    return str(own if own.is_file() else folder / "any_task" / "any_task.py")
