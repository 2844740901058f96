"""Every noise plan against the distribution it claims: exactly, over all noise, or by χ² of 20,000 draws."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations, permutations, product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from trl_diffusion.likelihood.plans import (
    NoisePlan,
    bernoulli,
    block_random,
    concatenate,
    full_mask,
    prompt_noise,
    random_subsets,
    random_text,
    stratified_counts,
    trajectory_groups,
    uniform_counts,
    with_complements,
)

DRAWS = 20_000
KEPT, REJECTED = 1e-3, 1e-6  # p-values, as in test_sampling.py
JUST_BELOW_ONE = float(np.nextafter(1, 0))
Cell = tuple[int, ...]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def p_value(rows: torch.Tensor, expected: dict[Cell, float]) -> float:
    """χ² of the rows of [N, K] against cell probabilities; 0 if a row has probability 0."""
    assert len(rows) >= 20_000 and sum(expected.values()) == pytest.approx(1)
    cells = {cell: chance for cell, chance in expected.items() if chance > 0}
    place = 8 ** torch.arange(rows.size(1))  # of values below 8, as one number each
    unique, counts = (rows.long() * place).sum(1).unique(return_counts=True)
    observed = dict(zip(map(tuple, (unique.unsqueeze(1) // place % 8).tolist()), counts.tolist(), strict=True))
    assert min(cells.values()) * len(rows) >= 5  # as χ² needs
    if set(observed) - set(cells):
        return 0.0
    if len(cells) == 1:
        return 1.0
    return chisquare([observed.get(cell, 0) for cell in cells], [p * len(rows) for p in cells.values()]).pvalue


def subsets(positions) -> list[Cell]:
    positions = list(positions)
    return list(chain.from_iterable(combinations(positions, k) for k in range(len(positions) + 1)))


def as_mask(chosen, length: int) -> Cell:
    return tuple(int(i in chosen) for i in range(length))


def uniform_size_then_subset(positions, length: int) -> dict[Cell, float]:
    """Non-empty subsets of some positions: the size uniform, the subset uniform given its size."""
    n = len(positions)
    return {as_mask(s, length): 1 / n / comb(n, len(s)) for s in subsets(positions) if s}


def all_orders(length: int) -> torch.Tensor:
    """Noise [L!, 1, L] in every order."""
    return torch.tensor(list(permutations(range(length)))).unsqueeze(1) / length


# ------------------------------------------- the whole canvas, and independent masks


def test_full_mask_hides_and_scores_everything():
    plan = full_mask(3, 2, 5)
    assert plan.masked.shape == plan.targets.shape == (3, 2, 5) and plan.rate.shape == (3, 2)
    assert plan.masked.all() and plan.targets.all() and (plan.rate == 1).all() and plan.prompt_masked is None


def rate_mixture(length: int, low: float, high: float) -> dict[Cell, float]:
    """∫ t^k (1 − t)^(L − k) dt over [low, high], divided by its width."""
    cells = {}
    for mask in product((0, 1), repeat=length):
        density = np.polynomial.Polynomial([0, 1]) ** sum(mask) * np.polynomial.Polynomial([1, -1]) ** (
            length - sum(mask)
        )
        integral = density.integ()
        cells[mask] = (integral(high) - integral(low)) / (high - low)
    return cells


def test_bernoulli_masks_independently_at_a_uniform_rate_of_each_view():
    low, high = 0.1, 0.9
    plan = bernoulli(noise(DRAWS, 2), noise(DRAWS, 2, 4, seed=1), low, high)
    assert torch.equal(plan.masked, plan.targets) and plan.rate.dtype == torch.float32
    assert p_value(plan.masked[:, 0], rate_mixture(4, low, high)) > KEPT
    assert p_value(plan.masked[:, 0], {m: 0.5**4 for m in product((0, 1), repeat=4)}) < REJECTED  # the mean rate
    assert p_value(plan.masked[:, 0], rate_mixture(4, 0.1, 1.0)) < REJECTED
    assert kstest(((plan.rate - low) / (high - low)).flatten().numpy(), "uniform").pvalue > KEPT

    # Each view has a rate of its own: sizes of two views are independent, those of one view and itself are not.
    sizes = Counter({k: 0.0 for k in range(5)})
    for mask, chance in rate_mixture(4, low, high).items():
        sizes[sum(mask)] += chance
    pairs = {(a, b): sizes[a] * sizes[b] for a in range(5) for b in range(5)}
    assert p_value(plan.masked.sum(-1), pairs) > KEPT
    one_rate = bernoulli(noise(DRAWS, 1).expand(-1, 2), noise(DRAWS, 2, 4, seed=1), low, high)
    assert p_value(one_rate.masked.sum(-1), pairs) < REJECTED


def test_bernoulli_at_the_given_rate():
    """At a fixed rate every mask has probability t^k (1 − t)^(L − k), and `share` is the rate."""
    plan = bernoulli(torch.full((DRAWS, 1), 0.25), noise(DRAWS, 1, 3), 0.2, 0.6)
    assert torch.allclose(plan.rate, torch.tensor(0.3))
    rate = {m: 0.3 ** sum(m) * 0.7 ** (3 - sum(m)) for m in product((0, 1), repeat=3)}
    assert p_value(plan.masked[:, 0], rate) > KEPT
    highest = torch.full((1, 1, 8), JUST_BELOW_ONE, dtype=torch.double)
    assert bernoulli(torch.zeros(1, 1), highest, 1.0, 1.0).masked.all()


# ------------------------------------------- sizes


@pytest.mark.parametrize("most", range(1, 8))
def test_uniform_counts_are_uniform_on_1_to_most(most):
    grid = (torch.arange(100 * most, dtype=torch.float64) + 0.5) / (100 * most)
    counts = uniform_counts(grid.unsqueeze(1), torch.tensor([[most]]))
    assert torch.bincount(counts.flatten()).tolist() == [0] + [100] * most
    ends = uniform_counts(torch.tensor([[0.0, JUST_BELOW_ONE]]).double(), torch.tensor([[most]]))
    assert ends.tolist() == [[1, most]]
    single = torch.tensor([[float(np.nextafter(np.float32(1), np.float32(0)))]])
    assert uniform_counts(single, torch.tensor([[most]])).tolist() == [[most]]


def test_uniform_counts_have_a_largest_count_per_row():
    counts = uniform_counts(torch.tensor([[0.5, 0.99], [0.5, 0.99]]), torch.tensor([[1], [6]]))
    assert counts.tolist() == [[1, 1], [4, 6]]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 10, 13, 24])
def test_stratified_counts_are_uniform_per_row_and_spread_over_rows(num_rows, length):
    """Over the L + 1 offsets, each equally likely, every row has every count once; for every offset, the rows have all
    counts equally often, but for one."""
    offsets = torch.arange(length + 1)
    counts = stratified_counts(offsets, torch.arange(num_rows), num_rows, length)
    assert counts.shape == (num_rows, length + 1)
    assert (counts.sort(1).values == torch.arange(length + 1)).all()
    for column in counts.T:
        often = torch.bincount(column, minlength=length + 1)
        assert len(often) == length + 1 and often.max() - often.min() <= 1


def test_stratified_counts_by_hand():
    # L + 1 = 4 sizes on 8 rows: steps of a half, rounded up
    counts = stratified_counts(torch.tensor([0, 3]), torch.arange(8), 8, 3)
    assert counts[:, 0].tolist() == [0, 1, 1, 2, 2, 3, 3, 0]
    assert counts[:, 1].tolist() == [3, 0, 0, 1, 1, 2, 2, 3]
    # a process that holds rows 2 and 5 gets theirs
    assert torch.equal(stratified_counts(torch.tensor([0, 3]), torch.tensor([2, 5]), 8, 3), counts[[2, 5]])


def test_counts_of_independent_rows_are_not_spread():
    """The negative control of the strata: independent sizes, of the same distribution per row."""
    often = torch.bincount((noise(8) * 4).long(), minlength=4)
    assert often.max() - often.min() > 1


# ------------------------------------------- subsets


@pytest.mark.parametrize("length", [1, 2, 5])
def test_every_subset_of_a_size_is_hidden_by_equally_many_orders(length):
    orders = all_orders(length)
    for count in range(length + 1):
        plan = random_subsets(torch.full((len(orders), 1), count), orders)
        assert torch.equal(plan.masked, plan.targets)
        assert torch.allclose(plan.rate, torch.tensor(count / length))
        often = Counter(map(tuple, plan.masked[:, 0].int().tolist()))
        assert len(often) == comb(length, count) and len(set(often.values())) == 1
        assert all(sum(mask) == count for mask in often)


def test_every_subset_of_the_allowed_positions_is_hidden_equally_often():
    allowed = torch.tensor([[[False, True, True, False, True, True]]])
    orders = all_orders(6)
    for count in range(5):
        plan = random_subsets(torch.full((720, 1), count), orders, allowed)
        often = Counter(map(tuple, plan.masked[:, 0].int().tolist()))
        assert set(often) == {as_mask(s, 6) for s in combinations((1, 2, 4, 5), count)}
        assert len(set(often.values())) == 1
    # more than is allowed spills over: what the docstring asks of the caller
    assert (random_subsets(torch.tensor([[5]]), orders[:1], allowed).masked & ~allowed).any()


def test_random_subsets_from_noise_are_uniform_and_views_independent():
    counts = torch.tensor([[2, 3]]).expand(DRAWS, -1)
    uniform = noise(DRAWS, 2, 5)
    plan = random_subsets(counts, uniform)
    both = {
        as_mask(a, 5) + as_mask(b, 5): 1 / 100
        for a, b in product(combinations(range(5), 2), combinations(range(5), 3))
    }
    assert p_value(plan.masked.flatten(1), both) > KEPT
    uniform[..., 0] **= 1.2  # negative control: the first position comes too early
    assert p_value(random_subsets(counts, uniform).masked.flatten(1), both) < REJECTED
    shared = random_subsets(counts, noise(DRAWS, 1, 5).expand(-1, 2, -1))
    assert p_value(shared.masked.flatten(1), both) < REJECTED


# ------------------------------------------- complements


def test_complements_follow_their_views():
    first = torch.tensor([[[1, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 1]]]).bool()
    plan = with_complements(NoisePlan(first, first, torch.tensor([[0.25, 1.0], [0.0, 0.5]])))
    assert plan.masked.int().tolist() == [
        [[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]],
        [[0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 0]],
    ]
    assert torch.equal(plan.targets, plan.masked)
    assert plan.rate.tolist() == [[0.25, 0.75, 1.0, 0.0], [0.0, 1.0, 0.5, 0.5]]


def test_a_pair_hides_every_position_once_and_a_complement_is_distributed_like_a_mask_at_the_other_rate():
    plan = with_complements(bernoulli(noise(DRAWS, 2), noise(DRAWS, 2, 3, seed=1), 0.2, 0.6))
    pairs = plan.masked.unflatten(1, (2, 2))
    assert (pairs.sum(2) == 1).all()
    assert torch.allclose(plan.rate.unflatten(1, (2, 2)).sum(-1), torch.tensor(1.0))
    assert p_value(plan.masked[:, 3], rate_mixture(3, 0.4, 0.8)) > KEPT
    assert p_value(plan.masked[:, 3], rate_mixture(3, 0.2, 0.6)) < REJECTED


# ------------------------------------------- prompts


def test_prompt_tokens_are_masked_independently_and_padding_never():
    length, words = 6, 3
    mask = (torch.arange(length) >= length - words).long().expand(DRAWS, -1)
    hidden = prompt_noise(noise(DRAWS, length, 2), 0.15, mask)
    assert hidden.shape == (DRAWS, 2, length) and hidden.dtype == torch.bool
    assert not hidden[..., : length - words].any()

    def independent(rate: float) -> dict[Cell, float]:
        masks = product((0, 1), repeat=2 * words)
        return {m: rate ** sum(m) * (1 - rate) ** (2 * words - sum(m)) for m in masks}

    some = hidden[..., length - words :]
    grouped = torch.stack([some[:, 0, :2].int().flatten(1), some[:, 1, 1:].int().flatten(1)], 1).flatten(1)
    four = {m: 0.15 ** sum(m) * 0.85 ** (4 - sum(m)) for m in product((0, 1), repeat=4)}
    assert p_value(grouped, four) > KEPT
    assert p_value(grouped, {m: 0.17 ** sum(m) * 0.83 ** (4 - sum(m)) for m in product((0, 1), repeat=4)}) < REJECTED
    wide = prompt_noise(noise(DRAWS, length, 2), 0.5, mask)[..., length - words :]
    assert p_value(wide.flatten(1), independent(0.5)) > KEPT
    assert p_value(wide[:, [0, 0]].flatten(1), independent(0.5)) < REJECTED  # one mask for both views


def test_prompt_noise_counts_from_the_right_so_that_padding_does_not_move_it():
    uniform = noise(4, 20, 3)
    mask = torch.ones(4, 8)
    short = prompt_noise(uniform[:, :8], 0.4, mask)
    padded = prompt_noise(uniform, 0.4, torch.cat([torch.zeros(4, 12), mask], 1))
    assert torch.equal(padded[..., 12:], short) and not padded[..., :12].any() and short.any()
    assert torch.equal(prompt_noise(uniform[:, :5], 0.4, mask[:, :5]), short[..., 3:])
    assert not prompt_noise(uniform, 0.0, torch.ones(4, 20)).any()


# ------------------------------------------- SPG


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_random_text_scores_a_uniform_size_of_the_text_and_hides_all_behind(n):
    length = 5
    plan = random_text(noise(DRAWS, 2), noise(DRAWS, 2, length, seed=1), torch.full((DRAWS,), n))
    behind = torch.arange(length) >= n
    assert torch.equal(plan.masked, plan.targets | behind) and not (plan.targets & behind).any()
    assert torch.allclose(plan.rate, plan.targets.sum(-1) / length)
    claim = uniform_size_then_subset(range(n), length)
    for view in range(2):
        assert p_value(plan.targets[:, view], claim) > KEPT
    if n > 1:  # negative control: every subset equally likely
        assert p_value(plan.targets[:, 0], dict.fromkeys(claim, 1 / len(claim))) < REJECTED
        assert p_value(plan.targets[:, 0], uniform_size_then_subset(range(n - 1), length)) < REJECTED
        sizes = {(a, b): 1 / n**2 for a, b in product(range(1, n + 1), repeat=2)}
        assert p_value(plan.targets.sum(-1), sizes) > KEPT  # the views' sizes are independent


def test_texts_of_one_batch_have_lengths_of_their_own():
    plan = random_text(noise(3, 50), noise(3, 50, 4, seed=1), torch.tensor([1, 4, 2]))
    for row, n in enumerate([1, 4, 2]):
        assert plan.masked[row, :, n:].all() and not plan.targets[row, :, n:].any()
        assert plan.targets[row].sum(-1).unique().tolist() == list(range(1, n + 1))


def block_claim(length: int, n: int, block: int, probability: float) -> dict[Cell, float]:
    """Probabilities of (targets, hidden): a uniform block of the text, a uniform size, a uniform subset, and masks in
    the blocks before it."""
    cells: Counter = Counter()
    blocks = -(-n // block)
    for index in range(blocks):
        start, end = index * block, min((index + 1) * block, n)
        for targets, chance in uniform_size_then_subset(range(start, end), length).items():
            for context in subsets(range(start)):
                hidden = {*context, *(i for i in range(length) if targets[i]), *range(end, length)}
                weight = probability ** len(context) * (1 - probability) ** (start - len(context))
                cells[targets + as_mask(hidden, length)] += chance * weight / blocks
    return cells


@pytest.mark.parametrize("probability", [0.0, 0.4])
@pytest.mark.parametrize(
    ("length", "n", "block"),
    [(4, 1, 2), (4, 2, 2), (4, 3, 2), (4, 4, 2), (6, 4, 3), (6, 3, 3), (4, 3, 4), (4, 2, 1)],
    ids=[
        "one token",
        "at a boundary",
        "behind a boundary",
        "whole canvas",
        "1 of 2nd block",
        "one block",
        "one wide block",
        "ones",
    ],
)
def test_block_random_has_the_claimed_joint_distribution(length, n, block, probability):
    arguments = noise(DRAWS, 1), noise(DRAWS, 1, seed=1), noise(DRAWS, 1, length, seed=2)
    plan = block_random(*arguments, torch.full((DRAWS,), n), block, probability)
    found = torch.cat([plan.targets, plan.masked], -1)[:, 0]
    claim = block_claim(length, n, block, probability)
    assert p_value(found, claim) > KEPT
    assert not (plan.targets & ~plan.masked).any() and plan.targets.any(-1).all()
    if n > block:  # negative controls: the masks of earlier blocks, a uniform position instead of a uniform block
        assert p_value(found, block_claim(length, n, block, 0.2)) < REJECTED
        first = sum(chance for cell, chance in claim.items() if any(cell[:block]))
        assert first == pytest.approx(1 / -(-n // block))
        skewed = {
            cell: chance * (1.1 if any(cell[:block]) else (1 - 1.1 * first) / (1 - first))
            for cell, chance in claim.items()
        }
        assert p_value(found, skewed) < REJECTED


def test_block_random_views_are_independent_and_lengths_those_of_the_rows():
    length = torch.tensor([1, 5]).repeat(DRAWS)
    plan = block_random(noise(2 * DRAWS, 2), noise(2 * DRAWS, 2, seed=1), noise(2 * DRAWS, 2, 6, seed=2), length, 3)
    assert torch.equal(plan.targets[::2], (torch.arange(6) == 0).expand(DRAWS, 2, -1))
    blocks = plan.targets[1::2, :, 3:].any(-1)
    assert p_value(blocks, {cell: 1 / 4 for cell in product((0, 1), repeat=2)}) > KEPT
    assert p_value(blocks[:, [0, 0]], {cell: 1 / 4 for cell in product((0, 1), repeat=2)}) < REJECTED


# ------------------------------------------- trajectories

STEPS = st.lists(st.integers(-1, 8), min_size=1, max_size=12)


@given(canvas=STEPS, shrink=st.integers(1, 9))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_trajectory_groups_score_each_sampled_token_once(canvas, shrink):
    unmask_step = torch.tensor([canvas], dtype=torch.int32)
    plan = trajectory_groups(unmask_step, 9, shrink)
    assert plan.targets.shape == (1, -(-9 // shrink), len(canvas))
    assert torch.equal(plan.targets.sum(1), (unmask_step >= 0).long())
    taken = sorted({step for step in canvas if step >= 0})
    canvas = [taken.index(step) if step >= 0 else -1 for step in canvas]
    for view in range(plan.targets.size(1)):
        before = [i for i, step in enumerate(canvas) if 0 <= step < view * shrink]  # what had been committed by then
        assert plan.masked[0, view].tolist() == [i not in before for i in range(len(canvas))]
        own = [i for i, step in enumerate(canvas) if step >= 0 and step // shrink == view]
        assert plan.targets[0, view].nonzero().flatten().tolist() == own
        assert float(plan.rate[0, view]) == pytest.approx(1 - len(before) / len(canvas))


def test_trajectory_groups_by_hand():
    """Five steps in twos: the last view has one step. The second row left after its first block."""
    unmask_step = torch.tensor([[1, 0, 4, 2, 3, 2], [0, 1, 1, -1, -1, -1]], dtype=torch.int32)
    plan = trajectory_groups(unmask_step, 5, 2)
    assert plan.masked.int().tolist() == [
        [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]],
    ]
    assert plan.targets.int().tolist() == [
        [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]],
        [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    ]


def test_trajectory_groups_are_of_steps_that_were_taken():
    """Two blocks of four steps, of which the rows took 0, 2 and 4, 5, 7; and 0 and 4. By index, in threes, the first
    row's groups would be of 0, 2 | 4, 5 | 7."""
    unmask_step = torch.tensor([[2, 0, 0, 5, 4, 7], [0, 0, 0, 4, 4, -1]], dtype=torch.int32)
    plan = trajectory_groups(unmask_step, 8, 3)
    assert plan.targets.int().tolist() == [
        [[1, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    ]
    assert plan.masked.int().tolist() == [
        [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]],
        [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]],
    ]


# ------------------------------------------- composition


def some_plan(seed: int, batch: int = 3, views: int = 2, length: int = 4) -> NoisePlan:
    return bernoulli(noise(batch, views, seed=seed), noise(batch, views, length, seed=seed + 100), 0.2, 0.8)


def test_concatenate_joins_views_in_order():
    first, second = some_plan(0), some_plan(1, views=1)
    joined = concatenate([first, second])
    assert torch.equal(joined.masked[:, :2], first.masked) and torch.equal(joined.masked[:, 2:], second.masked)
    assert torch.equal(joined.targets, torch.cat([first.targets, second.targets], 1))
    assert torch.equal(joined.rate, torch.cat([first.rate, second.rate], 1))
    assert joined.prompt_masked is None


def test_concatenate_joins_prompts():
    first, second = some_plan(0), some_plan(1)
    first.prompt_masked, second.prompt_masked = noise(3, 2, 5) < 0.5, noise(3, 2, 5, seed=1) < 0.5
    joined = concatenate([first, second])
    assert torch.equal(joined.prompt_masked, torch.cat([first.prompt_masked, second.prompt_masked], 1))


def test_only_narrows_the_targets_and_nothing_else():
    plan = with_complements(some_plan(0))
    text = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    narrowed = plan.only(text)
    assert torch.equal(narrowed.targets, plan.masked & text.unsqueeze(1))
    assert torch.equal(narrowed.masked, plan.masked) and torch.equal(narrowed.rate, plan.rate)
    assert torch.equal(plan.targets, plan.masked)  # the plan itself is left alone
    assert torch.equal(narrowed.only(text).targets, narrowed.targets)
    assert torch.equal(concatenate([plan, plan]).only(text).targets, concatenate([narrowed, narrowed]).targets)


# ------------------------------------------- purity

U2, U3 = noise(6, 2), noise(6, 2, 4, seed=1)
TEXT = torch.tensor([1, 2, 3, 4, 4, 2])
PURE = {
    "full_mask": (full_mask, (6, 2, 4)),
    "bernoulli": (bernoulli, (U2, U3, 0.1, 0.9)),
    "uniform_counts": (uniform_counts, (U2, TEXT.unsqueeze(1))),
    "stratified_counts": (stratified_counts, (torch.tensor([0, 3]), torch.arange(6), 6, 4)),
    "random_subsets": (random_subsets, (torch.tensor([[1, 2]] * 6), U3, U3 < 0.9)),
    "with_complements": (with_complements, (some_plan(0),)),
    "prompt_noise": (prompt_noise, (noise(6, 5, 2), 0.3, torch.ones(6, 5, dtype=torch.long))),
    "random_text": (random_text, (U2, U3, TEXT)),
    "block_random": (block_random, (U2, U2.flip(0), U3, TEXT, 2, 0.15)),
    "trajectory_groups": (trajectory_groups, (torch.tensor([[0, 1, 2, -1]], dtype=torch.int32), 4, 3)),
    "concatenate": (concatenate, ([some_plan(0), some_plan(1)],)),
    "only": (NoisePlan.only, (some_plan(0), torch.tensor([[True, False, True, True]] * 3))),
}


def tensors_in(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, NoisePlan):
        return tensors_in([value.masked, value.targets, value.rate, value.prompt_masked])
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("name", PURE)
def test_plans_are_functions_of_their_noise_and_leave_it_alone(name):
    function, arguments = PURE[name]
    before = [tensor.clone() for tensor in tensors_in(arguments)]
    state = torch.get_rng_state()
    first, second = tensors_in(function(*arguments)), tensors_in(function(*arguments))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(arguments), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
