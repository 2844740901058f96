"""Completions to log-probabilities under noised views."""

from trl_diffusion.likelihood.estimates import elbo_of_pairs, elbo_per_token, mean_of_targets, upper_bound_per_token
from trl_diffusion.likelihood.plans import NoisePlan
from trl_diffusion.likelihood.scoring import Scores, score_views
from trl_diffusion.likelihood.views import Views, noised_views, stack_views, trajectory_views

__all__ = [
    "NoisePlan",
    "Scores",
    "Views",
    "elbo_of_pairs",
    "elbo_per_token",
    "mean_of_targets",
    "noised_views",
    "score_views",
    "stack_views",
    "trajectory_views",
    "upper_bound_per_token",
]
