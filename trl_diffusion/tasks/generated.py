"""Loads tasks of which all rows are generated."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset

from trl_diffusion.tasks import d1_prompts as prompts
from trl_diffusion.tasks.task import EMBEDDED

TEST_SIZE = 256


def generated_loader(name: str, generate: Callable[..., Dataset], reader: str) -> Callable[..., Dataset]:
    """Return `Task.load` for a task without files and with the plain prompt only.

    Args:
        name: of the task, for messages.
        generate: its generator, see `Task`.
        reader: a similar task that reads files, for messages.

    Returns:
        A function that raises `ValueError` for another source or prompt, and generates 256 rows without a limit.
    """

    def load(
        split: str, source: str | None = None, limit: int | None = None, prompt: str = prompts.PLAIN, seed: int = 0
    ) -> Dataset:
        if source not in (None, EMBEDDED):
            raise ValueError(f"{name} is generated and reads no file, got source {source!r}; the task {reader} does.")
        if prompt != prompts.PLAIN:
            raise ValueError(f"{name} has the prompt 'plain' only, got {prompt!r}.")
        return generate(split, limit or TEST_SIZE, seed)

    return load
