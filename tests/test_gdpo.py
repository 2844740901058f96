"""GDPO: its estimate of the ELBO by enumeration, the rounding of its counts, and its ratios."""

from __future__ import annotations

from math import floor

import pytest
import torch
from methods import method_named
from test_likelihood_enumeration import (
    LENGTH,
    ORDERS,
    elbo,
    feed,
    make,
    mask_of,
    planned,
    table,
    uniform_subsets,
)
from trainer_helpers import largest_log_ratio, logps_of, losses_seen, plan_of, rollout_of

from trl_diffusion.likelihood import MaskedViews, QuadratureSubsets, ScoredViews
from trl_diffusion.likelihood.plans import gauss_legendre, random_subsets, rounded_counts
from trl_diffusion.sampling.rollout import RowNoise

GDPO = method_named("gdpo")
SMALL = {"num_mc_samples": 3, "num_iterations": 1, "prompt_mask_probability": 0.0}


def mean_score(size: int) -> float:
    """f(k): the mean over subsets of size k, and over their positions, of the log-probability."""
    of_size = [chosen for _, chosen in uniform_subsets(range(LENGTH)) if len(chosen) == size]
    return sum(sum(table()[mask_of(chosen)][i] for i in chosen) / size for chosen in of_size) / len(of_size)


def estimates_over_all_masks(trainer, rounding: list[float], monkeypatch) -> torch.Tensor:
    """The trainer's estimate [720] of one completion under every order of its positions, the counts rounded so."""
    views = len(rounding)
    noise = torch.tensor(rounding).double().expand(len(ORDERS), views)
    # another order in every view, so that no view has the masks of its neighbour
    orders = torch.stack([ORDERS.roll(view, 0) for view in range(views)], 1)
    feed(monkeypatch, noise, orders, torch.ones(len(ORDERS), 3, views).double())
    rows = planned(trainer, len(ORDERS))
    likelihood = trainer.choices.likelihood
    logps = logps_of(trainer, trainer.model, rows).double()[:, 0]
    return likelihood.estimate(logps, likelihood.scored(rows, 0, range(views), rows["targets"][:, 0]))


@pytest.mark.parametrize("rounding", [[0.0, 0.0, 0.0], [0.99, 0.3, 0.99]])
def test_the_estimate_averaged_over_all_masks_is_the_quadrature_of_the_mean_scores(rounding, tmp_path, monkeypatch):
    """Σ w L f(k), where 5 t + ½ is (1.06, 3, 4.94) and is rounded up if the noise reaches the next integer."""
    sizes = [1, 3, 4] if rounding[0] == 0 else [2, 3, 5]
    expected = sum(w * LENGTH * mean_score(k) for w, k in zip((5 / 18, 8 / 18, 5 / 18), sizes, strict=True))
    found = estimates_over_all_masks(make("gdpo", tmp_path, **SMALL), rounding, monkeypatch)
    assert found.mean().item() == pytest.approx(expected, abs=1e-6) and found.std() > 0.1
    # negative controls: other sizes, and views that count alike
    for wrong in ([2, 3, 4], [1, 3, 5]):
        other = sum(w * LENGTH * mean_score(k) for w, k in zip((5 / 18, 8 / 18, 5 / 18), wrong, strict=True))
        assert abs(found.mean() - other) > 1e-2
    assert abs(found.mean() - sum(LENGTH * mean_score(k) for k in sizes) / 3) > 1e-2


def test_with_a_time_for_every_size_the_estimate_is_the_elbo_whatever_the_scores(tmp_path, monkeypatch):
    """(j − ½) / L + ½ / L is j / L: the ELBO that ESPO estimates, without an error of the rule."""
    trainer = make("gdpo", tmp_path, **SMALL | {"num_mc_samples": LENGTH})
    noise = trainer.choices.likelihood.noise
    of_the_rule = estimates_over_all_masks(trainer, [0.5] * LENGTH, monkeypatch).mean().item()
    noise.times = (torch.arange(LENGTH).double() + 0.5) / LENGTH
    noise.weights = torch.full((LENGTH,), 1 / LENGTH).double()
    found = estimates_over_all_masks(trainer, [0.0, 0.2, 0.5, 0.7, 0.99], monkeypatch)
    assert found.mean().item() == pytest.approx(elbo(), abs=1e-6)
    assert abs(of_the_rule - elbo()) > 1e-2  # negative control: five times on five positions are not every size


# ------------------------------------------- scores that are linear in the size of the mask

SLOPE, START = -0.3, -0.2
LINEAR_ELBO = 32 * (START + SLOPE * 33 / 2)  # the mean of 32 f(k) over k = 1..32


def estimate_of_linear_scores(counts: torch.Tensor, noise: QuadratureSubsets) -> float:
    """The estimate on 32 positions where every masked token has the log-probability f(k) = START + SLOPE · k."""
    plan = random_subsets(counts.unsqueeze(0), torch.rand(1, len(counts), 32, dtype=torch.float64))
    size = plan.masked.sum(-1, keepdim=True)
    assert size.flatten().tolist() == counts.tolist()
    facts = ScoredViews(plan.masked, torch.tensor([32]), rates=size.squeeze(-1).double() / 32)
    return noise.estimate((START + SLOPE * size) * plan.masked, facts).item()


@pytest.mark.parametrize("views", [1, 2, 3, 5])
def test_random_rounding_is_unbiased_for_scores_that_are_linear_in_the_size(views):
    noise = QuadratureSubsets(views)
    exact = 32 * noise.times + 0.5
    share = exact - exact.floor()  # of the noise that rounds up
    low, high = (rounded_counts(noise.times, torch.full((1, views), value), 32)[0] for value in (0.0, 1 - 1e-9))
    assert torch.equal(low, exact.floor().long())
    assert torch.equal(high, torch.where(share > 1e-9, low + 1, low))
    # the estimate is a sum over views, so views may be rounded one at a time
    base = estimate_of_linear_scores(low, noise)
    found = base
    for view in range(views):
        up = torch.where(torch.arange(views) == view, high, low)
        found += share[view].item() * (estimate_of_linear_scores(up, noise) - base)
    assert found == pytest.approx(LINEAR_ELBO, rel=1e-6)
    # negative control: the release's counts
    down = torch.tensor([floor(32 * time) for time in noise.times.tolist()])
    assert abs(estimate_of_linear_scores(down, noise) - LINEAR_ELBO) > 1.0


def test_rounding_takes_every_value_with_its_probability():
    times, rounding = gauss_legendre(3)[0], ((torch.arange(10_000) + 0.5) / 10_000).unsqueeze(1).expand(-1, 3)
    counts = rounded_counts(times, rounding, 256)
    torch.testing.assert_close(counts.double().mean(0), 256 * times + 0.5, atol=1e-4, rtol=0)
    assert counts.double().mean().item() == pytest.approx(257 / 2, abs=1e-4)
    edges = rounded_counts(torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 0.99]]), 8)
    assert edges.tolist() == [[1, 8]]  # a view masks something, and no more than there is


def test_the_rule_integrates_polynomials_of_twice_its_degree():
    for count in (1, 2, 3):
        times, weights = gauss_legendre(count)
        for degree in range(2 * count):
            assert (weights * times**degree).sum().item() == pytest.approx(1 / (degree + 1))
        assert (weights * times ** (2 * count)).sum().item() != pytest.approx(1 / (2 * count + 1), rel=1e-4)


# ------------------------------------------- ratios


def test_old_log_probabilities_are_those_of_the_same_masks(tmp_path, monkeypatch):
    """Property 1 has the ratios of 1; this is what it would see if old masks came from another stream."""
    trainer = GDPO.make(tmp_path, num_iterations=2)
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, "a b", "b a a")
    seen = losses_seen(trainer, monkeypatch)
    trainer._compute_loss(trainer.model, rows)
    assert largest_log_ratio(seen) <= 1e-4

    own = RowNoise.uniform
    monkeypatch.setattr(RowNoise, "uniform", lambda noise, *shape: (own(noise, *shape) + 0.5) % 1)
    other = rows | plan_of(trainer, trainer.last_rollout[0], rows)
    rows["old_per_token_logps"] = logps_of(trainer, trainer.model, other)
    seen.clear()
    trainer._compute_loss(trainer.model, rows)
    assert largest_log_ratio(seen) > 0.1


def test_views_score_half_of_the_canvas():
    assert MaskedViews(QuadratureSubsets(3), "canvas").targets_per_view(256) == 257 / 2  # for estimates of the cost
