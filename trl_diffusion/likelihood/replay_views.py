"""Views that replay the rollout: all of its denoising steps, several per view (TraceRL, DiPO).

A view is the canvas before every `shrink`-th step, and its targets are what the next `shrink` steps wrote. With
block-causal attention, where a block never sees later ones, one view replays the same steps of all blocks, each next
to the finished blocks before it (two streams); a trajectory then takes as many views as a block has steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.likelihood.base import Likelihood, Rows, ScoredViews, refuse_block_attention
from trl_diffusion.likelihood.plans import block_steps, trajectory_groups
from trl_diffusion.likelihood.views import Views, noised_views
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.validation import one_of

MEANS = ("views", "tokens")


@dataclass
class ReplayViews(Likelihood):
    """Every denoising step of the rollout, `shrink` steps per view.

    With `shrink=1` after an exact rollout each token is scored on what the sampler saw, so the rollout's
    log-probabilities are the old ones; else those are recomputed on the views.

    Args:
        sampling: how completions are drawn.
        shrink: denoising steps per view.
        mean_over: what the weights make of a loss that sums over a view's tokens: the mean over a view's tokens, and
            over the `views` that have any; or a sum in which all `tokens` count alike.
        two_stream: for block-causal attention; a view replays the same steps of all blocks.
    """

    paper = "2509.06949"

    sampling: SamplingConfig
    shrink: int = 1
    mean_over: str = "views"
    two_stream: bool = False

    weighted = True
    at_sampling_temperature = True

    def __post_init__(self) -> None:
        one_of("mean_over", self.mean_over, MEANS)
        self.num_views = -(-self._steps // self.shrink)
        self.records_old = self.shrink == 1 and not self.sampling.approximate

    @property
    def _steps(self) -> int:
        return self.sampling.steps_per_block if self.two_stream else self.sampling.denoising_steps

    def check_family(self, family: DiffusionFamily, name: str) -> None:
        if not self.two_stream:
            refuse_block_attention(family, name)
        elif family.attention_block is None:
            raise ValueError(
                f"{name} noises every block next to the finished ones, which needs block-causal attention; "
                f"{family.name} attends to the whole canvas. Take a block-causal model (sdar), or TraceRL without "
                "block_causal."
            )

    def plan(self, rollout: Rollout) -> Rows:
        trajectory = rollout.trajectory
        mask = rollout.text & rollout.trainable.unsqueeze(1)
        groups = block_steps if self.two_stream else trajectory_groups
        plan = groups(trajectory.unmask_step, self._steps, self.shrink).only(mask)
        masked = plan.masked if trajectory.given is None else plan.masked & ~trajectory.given.unsqueeze(1)
        # Steps were taken once, so the views of every inner update are the same.
        updates = len(rollout.updates)
        targets = plan.targets.unsqueeze(1).repeat(1, updates, 1, 1)
        rows = {
            "completion_mask": mask.long(),
            "masked": masked.unsqueeze(1).repeat(1, updates, 1, 1),
            "targets": targets,
            "view_weights": self._weights(targets.sum(-1)),
        }
        optional = {"support": trajectory.support}
        if self.records_old:
            rows["old_per_token_logps"] = trajectory.logps
            optional["prompt_columns"] = trajectory.prompt_columns
        return rows | {name: value for name, value in optional.items() if value is not None}

    def _weights(self, count: torch.Tensor) -> torch.Tensor:
        """Weights [B, μ, V] of the views' sums over their targets (`count` of them), which the loss divides by V."""
        if self.mean_over == "tokens":
            return torch.full_like(count, self.num_views, dtype=torch.float32)
        filled = (count > 0).sum(-1, keepdim=True)
        return self.num_views / (filled * count).clamp(min=1)

    def view(self, rows: Rows, update: int, view: int, mask_token_id: int) -> Views:
        return noised_views(
            rows["completion_ids"],
            rows["masked"][:, update, view],
            rows["targets"][:, update, view],
            mask_token_id,
            two_stream=self.two_stream,
        )

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Σ log p over all views: log p of the trajectory, exact with `shrink=1`."""
        return logps.sum((1, 2))

    def targets_per_view(self, length: int) -> float:
        return length / self.num_views

    def extra_columns(self, length: int) -> float:
        return float(length) if self.two_stream else 0.0
