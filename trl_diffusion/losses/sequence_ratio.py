"""ESPO's loss (2512.03759): the clipped ratio of whole completions, and a quadratic estimate of the KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trl_diffusion.losses.base import LossInputs, LossOutputs
from trl_diffusion.losses.estimate_loss import EstimateLoss


@dataclass
class SequenceRatio(EstimateLoss):
    """−min(ρA, clip(ρ) A) + β (ℓ − ℓ_ref)² / 2L with ρ = exp((ℓ − ℓ_old) / L), ℓ the estimate of log p(completion).

    Args:
        low: the ratio is clipped below 1 − low.
        high: the ratio is clipped above 1 + high.
        beta: coefficient of the KL term.
    """

    paper = "2512.03759"

    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0

    needs_old = True
    reads: ClassVar[tuple[str, ...]] = (*EstimateLoss.reads, "epsilon", "epsilon_high")

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
        return self.with_kl(inputs, current, LossOutputs(loss, metrics))


def sequence_ratio(elbo: torch.Tensor, old: torch.Tensor, length: int) -> torch.Tensor:
    """exp((ELBO − ELBO_old) / L), one per completion."""
    return ((elbo - old) / length).exp()


def clipped_loss(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A), one per completion."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
