"""The distribution a token is drawn from, and the draw itself."""

from __future__ import annotations

import torch

# A draw of exactly 1 would fall behind the last token.
_LARGEST_UNIFORM = 1.0 - 2.0**-50

# Entries of a part of a large vocabulary.
_PART = 512


def truncate(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tempered log-probabilities of the `top_k` ids, cut to the smallest set with probability `top_p`.

    The token that crosses `top_p` is kept, as transformers does.

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
    probabilities = scores.softmax(-1)
    cut = (probabilities.cumsum(-1) - probabilities >= top_p) | (scores == -torch.inf)
    scores = scores.masked_fill(cut, -torch.inf)
    return scores.log_softmax(-1), ids.int().masked_fill(cut, -1)


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one index per distribution by inverting its cumulative distribution.

    One uniform per token instead of one per vocabulary entry lets every completion have its own random stream. The
    probabilities are float32 and their running sum float64, because a float32 sum over 10⁵ entries loses the tail.
    Over a large vocabulary the part that holds the index is found first, from the sums of all parts.

    Args:
        probabilities: float32 [..., K], not all 0.
        uniform: float64 [...], in [0, 1).

    Returns:
        Long [...], an index of non-zero probability.
    """
    size = probabilities.size(-1)
    threshold = uniform.clamp(max=_LARGEST_UNIFORM)
    if size <= _PART:
        return _invert(probabilities, threshold)[0]
    if size % _PART:
        probabilities = torch.nn.functional.pad(probabilities, (0, -size % _PART))
    parts = probabilities.unflatten(-1, (-1, _PART))
    part, threshold = _invert(parts.sum(-1), threshold)
    inside = parts.gather(-2, part[..., None, None].expand(*part.shape, 1, _PART)).squeeze(-2)
    return part * _PART + _invert(inside, threshold)[0]


def _invert(masses: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index whose share of the total mass holds a threshold in [0, 1), and where in this share it lies."""
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    point = threshold.unsqueeze(-1) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, point, right=True).clamp(max=masses.size(-1) - 1)
    mass = masses.gather(-1, index).double()
    inside = (point - (cumulative.gather(-1, index) - mass)) / mass
    return index.squeeze(-1), inside.squeeze(-1).clamp(0.0, _LARGEST_UNIFORM)
