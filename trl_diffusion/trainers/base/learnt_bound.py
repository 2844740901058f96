"""Trainers whose rollouts take their entropy bound from a policy that learns, too (DiFFPO, 2510.02212)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from trl_diffusion.credit import leave_one_out
from trl_diffusion.likelihood.base import Rows
from trl_diffusion.runtime.bound_policy import BOUNDS, BoundPolicy, prompt_states, speed_rewards
from trl_diffusion.sampling import row_generators
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.streams import Purpose, uniforms
from trl_diffusion.trainers.base.masked import NoisedGRPOConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class LearntBoundConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` with a learnt entropy bound.

    Args:
        learn_bound: draw an entropy bound for each completion from a policy that reads the prompt, and train it.
            `unmasking="entropy"` and `entropy_bound`, one of 0.01, 0.02, 0.05, 0.1, 0.2, 0.5 and 1, are then needed:
            at first that bound has half of the probability.
        bound_learning_rate: of the policy of bounds.
        speed_exponent: α, how much a completion of few steps is worth.

    Raises:
        ValueError: if a setting would have no effect, or settings do not fit together.
    """

    learn_bound: bool = field(default=False, metadata={"help": "Learn the entropy bound of each prompt's rollouts."})
    bound_learning_rate: float = field(default=10.0, metadata={"help": "Learning rate of the policy of bounds."})
    speed_exponent: float = field(default=1.0, metadata={"help": "How much fewer steps are worth to it; 0: nothing."})

    def __post_init__(self):
        super().__post_init__()
        defaults = {option.name: option.default for option in fields(LearntBoundConfig)}
        for name in ("bound_learning_rate", "speed_exponent"):
            value = getattr(self, name)
            if not self.learn_bound and value != defaults[name]:
                raise ValueError(f"{name}={value} would have no effect: set learn_bound=True, or leave it out.")
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if self.learn_bound and self.entropy_bound not in BOUNDS:
            raise ValueError(
                "learn_bound=True needs unmasking='entropy' and an entropy_bound to start from, one of "
                f"{', '.join(map(str, BOUNDS))}; got entropy_bound={self.entropy_bound}."
            )


class LearntBoundTrainer(DiffusionGRPOTrainer):
    """A trainer that draws the bounds of its rollouts with `learn_bound`, and takes the likeliest in evaluations.

    For each rollout, the policy of bounds takes one step of REINFORCE. Its reward is `speed_rewards` of the weighted
    sum of the reward functions, less the mean over the prompt's other completions.

    Attributes:
        bound_policy: the policy; `None` without `learn_bound`.

    Raises:
        ValueError: with `learn_bound`, if weights are sharded or a step-aware reward continues rollouts.
    """

    args: LearntBoundConfig

    def _set_up_rollouts(self) -> None:
        super()._set_up_rollouts()
        self.bound_policy: BoundPolicy | None = None
        if not self.args.learn_bound:
            return
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise ValueError(
                "learn_bound=True reads the network's state of a prompt, which needs whole weights on every process: "
                "it works with DDP and ZeRO-1 and 2, and not with ZeRO-3 or FSDP. Set learn_bound=False or change the "
                "backend."
            )
        if self._probe is not None:
            raise ValueError(
                "learn_bound=True does not go with a StepAwareReward, whose continuations would take entropy_bound in "
                "place of the bound of the completion. Set learn_bound=False."
            )
        self.bound_policy = BoundPolicy(
            self.model.config.hidden_size, float(self.args.entropy_bound or 0.0), self.accelerator.device
        )
        self._bound_choice: tuple[torch.Tensor, torch.Tensor] | None = None  # states and choices of the last rollout

    def bounds(self, model: Any, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor) -> torch.Tensor | None:
        if self.bound_policy is None:
            return None
        trains, noise = self.model.training, None
        if trains:
            rows = self._global_rows(len(prompt_ids)).tolist()
            streams = row_generators(self.args.seed, Purpose.BOUNDS, self._rollouts["train"], rows=rows)
            noise = uniforms(streams).to(prompt_ids.device)
            columns = prompt_ids.size(1) / (prompt_ids.size(1) + self.args.max_completion_length)
            self.meter.count_forwards(len(prompt_ids) * columns * self.accelerator.num_processes)
        states = prompt_states(model, prompt_ids, prompt_mask)
        choices = self.bound_policy.choose(states, noise)
        self._bound_choice = states, choices
        bounds = torch.tensor(BOUNDS, dtype=torch.float64, device=choices.device)[choices]
        self.meter.add("train" if trains else "eval", {"bound/mean": self._mean(bounds)})
        return bounds

    def _take_rollout(self, mode: str, rows: Rows) -> Rollout:
        rollout = super()._take_rollout(mode, rows)
        if self.bound_policy is not None and mode == "train":
            self._learn_bounds(self.bound_policy, rollout)
        return rollout

    def _learn_bounds(self, policy: BoundPolicy, rollout: Rollout) -> None:
        """Train the policy of bounds on the completions of all processes, so that it stays the same on each."""
        assert self._bound_choice is not None
        states, choices = (rollout.gather(values.contiguous()) for values in self._bound_choice)
        rewards = rollout.finished.rewards
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        total = total.masked_fill(rewards.isnan().all(1), torch.nan)
        steps = rollout.gather(rollout.trajectory.row_forwards)
        paid = speed_rewards(total, steps, rollout.sampling.denoising_steps, self.args.speed_exponent)
        groups = paid.view(-1, rollout.group_size)
        advantages = leave_one_out(groups - groups.nanmean(1, keepdim=True)).flatten().nan_to_num(nan=0.0)
        policy.learn(states, choices, advantages.float(), self.args.bound_learning_rate)
        self.meter.add("train", {"bound/reward": paid.nanmean().item()})

    def _mean(self, values: torch.Tensor) -> float:
        return self.accelerator.gather(values.float()).mean().item()

    def _extra_state(self) -> dict[str, Any]:
        found = super()._extra_state()
        return found if self.bound_policy is None else found | {"bound_policy": self.bound_policy.state_dict()}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        super()._load_extra_state(state)
        if self.bound_policy is not None:
            self.bound_policy.load_state_dict(state["bound_policy"])
