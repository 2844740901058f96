"""Completions to log-probabilities under noised views."""

from trl_diffusion.likelihood.base import Likelihood, ScoredViews
from trl_diffusion.likelihood.estimates import (
    elbo_of_pairs,
    elbo_per_token,
    mean_of_targets,
    quadrature_elbo,
    upper_bound_per_token,
)
from trl_diffusion.likelihood.informed import InformedMasking
from trl_diffusion.likelihood.masked_views import MaskedViews
from trl_diffusion.likelihood.noises import (
    Bernoulli,
    FullMask,
    Noise,
    QuadratureSubsets,
    SplitAtSteps,
    Strata,
    SubsetPairs,
    TextSubsets,
)
from trl_diffusion.likelihood.plans import NoisePlan
from trl_diffusion.likelihood.replay_views import ReplayViews
from trl_diffusion.likelihood.scoring import Scores, score_views
from trl_diffusion.likelihood.split_views import SplitViews
from trl_diffusion.likelihood.trajectory_views import TrajectoryViews
from trl_diffusion.likelihood.views import Views, noised_views, stack_views, trajectory_views

__all__ = [
    "Bernoulli",
    "FullMask",
    "InformedMasking",
    "Likelihood",
    "MaskedViews",
    "Noise",
    "NoisePlan",
    "QuadratureSubsets",
    "ReplayViews",
    "ScoredViews",
    "Scores",
    "SplitAtSteps",
    "SplitViews",
    "Strata",
    "SubsetPairs",
    "TextSubsets",
    "TrajectoryViews",
    "Views",
    "elbo_of_pairs",
    "elbo_per_token",
    "mean_of_targets",
    "noised_views",
    "quadrature_elbo",
    "score_views",
    "stack_views",
    "trajectory_views",
    "upper_bound_per_token",
]
