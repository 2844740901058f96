"""Views at the completion's own denoising steps: a token's log-probability is the one at the step that wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.credit.step_choice import EligibleSteps, StepChoice
from trl_diffusion.likelihood.base import Likelihood, Rows, ScoredViews
from trl_diffusion.likelihood.views import Views, trajectory_views
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
    """

    steps: StepChoice
    sampling: SamplingConfig
    weighted: bool = True
    recompute: bool = False
    cap: float = 3.0

    at_sampling_temperature = True

    def __post_init__(self) -> None:
        self.num_views = self.steps.count
        self.records_old = not self.recompute
        self.importance_cap = self.cap if self.recompute else None
        self.estimates, self.needs_signals = self.steps.sums, self.steps.needs_signals

    def plan(self, rollout: Rollout) -> Rows:
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
        if not self.recompute:
            rows["old_per_token_logps"] = trajectory.logps
        if self.recompute or rollout.sampling.approximate:
            rows["rollout_logps"] = trajectory.logps  # another policy's, compared with the network's
        optional = {"support": trajectory.support, "given": trajectory.given}
        if not self.recompute:
            optional["prompt_columns"] = trajectory.prompt_columns
        return rows | {name: value for name, value in optional.items() if value is not None}

    def view(self, rows: Rows, update: int, view: int, mask_token_id: int) -> Views:
        steps = rows["view_steps"][:, update, view]
        views = trajectory_views(rows["completion_ids"], rows["unmask_step"], steps, mask_token_id, rows.get("given"))
        views.targets &= rows["completion_mask"].bool()
        return views

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """The mean over drawn steps of weight · Σ log p: unbiased for log p of the completion's trajectory."""
        assert views.weights is not None
        return (views.weights * logps.sum(-1)).mean(1)

    def state(self) -> dict[str, Any]:
        return self.steps.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps.load_state(state)

    def targets_per_view(self, length: int) -> float:
        return length / self.sampling.denoising_steps

    def buffer_bytes(self, length: int, updates: int) -> float:
        return 4.0 * length * (2 + self.sampling.top_k) + 12.0 * updates * self.num_views
