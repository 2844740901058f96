"""Rollouts: what the reward functions saw of them, and the policy that samples them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from trl.models import unwrap_model_for_generation

from trl_diffusion.runtime.zero3 import finish_trace


@dataclass
class FinishedBatch:
    """This process's completions as the reward functions saw them.

    Args:
        inputs: B rows of the data set.
        prompts: B prompts.
        completions: B completions.
        completion_ids: their token ids, cut after the first end token.
        rewards: float [rows of all processes, reward functions], NaN for `None`.
    """

    inputs: list[dict[str, Any]]
    prompts: list
    completions: list
    completion_ids: list[list[int]]
    rewards: torch.Tensor

    def columns(self, rows: list[int]) -> dict[str, list]:
        """The data set's other columns, of some rows."""
        names = [name for name in dict(self.inputs[0]) if name not in ("prompt", "completion", "completion_ids")]
        return {name: [self.inputs[row][name] for row in rows] for name in names}


@dataclass(frozen=True)
class RolloutEngine:
    """The policy as it is being trained, ready to sample.

    Args:
        accelerator: of the run.
        model_wrapped: the policy inside of its wrappers.
        summon: TRL's `summon_full_params` for the backend.
        gather: whether ZeRO-3 gathers all weights before sampling.
        checkpointing: `gradient_checkpointing_kwargs`, with which checkpointing is put back on.
        any_process: where weights stay sharded, all-reduces "does any process need a forward?"; else `None`.
    """

    accelerator: Accelerator
    model_wrapped: Any
    summon: Callable
    gather: bool
    checkpointing: dict[str, Any] | None
    any_process: Callable[[bool], bool] | None

    @contextmanager
    def policy(self) -> Iterator[Any]:
        """The network to sample with, without autograd and without checkpointing."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.gather,
                gradient_checkpointing_kwargs=self.checkpointing,
            ) as model,
            torch.no_grad(),
            self.summon(self.model_wrapped, recurse=False),
        ):
            if self.any_process is None:
                finish_trace(self.accelerator, model)
            yield model
