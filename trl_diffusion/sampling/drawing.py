"""Tokens from logits: the draw under temperature, top-k and top-p, and what is recorded of each token."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trl_diffusion.distribution import draw, score_targets, truncate
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.unmasking import Draws

# Probabilities (4 bytes each) that `draw_everywhere` holds at once in addition to the logits. On a CPU small parts
# stay in the cache; on a GPU larger ones keep the number of kernels low.
_CPU_PART, _PART = 2**22, 2**27


class ScoredTokens(NamedTuple):
    """Tokens drawn at [R, n] positions, with what a trajectory records of them.

    Args:
        tokens: long [R, n].
        logps: float32 [R, n], log-probabilities under the distributions that the tokens were drawn from.
        entropies: float32 [R, n], entropies of these distributions in nats.
        support: int [R, n, top_k], the ids that each token could be; `None` for the full vocabulary.
    """

    tokens: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor
    support: torch.Tensor | None


def draw_scored(logits: torch.Tensor, noise: torch.Tensor, config: SamplingConfig) -> ScoredTokens:
    """Draw a token from each distribution and score it.

    Args:
        logits: float32 [R, n, V].
        noise: float64 [R, n], uniform.
        config: temperature, top-k and top-p.
    """
    return score(logits, *_draw_tokens(logits, noise, config), config)


def score(
    logits: torch.Tensor, tokens: torch.Tensor, support: torch.Tensor | None, config: SamplingConfig
) -> ScoredTokens:
    """Score tokens [R, n] under logits [R, n, V]; at temperature 0 as at temperature 1."""
    return ScoredTokens(tokens, *score_targets(logits, tokens, config.temperature or 1.0, support), support)


def draw_everywhere(logits: torch.Tensor, noise: torch.Tensor, config: SamplingConfig) -> Draws:
    """Draw a token at every position, with its probability at temperature 1.

    A few rows at a time: the probabilities of all rows would take as much memory as the logits once more.

    Args:
        logits: float32 [R, m, V].
        noise: float64 [R, m], uniform.
        config: temperature, top-k and top-p.
    """
    tokens, supports, confidence = [], [], []
    part_size = _CPU_PART if logits.device.type == "cpu" else _PART
    rows = max(part_size // max(logits[:1].numel(), 1), 1)
    for part, part_noise in zip(logits.split(rows), noise.split(rows), strict=True):
        probabilities = part.softmax(-1)
        if config.temperature == 1 and not config.truncates:  # the tokens are drawn from the same probabilities
            drawn, support = draw(probabilities, part_noise), None
        else:
            drawn, support = _draw_tokens(part, part_noise, config)
        tokens.append(drawn)
        confidence.append(probabilities.gather(-1, drawn.unsqueeze(-1)).squeeze(-1))
        if support is not None:
            supports.append(support)
    return Draws(torch.cat(tokens), torch.cat(supports) if supports else None, torch.cat(confidence))


def _draw_tokens(
    logits: torch.Tensor, noise: torch.Tensor, config: SamplingConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw tokens [R, n]; returns them with the ids [R, n, top_k] that each could be."""
    if config.temperature == 0:
        return logits.argmax(-1), None
    if not config.truncates:
        # A division by 1 would change no value, but it copies the logits, the largest tensor of a rollout.
        return draw((logits if config.temperature == 1 else logits / config.temperature).softmax(-1), noise), None
    log_probs, ids = truncate(logits, config.temperature, config.top_k or logits.size(-1), config.top_p)
    # An id that was cut, -1, has no probability. But a draw from NaN can be any, and the network is run on it before
    # the sampler asks whether the logits were finite.
    tokens = ids.gather(-1, draw(log_probs.exp(), noise).unsqueeze(-1)).squeeze(-1).long().clamp(min=0)
    # A vocabulary smaller than top_k gives fewer ids than the trajectory has room for.
    return tokens, torch.nn.functional.pad(ids, (0, max(config.top_k - ids.size(-1), 0)), value=-1)
