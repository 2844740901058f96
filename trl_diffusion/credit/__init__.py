"""From rewards to advantages, and which denoising steps are trained with which weight."""

from trl_diffusion.credit.advantages import (
    among_untied,
    effective_sample_size,
    group_softmax,
    leave_one_out,
    opposed_softmax,
    population_z_score,
    scored_in_group,
    target_log_weights,
)
from trl_diffusion.credit.group_credit import Credit, GroupCredit, GroupValues, GroupWeights
from trl_diffusion.credit.per_view import FillAdvantages, GroupViews, StepwiseRisk, ViewCredit
from trl_diffusion.credit.stable_weights import SelfNormalisedWeights
from trl_diffusion.credit.step_aware import StepAwareReward
from trl_diffusion.credit.step_choice import ChosenSteps, DrawnSteps, SelectedSteps, StepChoice
from trl_diffusion.credit.step_draws import (
    StepWeights,
    chosen_draws,
    draw_steps,
    eligible_steps,
    largest,
    step_probabilities,
)
from trl_diffusion.credit.step_selection import (
    SELECTORS,
    StepSelection,
    StepSelector,
    StepSignals,
    Threshold,
    selected_draws,
    step_signals,
)
from trl_diffusion.credit.target_weights import TargetWeights
from trl_diffusion.credit.token_weights import ProgressWeights, TokenCredit
from trl_diffusion.sampling.trajectory import taken_steps

__all__ = [
    "SELECTORS",
    "ChosenSteps",
    "Credit",
    "DrawnSteps",
    "FillAdvantages",
    "GroupCredit",
    "GroupValues",
    "GroupViews",
    "GroupWeights",
    "ProgressWeights",
    "SelectedSteps",
    "SelfNormalisedWeights",
    "StepAwareReward",
    "StepChoice",
    "StepSelection",
    "StepSelector",
    "StepSignals",
    "StepWeights",
    "StepwiseRisk",
    "TargetWeights",
    "Threshold",
    "TokenCredit",
    "ViewCredit",
    "among_untied",
    "chosen_draws",
    "draw_steps",
    "effective_sample_size",
    "eligible_steps",
    "group_softmax",
    "largest",
    "leave_one_out",
    "opposed_softmax",
    "population_z_score",
    "scored_in_group",
    "selected_draws",
    "step_probabilities",
    "step_signals",
    "taken_steps",
    "target_log_weights",
]
