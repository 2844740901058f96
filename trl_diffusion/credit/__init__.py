"""Which denoising steps learn, and how much."""

from trl_diffusion.credit.step_draws import (
    StepDraws,
    draw_steps,
    eligible_steps,
    step_probabilities,
)

__all__ = ["StepDraws", "draw_steps", "eligible_steps", "step_probabilities"]
