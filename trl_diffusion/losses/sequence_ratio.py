"""ESPO's loss (2512.03759): the clipped ratio of whole completions, and a quadratic estimate of the KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trl_diffusion.likelihood.base import Likelihood
from trl_diffusion.losses.base import Loss, LossInputs, LossOutputs


@dataclass
class SequenceRatio(Loss):
    """−min(ρA, clip(ρ) A) + β (ℓ − ℓ_ref)² / 2L with ρ = exp((ℓ − ℓ_old) / L), ℓ the estimate of log p(completion).

    Args:
        low: the ratio is clipped below 1 − low.
        high: the ratio is clipped above 1 + high.
        beta: coefficient of the KL term.
    """

    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0

    scores_together = True
    needs_old = True
    reads: ClassVar[tuple[str, ...]] = ("beta", "epsilon", "epsilon_high", "sync_ref_model")

    def needs_reference(self, args: Any) -> bool:
        return self.beta != 0.0

    def check(self, likelihood: Likelihood, args: Any) -> None:
        self.require_estimate(likelihood)

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        assert inputs.old is not None
        length, advantages = inputs.logps.size(-1), inputs.completion_advantages
        current = inputs.log_likelihood(inputs.logps)
        ratio = sequence_ratio(current, inputs.log_likelihood(inputs.old), length)
        loss = clipped_loss(ratio, advantages, self.low, self.high)
        below = (ratio < 1 - self.low) & (advantages < 0)
        above = (ratio > 1 + self.high) & (advantages > 0)
        clipped = {"low": below, "high": above, "region": below | above}
        metrics = {f"clip_ratio/{name}_mean": rows.float() for name, rows in clipped.items()}
        if self.beta != 0.0:
            assert inputs.reference is not None
            kl = quadratic_kl(current, inputs.log_likelihood(inputs.reference), length)
            loss, metrics = loss + self.beta * kl, metrics | {"kl": kl.detach()}
        return LossOutputs(loss, metrics)


def sequence_ratio(elbo: torch.Tensor, old: torch.Tensor, length: int) -> torch.Tensor:
    """exp((ELBO − ELBO_old) / L), one per completion."""
    return ((elbo - old) / length).exp()


def clipped_loss(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A), one per completion."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def quadratic_kl(elbo: torch.Tensor, reference: torch.Tensor, length: int) -> torch.Tensor:
    """(ELBO − ELBO_ref)² / 2L, one per completion."""
    return (elbo - reference).square() / (2 * length)
