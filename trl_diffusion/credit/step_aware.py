"""SAPO, Step-Aware Policy Optimization (2510.01544): a reward for the progress made while denoising.

Not TRL's `loss_type="sapo"`, which is Soft Adaptive Policy Optimization.

A completion may have succeeded because of its first half or by luck at the end. Its process reward separates the two:
it is the success rate of continuations from the completion's own partly denoised state, minus the success rate of its
group, whose completions start from all masks. `StepAwareReward` wraps a reward function and holds the settings of this
measurement; the trainers of this library make it. The paper's code is not public: states, success and the form below
are our reading.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.utils import get_callable_name

from trl_diffusion.credit.step_aware_states import STATES
from trl_diffusion.credit.success import awaited, check_success, successes
from trl_diffusion.validation import one_of

PAPER = {
    "title": "Step-Aware Policy Optimization for Reasoning in Diffusion Large Language Models",
    "id": "2510.01544",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{xie2025step,
            title        = {{Step-Aware Policy Optimization for Reasoning in Diffusion Large Language Models}},
            author       = {Shaoan Xie and Lingjing Kong and Xiangchen Song and Xinshuai Dong and Guangyi Chen and
                            Eric P. Xing and Kun Zhang},
            year         = 2025,
            eprint       = {arXiv:2510.01544},
        }"""),
}

FORMS = ("additive", "mean_normalised")
GATES = ("success", "advantage")
SHARED = ("group", "completion")
BASELINES = ("group", "earlier_state")


class StepAwareReward:
    """A reward function whose successful completions are also judged by their partly denoised states.

    Other trainers call it as the wrapped reward function. A trainer of this library also continues completions from
    their own states and adds λ · 1[A > 0 and success] · R to the advantage A of all their tokens, where R is the
    success rate of the continuations minus that of the group.

    Args:
        reward: a reward function in TRL's form, asynchronous or not.
        success: decides which completions succeeded. It is called like a reward function and returns one truth value
            per completion, or `None` for one it cannot judge. Give this or `success_threshold`.
        success_threshold: a completion succeeded if the wrapped reward is at least this.
        num_rollouts: N, continuations per completion.
        num_mask_tokens: masked positions that are appended to a state, as far as the canvas has room.
        state: `block`, `keep` or `prefix`, see `trl_diffusion.credit.step_aware_states`.
        state_shared_by: the state is taken at one random fraction per `group` or per `completion`.
        baseline: what the continuations are compared with: `group`, the success rate of the group; or
            `earlier_state`, that of continuations from an earlier random state of the same completion (the paper's
            general form).
        weight: λ.
        clamp: limits (low, high) of R; none if `None`.
        leave_one_out: exclude the completion itself from its group's rate.
        form: `additive`, or `mean_normalised`: A + λ(R − group mean of R), the paper's ablation, which probes every
            completion.
        gate: which completions are probed in the additive form: `success`, those with A > 0 that succeeded;
            `advantage`, all with A > 0.

    Raises:
        TypeError: if `reward` is no function.
        ValueError: if neither or both of `success` and `success_threshold` are given, or a setting has no such value.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        *,
        success: Callable[..., Any] | None = None,
        success_threshold: float | None = None,
        num_rollouts: int = 3,
        num_mask_tokens: int = 64,
        state: str = "block",
        state_shared_by: str = "group",
        baseline: str = "group",
        weight: float = 1.0,
        clamp: tuple[float, float] | None = None,
        leave_one_out: bool = False,
        form: str = "additive",
        gate: str = "success",
    ):
        if isinstance(reward, torch.nn.Module) or not callable(reward):
            raise TypeError(
                f"StepAwareReward wraps a reward function, got {type(reward).__name__}. Wrap a reward model in a "
                "function that returns one number per completion."
            )
        check_success("StepAwareReward", success, success_threshold)
        for name, value, choices in (
            ("state", state, STATES),
            ("state_shared_by", state_shared_by, SHARED),
            ("baseline", baseline, BASELINES),
            ("form", form, FORMS),
            ("gate", gate, GATES),
        ):
            one_of(name, value, choices)
        if min(num_rollouts, num_mask_tokens) < 1:
            raise ValueError(
                f"num_rollouts ({num_rollouts}) and num_mask_tokens ({num_mask_tokens}) must be at least 1."
            )
        if clamp is not None and not clamp[0] < clamp[1]:
            raise ValueError(f"clamp must be (low, high) with low < high, got {clamp}.")
        if form == "mean_normalised" and gate != "success":
            raise ValueError("form='mean_normalised' probes every completion, so `gate` must stay at its default.")
        if state == "keep" and num_mask_tokens != 64:
            raise ValueError(
                "state='keep' continues the canvas as it was, so `num_mask_tokens` has no effect. Leave it out."
            )
        functools.update_wrapper(self, reward, updated=())
        self.__name__ = get_callable_name(reward)  # the name under which TRL logs the reward
        self.reward, self.success, self.success_threshold = reward, success, success_threshold
        self.num_rollouts, self.num_mask_tokens = num_rollouts, num_mask_tokens
        self.state, self.state_shared_by, self.baseline = state, state_shared_by, baseline
        self.weight, self.clamp, self.leave_one_out = weight, clamp, leave_one_out
        self.form, self.gate = form, gate

    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        """Return the wrapped rewards."""
        return awaited(self.reward(prompts=prompts, completions=completions, **columns))

    def successes(
        self, prompts, completions, *, rewards: list[float | None] | None = None, **columns: Any
    ) -> torch.Tensor:
        """Return which completions succeeded.

        Args:
            prompts: as a reward function gets them.
            completions: as a reward function gets them.
            rewards: their wrapped rewards, if known.
            **columns: the other arguments of a reward function.

        Returns:
            Float64 [B]: 1, 0, or NaN for a completion whose reward (or NaN) or success is `None`.
        """
        if rewards is None:
            rewards = self(prompts=prompts, completions=completions, **columns)
        return successes(
            self.success, self.success_threshold, rewards, prompts=prompts, completions=completions, **columns
        )

    def probed(self, advantages: torch.Tensor, success: torch.Tensor) -> torch.Tensor:
        """Return which completions are continued, bool [B], from advantages [B] and successes [B], NaN if unknown."""
        if self.form == "mean_normalised":
            return ~success.isnan()
        if self.gate == "advantage":
            return (advantages > 0) & ~success.isnan()
        return (advantages > 0) & (success == 1)

    def advantages(self, advantages: torch.Tensor, process_reward: torch.Tensor, num_generations: int) -> torch.Tensor:
        """Add the process reward to advantages.

        Args:
            advantages: [B], whole groups.
            process_reward: float64 [B], R; NaN for completions that were not probed.
            num_generations: G.

        Returns:
            [B], of the type of `advantages`.
        """
        if self.clamp is not None:
            process_reward = process_reward.clamp(*self.clamp)
        if self.form == "mean_normalised":
            groups = process_reward.view(-1, num_generations)
            process_reward = (groups - groups.nanmean(1, keepdim=True)).flatten()
        return advantages + (self.weight * process_reward.nan_to_num(0.0)).to(advantages)


def group_success_rate(success: torch.Tensor, num_generations: int, leave_one_out: bool = False) -> torch.Tensor:
    """Return the success rate of each completion's group, over those whose success is known.

    Args:
        success: float64 [B], whole groups; 1, 0 or NaN.
        num_generations: G.
        leave_one_out: exclude the completion itself.

    Returns:
        Float64 [B]; NaN where no completion is left.
    """
    groups = success.view(-1, num_generations)
    known = (~groups.isnan()).double()
    total = groups.nan_to_num(0.0)
    count, right = known.sum(1, keepdim=True).expand_as(groups), total.sum(1, keepdim=True).expand_as(groups)
    if leave_one_out:
        count, right = count - known, right - total
    return (right / count).flatten()
