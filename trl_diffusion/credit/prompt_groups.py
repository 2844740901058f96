"""Advantages and weights that are computed over whole prompt groups, [N, G] for N prompts with G completions each."""

from __future__ import annotations

import torch


def leave_one_out(advantages: torch.Tensor) -> torch.Tensor:
    """r − mean of the other completions' rewards, from A = r − group mean; 0 in a group of one."""
    size = advantages.size(1)
    return advantages * (size / max(size - 1, 1))


def population_z_score(advantages: torch.Tensor) -> torch.Tensor:
    """A divided by the population standard deviation of its group, 0 if that is 0."""
    centred = advantages - advantages.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    # rewards that are equal may differ by rounding once they are centred
    return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred))


def opposed_softmax(advantages: torch.Tensor) -> torch.Tensor:
    """softmax(A) − softmax(−A): what wd1 (2507.08838) wants more and less of. Sums to 0 over the group."""
    return advantages.softmax(1) - (-advantages).softmax(1)


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
