"""Views at the completion's own denoising steps: a token's log-probability is the one at the step that wrote it.

If the rollout drew positions with a probability (`plackett_luce`), a token's log-probability is that of its position
and the token together. Then a step's log-probability is exact: both are drawn from the canvas before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_diffusion.credit.step_choice import EligibleSteps, StepChoice
from trl_diffusion.likelihood.base import Likelihood, Rows, ScoredViews
from trl_diffusion.likelihood.views import PositionChoice, Views, trajectory_views
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.rollout import Rollout


@dataclass
class TrajectoryViews(Likelihood):
    """The canvas before a denoising step, whose targets are the tokens which that step wrote.

    Args:
        steps: which steps learn.
        sampling: how completions are drawn.
        weighted: whether steps may have weights other than 1; a KL term must then carry them too.
        recompute: old log-probabilities are the network's on these views, and not the rollout's, which another
            policy wrote; tokens are weighted with the ratio of the two.
        cap: largest of these weights.
        merge: denoising steps per view, as if all of them had been taken at once: the canvas before the first of them,
            with the tokens of all as targets. Above 1 old log-probabilities are the network's on these views, and
            positions do not count.
    """

    steps: StepChoice
    sampling: SamplingConfig
    weighted: bool = True
    recompute: bool = False
    cap: float = 3.0
    merge: int = 1

    at_sampling_temperature = True

    def __post_init__(self) -> None:
        self.num_views = self.steps.count
        self.records_old = not self.recompute and self.merge == 1
        self.importance_cap = self.cap if self.recompute else None
        self.estimates, self.needs_signals = self.steps.sums, self.steps.needs_signals

    def plan(self, rollout: Rollout) -> Rows:
        rollout = merged(rollout, self.merge)
        trajectory = rollout.trajectory
        eligible = EligibleSteps.of(rollout, self.steps.scope)
        updates = self.steps.choose(rollout, eligible)
        text = (trajectory.unmask_step >= 0) & (trajectory.unmask_step < eligible.count.unsqueeze(1))
        rows = {
            "completion_mask": (text & rollout.trainable.unsqueeze(1)).long(),
            "unmask_step": trajectory.unmask_step,
            "view_steps": torch.stack([chosen.steps for chosen in updates], dim=1),
            "view_weights": torch.stack([chosen.weights for chosen in updates], dim=1),
        }
        optional = {"support": trajectory.support, "given": trajectory.given}
        optional |= {"position_ranks": trajectory.position_ranks}
        drawn = trajectory.logps
        if trajectory.position_logps is not None:
            drawn = drawn + trajectory.position_logps
            optional["prompt_tail"] = rollout.prompt_tail
        if self.records_old:
            rows["old_per_token_logps"] = drawn
            optional["prompt_columns"] = trajectory.prompt_columns
        if self.merge == 1 and (self.recompute or rollout.sampling.approximate):
            rows["rollout_logps"] = drawn  # another policy's, compared with the network's
        return rows | {name: value for name, value in optional.items() if value is not None}

    def view(self, rows: Rows, update: int, view: int, mask_token_id: int) -> Views:
        steps = rows["view_steps"][:, update, view]
        views = trajectory_views(rows["completion_ids"], rows["unmask_step"], steps, mask_token_id, rows.get("given"))
        views.targets &= rows["completion_mask"].bool()
        if "position_ranks" in rows:
            views.choice = self._choice(rows, steps, views.targets)
        return views

    def _choice(self, rows: Rows, steps: torch.Tensor, targets: torch.Tensor) -> PositionChoice:
        """The positions that each step [R] could choose: those of its block that no earlier step wrote."""
        positions = torch.arange(targets.size(1), device=steps.device) + rows["prompt_tail"].unsqueeze(1)
        active = positions // self.sampling.block_length == (steps // self.sampling.steps_per_block).unsqueeze(1)
        still_open = active & (rows["unmask_step"] >= steps.unsqueeze(1)) & targets.any(1, keepdim=True)
        return PositionChoice(still_open, rows["position_ranks"], self.sampling.position_temperature)

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """The mean over drawn steps of weight · Σ log p: unbiased for log p of the completion's trajectory."""
        assert views.weights is not None
        return (views.weights * logps.sum(-1)).mean(1)

    def state(self) -> dict[str, Any]:
        return self.steps.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps.load_state(state)

    def targets_per_view(self, length: int) -> float:
        of_a_view = self.merge * length / self.sampling.denoising_steps
        return of_a_view + (self.sampling.block_length / 2 if self.sampling.draws_positions else 0.0)

    def buffer_bytes(self, length: int, updates: int) -> float:
        return 4.0 * length * (2 + self.sampling.top_k) + 12.0 * updates * self.num_views


def merged(rollout: Rollout, merge: int) -> Rollout:
    """Return a rollout as if `merge` successive denoising steps of a block had been one (StepMerge, 2607.15200).

    Args:
        rollout: of whose steps the last group of a block is as large as the others.
        merge: steps per group; divides the steps of a block.
    """
    if merge == 1:
        return rollout
    trajectory, sampling = rollout.trajectory, rollout.sampling
    # a group of the steps −1 (never sampled) is −1 again
    steps = trajectory.unmask_step.div(merge, rounding_mode="floor").int()
    trajectory = replace(
        trajectory, unmask_step=steps, position_logps=None, position_ranks=None, forced=None, step_entropy=None
    )
    fewer = replace(sampling, denoising_steps=sampling.denoising_steps // merge, cache_refresh=0)
    return replace(rollout, trajectory=trajectory, sampling=fewer)
