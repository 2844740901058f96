"""The base class of losses of whole completions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from trl_diffusion.likelihood.base import Likelihood
from trl_diffusion.losses.base import Loss, LossInputs, LossOutputs


class EstimateLoss(Loss):
    """Base of losses of ℓ, the likelihood's estimate of log p(completion), with ESPO's KL term β (ℓ − ℓ_ref)² / 2L.

    Attributes:
        beta: coefficient of the KL term.
    """

    beta: float
    scores_together = True
    reads: ClassVar[tuple[str, ...]] = ("beta", "sync_ref_model")

    def needs_reference(self, args: Any) -> bool:
        return self.beta != 0.0

    def check(self, likelihood: Likelihood, args: Any) -> None:
        self.require_estimate(likelihood)

    def with_kl(self, inputs: LossInputs, current: torch.Tensor, outputs: LossOutputs) -> LossOutputs:
        """Add the KL term.

        Args:
            inputs: of the loss.
            current: [B], ℓ under the policy.
            outputs: without the term.
        """
        if self.beta == 0.0:
            return outputs
        assert inputs.reference is not None
        kl = quadratic_kl(current, inputs.log_likelihood(inputs.reference), inputs.logps.size(-1))
        return LossOutputs(outputs.loss + self.beta * kl, outputs.metrics | {"kl": kl.detach()})


def quadratic_kl(elbo: torch.Tensor, reference: torch.Tensor, length: int) -> torch.Tensor:
    """(ELBO − ELBO_ref)² / 2L, one per completion (ESPO, 2512.03759)."""
    return (elbo - reference).square() / (2 * length)
