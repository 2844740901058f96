"""Advantages and weights that are computed over whole prompt groups, [N, G] for N prompts with G completions each.

NaN stands for a completion without a reward. It takes no part in what is computed for the others; its own advantage
stays NaN, and its weight is 0.
"""

from __future__ import annotations

import torch


def scored_in_group(advantages: torch.Tensor) -> torch.Tensor:
    """How many completions of the group have a reward, long [N, G]; 0 for one without."""
    scored = ~advantages.isnan()
    return scored * scored.sum(1, keepdim=True)


def leave_one_out(advantages: torch.Tensor) -> torch.Tensor:
    """r − mean of the other completions' rewards, from A = r − group mean; 0 in a group of one."""
    scored = scored_in_group(advantages)
    return advantages * (scored / (scored - 1).clamp(min=1))


def population_z_score(advantages: torch.Tensor) -> torch.Tensor:
    """A divided by the population standard deviation of its group, 0 if that is 0."""
    centred = advantages - advantages.nanmean(1, keepdim=True)
    std = centred.square().nanmean(1, keepdim=True).sqrt()
    # rewards that are equal may differ by rounding once they are centred
    return torch.where(std <= 1e-6, 0.0 * centred, centred / std)


def opposed_softmax(advantages: torch.Tensor) -> torch.Tensor:
    """softmax(A) − softmax(−A): what wd1 (2507.08838) wants more and less of. Sums to 0 over the group."""
    unscored = advantages.isnan()
    more, less = (group_softmax(values.masked_fill(unscored, -torch.inf)) for values in (advantages, -advantages))
    return more - less


def group_softmax(log_weights: torch.Tensor) -> torch.Tensor:
    """softmax over the group. A log-weight of −inf is a weight of 0, also where the group has no other."""
    return torch.where(log_weights == -torch.inf, 0.0, log_weights.softmax(1))


def target_log_weights(
    reference: torch.Tensor | None, current: torch.Tensor | None, rewards: torch.Tensor, alpha: float, scale: float
) -> torch.Tensor:
    """DMPO's log-weight of completions drawn from the current policy (2510.08233).

    η α (ĝ_ref − ĝ_cur) + η r. For η = 1/α their softmax over a prompt's completions estimates p_ref exp(r/α) ÷ p_cur.

    Args:
        reference: estimated log-likelihoods under the reference model; `None` if `alpha` is 0.
        current: the same under the policy that wrote the completions.
        rewards: may be shifted by a constant per prompt, as advantages are.
        alpha: α, temperature of the target.
        scale: η.

    Returns:
        Same shape as `rewards`.
    """
    if alpha == 0:
        return scale * rewards
    assert reference is not None and current is not None
    return scale * alpha * (reference - current) + scale * rewards


def effective_sample_size(weights: torch.Tensor) -> torch.Tensor:
    """1 / Σ w² of weights that sum to 1 in their group, between 1 and G; [N]."""
    return 1 / weights.square().sum(1)
