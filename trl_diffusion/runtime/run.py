"""A run as values, from which its cost and its report are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import Trainer

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.runtime.rollout_adapter import RolloutAdapter, check_wanted_merge, rollout_merge_obstacle
from trl_diffusion.sampling.static_windows import check_compiles


@dataclass(frozen=True)
class TrainingRun:
    """A run of any trainer.

    Args:
        name: of the method.
        paper: its `id` and `title`; empty for none.
        args: the settings.
        family: of the model.
        model: what is trained.
        launch: how many processes train together, and what they divide among them.
        rows: training rows; `None` where they cannot be counted, as those of a stream.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        own_optimizer: whether an optimizer was handed over, in place of the one that `args` names.
        prompt_length: tokens that prompts are padded to, on average.
    """

    name: str
    paper: dict[str, str]
    args: Any
    family: DiffusionFamily
    model: Any
    launch: Launch
    rows: int | None
    mixed_precision: str
    own_optimizer: bool
    prompt_length: float

    @classmethod
    def of(cls, trainer: Trainer, family: DiffusionFamily, **others: Any):
        """The values of a trainer; `others` are the fields that only a subclass has."""
        own: Any = trainer
        return cls(
            name=own._name,
            paper=own._paper,
            args=own.args,
            family=family,
            model=own.model,
            launch=Launch.of_trainer(own),
            rows=len(own.train_dataset) if isinstance(own.train_dataset, Dataset) else None,
            mixed_precision=own.accelerator.mixed_precision,
            own_optimizer=own.optimizer is not None,
            **others,
        )


@dataclass(frozen=True)
class CompletionCost:
    """Forward passes of prompt and whole canvas that one completion of a rollout costs, at most.

    Args:
        rollout: passes of the rollout.
        probe: passes of continuations (SAPO), if every completion is continued.
        old: passes without gradient before the first update, for the old log-probabilities.
        reference: passes of the reference model.
        training: passes with gradient, in all inner updates together.
        targets: tokens scored in a pass of the last three kinds.
        extra_columns: columns of such a pass in addition to prompt and canvas.
        buffer_bytes: bytes kept of it until the last inner update, in addition to tokens and the log-probabilities
            that the passes above compute.
    """

    rollout: float
    probe: float
    old: float
    reference: float
    training: float
    targets: float
    extra_columns: float = 0.0
    buffer_bytes: float = 0.0


@dataclass(frozen=True)
class RolloutRun(TrainingRun):
    """A run that learns from rollouts.

    Args:
        reference: a separate reference model, or `None`.
        compares: whether the loss has a KL term.
        group: completions per prompt.
        completion: what one completion costs.
        views: views per completion and update.
        backwards: backward passes per completion and update.
        choices: what the method is composed of, if it is composed for this run.
        step_aware: whether a reward is step-aware (SAPO).
        rewards: names of the reward functions, with their weights.
        rollout_adapter: what is done to the adapter for a rollout.

    Raises:
        ValueError: if the launch does not allow a setting; one that is only planned, since the trainer checks its own.
    """

    reference: Any
    compares: bool
    group: int
    completion: CompletionCost
    views: int
    backwards: int
    choices: dict[str, str]
    step_aware: bool
    rewards: tuple[tuple[str, float], ...]
    rollout_adapter: RolloutAdapter

    def __post_init__(self) -> None:
        check_wanted_merge(self.args.merge_adapter_for_rollout, self.merge_obstacle)
        if self.args.rollout_compile:
            check_compiles(self.model, sharded=self.launch.zero_stage == 3)

    @property
    def merge_obstacle(self) -> str | None:
        """Why the adapter is not merged for rollouts, under the launch that is planned; `None` if it is merged."""
        obstacle = self.rollout_adapter.obstacle
        return obstacle or rollout_merge_obstacle(self.model, self.mixed_precision, self.launch)
