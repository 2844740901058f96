"""Tasks: data, prompts, rewards. One file per task."""

from trl_diffusion.tasks.task import Task

# Filled in by name below; every entry follows `Task`.
TASKS: dict[str, Task] = {}

__all__ = ["TASKS", "Task"]
