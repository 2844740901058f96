"""WDDO (DMPO, 2510.08233): classify completions of the target against those of the old policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from trl_diffusion.likelihood.base import Likelihood, describe
from trl_diffusion.losses.base import Loss, LossInputs, LossOutputs


@dataclass
class Contrast(Loss):
    """−[A · log σ(D) + log σ(−D')], D and D' the change of the ELBO since the rollout on independent views.

    A is the completion's weight under the target, with mean 1 over a prompt's completions that have a reward.
    """

    paper = "2510.08233"

    scores_together = True
    needs_old = True

    def check(self, likelihood: Likelihood, args: Any) -> None:
        if not likelihood.independent_halves:
            raise ValueError(
                f"Contrast needs two independent, unbiased estimates of the ELBO; {describe(likelihood)} gives none. "
                "Take MaskedViews of an even number of SubsetPairs."
            )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        half = inputs.logps.size(1) // 2
        parts = inputs.part(slice(None, half)), inputs.part(slice(half, None))
        changes = []
        for part in parts:
            assert part.old is not None
            changes.append(part.log_likelihood(part.logps) - part.log_likelihood(part.old))
        return LossOutputs(wddo_loss(inputs.completion_advantages, *changes))


def wddo_loss(weights: torch.Tensor, change: torch.Tensor, other_change: torch.Tensor) -> torch.Tensor:
    """−[G·w · log σ(D) + log σ(−D')], minimal where D is the log-ratio of target and old policy.

    Args:
        weights: [B], G·w, mean 1 over a prompt's G completions with a reward.
        change: [B], D = ELBO − ELBO_old.
        other_change: [B], the same from independent views.
    """
    return -(weights * logsigmoid(change) + logsigmoid(-other_change))
