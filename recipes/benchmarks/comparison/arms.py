"""The arms of the comparison, as data: a method, its settings, and the arms that it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl_diffusion.credit import StepSelection

# The length of the canvas of these arms, see `comparison.settings`.
CANVAS_LENGTH = 32
COMMON = dict(
    per_device_train_batch_size=32,
    num_generations=8,
    temperature=1.0,
    learning_rate=3e-4,
    lr_scheduler_type="constant",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    scale_rewards="none",
    logging_steps=1,
)
# All trajectory arms share reduction, learning rate, clipping and K = M.
TRAJECTORY = dict(
    epsilon=0.2,
    num_iterations=2,
    num_mc_samples=4,
    step_scope="exact",
    step_reduction="mean",
    loss_type="grpo",
    top_k=0,
    top_p=1.0,
    beta=0.0,
)
DIFFU = dict(num_iterations=4, epsilon=0.5, beta=0.04)
NOISED = dict(num_iterations=4)
# With the paper's α of 0.04 and rewards of 0 and 1, one completion of a prompt would take all the weight.
DMPO = NOISED | dict(num_mc_samples=2, alpha=0.5)

# One token a step, so more steps than the others take.
LEFT_TO_RIGHT = dict(num_iterations=2, block_length=1, denoising_steps=CANVAS_LENGTH)
POSITIONS = dict(num_iterations=2, num_mc_samples=4, epsilon=0.2, epsilon_high=0.2)
FORKS = dict(num_iterations=2, num_mc_samples=8, denoising_steps=CANVAS_LENGTH)


@dataclass(frozen=True)
class Arm:
    """A method and its settings.

    Args:
        method: a name in `trl_diffusion.trainers.METHODS`.
        baselines: the arms it is compared with.
        settings: fields of its config, in addition to `COMMON`.
        step_aware: arguments of `StepAwareReward`; `None` without.
        selector: a step selector that has no name in the config.
        curriculum: train on so many problems, in the order of their difficulty; `None` for a random order.
    """

    method: str
    baselines: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    step_aware: dict[str, Any] | None = None
    selector: Callable | None = None
    curriculum: int | None = None


def _sapo(**settings: Any) -> Arm:
    return Arm("diffu_grpo", ("diffu_grpo",), DIFFU, settings)


def _selected(selector: str, **settings: Any) -> Arm:
    return Arm("atpo", ("uniform", "random"), TRAJECTORY | {"step_selector": selector} | settings)


def _drawn(draws: str) -> Arm:
    return Arm("agrpo", ("uniform", "random"), TRAJECTORY | {"step_draws": draws})


def _tuned(method: str, learning_rate: float, **settings: Any) -> Arm:
    """An arm of the comparison of all methods, each at its own learning rate (see `docs/pages/results.md`)."""
    return Arm(method, ("diffu_grpo_tuned", "agrpo_tuned"), settings | {"learning_rate": learning_rate})


def _cached(cache: str, correction: str) -> Arm:
    """`agrpo_tuned` with rollouts under an approximate cache."""
    settings = {"learning_rate": 1e-4, "step_draws": "uniform", "cache": cache, "rollout_correction": correction}
    return Arm("agrpo", ("agrpo_tuned",), TRAJECTORY | settings)


def fixed_steps(signals, count: int, noise):
    """Select the middle of each of K equal parts: with K = 4 of 16 steps, the third step of every block."""
    steps = signals.entropy.size(1)
    middle = [[(2 * part + 1) * steps // (2 * count) for part in range(count)]]
    return StepSelection(signals.num_candidates.new_tensor(middle))


ARMS: dict[str, Arm] = {
    "diffu_grpo": Arm("diffu_grpo", ("diffu_grpo",), DIFFU),
    "sapo_1": _sapo(num_rollouts=1),
    "sapo_3": _sapo(num_rollouts=3),
    "sapo_6": _sapo(num_rollouts=6),
    "sapo_3_mean": _sapo(num_rollouts=3, form="mean_normalised"),
    # The canvas has 32 positions, so 32 and 64 masks are the same run: `sapo_3`. In proportion to the paper's canvas
    # of 256, its 32 and 64 masks are 4 and 8 here.
    "sapo_3_masks4": _sapo(num_rollouts=3, num_mask_tokens=4),
    "sapo_3_masks8": _sapo(num_rollouts=3, num_mask_tokens=8),
    "uniform": _selected("uniform"),
    "uniform_fixed": Arm("atpo", ("uniform", "random"), TRAJECTORY | {"step_selector": None}, selector=fixed_steps),
    "random": _selected("random"),
    "entropy": _selected("entropy"),
    "confidence_margin": _selected("confidence_margin"),
    "roec": _selected("roec"),
    "roec_cm": _selected("roec_cm"),
    "roec_cm_k2": _selected("roec_cm", num_mc_samples=2),
    "roec_cm_k8": _selected("roec_cm", num_mc_samples=8),
    "agrpo_uniform": _drawn("uniform"),
    "agrpo_entropy": _drawn("entropy"),
    # All methods, at that learning rate of 3e-5, 1e-4 and 3e-4 which sampled best on word problems with seed 100.
    "diffu_grpo_tuned": _tuned("diffu_grpo", 3e-4, **DIFFU),
    "agrpo_tuned": _tuned("agrpo", 1e-4, **TRAJECTORY, step_draws="uniform"),
    "roec_cm_tuned": _tuned("atpo", 1e-4, **TRAJECTORY, step_selector="roec_cm"),
    "tracerl": _tuned("tracerl", 1e-4, num_iterations=2, shrink=4, epsilon=0.2, beta=0.01),
    "uni_grpo": _tuned("uni_grpo", 3e-5, **NOISED, epsilon=0.2, beta=0.04),
    "coupled_grpo": _tuned("coupled_grpo", 1e-4, **NOISED, epsilon=0.5, beta=0.01),
    "espo": _tuned("espo", 3e-5, **NOISED, num_mc_samples=2, epsilon=0.2, beta=1e-3),
    "espo_4_views": _tuned("espo", 3e-5, **NOISED, num_mc_samples=4, epsilon=0.2, beta=1e-3),
    "gdpo": _tuned("gdpo", 1e-4, **NOISED, num_mc_samples=3, epsilon=0.5, beta=0.0),
    "gdsd": _tuned("gdsd", 1e-4, **NOISED, num_mc_samples=2, psi=1.0, epsilon=0.02, beta=1e-3),
    "wd1": _tuned("wd1", 1e-4, **NOISED),
    "spg": _tuned("spg", 1e-4, **NOISED),
    "spg_random": _tuned("spg", 1e-4, **NOISED, noise="random"),
    "spg_elbo": _tuned("spg", 1e-4, **NOISED, negative_bound="lower"),
    "stable_drl": _tuned("stable_drl", 1e-4, **NOISED),
    "stable_espo": _tuned("stable_espo", 3e-5, **NOISED, num_mc_samples=2, epsilon=0.2, beta=1e-3),
    "spg_informed": _tuned("spg", 1e-4, **NOISED, mask_bias="informed"),
    "dmpo": _tuned("dmpo", 3e-5, **DMPO),
    "dmpo_individual": _tuned("dmpo", 3e-5, **DMPO, weight_baseline="individual"),
    "dmpo_none": _tuned("dmpo", 3e-5, **DMPO, weight_baseline="none"),
    "dmpo_wddo": _tuned("dmpo", 1e-4, **DMPO, weight_baseline="none", objective="wddo"),
    "just_grpo": _tuned("just_grpo", 3e-4, **LEFT_TO_RIGHT, step_draws="all"),
    "just_grpo_fast": _tuned("just_grpo", 1e-4, **LEFT_TO_RIGHT, step_draws="top_entropy"),
    "just_grpo_drawn": _tuned("just_grpo", 1e-4, **LEFT_TO_RIGHT, step_draws="entropy"),
    "fork_grpo": _tuned("fork_grpo", 1e-4, **FORKS),
    "fork_grpo_drawn_token": _tuned("fork_grpo", 1e-4, **FORKS, unmasking="low_confidence"),
    "mapg": _tuned("mapg", 1e-4, **POSITIONS),
    "mapg_step_merge": _tuned("mapg", 1e-4, **POSITIONS, merged_steps=2, unmasking="low_confidence"),
    "egspo": _tuned("egspo", 1e-4, num_iterations=2, num_mc_samples=4),
    "egspo_plain": _tuned("egspo", 1e-4, num_iterations=2, num_mc_samples=4, fill_weight=0.0),
    "step_rs": _tuned("step_rs", 1e-4, num_iterations=2, num_mc_samples=4),
    "step_rs_none": _tuned("step_rs", 1e-4, num_iterations=2, num_mc_samples=4, first_risk=0.0),
    "daca": _tuned("daca", 3e-4, **NOISED),
    "diffpo": _tuned("diffpo", 1e-4, **NOISED),
    "diffpo_unweighted": _tuned("diffpo", 1e-4, **NOISED, weight_cap=None),
    "diffpo_bound": _tuned("diffpo", 1e-4, **NOISED, learn_bound=True, unmasking="entropy", entropy_bound=0.05),
    "agrpo_prefix": _cached("prefix", "recompute"),
    "agrpo_dual": _cached("dual", "recompute"),
    "agrpo_prefix_behaviour": _cached("prefix", "behaviour"),
    "agrpo_dual_behaviour": _cached("dual", "behaviour"),
}
