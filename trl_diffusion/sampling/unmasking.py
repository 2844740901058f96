"""Unmasking rules: which masked positions of the active block a denoising step commits.

A rule is a function from `Candidates` to a `Choice`. To add one, write the function and its line in `RULES`: the
checks of `SamplingConfig`, the estimate of cost, the help texts and the options of the recipes follow from the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from trl_diffusion.distribution import entropies, ordered_choice, sum_before

# Sums of entropies are multiples of this, in nats: as integers they do not depend on the order of addition.
_NATS = 2.0**-40

# A uniform of 0 would make its Gumbel noise −∞, and of a masked position one that cannot be chosen.
_SMALLEST_UNIFORM = 2.0**-54


class Draws(NamedTuple):
    """Tokens drawn at [R, m] positions.

    Args:
        tokens: long [R, m].
        support: int [R, m, top_k], the ids that each could be, -1 for none; `None` for the full vocabulary.
        confidence: float32 [R, m], the probability of each token at temperature 1 on the full vocabulary.
    """

    tokens: torch.Tensor
    support: torch.Tensor | None
    confidence: torch.Tensor


@dataclass(frozen=True)
class Candidates:
    """The masked positions of R rows from which one denoising step chooses, m per row.

    Args:
        is_masked: bool [R, m], false where a row has fewer than m masked positions, which come first and from left to
            right.
        min_commits: long [R], tokens that each row must commit at this step; an array, which the host knows.
        order_noise: float64 [R, m], uniform; the same at every step of a block.
        logits: float32 [R, m, V]; `None` if the rule does not read them and no signals are recorded.
        bound: value of the setting that `Rule.parallel` names, or float64 [R, 1] with one for each row (`entropy`
            alone); `None` if it is not set.
        position_noise: float64 [R, m], uniform and new at every step; `None` unless the rule draws positions.
        position_temperature: divides the scores that positions are drawn by.
        leftmost: where fewer positions reach the bound than must commit, the leftmost ones fill up, and not those that
            come nearest to it.
        draw: draws a token at every candidate.
    """

    is_masked: torch.Tensor
    min_commits: np.ndarray
    order_noise: torch.Tensor
    logits: torch.Tensor | None
    bound: float | torch.Tensor | None
    leftmost: bool
    position_noise: torch.Tensor | None
    position_temperature: float
    draw: Callable[[torch.Tensor], Draws]

    def read_logits(self) -> torch.Tensor:
        """The logits, for rules whose line in the table says that they read them."""
        assert self.logits is not None
        return self.logits


class Choice(NamedTuple):
    """The candidates that a step commits.

    Args:
        slots: long [R, n], indices of candidates, the first to commit first.
        counts: long [R], how many of a row's n slots are committed; an array, which the host knows.
        draws: the tokens, if the rule has drawn them to choose; else they are drawn at the chosen positions.
        forced: bool [R], fewer positions reached the bound than had to commit, an array; `None` without a bound.
        logps: float32 [R, n], log-probability of choosing each slot after those before it; `None` if the rule does not
            draw positions with a probability that depends on the network.
    """

    slots: torch.Tensor
    counts: np.ndarray
    draws: Draws | None = None
    forced: np.ndarray | None = None
    logps: torch.Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """One unmasking rule.

    Args:
        choose: the rule.
        words: a short name in words, for help texts.
        reads_logits: the rule reads the logits of every candidate, so the LM head runs at all of them. If not, it runs
            at the chosen positions only, which is cheaper for large vocabularies.
        redraws: the rule draws tokens that it does not commit, so a position needs new noise at every step.
        draws_positions: the rule draws positions with probabilities that depend on the network, which it returns.
        parallel: name of the setting of `SamplingConfig` that lets this rule commit more than `min_commits`.
    """

    choose: Callable[[Candidates], Choice]
    words: str
    reads_logits: bool = True
    redraws: bool = False
    draws_positions: bool = False
    parallel: str | None = None


def random(candidates: Candidates) -> Choice:
    """Commit positions in a random order, as the forward process of masked diffusion has it."""
    order = candidates.order_noise.masked_fill(~candidates.is_masked, torch.inf)
    slots = order.argsort(1)[:, : int(candidates.min_commits.max())]
    return Choice(slots, candidates.min_commits)


def max_prob(candidates: Candidates) -> Choice:
    """Commit the positions with the largest top probability; with a bound, all that reach it (2505.22618)."""
    logits = candidates.read_logits()
    top_log_prob = logits.amax(-1) - logits.logsumexp(-1)
    return _most_certain(candidates, top_log_prob, lambda sorted_, bound: (sorted_ >= math.log(bound)).sum(1))


def entropy(candidates: Candidates) -> Choice:
    """Commit the positions of lowest entropy; with a bound, all within a budget of entropy (2505.24857)."""
    return _most_certain(candidates, -entropies(candidates.read_logits()), _within_entropy)


def margin(candidates: Candidates) -> Choice:
    """Commit the positions with the largest gap between their two largest probabilities."""
    top = candidates.read_logits().softmax(-1).topk(2, dim=-1).values
    return _most_certain(candidates, top[..., 0] - top[..., 1])


def plackett_luce(candidates: Candidates) -> Choice:
    """Draw positions one after the other, each in proportion to its largest probability to the power of 1/τ.

    Adding Gumbel noise to the scores and sorting them draws such an order (1903.06059). Positions are drawn before
    tokens, so the log-probability of a step is that of its positions plus that of its tokens.
    """
    logits, noise = candidates.read_logits(), candidates.position_noise
    assert noise is not None
    scores = (logits.amax(-1) - logits.logsumexp(-1)) / candidates.position_temperature
    gumbel = -(-noise.clamp(min=_SMALLEST_UNIFORM).log()).log()
    order = (scores + gumbel).masked_fill(~candidates.is_masked, -torch.inf).argsort(dim=1, descending=True)
    logps = ordered_choice(scores.gather(1, order), candidates.is_masked.gather(1, order))
    most = int(candidates.min_commits.max())
    return Choice(order[:, :most], candidates.min_commits, logps=logps[:, :most])


def low_confidence(candidates: Candidates) -> Choice:
    """LLaDA's rule (2502.09992): draw a token everywhere and commit those with the largest probability.

    With a bound, commit all tokens whose probability reaches it. The choice of positions depends on the tokens, so
    committed tokens are mostly modes, and the recorded log-probability is not that of the policy.
    """
    draws = candidates.draw(candidates.read_logits())
    choice = _most_certain(candidates, draws.confidence, lambda sorted_, bound: (sorted_ >= bound).sum(1))
    return choice._replace(draws=draws)


RULES: dict[str, Rule] = {
    "random": Rule(random, "uniformly", reads_logits=False),
    "max_prob": Rule(max_prob, "largest top probability", parallel="confidence_threshold"),
    "entropy": Rule(entropy, "lowest entropy", parallel="entropy_bound"),
    "margin": Rule(margin, "largest gap between the two largest probabilities"),
    "plackett_luce": Rule(plackett_luce, "drawn in proportion to the largest probability", draws_positions=True),
    "low_confidence": Rule(low_confidence, "LLaDA's rule, biased", redraws=True, parallel="confidence_threshold"),
}


def _most_certain(
    candidates: Candidates,
    certainty: torch.Tensor,
    count: Callable[[torch.Tensor, Any], torch.Tensor] | None = None,
) -> Choice:
    """Choose the candidates of largest certainty [R, m].

    Args:
        candidates: what there is to choose from.
        certainty: float [R, m], larger commits first.
        count: how many positions [R] a bound lets commit, given the certainties in descending order (-inf where there
            is no candidate) and the bound.
    """
    certainty = certainty.masked_fill(~candidates.is_masked, -torch.inf)
    if count is None or candidates.bound is None:
        slots = certainty.topk(int(candidates.min_commits.max()), dim=1).indices
        return Choice(slots, candidates.min_commits)
    # The bound can let any number of positions commit, so all are sorted.
    certainty, slots = certainty.sort(dim=1, descending=True)
    num_reached = count(certainty, candidates.bound)
    if candidates.leftmost:
        reaches = slots.argsort(1) < num_reached.unsqueeze(1)
        slots = (~reaches).int().argsort(dim=1, stable=True)  # candidates come from left to right
    reached = num_reached.cpu().numpy()  # the one thing that the host waits for in a step
    counts = np.maximum(candidates.min_commits, reached)
    return Choice(slots[:, : int(counts.max())], counts, forced=reached < candidates.min_commits)


def _within_entropy(certainty: torch.Tensor, bound: float | torch.Tensor) -> torch.Tensor:
    """Count the positions [R] whose entropies, all but the largest, add up to at most the bound in nats.

    The bound is a number, or [R, 1].
    """
    # Entropies are in ascending order, so the sum of all but the largest is the sum of those before it.
    exists = certainty > -torch.inf
    before = sum_before((-certainty).masked_fill(~exists, 0.0), _NATS)
    return ((before <= bound) & exists).sum(1)


def step_signals(logits: torch.Tensor, is_masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy in nats and mean p1 − p2 over the masked positions of a step: [R] each.

    Args:
        logits: float32 [R, m, V].
        is_masked: bool [R, m].
    """
    probabilities = logits.softmax(-1)
    top = probabilities.topk(2, dim=-1).values
    # Passes over the vocabulary are what this costs, so there are few: the normaliser follows from the largest logit.
    # 0 · −inf (ids that are never sampled) is NaN and is taken out of the product, which takes no memory of its own.
    normaliser = logits.amax(-1) - top[..., 0].log()
    by_position = normaliser - probabilities.mul_(logits).nan_to_num_(nan=0.0).sum(-1)
    count = is_masked.sum(1)
    margins = (top[..., 0] - top[..., 1]).masked_fill(~is_masked, 0.0).sum(1) / count
    return by_position.masked_fill(~is_masked, 0.0).sum(1) / count, margins
