"""The distribution that a token is drawn from: truncate it, draw from it, score tokens under it."""

from __future__ import annotations

import math

import torch

# A draw of exactly 1 would fall past the last token.
_LARGEST_UNIFORM = 1.0 - 2.0**-50

# A large vocabulary is searched in parts of this many entries: first for the part, then inside of it.
_PART = 512

# Shares of a distribution are rounded to multiples of this, the finest that float64 holds exactly up to 1.
_SHARE = 2.0**-52

# In place of a log-probability of −inf, so that 0 · log 0 is 0: its exponential is 0.
SMALLEST = -1e4


def running_sum(values: torch.Tensor, resolution: float) -> torch.Tensor:
    """Return the sums of values up to and including each one along the last dimension, in multiples of `resolution`.

    The values are rounded to integers and added as integers. So no sum depends on the order of addition, every device
    gives the same sums, and the sums of values that are not negative never decrease. PyTorch's `cumsum` of floats
    guarantees none of this on a GPU, and raises there under `full_determinism=True`.

    Args:
        values: float [..., K], finite.
        resolution: a power of 2; at least 2⁻⁶² times the largest sum.

    Returns:
        Float64 [..., K].
    """
    return (values.double() / resolution).round().long().cumsum(-1).double() * resolution


def sum_before(values: torch.Tensor, resolution: float) -> torch.Tensor:
    """Return the sums of the values before each one, 0 at the first; see `running_sum`."""
    return torch.nn.functional.pad(running_sum(values, resolution)[..., :-1], (1, 0))


def cumulative_shares(masses: torch.Tensor) -> torch.Tensor:
    """Return the share of the total mass up to and including each entry, float64 [..., K]; the last is about 1.

    Args:
        masses: float [..., K], at least 0 and not all 0.
    """
    return running_sum(_shares(masses), _SHARE)


def _shares(masses: torch.Tensor) -> torch.Tensor:
    masses = masses.double()
    return masses / masses.sum(-1, keepdim=True)


def truncate(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tempered log-probabilities of the `top_k` ids, cut to the smallest set with probability `top_p`.

    The token whose probability crosses `top_p` is kept, as in transformers.

    Args:
        logits: float32 [..., V], never-sampled ids at -inf.
        temperature: > 0.
        top_k: ≥ 1.
        top_p: in (0, 1].

    Returns:
        (log-probabilities [..., K], most likely first, -inf where cut; ids int32 [..., K], -1 where cut) with
        K = min(top_k, V).
    """
    scores, ids = (logits / temperature).topk(min(top_k, logits.size(-1)), dim=-1)
    cut = scores == -torch.inf
    if top_p < 1:  # at 1 nothing is cut, even where the first ids already add up to 1 after rounding
        cut |= sum_before(_shares(scores.softmax(-1)), _SHARE) >= top_p
    scores = scores.masked_fill(cut, -torch.inf)
    return scores.log_softmax(-1), ids.int().masked_fill(cut, -1)


def ordered_choice(scores: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each item of an ordered choice without replacement (Plackett–Luce).

    Of the items that are left, one is chosen with a probability proportional to the exponential of its score. The sum
    over the first k is the log-probability that these are chosen in this order.

    Args:
        scores: float [..., m], in the order in which the items are chosen, those that are not chosen last.
        exists: bool [..., m], items that there are.

    Returns:
        [..., m], 0 where there is no item.
    """
    scores = scores.masked_fill(~exists, 0.0)
    size = scores.size(-1)
    # Of an item that does not exist only itself is left, since a sum over nothing has no gradient.
    left = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu() & exists.unsqueeze(-2)
    left |= torch.eye(size, dtype=torch.bool, device=scores.device)
    rest = scores.unsqueeze(-2).masked_fill(~left, -torch.inf).logsumexp(-1)
    return (scores - rest).masked_fill(~exists, 0.0)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one index per distribution by inverting its cumulative distribution.

    One uniform per token instead of one per vocabulary entry makes it affordable that every completion has its own
    random stream. The probabilities are float32 but their running sum is finer, because a float32 sum over 10⁵ entries
    loses the tail. In a large vocabulary the part that holds the index is found first, from the sums of all parts.

    Args:
        probabilities: float32 [..., K], not all 0.
        uniform: float64 [...], in [0, 1).

    Returns:
        Long [...], an index of non-zero probability; any index if there is a NaN.
    """
    size = probabilities.size(-1)
    threshold = uniform.clamp(max=_LARGEST_UNIFORM)
    if size <= _PART:
        return _index_at(cumulative_shares(probabilities), threshold)[0].squeeze(-1)
    if size % _PART:
        probabilities = torch.nn.functional.pad(probabilities, (0, -size % _PART))
    # The threshold's place inside of its part is uniform again, and serves as the threshold there.
    parts = probabilities.unflatten(-1, (-1, _PART))
    cumulative = cumulative_shares(parts.sum(-1))
    part, point = _index_at(cumulative, threshold)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, part)
    place = (point - before) / (cumulative.gather(-1, part) - before)
    inside = parts.gather(-2, part.unsqueeze(-1).expand(*part.shape, _PART)).squeeze(-2)
    index, _ = _index_at(cumulative_shares(inside), place.squeeze(-1).clamp(0.0, _LARGEST_UNIFORM))
    # Only from NaN is an index of the padding drawn.
    return (part * _PART + index).squeeze(-1).clamp(max=size - 1)


def _index_at(cumulative: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index whose share of the total mass holds a threshold in [0, 1), and the point that was looked for.

    Args:
        cumulative: float64 [..., K], from `cumulative_shares`.
        threshold: float64 [...].

    Returns:
        (long [..., 1], float64 [..., 1]).
    """
    # The last share may differ from 1 by rounding, so the threshold is scaled by it. `right=True` finds the first
    # share above that point, which is never the share of an entry of mass 0.
    point = threshold.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.size(-1) - 1), point


def score_targets(
    logits: torch.Tensor, targets: torch.Tensor | None, temperature: float = 1.0, support: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each target and the entropy of its distribution, at a temperature, on a support.

    Args:
        logits: float32 [..., V]; -inf for ids that are never sampled.
        targets: long [...]; the most likely ids if `None`.
        temperature: divides the logits; > 0.
        support: int [..., C], the ids that could be drawn, -1 for none; every id if not given.

    Returns:
        (log-probabilities [...], entropies [...] in nats), float32. The log-probability of a target outside of its
        support is -inf.

    Raises:
        ValueError: if the temperature is not positive and finite.
    """
    log_probs = log_distribution(logits, temperature, support)
    if targets is None:
        logps = log_probs.amax(-1)
    elif support is None:
        logps = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    else:
        logps = at_columns(log_probs, *target_columns(targets, support))
    return logps, _entropies(log_probs)  # which may overwrite the log-probabilities


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropies [...] in nats of the distributions with these logits [..., V]; -inf for ids never sampled.

    Without a gradient it holds two tensors of the logits' size at once in addition to them.
    """
    return _entropies(logits.log_softmax(-1))


def _entropies(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the entropies [...]; overwrites the log-probabilities [..., V] unless a gradient flows through them."""
    if log_probs.requires_grad:
        return -(log_probs.exp() * log_probs.clamp(min=SMALLEST)).sum(-1)
    # The logits of a block over the whole vocabulary are the largest tensor of a rollout, so every copy counts.
    return -log_probs.exp().mul_(log_probs.clamp_(min=SMALLEST)).sum(-1)


def log_distribution(logits: torch.Tensor, temperature: float, support: torch.Tensor | None) -> torch.Tensor:
    """Return log-probabilities of all ids, [..., V], or of the support, [..., C]."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"Tokens are scored at a finite temperature above 0, got {temperature}. A greedy trajectory records the "
            "log-probabilities of temperature 1, so score it with temperature=1.0."
        )
    if support is not None:
        logits = logits.gather(-1, support.clamp(min=0).long()).masked_fill(support < 0, -torch.inf)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def target_columns(targets: torch.Tensor, support: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the column of `log_distribution` that holds each target: (column long, found bool), both [..., 1]."""
    targets = targets.unsqueeze(-1)
    if support is None:
        return targets, torch.ones_like(targets, dtype=torch.bool)
    hit = support == targets
    return hit.int().argmax(-1, keepdim=True), hit.any(-1, keepdim=True)


def at_columns(log_probs: torch.Tensor, column: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [...] in the columns that `target_columns` found, -inf where it found none."""
    return log_probs.gather(-1, column).masked_fill(~found, -torch.inf).squeeze(-1)
