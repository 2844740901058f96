"""The claims of the papers, as data: what each presupposes, which number shows that, and which arms test it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from statistics_of_runs import holm

from comparison.core import CORE
from comparison.core_summary import Difference, Runs, p_text

Premises = dict[str, Any]  # of one task, see `premises.py`
SIGNIFICANT = 0.05  # p-values below this, after correction


@dataclass(frozen=True)
class Claim:
    """A claim, and what would show it here.

    Args:
        method: its name.
        paper: its arXiv id; `ours` for a choice that no paper claims.
        text: the claim.
        premise: what must hold for it to have a chance.
        value: returns the premise's number from the premises of a task.
        least: the premise holds if the number is at least this.
        arm: the arm that has what the claim praises.
        baseline: the arm that has not.
    """

    method: str
    paper: str
    text: str
    premise: str
    value: Callable[[Premises], float]
    least: float
    arm: str
    baseline: str

    @property
    def compares_methods(self) -> bool:
        """Return whether the arms use two methods, each with the settings of its paper."""
        return CORE[self.arm].method != CORE[self.baseline].method

    def premise_holds(self, premises: Premises) -> bool:
        """Return whether the premise's number reaches its bound."""
        return self.value(premises) >= self.least

    def verdict(self, premises: Premises, difference: Difference, p_value: float) -> str:
        """Return `premise fails`, or `seen`, `not seen`, `the opposite` or `open`.

        Args:
            premises: of the task.
            difference: of the two arms.
            p_value: of the difference, corrected for the number of claims.
        """
        if not self.premise_holds(premises):
            return "premise fails"
        if difference.verdict in ("more", "less") and p_value >= SIGNIFICANT:
            return "open"
        return {"more": "seen", "less": "the opposite", "equal": "not seen", "open": "open"}[difference.verdict]


def _gradient(kind: str) -> Callable[[Premises], float]:
    """Share of the gradient norm in four steps chosen in some way, as a multiple of that in four uniform steps."""
    return lambda premises: premises["gradient_share"][kind] / premises["gradient_share"]["uniform"]


def _middle(premises: Premises) -> float:
    """How much better right completions continue than failed ones, on average over the blocks that SAPO draws from."""
    right, failed = (premises["continuations"][outcome][1:-1] for outcome in ("right", "failed"))
    return (sum(right) - sum(failed)) / len(right)


def _cosine_gain(better: str, worse: str) -> Callable[[Premises], float]:
    return lambda premises: premises["cosine"][better] - premises["cosine"][worse]


def _spread_of_deviations(premises: Premises) -> float:
    """Largest over smallest deviation of the ELBO among shares below 1."""
    values = [value for share, value in premises["elbo_deviation"].items() if share != "1"]
    return max(values) / min(values)


STEPS_HOLD_IT = "share of the gradient in four chosen steps / in four uniform ones"
MIDDLE = "success of continuations from a random block, right − failed completions"
NEARER = "cosine to the policy gradient, gain over the one-step surrogate"
CLAIMS = (
    Claim(
        "AGRPO",
        "2510.04019",
        "the policy gradient over drawn steps beats a one-step surrogate",
        NEARER,
        _cosine_gain("drawn_steps_4", "one_step"),
        0.1,
        "agrpo",
        "diffu_grpo",
    ),
    Claim(
        "AGRPO",
        "2510.04019",
        "drawing steps by entropy beats drawing them uniformly",
        STEPS_HOLD_IT + ", chosen by a completion's own entropy",
        _gradient("entropy_own"),
        1.5,
        "agrpo_entropy",
        "agrpo",
    ),
    *(
        Claim(
            f"SAPO, N = {number}",
            "2510.01544",
            f"process rewards improve {host}",
            MIDDLE,
            _middle,
            0.3,
            f"{prefix}sapo_{number}",
            baseline,
        )
        for host, prefix, baseline in (("diffu-GRPO", "", "diffu_grpo"), ("AGRPO", "agrpo_", "agrpo"))
        for number in (1, 3, 6)
    ),
    Claim(
        "ATPO",
        "2511.15208",
        "uncertain steps beat equally spaced ones",
        STEPS_HOLD_IT + ", chosen by the hybrid score of the batch",
        _gradient("roec_cm"),
        1.5,
        "roec_cm",
        "uniform",
    ),
    *(
        Claim(
            "ATPO",
            "2511.15208",
            f"the hybrid score beats {name} alone",
            f"share of the gradient in four steps, hybrid score / {name}",
            lambda premises, signal=signal: premises["gradient_share"]["roec_cm"] / premises["gradient_share"][signal],
            1.05,
            "roec_cm",
            signal,
        )
        for name, signal in (("entropy", "entropy"), ("the margin", "confidence_margin"), ("RoEC", "roec"))
    ),
    Claim(
        "ATPO",
        "ours",
        "steps chosen for each prompt beat steps chosen for the batch",
        "share of the gradient in four steps, chosen for each completion / for the batch",
        lambda premises: premises["gradient_share"]["roec_cm_own"] / premises["gradient_share"]["roec_cm"],
        1.1,
        "roec_cm_group",
        "roec_cm",
    ),
    Claim(
        "DMPO",
        "2510.08233",
        "matching the tilted distribution beats a one-step policy gradient",
        NEARER + ", of masked views",
        _cosine_gain("random_mask", "one_step"),
        0.05,
        "dmpo",
        "diffu_grpo",
    ),
    Claim(
        "ESPO",
        "2512.03759",
        "ratios of the ELBO of whole completions beat token ratios of a one-step surrogate",
        NEARER + ", of masked views",
        _cosine_gain("random_mask", "one_step"),
        0.05,
        "espo",
        "diffu_grpo",
    ),
    Claim(
        "SPG",
        "2510.09541",
        "an upper bound for bad completions beats a one-step surrogate",
        NEARER + ", of masked views",
        _cosine_gain("random_mask", "one_step"),
        0.05,
        "spg",
        "diffu_grpo",
    ),
    Claim(
        "TraceRL",
        "2509.06949",
        "all steps of the trajectory, in groups, beat a one-step surrogate",
        NEARER + ", of four drawn steps",
        _cosine_gain("drawn_steps_4", "one_step"),
        0.1,
        "tracerl",
        "diffu_grpo",
    ),
    Claim(
        "GDPO",
        "2510.08554",
        "fixed mask shares (quadrature) beat random ones",
        "deviation of the ELBO over masks, largest / smallest share",
        _spread_of_deviations,
        2.0,
        "gdpo",
        "espo",
    ),
    Claim(
        "Informed masks",
        "2609.25927",
        "masks biased towards what the rollout decided late beat random ones",
        STEPS_HOLD_IT + ", each completion's own four",
        _gradient("own"),
        2.0,
        "spg_informed",
        "spg",
    ),
    Claim(
        "JustGRPO",
        "2601.15165",
        "left-to-right rollouts beat rollouts in the order of certainty",
        "share of uncertain tokens that are written after one to their right",
        lambda premises: premises["uncertain_postponed"],
        0.5,
        "just_grpo",
        "agrpo",
    ),
    Claim(
        "ForkGRPO",
        "2609.39859",
        "training at forks alone beats training at drawn steps",
        STEPS_HOLD_IT + ", each completion's own four",
        _gradient("own"),
        2.0,
        "fork_grpo",
        "agrpo",
    ),
)


def claims_table(premises: Premises, runs: Runs, task: str) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of a task's table of claims: of those whose arms were run.

    Args:
        premises: of the task, from rollouts that unmask the surest positions first.
        runs: of the core table.
        task: its name.
    """
    found = {
        claim: runs.difference(task, claim.arm, claim.baseline)
        for claim in CLAIMS
        if {claim.arm, claim.baseline} <= {*runs.arms(task)}
    }
    # A claim without its premise is not tested, so it counts for no correction.
    tested = [claim for claim in found if claim.premise_holds(premises)]
    corrected = dict(zip(tested, holm([found[claim].p_value for claim in tested]), strict=True))
    lines = []
    for claim, difference in found.items():
        value, p_value = claim.value(premises), corrected.get(claim, math.nan)
        lines.append(
            [
                f"{claim.method} ({claim.paper}): {claim.text}",
                f"{claim.premise}: **{value:.2f}** (at least {claim.least:g})",
                f"`{claim.arm}` − `{claim.baseline}`" + (", methods" if claim.compares_methods else ""),
                f"{difference}",
                "" if claim not in corrected else p_text(p_value),
                claim.verdict(premises, difference, p_value),
            ]
        )
    return ["claim", "premise", "test", "points, 95 %", "Holm", "verdict"], lines
