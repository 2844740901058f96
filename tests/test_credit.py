"""Which steps may learn, how they are drawn, and that the weights undo the draw: tables, brute force, integration."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tiny import END, MASK, TAIL, A, B

from trl_diffusion.credit import draw_steps, eligible_steps, step_probabilities, taken_steps
from trl_diffusion.models import DiffusionFamily
from trl_diffusion.sampling import SamplingConfig, row_generators
from trl_diffusion.streams import uniforms

FAMILY = DiffusionFamily("tiny", MASK, 5, (TAIL, END), TAIL)
DRAWS = 20_000
KEPT, REJECTED = 1e-3, 1e-6  # p-values, as in test_sampling.py
JUST_BELOW_ONE = float(np.nextafter(1, 0))

# canvas of 6 positions; `.` is <tail>, `|` is <end>
WORDS = {".": TAIL, "|": END, "a": A, "b": B}

# ------------------------------------------- eligible steps


# completion, unmask_step, block length, steps per block, N of `paper`, N of `exact`
TABLE = {
    "no end": ("abbaba", [0, 1, 2, 3, 4, 5], 2, 2, 6, 6),
    "no end, one block": ("abbaba", [5, 1, 0, 3, 4, 2], 6, 6, 6, 6),
    "end at the last position": ("abbab|", [1, 0, 2, 3, 4, 5], 2, 2, 6, 6),
    "left after the first block": ("a|....", [0, 1, -1, -1, -1, -1], 2, 2, 2, 2),
    "left after the second block": ("aba|..", [0, 1, 3, 2, -1, -1], 2, 2, 4, 4),
    "all tail": ("......", [0, 1, -1, -1, -1, -1], 2, 2, 1, 2),
    "all tail, from the right": ("......", [1, 0, -1, -1, -1, -1], 2, 2, 2, 2),
    "all tail, one block": ("......", [3, 0, 1, 2, 4, 5], 6, 6, 4, 6),
    "all tail, one step per block": ("......", [0, 0, 0, -1, -1, -1], 3, 1, 1, 1),
    "tail in the last block": ("abba..", [0, 1, 2, 3, 4, 5], 3, 3, 5, 6),
    "tail in the last block, two at a time": ("abbab.", [0, 0, 1, 1, 2, 2], 6, 3, 3, 3),
    "tail behind the first one": ("a.....", [0, 1, 2, 3, 4, 5], 6, 6, 2, 6),
    "tail before text, in time": ("aab...", [3, 4, 5, 0, 1, 2], 6, 6, 6, 6),
    "text before tail, in time": ("aab...", [0, 1, 2, 5, 4, 3], 6, 6, 6, 6),
    "first tail early, others late": ("aab...", [2, 1, 3, 0, 4, 5], 6, 6, 4, 6),
    "end, not tail, behind the end": ("a||...", [0, 1, 2, -1, -1, -1], 3, 3, 3, 3),
    "end behind the tail": ("a.|...", [0, 1, 2, -1, -1, -1], 3, 3, 3, 3),
    "tail behind the end": ("a|....", [0, 1, 2, -1, -1, -1], 3, 3, 2, 3),
    "text behind the end": ("a.b...", [0, 1, 2, -1, -1, -1], 3, 3, 3, 3),
    "text behind the end, written first": ("a.b...", [1, 2, 0, -1, -1, -1], 3, 3, 3, 3),
    "text of a later block behind the end": ("a..b..", [0, 1, 2, 3, 4, 5], 3, 3, 4, 3),
    "uneven steps": ("ab.aab", [0, 0, 1, 2, 2, 3], 3, 2, 4, 2),
}


def eligible(completion: list[int], unmask_step: list[int], scope: str, block: int, steps: int) -> int:
    counts = eligible_steps(torch.tensor([completion]), torch.tensor([unmask_step]), FAMILY, scope, block, steps)
    assert counts.dtype == torch.long and counts.shape == (1,)
    return counts.item()


@pytest.mark.parametrize(("text", "unmask_step", "block", "steps", "paper", "exact"), TABLE.values(), ids=TABLE)
def test_eligible_steps(text, unmask_step, block, steps, paper, exact):
    completion = [WORDS[word] for word in text]
    assert eligible(completion, unmask_step, "paper", block, steps) == paper
    assert eligible(completion, unmask_step, "exact", block, steps) == exact


def test_eligible_steps_of_a_batch():
    rows = [row for row in TABLE.values() if row[2:4] == (6, 6)]
    completions = torch.tensor([[WORDS[word] for word in row[0]] for row in rows])
    steps = torch.tensor([row[1] for row in rows], dtype=torch.int32)
    assert eligible_steps(completions, steps, FAMILY, "paper", 6, 6).tolist() == [row[4] for row in rows]
    assert eligible_steps(completions, steps, FAMILY, "exact", 6, 6).tolist() == [row[5] for row in rows]


@st.composite
def rollouts(draw) -> tuple[list[int], list[int], SamplingConfig]:
    """What the sampler can leave behind: any words in any order, a row leaving behind the block of its end."""
    block, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    config = SamplingConfig(block * blocks, blocks * draw(st.integers(1, block)), block)
    completion, unmask_step = [], []
    for index in range(blocks):
        words = draw(st.lists(st.sampled_from([TAIL, END, A, A, B, B]), min_size=block, max_size=block))
        order = [step for step, count in enumerate(config.commits()) for _ in range(count)]
        completion += words
        unmask_step += [index * config.steps_per_block + step for step in draw(st.permutations(order))]
        if {TAIL, END} & set(words):
            break
    filled = config.canvas_length - len(completion)
    return completion + [TAIL] * filled, unmask_step + [-1] * filled, config


@given(rollouts())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_eligible_steps_of_any_rollout(case):
    completion, unmask_step, config = case
    paper, exact = (
        eligible(completion, unmask_step, scope, config.block_length, config.steps_per_block)
        for scope in ("paper", "exact")
    )
    ends = [position for position, word in enumerate(completion) if word in (TAIL, END)]
    last = ends[0] if ends else config.canvas_length - 1
    counted = [
        unmask_step[position]
        for position, word in enumerate(completion)
        if unmask_step[position] >= 0 and (word != TAIL or position <= last)
    ]
    assert paper == max(counted) + 1
    assert exact == max(unmask_step) + 1  # every step that was taken
    assert 1 <= paper <= exact <= config.denoising_steps


# ------------------------------------------- probabilities

ENTROPIES = torch.tensor([[0.5, 0.25, 0.25, 1.0, 9.0, 9.0], [0.0] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
UNMASK_STEP = torch.tensor([[1, 0, 0, 2, -1, -1], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 3, 1]], dtype=torch.int32)
ELIGIBLE = torch.tensor([3, 4, 2])


def leading(counts: torch.Tensor, steps: int) -> torch.Tensor:
    """The first steps of each completion, bool [B, steps]."""
    return torch.arange(steps) < counts.unsqueeze(1)


def test_step_probabilities_by_hand():
    probabilities = step_probabilities(ENTROPIES, UNMASK_STEP, leading(ELIGIBLE, 5), "entropy")
    assert probabilities.dtype == torch.float64
    expected = [[0.25, 0.25, 0.5, 0, 0], [0.25] * 4 + [0], [0.1 / 0.9, 0.8 / 0.9, 0, 0, 0]]
    assert torch.allclose(probabilities, torch.tensor(expected, dtype=torch.float64), atol=1e-7)
    rounded = step_probabilities(torch.full_like(ENTROPIES, -1e-6), UNMASK_STEP, leading(ELIGIBLE, 5), "entropy")
    uniform = step_probabilities(ENTROPIES, UNMASK_STEP, leading(ELIGIBLE, 5), "uniform")
    assert torch.equal(rounded, uniform)  # entropies that rounding left below zero count as zero
    assert torch.allclose(uniform[:, :4] * ELIGIBLE[:, None], (torch.arange(4) < ELIGIBLE[:, None]).double())
    assert not uniform[:, 4].any()


@pytest.mark.slow
@given(
    entropies=st.lists(st.floats(-(2.0**-20), 12, width=32), min_size=1, max_size=12),
    data=st.data(),
    draws=st.sampled_from(["uniform", "entropy"]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_step_probabilities_of_anything(entropies, data, draws):
    steps = data.draw(st.lists(st.integers(-1, 7), min_size=len(entropies), max_size=len(entropies)))
    eligible = data.draw(st.integers(1, 8))
    (q,) = step_probabilities(
        torch.tensor([entropies]), torch.tensor([steps]), leading(torch.tensor([eligible]), 8), draws
    ).tolist()
    mass = [1e-8 + sum(max(h, 0) for h, u in zip(entropies, steps, strict=True) if u == s) for s in range(eligible)]
    if draws == "uniform":
        mass = [1.0] * eligible
    assert q[:eligible] == pytest.approx([m / sum(mass) for m in mass], rel=1e-9)
    assert min(q[:eligible]) > 0 and q[eligible:] == [0.0] * (8 - eligible)
    assert sum(q) == pytest.approx(1, abs=1e-12)


# ------------------------------------------- draws

Q = torch.tensor([[0.07, 0.38, 0.05, 0.1, 0.4, 0, 0, 0]], dtype=torch.float64)
N = torch.tensor([5])
VALUES = torch.tensor([3.0, -1.0, 4.0, 1.5, -9.0, 1e6, 1e6, 1e6], dtype=torch.float64)  # f(step)


def draws_of(num_draws: int, uniform: torch.Tensor, reduction: str = "mean"):
    assert uniform.size(1) == num_draws
    return draw_steps(Q.expand(len(uniform), -1), uniform, reduction)


def p_value(steps: torch.Tensor, probabilities: torch.Tensor) -> float:
    counts, expected = steps.bincount(minlength=8).double(), probabilities * len(steps)
    if counts[expected == 0].any():
        return 0.0
    if (expected > 0).sum() == 1:
        return 1.0
    return chisquare(counts[expected > 0].numpy(), expected[expected > 0].numpy()).pvalue


@pytest.mark.parametrize("num_draws", [1, 4])
def test_steps_are_drawn_from_q(num_draws):
    """Each of the M draws is exactly multinomial in its own stratum of q; with M = 1 that is q itself."""
    noise = uniforms(row_generators(0, rows=range(DRAWS)), num_draws)
    steps = draws_of(num_draws, noise).steps
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), Q[0].cumsum(0)])
    for m in range(num_draws):
        inside = edges.clamp(m / num_draws, (m + 1) / num_draws).diff() * num_draws
        assert p_value(steps[:, m], inside) > KEPT
    uniform = step_probabilities(torch.zeros(1, 1), torch.full((1, 1), -1), leading(N, 8), "uniform")[0]
    assert p_value(steps[:, 0], uniform) < REJECTED


@pytest.mark.parametrize("v", [0.0, 0.5, 1 - 2.0**-20])
def test_as_many_uniform_draws_as_steps_take_each_step_once(v):
    q = step_probabilities(torch.zeros(1, 1), torch.full((1, 1), -1), leading(torch.tensor([4]), 8), "uniform")
    drawn = draw_steps(q, torch.full((1, 4), v, dtype=torch.float64), "mean")
    assert drawn.steps.tolist() == [[0, 1, 2, 3]]
    assert drawn.weights.tolist() == [[1.0] * 4]


def moments(num_draws: int, reduction: str, weigh: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact mean and variance of weight · f(step) for each of the M draws, over its uniform v in [0, 1).

    Between two breakpoints M · cumsum(q) − m every draw is constant, so one evaluation inside of each interval does.
    """
    cuts = (num_draws * Q[0].cumsum(0).unsqueeze(1) - torch.arange(num_draws)).flatten()
    edges = torch.cat([cuts[(cuts > 0) & (cuts < 1)], torch.tensor([0.0, 1.0], dtype=torch.float64)]).unique()
    inside = (edges[1:] + edges[:-1]) / 2
    drawn = draws_of(num_draws, inside.unsqueeze(1).expand(-1, num_draws), reduction)
    values = VALUES[drawn.steps] * (drawn.weights if weigh else 1)
    mean = (edges.diff().unsqueeze(1) * values).sum(0)
    return mean, (edges.diff().unsqueeze(1) * values.square()).sum(0) - mean.square()


@pytest.mark.parametrize("num_draws", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_draws_are_unbiased(reduction, num_draws):
    target = getattr(VALUES[:5], reduction)().item()
    assert moments(num_draws, reduction)[0].mean().item() == pytest.approx(target, rel=1e-5)
    assert moments(num_draws, reduction, weigh=False)[0].mean().item() != pytest.approx(target, rel=0.1)
    other = "sum" if reduction == "mean" else "mean"
    assert moments(num_draws, other)[0].mean().item() != pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("num_draws", [2, 3, 8, 24])
def test_strata_lower_the_variance(num_draws):
    independent = moments(1, "mean")[1].item() / num_draws
    stratified = moments(num_draws, "mean")[1].sum().item() / num_draws**2
    assert 0 < stratified < (0.9 if num_draws < 8 else 0.5) * independent
    noise = uniforms(row_generators(0, rows=range(4000)), num_draws)
    drawn = draws_of(num_draws, noise)
    measured = (VALUES[drawn.steps] * drawn.weights).mean(1).var().item()
    assert measured == pytest.approx(stratified, rel=0.2)


@pytest.mark.parametrize("num_draws", [1, 3, 24, 1000])
@pytest.mark.parametrize("extreme", [0.0, 2.0**-1074, 0.5, 1 - 2.0**-24, JUST_BELOW_ONE])
def test_no_draw_falls_behind_the_last_eligible_step(extreme, num_draws):
    generator = torch.Generator().manual_seed(0)
    num_eligible = torch.randint(1, 129, (300,), generator=generator)
    entropies = torch.rand(300, 128, generator=generator) ** 8 * (torch.rand(300, 1, generator=generator) > 0.2)
    steps = torch.arange(128).expand(300, -1)
    for draws in ("uniform", "entropy"):
        q = step_probabilities(entropies, steps, leading(num_eligible, 128), draws)
        uniform = torch.full((300, num_draws), extreme, dtype=torch.float64)
        for scale in (1.0, 1 - 1e-15, 1 + 1e-15):  # sums that rounding leaves
            drawn = draw_steps(q * scale, uniform, "mean")
            assert (drawn.steps >= 0).all() and (drawn.steps < num_eligible[:, None]).all()
            assert drawn.weights.isfinite().all() and (drawn.weights > 0).all()
    if extreme == JUST_BELOW_ONE:
        assert (drawn.steps[:, -1] == num_eligible - 1).all()
        careless = torch.searchsorted(q.cumsum(1) * (1 - 1e-15), uniform[:, :1].contiguous(), right=True)
        assert (careless[:, 0] >= num_eligible).any()


def test_draws_of_a_row_depend_on_its_stream_alone():
    probabilities = step_probabilities(
        torch.rand(6, 12, generator=torch.Generator().manual_seed(0)), torch.arange(12).expand(6, -1),
        leading(torch.tensor([12, 1, 5, 8, 12, 3]), 12), "entropy",
    )  # fmt: skip

    def run(rows: list[int], streams: list[int]):
        noise = uniforms(row_generators(3, 2, 0, rows=streams), 8)
        return draw_steps(probabilities[rows], noise, "mean")

    together = run(list(range(6)), list(range(6)))
    for rows in ([4, 2, 0, 5, 1, 3], [3], [0, 0]):
        apart = run(rows, rows)
        assert torch.equal(apart.steps, together.steps[rows])
        assert torch.equal(apart.weights, together.weights[rows])
    assert not torch.equal(run([4, 2, 0], [0, 1, 2]).steps, together.steps[[4, 2, 0]])
    assert len(Counter(map(tuple, run([0] * 50, list(range(50))).steps.tolist()))) > 25


# ------------------------------------------- steps that committed nothing


def test_steps_that_committed_nothing_are_never_drawn():
    """Two blocks of three steps: the first is finished after two, the second after one."""
    unmask_step = torch.tensor([[0, 1, 1, 3, 3, -1], [3, 0, 4, 1, 2, 5]], dtype=torch.int32)
    taken = taken_steps(unmask_step, 6)
    assert taken.tolist() == [[True, True, False, True, False, False], [True] * 6]
    noise = uniforms(row_generators(0, rows=range(2)), 3000)
    for draws in ("uniform", "entropy"):
        q = step_probabilities(torch.ones(2, 6), unmask_step, taken, draws)
        assert torch.equal(q > 0, taken)
        drawn = draw_steps(q, noise, "mean")
        shares = torch.stack([row.bincount(minlength=6) for row in drawn.steps]) / 3000
        torch.testing.assert_close(shares.double(), q, rtol=0, atol=2e-3)
        # the mean and the sum over the steps that were taken
        values = torch.tensor([2.0, 5.0, 1e6, -1.0, 1e6, 1e6])
        assert (drawn.weights * values[drawn.steps])[0].mean() == pytest.approx(2.0, abs=0.02)
        assert (draw_steps(q, noise, "sum").weights * values[drawn.steps])[0].mean() == pytest.approx(6.0, abs=0.06)
    extreme = draw_steps(q * (1 - 1e-15), torch.full((2, 3), JUST_BELOW_ONE, dtype=torch.float64), "mean")
    assert extreme.steps[:, -1].tolist() == [3, 5]
