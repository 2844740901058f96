"""GDSD's loss (2605.29398): a regression of the completion's log-ratio on its advantage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trl_diffusion.likelihood.base import Likelihood, describe
from trl_diffusion.losses.base import LossInputs, LossOutputs
from trl_diffusion.losses.estimate_loss import EstimateLoss
from trl_diffusion.validation import clip_range


@dataclass
class LogRatioRegression(EstimateLoss):
    """(clip((ℓ − ℓ_old) / L) − ψA)² + β (ℓ − ℓ_ref)² / 2L, mean over the samples of the views.

    ℓ is the estimate of log p(completion) from one sample. The clip is to [log(1 − low), log(1 + high)], whatever the
    sign of A: a completion whose log-ratio has left it learns from the KL term alone.

    Args:
        psi: ψ.
        low: see above; in [0, 1).
        high: see above.
        beta: coefficient of the KL term.
        samples: into how many parts the views are divided, each of which has a square.

    Raises:
        ValueError: if the clip range is not one.
    """

    paper = "2605.29398"

    psi: float = 1.0
    low: float = 4e-4
    high: float = 4e-4
    beta: float = 0.0
    samples: int = 1

    needs_old = True
    reads: ClassVar[tuple[str, ...]] = (*EstimateLoss.reads, "epsilon", "epsilon_high")

    def __post_init__(self) -> None:
        clip_range(self.low, self.high)

    def check(self, likelihood: Likelihood, args: Any) -> None:
        super().check(likelihood, args)
        if likelihood.samples % self.samples:
            raise ValueError(
                f"LogRatioRegression(samples={self.samples}) divides the views into {self.samples} parts that each "
                f"estimate the likelihood; {describe(likelihood)} has {likelihood.samples}. Set samples=1."
            )

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        size = inputs.logps.size(1) // self.samples
        of_samples = [
            self._of_sample(inputs.part(slice(first, first + size))) for first in range(0, size * self.samples, size)
        ]
        names = of_samples[0].metrics
        metrics = {name: torch.stack([own.metrics[name] for own in of_samples]).mean(0) for name in names}
        return LossOutputs(torch.stack([own.loss for own in of_samples]).mean(0), metrics)

    def _of_sample(self, inputs: LossInputs) -> LossOutputs:
        assert inputs.old is not None
        current = inputs.log_likelihood(inputs.logps)
        change = (current - inputs.log_likelihood(inputs.old)) / inputs.logps.size(-1)
        loss, clipped = regression_loss(change, self.psi * inputs.completion_advantages, self.low, self.high)
        return self.with_kl(inputs, current, LossOutputs(loss, {"clip_ratio/region_mean": clipped.float()}))


def regression_loss(
    change: torch.Tensor, wanted: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (clip(change) − wanted)², and which changes were clipped; [B] each.

    Args:
        change: [B], log-ratio per token.
        wanted: [B], ψA.
        low: the change is clipped below log(1 − low).
        high: the change is clipped above log(1 + high).
    """
    least, most = math.log1p(-low), math.log1p(high)
    return (change.clamp(least, most) - wanted).square(), (change < least) | (change > most)
