"""Weighted estimates of whole completions' log-likelihoods; StableDRL's loss on ESPO's views (2603.06743)."""

from __future__ import annotations

from dataclasses import dataclass

from trl_diffusion.losses.base import LossInputs, LossOutputs
from trl_diffusion.losses.estimate_loss import EstimateLoss


@dataclass
class EstimatedLikelihood(EstimateLoss):
    """−A ℓ / L + β (ℓ − ℓ_ref)² / 2L, ℓ the estimate of log p(completion).

    On policy it has the gradient of `SequenceRatio`. There is no ratio: what an update knows of the old policy is in
    A.

    Args:
        beta: coefficient of the KL term.
    """

    paper = "2603.06743"

    beta: float = 0.0

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        current = inputs.log_likelihood(inputs.logps)
        loss = -inputs.completion_advantages * current / inputs.logps.size(-1)
        return self.with_kl(inputs, current, LossOutputs(loss))
