"""Views that score every token once, on more or less of what the sampler saw, and weigh it by how much (DiFFPO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.likelihood.base import Rows
from trl_diffusion.likelihood.masked_views import MaskedViews
from trl_diffusion.sampling.rollout import Rollout


@dataclass
class SplitViews(MaskedViews):
    """The views of `SplitAtSteps`, with importance weights of tokens (DiFFPO, 2510.02212).

    A token was drawn from the canvas before its own step, and is scored on another one. Its loss is multiplied by
    min(C, p_old(token in its view) / p(token when it was drawn)), which is 1 where the two canvases are the same.
    Both probabilities are those at the sampling temperature and support.

    Every token has one view of the two, so views have a weight of 2, and the mean over views is a sum over tokens.

    Args:
        noise: how views are drawn.
        loss_mask: see `MaskedViews`.
        cap: C; `None` for no weights.
    """

    paper = "2510.02212"

    cap: float | None = 2.0

    weighted = True
    at_sampling_temperature = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.importance_cap, self.weighs_tokens = self.cap, self.cap is not None

    def plan(self, rollout: Rollout) -> Rows:
        rows, trajectory = super().plan(rollout), rollout.trajectory
        rows["view_weights"] = torch.full_like(rows["mask_rate"], 2.0)
        rows["rollout_logps"] = trajectory.logps
        # With these the passes have the columns of the rollout's, so that bfloat16 rounds alike in both.
        optional = {"support": trajectory.support, "prompt_columns": trajectory.prompt_columns}
        return rows | {name: value for name, value in optional.items() if value is not None}

    def buffer_bytes(self, length: int, updates: int) -> float:
        return super().buffer_bytes(length, updates) + 4.0 * length
