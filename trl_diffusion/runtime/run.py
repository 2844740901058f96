"""A run as values, from which its cost and its report are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from trl_diffusion.family import DiffusionFamily


@dataclass(frozen=True)
class TrainingRun:
    """A run of any trainer.

    Args:
        name: of the method.
        paper: its `id` and `title`; empty for none.
        args: the settings.
        family: of the model.
        model: what is trained.
        processes: how many train together.
        zero_stage: 1 if processes divide the optimizer's state among them, 2 if gradients too, 3 if weights too (also
            under FSDP), 0 for nothing.
        deepspeed: whether DeepSpeed keeps the optimizer's state.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        own_optimizer: whether an optimizer was handed over, in place of the one that `args` names.
    """

    name: str
    paper: dict[str, str]
    args: Any
    family: DiffusionFamily
    model: Any
    processes: int
    zero_stage: int
    deepspeed: bool
    mixed_precision: str
    own_optimizer: bool

    @classmethod
    def of(cls, trainer: Trainer, family: DiffusionFamily, **others: Any):
        """The values of a trainer; `others` are the fields that only a subclass has."""
        own: Any = trainer
        plugin = own.accelerator.state.deepspeed_plugin if own.is_deepspeed_enabled else None
        return cls(
            name=own._name,
            paper=own._paper,
            args=own.args,
            family=family,
            model=own.model,
            processes=own.accelerator.num_processes,
            zero_stage=3 if own.is_fsdp_enabled else 0 if plugin is None else plugin.zero_stage,
            deepspeed=plugin is not None,
            mixed_precision=own.accelerator.mixed_precision,
            own_optimizer=own.optimizer is not None,
            **others,
        )

    def share(self, stage: int) -> float:
        """Share that a process holds of what is divided from a stage of DeepSpeed's on."""
        return 1 / self.processes if self.zero_stage >= stage else 1.0


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
        buffer_bytes: bytes kept of it until the last inner update, in addition to tokens and the log-probabilities
            that the passes above compute.
    """

    rollout: float
    probe: float
    old: float
    reference: float
    training: float
    targets: float
    buffer_bytes: float = 0.0


@dataclass(frozen=True)
class RolloutRun(TrainingRun):
    """A run that learns from rollouts.

    Args:
        reference: a separate reference model, or `None`.
        compares: whether the loss has a KL term.
        group: completions per prompt.
        prompt_length: tokens that a process's prompts are padded to, on average over rollouts.
        completion: what one completion costs.
        views: views per completion and update.
        backwards: backward passes per completion and update.
        step_aware: whether a reward is step-aware (SAPO).
    """

    reference: Any
    compares: bool
    group: int
    prompt_length: float
    completion: CompletionCost
    views: int
    backwards: int
    step_aware: bool
