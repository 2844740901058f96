"""GDSD: its gradient and minimum on a policy that can be enumerated, its clip, and a centring that does nothing."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from test_dmpo import (
    BY_SIZE,
    COMPLETIONS,
    CONSISTENT,
    HIDDEN,
    INCONSISTENT,
    LENGTH,
    PAIRS,
    logps_of,
    minimised,
    pairs_of,
)
from trainer_helpers import loss_inputs

from trl_diffusion.likelihood import SubsetPairs
from trl_diffusion.losses import LogRatioRegression
from trl_diffusion.losses.log_ratio_regression import regression_loss
from trl_diffusion.trainers.gdsd import TokenPairs

WIDE: dict[str, Any] = {"low": 0.999, "high": 1e6}
FULL = len(HIDDEN) - 1  # the pair of everything masked and nothing masked


def chosen(values: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Of all completions and masks [27 · 8, …] those of some completions, [rows · 8, …]."""
    return values.unflatten(0, (len(COMPLETIONS), -1))[rows].flatten(0, 1)


def losses(table, old, advantages: torch.Tensor, rows: list[int], elbo: bool = False, **settings) -> torch.Tensor:
    """The library's loss [rows, 8] of some completions under every mask and its complement."""
    noise, pairs = (SubsetPairs if elbo else TokenPairs)(1), chosen(PAIRS, rows)
    inputs = loss_inputs(
        chosen(pairs_of(table), rows),
        pairs,
        advantages.repeat_interleave(len(HIDDEN)),
        old=chosen(pairs_of(old), rows).detach(),
        estimate=noise.estimate,
    )
    return LogRatioRegression(**settings)(inputs).loss.unflatten(0, (len(rows), -1))


@pytest.mark.parametrize("elbo", [False, True])
def test_on_policy_the_gradient_is_that_of_reinforce_with_twice_the_scaled_advantage(elbo):
    """−2ψA/L ∇Σℓ, where Σℓ is the mean over all masks of a pair's log-probabilities; each token once."""
    rows, advantages, psi = [0, 5, 20, 26], torch.tensor([1.0, -0.3, 0.0, 2.0]).double(), 3.0
    table = INCONSISTENT.clone().requires_grad_()
    values = losses(table, INCONSISTENT, advantages, rows, elbo, psi=psi)
    torch.testing.assert_close(values, (psi * advantages).square().unsqueeze(1).expand_as(values))
    (found,) = torch.autograd.grad((values @ BY_SIZE).sum(), table)

    logps = logps_of(table)[rows]  # [rows, 8, 3], 0 where a word is shown
    weights = torch.ones(len(HIDDEN), 1).double()
    if elbo:
        weights = (LENGTH + 1) / 2 / HIDDEN.sum(1, keepdim=True).clamp(min=1)
    both = (weights * logps).sum(-1) + (weights.flip(0) * logps.flip(1)).sum(-1)
    objective = -(2 * psi * advantages / LENGTH) @ (both @ BY_SIZE)
    (expected,) = torch.autograd.grad(objective, table)
    torch.testing.assert_close(found, expected)
    assert expected.norm() > 0.1
    # negative control: the release's half
    assert (found - expected / 2).norm() > 0.1


@pytest.mark.parametrize("elbo", [False, True])
def test_the_minimum_is_where_the_log_ratio_per_token_is_the_scaled_advantage(elbo):
    """Of two completions without a common word; the third word gives and takes what they need."""
    rows, advantages = [0, 13], torch.tensor([0.4, -0.7]).double()  # 0 0 0 and 1 1 1
    assert COMPLETIONS[rows].tolist() == [[0, 0, 0], [1, 1, 1]]

    def loss(table: torch.Tensor) -> torch.Tensor:
        return (losses(table, CONSISTENT, advantages, rows, elbo, psi=0.5, **WIDE) @ BY_SIZE).sum()

    found = minimised(loss, CONSISTENT)
    assert loss(found) < 1e-6 < 1e-2 < loss(CONSISTENT)
    estimate = (SubsetPairs if elbo else TokenPairs)(1).estimate
    facts = loss_inputs(chosen(pairs_of(found), rows), chosen(PAIRS, rows), torch.zeros(16)).views
    now, old = (estimate(chosen(pairs_of(table), rows), facts) for table in (found, CONSISTENT))
    change = ((now - old) / LENGTH).unflatten(0, (2, -1))
    torch.testing.assert_close(change, 0.5 * advantages.unsqueeze(1).expand_as(change), atol=2e-3, rtol=0)
    if not elbo:  # with everything masked in one pass: log p / p_old of mean field, a distribution
        ratio = (logps_of(found) - logps_of(CONSISTENT))[rows, FULL].sum(1) / LENGTH
        torch.testing.assert_close(ratio, 0.5 * advantages, atol=2e-3, rtol=0)


def test_outside_of_the_clip_nothing_is_learned_whatever_the_sign():
    change = torch.tensor([-1.0, -5e-4, -3e-4, 0.0, 3e-4, 5e-4, 1.0]).double().requires_grad_()
    for wanted in (-2.0, 2.0):
        values, clipped = regression_loss(change, torch.tensor(wanted).double(), 4e-4, 4e-4)
        (slopes,) = torch.autograd.grad(values.sum(), change)
        assert clipped.tolist() == [True, True, False, False, False, True, True]
        assert slopes[clipped].tolist() == [0] * 4
        torch.testing.assert_close(slopes[~clipped], 2 * (change.detach()[~clipped] - wanted))
    # by hand: (log 1.5 − 0.2)² and (log 0.75 + 0.2)²
    values, _ = regression_loss(torch.tensor([9.0, -9.0]).double(), torch.tensor([0.2, -0.2]).double(), 0.25, 0.5)
    assert values.tolist() == pytest.approx([(log(1.5) - 0.2) ** 2, (log(0.75) + 0.2) ** 2])


def test_the_clip_is_of_the_log_ratio_per_token():
    """The release clips the sum over 256 tokens, so that 1.6e-6 per token end the learning of a completion."""
    tokens = torch.full((1, 2, 256), 1e-5).double().requires_grad_()
    pairs = torch.stack([torch.arange(256) % 2 == 0, torch.arange(256) % 2 == 1]).unsqueeze(0)
    estimate = TokenPairs(1).estimate
    inputs = loss_inputs(
        tokens * pairs, pairs, torch.ones(1).double(), old=torch.zeros_like(tokens), estimate=estimate
    )
    (slopes,) = torch.autograd.grad(LogRatioRegression()(inputs).loss.sum(), tokens)
    torch.testing.assert_close(slopes[pairs], torch.full((256,), 2 * (1e-5 - 1) / 256).double())
    total, _ = regression_loss(estimate((tokens * pairs), inputs.views), torch.ones(1).double(), 4e-4, 4e-4)
    assert not torch.autograd.grad(total.sum(), tokens)[0].any()  # negative control: clipped as the release does


def test_every_sample_of_masks_has_a_square():
    """(1 − 3)² and (5 − 3)² are 4 each; the square of their mean would be 0."""
    pairs = torch.tensor([[[1, 0], [0, 1]] * 2]).bool()
    logps = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [10.0, 0.0], [0.0, 0.0]]])
    noise = TokenPairs(2)
    inputs = loss_inputs(logps, pairs, torch.tensor([3.0]), old=torch.zeros_like(logps), estimate=noise.estimate)
    assert noise.samples == 2
    assert LogRatioRegression(samples=2, low=0.5, high=1e6)(inputs).loss.tolist() == pytest.approx([4.0])
    assert LogRatioRegression(samples=1, low=0.5, high=1e6)(inputs).loss.tolist() == pytest.approx([0.0])


def test_each_token_counts_once_whatever_the_sizes_of_a_pair():
    facts = loss_inputs(chosen(pairs_of(INCONSISTENT), [4]), chosen(PAIRS, [4]), torch.zeros(8)).views
    ones = facts.targets.double()
    assert TokenPairs(1).estimate(ones, facts).tolist() == [LENGTH] * 8
    assert len({*SubsetPairs(1).estimate(ones, facts).tolist()}) > 1  # the ELBO's weights are right on average alone


def test_biased_estimates_are_no_two_unbiased_ones():
    assert SubsetPairs(2).independent_halves and not TokenPairs(2).independent_halves


def test_centring_logits_before_the_softmax_does_nothing():
    """The paper's "token-level logit centralisation" in its release, for anyone tempted: no value and no gradient
    moves. What its variant changes is the weights of the tokens (`token_weights`)."""
    logits = torch.randn(4, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(4, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for centred in (logits - logits.mean(-1, keepdim=True), logits - logits.mean(-1, keepdim=True).detach()):
        plain, moved = logits.log_softmax(-1), centred.log_softmax(-1)
        torch.testing.assert_close(moved, plain)
        slopes, others = (
            torch.autograd.grad((weights * x).sum(), logits, retain_graph=True)[0] for x in (plain, moved)
        )
        torch.testing.assert_close(others, slopes)
        assert slopes.abs().max() > 0.1
    # negative control: a logit that is no log-probability does depend on it
    assert ((logits - logits.mean(-1, keepdim=True)) - logits).abs().max() > 0.1
