"""Estimate a completion's log-likelihood from the log-probabilities in its noised views."""

from __future__ import annotations

import math

import torch


def elbo_per_token(logps: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Return each token's part of an ELBO estimate from subsets and their complements (ESPO, 2512.03759).

    It is the mean over the views of (L + 1)/k · ℓ if the token is one of the view's k masked positions, else 0.

    Args:
        logps: float [B, V, L], log-probabilities ℓ of the masked positions, 0 elsewhere.
        masked: bool [B, V, L], the masked positions; views 2i and 2i + 1 are complements.

    Returns:
        [B, L], in nats.
    """
    weights = (masked.size(-1) + 1) / masked.sum(-1, keepdim=True).clamp(min=1)
    return (weights * logps).mean(1)


def elbo_of_pairs(logps: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Return a Monte-Carlo estimate [B] of the ELBO in nats: the sum of `elbo_per_token`, with the same arguments.

    It is unbiased if the size of the subset is uniform on 0..L and the subset is uniform given its size. One of the
    two complements may then be empty, which counts as 0.
    """
    return elbo_per_token(logps, masked).sum(-1)


def quadrature_elbo(logps: torch.Tensor, rates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return a quadrature over the masked share of the ELBO, [B] in nats (GDPO, 2510.08554).

    It is Σ over the views of w · (1/t) · Σ ℓ, t the share of the canvas that a view masks.

    Args:
        logps: float [B, V, L], log-probabilities ℓ of the masked positions, 0 elsewhere.
        rates: [B, V], t.
        weights: [V], w, which sum to 1.
    """
    return (weights.to(logps) * logps.sum(-1) / rates).sum(1)


def mean_of_targets(logps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean log-probability [B, V] of each view's targets, 0 for a view without targets.

    Args:
        logps: float [B, V, L], 0 where a position is no target.
        targets: bool [B, V, L].
    """
    return logps.sum(-1) / targets.sum(-1).clamp(min=1)


def upper_bound_per_token(
    logps: torch.Tensor, targets: torch.Tensor, length: torch.Tensor, power: float
) -> torch.Tensor:
    """Return SPG's upper bound of the log-likelihood per token (2510.09541).

    It is (1/b) · the mean over positions of log(mean over views of 1[scored] · pᵇ / t), where t is the share of the
    text that a view scores. Positions that no view scores are left out of the mean.

    Args:
        logps: float [B, V, L], log p at the targets.
        targets: bool [B, V, L].
        length: long [B], n, tokens of the text.
        power: b > 0.

    Returns:
        [B], in nats per token.
    """
    share = targets.sum(-1, keepdim=True) / length.view(-1, 1, 1)
    terms = (power * logps - share.clamp(min=1e-9).log()).masked_fill(~targets, -torch.inf)
    scored = targets.any(1)
    # Positions that no view scores would be log 0, whose gradient is NaN even where the mask below discards the value.
    log_mean = torch.logsumexp(terms.masked_fill(~scored.unsqueeze(1), 0.0), dim=1) - math.log(logps.size(1))
    return (log_mean * scored).sum(-1) / scored.sum(-1).clamp(min=1) / power
