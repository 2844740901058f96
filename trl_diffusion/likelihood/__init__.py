"""Completions to log-probabilities under noised views."""

from trl_diffusion.likelihood.scoring import Scores, score_views
from trl_diffusion.likelihood.views import Views, prompt_masked_views, trajectory_views

__all__ = ["Scores", "Views", "prompt_masked_views", "score_views", "trajectory_views"]
