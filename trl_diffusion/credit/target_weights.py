"""DMPO's credit (2510.08233): how much more the tilted reference wants a completion than the policy that wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.credit.advantages import effective_sample_size, group_softmax, scored_in_group, target_log_weights
from trl_diffusion.credit.group_credit import Credit, GroupValues, GroupWeights

BASELINES = ("group", "individual", "model", "none")


@dataclass
class TargetWeights(Credit):
    """G · (w − baseline), w the softmax over a prompt's completions of η α (ELBO_ref − ELBO) + η r.

    Args:
        alpha: α, temperature of the target p_ref · exp(r / α); 0 needs no likelihoods.
        scale: η; 1/α if the log-weights are those of the target.
        baseline: `group` 1/G; `individual` w for the negated rewards; `model` the softmax of the policy's own change
            since the rollout, taken anew before each update; `none`.
        views: `Likelihood` whose estimates are unbiased; which the ELBOs are estimated on.
        over_scored: count only the completions with a reward in the factor G, as WDDO does, whose sample of the old
            policy they are.
    """

    paper = "2510.08233"

    alpha: float
    scale: float
    baseline: str
    views: Any
    over_scored: bool = False

    only_scored = True

    def __post_init__(self) -> None:
        self.refreshes = self.baseline == "model"
        self.needs_reference = self.alpha != 0.0
        self.estimates = self.views if self.needs_reference or self.refreshes else None

    def weigh(self, group: GroupValues) -> GroupWeights:
        unscored, size = group.advantages.isnan(), group.advantages.size(1)
        scored = scored_in_group(group.advantages)

        def softmax(log_weights: torch.Tensor) -> torch.Tensor:
            return group_softmax(log_weights.masked_fill(unscored, -torch.inf))

        def weights(rewards: torch.Tensor) -> torch.Tensor:
            return softmax(target_log_weights(group.reference, group.current, rewards, self.alpha, self.scale))

        values = weights(group.advantages)
        if self.over_scored:
            return GroupWeights(values * scored, _metrics(values))
        if self.baseline == "individual":
            baseline = weights(-group.advantages)
        elif self.baseline == "model" and group.now is not None:
            assert group.current is not None
            baseline = softmax(group.now - group.current)
        elif self.baseline == "none":
            baseline = torch.zeros_like(values)
        else:  # the softmax of a policy that has not changed is as flat as `group`
            baseline = (1 / scored).masked_fill(unscored, 0.0)
        return GroupWeights(size * (values - baseline), _metrics(values))


def _metrics(weights: torch.Tensor) -> dict[str, float]:
    groups = weights[weights.any(1)]  # a prompt without any reward has no weights
    if not len(groups):
        return {}
    return {
        "dmpo/effective_sample_size": effective_sample_size(groups).mean().item(),
        "dmpo/max_weight": groups.max(1).values.mean().item(),
    }
