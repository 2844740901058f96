"""Weighted log-likelihoods instead of ratios: wd1 (2507.08838) and DMPO (2510.08233)."""

from __future__ import annotations

from dataclasses import dataclass

from trl_diffusion.likelihood.estimates import mean_of_targets
from trl_diffusion.losses.base import Loss, LossInputs, LossOutputs
from trl_diffusion.validation import one_of

REDUCTIONS = ("sum", "mean")


@dataclass
class WeightedLikelihood(Loss):
    """−A · mean over views of the log-probabilities of a view's targets, summed (wd1) or averaged (DMPO).

    No old and no reference pass: the weights of the completions are all that the update knows of the rewards.

    Args:
        reduction: over the targets of a view, `sum` or `mean`.
    """

    paper = "2507.08838"

    reduction: str = "sum"

    def __post_init__(self) -> None:
        one_of("reduction", self.reduction, REDUCTIONS)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        if self.reduction == "sum":
            values = inputs.logps.sum(-1)
        else:
            values = mean_of_targets(inputs.logps, inputs.views.targets)
        if inputs.views.weights is not None:
            values = inputs.views.weights * values
        return LossOutputs(-(inputs.advantages * values).mean(1))
