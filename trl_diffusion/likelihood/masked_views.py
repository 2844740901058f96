"""Views that mask positions of the finished completion, whatever the order in which it was written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.likelihood.base import Likelihood, Rows, ScoredViews, refuse_block_attention
from trl_diffusion.likelihood.noises import Noise
from trl_diffusion.likelihood.views import Views, noised_views
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.validation import one_of

LOSS_MASKS = ("text", "canvas")


@dataclass
class MaskedViews(Likelihood):
    """The finished completion under random masks.

    Args:
        noise: which positions a view masks.
        loss_mask: which tokens may learn: `text`, up to and including the first end token, or the whole `canvas`, end
            tokens after the text included.
    """

    noise: Noise
    loss_mask: str = "text"

    def __post_init__(self) -> None:
        one_of("loss_mask", self.loss_mask, LOSS_MASKS)
        self.num_views, self.partial = self.noise.num_views, self.noise.partial
        self.random_subsets, self.independent_halves = self.noise.random_subsets, self.noise.independent_halves
        self.samples = self.noise.samples
        self.shift_window = None if self.noise.informed is None else self.noise.informed.window

    def check_family(self, family: DiffusionFamily, name: str) -> None:
        refuse_block_attention(family, name)

    def plan(self, rollout: Rollout) -> Rows:
        mask = self._loss_mask(rollout)
        plans = [self._draw(rollout, update).only(mask) for update in rollout.updates]
        rows = {
            "completion_mask": mask.long(),
            "masked": torch.stack([plan.masked for plan in plans], 1),
            "targets": torch.stack([plan.targets for plan in plans], 1),
            "mask_rate": torch.stack([plan.rate for plan in plans], 1),
        }
        prompts = [plan.prompt_masked for plan in plans if plan.prompt_masked is not None]
        return rows | ({"prompt_masked": torch.stack(prompts, 1)} if prompts else {})

    def _draw(self, rollout: Rollout, update: int):
        plan, given = self.noise.draw(rollout, update), rollout.trajectory.given
        if given is None:
            return plan
        given = given.unsqueeze(1)  # text that was put on the canvas is shown in every view
        return replace(plan, masked=plan.masked & ~given, targets=plan.targets & ~given)

    def _loss_mask(self, rollout: Rollout) -> torch.Tensor:
        """Tokens that may learn, bool [B, L]."""
        tokens = torch.ones_like(rollout.text) if self.loss_mask == "canvas" else rollout.text
        return tokens & rollout.trainable.unsqueeze(1)

    def view(self, rows: Rows, update: int, view: int, mask_token_id: int) -> Views:
        return noised_views(
            rows["completion_ids"],
            rows["masked"][:, update, view],
            rows["targets"][:, update, view],
            mask_token_id,
            rows["prompt_ids"],
            rows["prompt_masked"][:, update, view] if "prompt_masked" in rows else None,
        )

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        return self.noise.estimate(logps, views)

    def targets_per_view(self, length: int) -> float:
        return self.noise.scored_share(length) * length
