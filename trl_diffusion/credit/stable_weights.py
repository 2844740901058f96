"""StableDRL's credit (2603.06743): self-normalised importance weights of the completions of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.credit.advantages import effective_sample_size, scored_in_group
from trl_diffusion.credit.group_credit import Credit, GroupFunction, GroupValues, GroupWeights
from trl_diffusion.validation import clip_range


@dataclass
class SelfNormalisedWeights(Credit):
    """A · n w, with w a completion's clipped ratio divided by the sum over the prompt's n completions with a reward.

    The ratio is exp((ℓ_now − ℓ_rollout) / tokens), ℓ the estimate of log p(completion). It is 1 before the first
    update of a rollout, and taken anew before each later one.

    Args:
        low: ratios are clipped below 1 − low, whatever the sign of A; in [0, 1).
        high: ratios are clipped above 1 + high.
        views: `Likelihood` on whose views the log-likelihoods are estimated, the same views for both policies.
        centring: see `Credit.centre`; `None` keeps TRL's advantages.

    Raises:
        ValueError: if the clip range is not one.
    """

    paper = "2603.06743"

    low: float
    high: float
    views: Any
    centring: GroupFunction | None = None

    refreshes = True

    def __post_init__(self) -> None:
        clip_range(self.low, self.high)
        self.estimates = self.views

    def centre(self, advantages: torch.Tensor) -> torch.Tensor:
        return advantages if self.centring is None else self.centring(advantages)

    def weigh(self, group: GroupValues) -> GroupWeights:
        log_ratios = torch.zeros_like(group.advantages)
        if group.now is not None:
            assert group.current is not None and group.estimated_tokens is not None
            log_ratios = (group.now - group.current) / group.estimated_tokens
        scored = scored_in_group(group.advantages)
        weights = self_normalised(log_ratios, scored > 0, self.low, self.high)
        return GroupWeights(group.advantages * (scored * weights), self._metrics(log_ratios, weights))

    def _metrics(self, log_ratios: torch.Tensor, weights: torch.Tensor) -> dict[str, float]:
        groups = weights[weights.any(1)]  # a prompt without any reward has no weights
        if not len(groups):
            return {}
        ratios = log_ratios[weights > 0].exp()
        clipped = (ratios < 1 - self.low) | (ratios > 1 + self.high)
        return {
            "stable_drl/clipped_share": clipped.float().mean().item(),
            "stable_drl/effective_sample_size": effective_sample_size(groups).mean().item(),
        }


def self_normalised(log_ratios: torch.Tensor, scored: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return clip(ρ) divided by its sum over the group: [N, G], between 0 and 1.

    Args:
        log_ratios: [N, G], log ρ.
        scored: bool [N, G], the completions that count; others get 0.
        low: ratios are clipped below 1 − low.
        high: ratios are clipped above 1 + high.
    """
    clipped = log_ratios.exp().clamp(1 - low, 1 + high) * scored
    return clipped / clipped.sum(1, keepdim=True).clamp(min=1 - low)  # a sum of at least one term, or 0
