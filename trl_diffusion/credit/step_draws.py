"""Draw the denoising steps that are trained, with weights that make the estimate unbiased.

Two ways: independent draws from a distribution over a completion's steps (AGRPO, 2510.04019), or as many as there are
views of the steps that a rule chose for the completion, each of them at most once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.distribution import cumulative_shares
from trl_diffusion.family import DiffusionFamily

STEP_SCOPES = ("paper", "exact")
STEP_REDUCTIONS = ("mean", "sum")
# Independent draws of steps, and rules that choose steps, of which each is taken once.
INDEPENDENT_DRAWS = ("uniform", "entropy")
STEP_RULES = ("all", "top_entropy", "forced")
STEP_DRAWS = (*INDEPENDENT_DRAWS, *STEP_RULES)

# Keeps every eligible step reachable if the entropies are zero.
_ENTROPY_FLOOR = 1e-8


@dataclass
class StepWeights:
    """M draws per completion.

    Args:
        steps: long [B, M], the drawn denoising steps; -1 for an empty view, of weight 0.
        weights: float32 [B, M]; the mean over draws of weight · f(step) is an unbiased estimate of the mean
            (`step_reduction="mean"`) or sum (`"sum"`) of f over the eligible steps.
    """

    steps: torch.Tensor
    weights: torch.Tensor


def eligible_steps(
    completion_ids: torch.Tensor,
    unmask_step: torch.Tensor,
    family: DiffusionFamily,
    scope: str,
    block_length: int,
    steps_per_block: int,
    prompt_tail: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Return the number N of leading denoising steps of each completion that may be trained.

    `paper`: up to the last step that committed an id other than the tail id, or a position up to the first end id.
    N depends on what is sampled later, so the gradient is that of a re-weighted objective.
    `exact` (ours): every step of every block up to the one that holds the first end id. Which blocks these are is
    known before each of them is sampled, so with `step_reduction="sum"` the policy gradient is exact.

    Args:
        completion_ids: long [B, L].
        unmask_step: int [B, L], -1 where nothing was sampled.
        family: for the end set and the tail id.
        scope: `"paper"` or `"exact"`.
        block_length: positions per block.
        steps_per_block: denoising steps per block.
        prompt_tail: long [B], tokens of the prompt in the first block, see `DiffusionFamily.prompt_tail`.

    Returns:
        Long [B], N ≥ 1; the eligible steps are 0..N-1.
    """
    length = family.effective_length(completion_ids)
    if scope == "exact":
        return (prompt_tail + length + block_length - 1) // block_length * steps_per_block
    positions = torch.arange(completion_ids.size(1), device=completion_ids.device)
    counts = (completion_ids != family.tail_token_id) | (positions < length.unsqueeze(1))
    return unmask_step.masked_fill(~counts, -1).max(1).values.long() + 1


def step_probabilities(
    entropies: torch.Tensor, unmask_step: torch.Tensor, eligible: torch.Tensor, draws: str
) -> torch.Tensor:
    """Return the distribution q that steps are drawn from, zero at steps that are not eligible.

    `uniform`: equal. `entropy`: proportional to 1e-8 + the sum of the entropies of the tokens committed at the step.

    Args:
        entropies: float32 [B, L], of each committed token.
        unmask_step: int [B, L].
        eligible: bool [B, S], at least one step in every row.
        draws: `"uniform"` or `"entropy"`.

    Returns:
        Float64 [B, S], rows sum to 1.
    """
    mass = torch.ones(eligible.shape, dtype=torch.float64, device=entropies.device)
    if draws == "entropy":
        mass = entropy_of_steps(entropies, unmask_step, eligible.size(1), _ENTROPY_FLOOR)
    mass = mass * eligible
    return mass / mass.sum(1, keepdim=True)


def entropy_of_steps(
    entropies: torch.Tensor, unmask_step: torch.Tensor, num_steps: int, floor: float = 0.0
) -> torch.Tensor:
    """Add up the entropies of the tokens that each step committed.

    Args:
        entropies: float32 [B, L], of each committed token, in nats.
        unmask_step: int [B, L], -1 where nothing was sampled.
        num_steps: S.
        floor: added to each sum.

    Returns:
        Float64 [B, S].
    """
    mass = torch.full((len(entropies), num_steps), floor, dtype=torch.float64, device=entropies.device)
    sampled = unmask_step >= 0
    return mass.scatter_add(1, unmask_step.clamp(min=0).long(), entropies.double().clamp(min=0) * sampled)


def largest(values: torch.Tensor, among: torch.Tensor, most: int | float) -> torch.Tensor:
    """Choose the largest of each row's N values, of equal ones the first.

    Args:
        values: [B, S].
        among: bool [B, S], the N values of a row that can be chosen.
        most: how many to choose; of type float, as a share of the N, which is rounded up.

    Returns:
        Bool [B, S].
    """
    count = torch.full_like(among[:, :1], most, dtype=torch.float64)
    if isinstance(most, float):
        # A product that is a whole number but for rounding must not be rounded up to the next.
        count = (among.sum(1, keepdim=True) * most - 1e-9).ceil()
    order = values.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(1) < count) & among


def spread_over(candidates: torch.Tensor, count: int, noise: torch.Tensor) -> torch.Tensor:
    """Choose steps at equal distances from a random start, so that every candidate is equally likely.

    One step at (k + v)/K of the way through a row's candidates, v the same for all k; all candidates, if they are at
    most K.

    Args:
        candidates: bool [A, S].
        count: K.
        noise: float64 [A, 1] in [0, 1), v.

    Returns:
        Long [A, K], in the order of time, -1 after the last one chosen.
    """
    number = candidates.sum(1, keepdim=True)
    parts = number.clamp(max=count)
    index = torch.arange(count, device=candidates.device)
    ranks = ((index + noise) * number / parts.clamp(min=1)).floor().long().minimum(number - 1).clamp(min=0)
    in_time = (~candidates).int().argsort(dim=1, stable=True)
    return in_time.gather(1, ranks).masked_fill(index >= parts, -1)


def chosen_draws(chosen: torch.Tensor, count: int, noise: torch.Tensor, reduction: str) -> StepWeights:
    """Take the steps that were chosen for each completion, or an even share of them if there are more than M views.

    Args:
        chosen: bool [B, S], C of a row's steps.
        count: M.
        noise: float64 [B, 1] in [0, 1).
        reduction: `"mean"` or `"sum"` over the chosen steps.

    Returns:
        Steps with weights M / min(C, M), or C times that for the sum: the mean over draws of weight · f(step) is an
        unbiased estimate, and exact for C ≤ M.
    """
    steps = spread_over(chosen, count, noise)
    number = chosen.sum(1, keepdim=True)
    weights = count / number.clamp(min=1, max=count) * (number if reduction == "sum" else 1.0)
    return StepWeights(steps, weights.expand_as(steps).masked_fill(steps < 0, 0.0).float())


def draw_steps(probabilities: torch.Tensor, uniform: torch.Tensor, reduction: str) -> StepWeights:
    """Draw steps by inverting the cumulative distribution at stratified points.

    The points of a completion are (m + v_m)/M, one in each of M equal strata: the average over draws keeps its mean
    and has less variance. Stratifying within the completion is ours; the paper's code stratifies over the micro-batch.

    Args:
        probabilities: float64 [B, S], q; positive at the N eligible steps of a row.
        uniform: float64 [B, M] in [0, 1), the v_m.
        reduction: `"mean"` or `"sum"` over the eligible steps.

    Returns:
        The drawn steps with weights (1/N)/q, or 1/q for the sum.
    """
    num_draws = uniform.size(1)
    points = (torch.arange(num_draws, device=uniform.device) + uniform) / num_draws
    cumulative = cumulative_shares(probabilities)
    # A point that rounds up to the total would fall past the last eligible step.
    points = (points * cumulative[:, -1:]).clamp(max=1.0 - 2.0**-50)
    eligible = probabilities > 0
    last = (eligible * torch.arange(eligible.size(1), device=eligible.device)).amax(1, keepdim=True)
    steps = torch.searchsorted(cumulative, points, right=True).minimum(last)
    weights = 1.0 / probabilities.gather(1, steps)
    if reduction == "mean":
        weights = weights / eligible.sum(1, keepdim=True)
    return StepWeights(steps, weights.float())
