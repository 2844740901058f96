"""Advantages and weights over whole prompt groups: tensors [N, G] for N prompts with G completions each.

NaN stands for a completion without a reward. The values of the others do not depend on it; its own advantage stays
NaN, and its weight is 0.
"""

from __future__ import annotations

import torch


def scored_in_group(advantages: torch.Tensor) -> torch.Tensor:
    """Count the completions of each one's group that have a reward, long [N, G]; 0 for one without a reward."""
    scored = ~advantages.isnan()
    return scored * scored.sum(1, keepdim=True)


def leave_one_out(advantages: torch.Tensor) -> torch.Tensor:
    """Return r − mean of the other completions' rewards, given A = r − group mean; 0 in a group of one.

    Among n completions with a reward that is A · n / (n − 1).

    Args:
        advantages: [N, G], A.
    """
    scored = scored_in_group(advantages)
    return advantages * (scored / (scored - 1).clamp(min=1))


def population_z_score(advantages: torch.Tensor) -> torch.Tensor:
    """Return A divided by the population standard deviation of its group, 0 if that is 0.

    Args:
        advantages: [N, G], A, centred or not.
    """
    centred = advantages - advantages.nanmean(1, keepdim=True)
    std = centred.square().nanmean(1, keepdim=True).sqrt()
    # Equal rewards may differ by rounding after they were centred, and dividing would make advantages of that.
    return torch.where(std <= 1e-6, 0.0 * centred, centred / std)


def among_untied(advantages: torch.Tensor) -> torch.Tensor:
    """Return A · N / (number of groups whose advantages differ).

    A loss that is a mean over all completions is then the mean over the completions of these groups; those of the
    others have no gradient.

    Args:
        advantages: [N, G], A.
    """
    # TRL centres and scales all rewards of a group by the same numbers, so those of equal rewards are equal exactly.
    largest, smallest = (advantages.nan_to_num(nan=fill) for fill in (-torch.inf, torch.inf))
    untied = (largest.amax(1) > smallest.amin(1)).sum()
    return advantages * (len(advantages) / untied.clamp(min=1))


def opposed_softmax(advantages: torch.Tensor) -> torch.Tensor:
    """Return softmax(A) − softmax(−A), [N, G]: what wd1 (2507.08838) makes more minus what it makes less likely."""
    unscored = advantages.isnan()
    more, less = (group_softmax(values.masked_fill(unscored, -torch.inf)) for values in (advantages, -advantages))
    return more - less


def group_softmax(log_weights: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the group [N, G]; −inf gives weight 0, also if the whole group is −inf."""
    return torch.where(log_weights == -torch.inf, 0.0, log_weights.softmax(1))


def target_log_weights(
    reference: torch.Tensor | None, current: torch.Tensor | None, rewards: torch.Tensor, alpha: float, scale: float
) -> torch.Tensor:
    """Return DMPO's log-weights of completions drawn from the current policy (2510.08233).

    They are η α (ĝ_ref − ĝ_cur) + η r. With η = 1/α their softmax over a prompt's completions estimates
    p_ref exp(r/α) ÷ p_cur, the importance weight of DMPO's target.

    Args:
        reference: estimated log-likelihoods under the reference model; `None` if `alpha` is 0.
        current: the same under the policy that sampled the completions.
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
    """Return 1 / Σ w² [N] of weights [N, G] that sum to 1 in their group; between 1 and G."""
    return 1 / weights.square().sum(1)
