"""Losses: from log-probabilities and advantages to one number per completion, and metrics."""

from trl_diffusion.losses.base import Loss, LossInputs, LossOutputs
from trl_diffusion.losses.bounds import SandwichedBound
from trl_diffusion.losses.contrast import Contrast
from trl_diffusion.losses.estimate_loss import EstimateLoss
from trl_diffusion.losses.estimated_likelihood import EstimatedLikelihood
from trl_diffusion.losses.log_ratio_regression import LogRatioRegression
from trl_diffusion.losses.sequence_ratio import SequenceRatio
from trl_diffusion.losses.token_ratio import TokenRatio
from trl_diffusion.losses.weighted_likelihood import WeightedLikelihood

__all__ = [
    "Contrast",
    "EstimateLoss",
    "EstimatedLikelihood",
    "LogRatioRegression",
    "Loss",
    "LossInputs",
    "LossOutputs",
    "SandwichedBound",
    "SequenceRatio",
    "TokenRatio",
    "WeightedLikelihood",
]
