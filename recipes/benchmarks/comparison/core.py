"""The arms of the core table: every claim of a paper that can be tested here, as data.

Arms state no learning rate. Each runs at the one that samples best on a `TUNING_TASK`, on average over the seeds
`TUNING_SEEDS`, which no other run uses. Every arm is tried at `FIRST_RATES`, and where the best of those tried is the
lowest or the highest, at the next of `LEARNING_RATES` too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from comparison.arms import DIFFU, DMPO, NOISED, TRAJECTORY, Arm

TASKS = ("chained_sums", "chained_sums_fixed")
# Tasks on which a few arms show that the model learns what it fails.
PUZZLES = ("sudoku_sweeps", "countdown_search")
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 6e-4, 1e-3)
FIRST_RATES = (1e-4, 3e-4, 6e-4)
TUNING_SEEDS = (100, 101, 102)
# The task by which learning rates are chosen: both layouts of chained sums share theirs.
TUNING_TASK = dict.fromkeys(TASKS, "chained_sums") | {puzzle: puzzle for puzzle in PUZZLES}

# Rollouts unmask the surest positions first. The settings shared with `comparison.arms` leave that to the method.
MAX_PROB = {"unmasking": "max_prob"}
ONE_TOKEN_A_STEP = {"num_iterations": 2, "denoising_steps": 0}


def _with_step_aware_rewards(arm: Arm, baseline: str, **settings: Any) -> Arm:
    return replace(arm, baselines=(baseline,), step_aware=settings)


def _agrpo(*baselines: str, **settings: Any) -> Arm:
    return Arm("agrpo", baselines, MAX_PROB | TRAJECTORY | {"step_draws": "uniform"} | settings)


def _atpo(selector: str, *baselines: str, **settings: Any) -> Arm:
    return Arm("atpo", baselines, MAX_PROB | TRAJECTORY | {"step_selector": selector} | settings)


DIFFU_GRPO, AGRPO = Arm("diffu_grpo", ("agrpo",), MAX_PROB | DIFFU), _agrpo()
CORE: dict[str, Arm] = {
    "agrpo": AGRPO,
    "diffu_grpo": DIFFU_GRPO,
    # SAPO: process rewards over outcome rewards.
    "sapo_1": _with_step_aware_rewards(DIFFU_GRPO, "diffu_grpo", num_rollouts=1),
    "sapo_3": _with_step_aware_rewards(DIFFU_GRPO, "diffu_grpo", num_rollouts=3),
    "sapo_6": _with_step_aware_rewards(DIFFU_GRPO, "diffu_grpo", num_rollouts=6),
    "agrpo_sapo_1": _with_step_aware_rewards(AGRPO, "agrpo", num_rollouts=1),
    "agrpo_sapo_3": _with_step_aware_rewards(AGRPO, "agrpo", num_rollouts=3),
    "agrpo_sapo_6": _with_step_aware_rewards(AGRPO, "agrpo", num_rollouts=6),
    # ATPO: uncertain steps over others, the same for all completions or for those of a prompt.
    "uniform": _atpo("uniform", "agrpo"),
    "random": _atpo("random", "uniform"),
    "roec_cm": _atpo("roec_cm", "uniform", "agrpo"),
    "entropy": _atpo("entropy", "uniform", "roec_cm"),
    "confidence_margin": _atpo("confidence_margin", "uniform", "roec_cm"),
    "roec": _atpo("roec", "uniform", "roec_cm"),
    "roec_cm_group": _atpo("roec_cm", "roec_cm", "agrpo", signal_average="group"),
    "entropy_group": _atpo("entropy", "entropy", "agrpo", signal_average="group"),
    "confidence_margin_group": _atpo("confidence_margin", "confidence_margin", "agrpo", signal_average="group"),
    "roec_group": _atpo("roec", "roec", "agrpo", signal_average="group"),
    # AGRPO: which steps of a completion, and what they stand for.
    "agrpo_paper": _agrpo("agrpo", step_scope="paper"),
    "agrpo_sum": _agrpo("agrpo", step_reduction="sum", loss_type="dr_grpo"),
    "agrpo_entropy": _agrpo("agrpo", "roec_cm_group", step_draws="entropy"),
    # Rollouts that unmask at random.
    "agrpo_random_order": _agrpo("agrpo", unmasking="random"),
    "uniform_random_order": _atpo("uniform", "uniform", unmasking="random"),
    "roec_cm_random_order": _atpo("roec_cm", "uniform_random_order", "roec_cm", unmasking="random"),
    # Other likelihoods and losses.
    "espo": Arm("espo", ("diffu_grpo", "agrpo"), MAX_PROB | NOISED | dict(num_mc_samples=2, epsilon=0.2, beta=1e-3)),
    "spg": Arm("spg", ("diffu_grpo", "agrpo"), MAX_PROB | NOISED),
    "tracerl": Arm(
        "tracerl", ("diffu_grpo", "agrpo"), MAX_PROB | dict(num_iterations=2, shrink=4, epsilon=0.2, beta=0.01)
    ),
    "dmpo": Arm("dmpo", ("diffu_grpo", "agrpo"), MAX_PROB | DMPO),
    "dmpo_individual": Arm("dmpo", ("dmpo",), MAX_PROB | DMPO | {"weight_baseline": "individual"}),
    "gdpo": Arm("gdpo", ("espo",), MAX_PROB | NOISED | dict(num_mc_samples=3, epsilon=0.5, beta=0.0)),
    "spg_informed": Arm("spg", ("spg",), MAX_PROB | NOISED | {"mask_bias": "informed"}),
    "just_grpo": Arm("just_grpo", ("agrpo",), ONE_TOKEN_A_STEP | dict(block_length=1, step_draws="top_entropy")),
    "fork_grpo": Arm("fork_grpo", ("agrpo",), ONE_TOKEN_A_STEP | dict(num_mc_samples=8)),
    # Few blanks first, with as many problems as a run reaches. Only Sudoku has difficulties.
    "agrpo_curriculum": replace(AGRPO, baselines=("agrpo",), curriculum=40),
    # Evaluated at fewer steps than their rollouts take, which is the most of the setting's `fewer_steps`.
    "diffu_grpo_fewer_steps": replace(DIFFU_GRPO, baselines=()),
    "agrpo_fewer_steps": AGRPO,
    "roec_cm_fewer_steps": _atpo("roec_cm"),
}
FEWER_STEPS = ("diffu_grpo_fewer_steps", "agrpo_fewer_steps", "roec_cm_fewer_steps")
# Arms that are not tuned, with the arm whose learning rate they take.
RATE_OF = {arm: arm.removesuffix("_fewer_steps") for arm in FEWER_STEPS} | {"agrpo_curriculum": "agrpo"}
# The arms that every task of `TASKS` has.
ON_CHAINS = [arm for arm in CORE if CORE[arm].curriculum is None]

# Sampled accuracies in percent: on a tuning task, of an arm, at a learning rate, with a tuning seed.
Tuned = dict[str, dict[str, dict[str, dict[str, float]]]]


def best_learning_rate(tuned: Tuned, task: str, arm: str) -> float | None:
    """Return the learning rate with the best mean over the tuning seeds; `None` for the untrained model."""
    of_arm = tuned.get(TUNING_TASK[task], {}).get(RATE_OF.get(arm, arm))
    return of_arm and max(_tried(of_arm), key=lambda rate: np.mean([*of_arm[f"{rate:g}"].values()]))


def next_learning_rate(tuned: Tuned, task: str, arm: str) -> float | None:
    """Return the rate to try after those that were tried; `None` where the best has neighbours, or the grid ends."""
    tried = _tried(tuned[TUNING_TASK[task]][arm])
    place = LEARNING_RATES.index(best_learning_rate(tuned, task, arm))
    around = LEARNING_RATES[max(place - 1, 0) : place + 2]
    return next((rate for rate in around if rate not in tried), None)


def _tried(of_arm: dict[str, dict[str, float]]) -> list[float]:
    return [rate for rate in LEARNING_RATES if f"{rate:g}" in of_arm]
