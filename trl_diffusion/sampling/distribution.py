"""The distribution a token is drawn from, and the draw itself."""

from __future__ import annotations

import torch

# A draw of exactly 1 would fall behind the last token.
_LARGEST_UNIFORM = 1.0 - 2.0**-50


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


def draw(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one index per distribution by inverting its cumulative distribution.

    One uniform per token instead of one per vocabulary entry lets every completion have its own random stream. The
    probabilities are float32; they are summed in float64, because a float32 sum over 10⁵ entries loses the tail.

    Args:
        log_probs: float32 [..., K], normalised, -inf allowed.
        uniform: float64 [...], in [0, 1).

    Returns:
        Long [...], an index of non-zero probability.
    """
    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    threshold = uniform.clamp(max=_LARGEST_UNIFORM).unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
