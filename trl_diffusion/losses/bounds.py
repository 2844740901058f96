"""SPG's loss (2510.09541): a lower bound of the likelihood for good completions, an upper bound for bad ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.likelihood.base import Likelihood, describe
from trl_diffusion.likelihood.estimates import mean_of_targets, upper_bound_per_token
from trl_diffusion.losses.base import Loss, LossInputs, LossOutputs


@dataclass
class SandwichedBound(Loss):
    """−A · bound per token; the bound is the ELBO where A ≥ 0, else a mix of it and an upper bound.

    Args:
        power: b of the upper bound, > 0.
        upper_weight: weight of the upper bound in the mix; 1 for the upper bound alone.
    """

    paper = "2510.09541"

    power: float = 1.5
    upper_weight: float = 0.5

    scores_together = True

    def check(self, likelihood: Likelihood, args: Any) -> None:
        if not likelihood.random_subsets:
            raise ValueError(
                f"SandwichedBound needs views that mask random subsets, over which its upper bound is taken; "
                f"{describe(likelihood)} masks what the denoising steps left. Take MaskedViews."
            )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        advantages, length = inputs.completion_advantages, inputs.views.lengths.clamp(min=1)
        bound = sandwiched_bound(inputs.logps, inputs.views.targets, length, advantages, self.power, self.upper_weight)
        return LossOutputs(-advantages * bound)


def sandwiched_bound(
    logps: torch.Tensor,
    targets: torch.Tensor,
    length: torch.Tensor,
    advantages: torch.Tensor,
    power: float,
    upper_weight: float,
) -> torch.Tensor:
    """ELBO per token where A ≥ 0, else upper_weight · upper bound + (1 − upper_weight) · ELBO.

    Args:
        logps: float [B, V, L], 0 where a position is no target.
        targets: bool [B, V, L].
        length: long [B], n.
        advantages: [B].
        power: b.
        upper_weight: 1 for the upper bound alone.

    Returns:
        [B], in nats per token.
    """
    lower = mean_of_targets(logps, targets).mean(1)
    upper = upper_bound_per_token(logps, targets, length, power)
    return torch.where(advantages < 0, upper_weight * upper + (1 - upper_weight) * lower, lower)
