"""Which steps selectors choose: a table written out by hand, brute force in numpy, and the loss on chosen steps."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import Method, method_named
from tiny import MASK, canvas_logits, forwards_of, tiny_model
from trainer_helpers import parameters_of, rollout_of, view_of

from trl_diffusion.credit import SELECTORS, StepSelection, StepSignals, Threshold, selected_draws, step_signals
from trl_diffusion.credit.step_selection import hybrid_score
from trl_diffusion.trainers import ATPOConfig, ATPOTrainer, TrajectoryGRPOConfig

# ------------------------------------------- the table: three completions, two blocks of three steps

STEPS_PER_BLOCK = 3
# In eighths, so that sums are exact and ties are ties. The second completion ended behind the first block; what
# stands behind its end must not count.
ENTROPY = [[9, 3, 6, 8, 4, 4], [6, 4, 0, 99, 77, 55], [10, 3, 1, 6, 3, 2]]
HESITATION = [[8, 4, 5, 7, 4, 1], [6, 7, 2, 99, 77, 55], [8, 3, 7, 3, 6, 1]]  # 1 − (p1 − p2)
TAKEN = [6, 3, 6]

# Sums over the completions still being written, divided by all three.
MEAN_ENTROPY = [25, 10, 7, 14, 7, 6]
MEAN_HESITATION = [22, 14, 14, 10, 10, 2]
# |9−3| + |6−4| + |10−3| = 15 and so on; nothing at the first step of a block
MEAN_ROEC = [0, 15, 9, 0, 7, 1]
# RoEC: mean 8 and standard deviation √((7² + 1² + 1² + 7²)/4) = 5 of four steps; C: mean 12, √(216/6) = 6 of six.
Z_ROEC = [0, 7 / 5, 1 / 5, 0, -1 / 5, -7 / 5]
Z_HESITATION = [10 / 6, 2 / 6, 2 / 6, -2 / 6, -2 / 6, -10 / 6]
SCORE = [5 / 6, 13 / 15, 4 / 15, -1 / 6, -4 / 15, -23 / 15]  # mean 0, standard deviation √(119/180) = 0.8131

NOISE = [0.3, 0.9, 0.1, 0.8, 0.5, 0.2]

# selector: the chosen steps for K = 1, 2, …
TABLE = {
    # from 0.3 of a distance: 6/K · (0.3, 1.3, …)
    "uniform": ([1], [0, 3], [0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]),
    "random": ([1], [1, 3], [1, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4, 5]),
    # 7 at steps 2 and 4: the earlier
    "entropy": ([0], [0, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]),
    # 14 at steps 1 and 2, 10 at 3 and 4. Divided by those still writing, step 3 would be second.
    "confidence_margin": ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]),
    # block starts stand between 1/5 and −1/5
    "roec": ([1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]),
    "roec_cm": ([1], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]),
}


def leading(counts: list[int] | torch.Tensor, steps: int = 6) -> torch.Tensor:
    """The first steps of each completion, bool [B, steps]."""
    return torch.arange(steps) < torch.as_tensor(counts).unsqueeze(1)


def eighths(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32) / 8


def table_signals(rows: tuple[int, ...] = (0, 1, 2), sets: int = 1) -> StepSignals:
    entropy, hesitation = eighths([ENTROPY[row] for row in rows]), eighths([HESITATION[row] for row in rows])
    taken = leading([TAKEN[row] for row in rows])
    return step_signals(entropy, 1 - hesitation, taken, STEPS_PER_BLOCK, sets)


def noise(sets: int = 1) -> torch.Tensor:
    return torch.tensor([NOISE] * sets, dtype=torch.float64)


def choose(selector, signals: StepSignals, count: int) -> list[list[int]]:
    selection = selector(signals, count, noise(len(signals.entropy)))
    assert selection.steps.shape == (len(signals.entropy), count) and selection.steps.dtype == torch.long
    return selection.steps.tolist()


def test_signals_of_the_table():
    signals = table_signals()
    for found, expected in (
        (signals.entropy, MEAN_ENTROPY),
        (signals.confidence_margin, MEAN_HESITATION),
        (signals.roec, MEAN_ROEC),
    ):
        assert found.dtype == torch.float64
        assert found.tolist() == [pytest.approx([value / 8 / 3 for value in expected], rel=1e-12)]
    assert signals.num_candidates.tolist() == [6]
    assert signals.block_starts.tolist() == [True, False, False, True, False, False]
    assert hybrid_score(signals).tolist() == [pytest.approx(SCORE, rel=1e-12)]
    assert [(r + c) / 2 for r, c in zip(Z_ROEC, Z_HESITATION, strict=True)] == pytest.approx(SCORE)


@pytest.mark.parametrize("name", TABLE)
def test_selectors_choose_what_the_table_says(name):
    for count, expected in enumerate(TABLE[name], start=1):
        assert choose(SELECTORS[name], table_signals(), count) == [expected], count


def test_all_chooses_every_candidate():
    assert choose(SELECTORS["all"], table_signals(), 6) == [[0, 1, 2, 3, 4, 5]]
    assert choose(SELECTORS["all"], table_signals(rows=(1,)), 6) == [[0, 1, 2, -1, -1, -1]]


@pytest.mark.parametrize(
    ("tau", "count", "expected"),
    [
        (0.0, 6, [0, 1, 2]),  # at least the mean, 0
        (1.0, 6, [0, 1]),  # 0.8131
        (1.05, 6, [1]),  # 0.8538
        (2.0, 6, []),
        (-0.3, 6, [0, 1, 2, 3]),  # −0.2439
        (-0.3, 2, [0, 1]),
    ],
)
def test_threshold(tau, count, expected):
    selection = Threshold(tau)(table_signals(), count, noise())
    assert selection.steps.shape == (1, count)
    assert [step for step in selection.steps[0].tolist() if step >= 0] == expected
    # the mean over those chosen: K/chosen, because the loss divides by K
    draws = selected_draws(selection, torch.zeros(1, dtype=torch.long), leading([6]))
    assert sorted(draws.weights[0].tolist())[count - len(expected) :] == [count / len(expected or [0])] * len(expected)
    assert draws.weights.sum() == (count if expected else 0)


def test_no_more_steps_than_candidates():
    """Alone, the second completion has three steps; its noise behind them is not looked at."""
    alone = table_signals(rows=(1,))
    assert alone.num_candidates.tolist() == [3]
    for name in TABLE:
        assert choose(SELECTORS[name], alone, 5) == [[0, 1, 2, -1, -1]], name
    assert choose(SELECTORS["entropy"], alone, 2) == [[0, 1]]
    assert choose(SELECTORS["confidence_margin"], alone, 2) == [[0, 1]]
    assert choose(SELECTORS["roec"], alone, 1) == [[2]]  # changes 2 and 4
    assert choose(SELECTORS["uniform"], alone, 2) == [[0, 1]]  # 3/2 · (0.3, 1.3)
    assert choose(Threshold(-9.0), alone, 5) == [[0, 1, 2, -1, -1]]
    drawn = SELECTORS["sampled"](alone, 5, torch.full((1, 6), 1 - 2.0**-53, dtype=torch.float64))
    assert drawn.steps.tolist() == [[2] * 5]


@pytest.mark.slow
def test_uniform_steps_are_all_as_likely():
    """Over the random start; a fixed one would choose the same place of every block."""
    starts = (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    for count in range(1, 7):
        chosen = [
            SELECTORS["uniform"](table_signals(), count, start.expand(1, 6)).steps[0].tolist() for start in starts
        ]
        shares = torch.tensor(chosen).flatten().bincount(minlength=6) / 600
        torch.testing.assert_close(shares, torch.full((6,), count / 6), rtol=0, atol=0.005)


def test_groups_have_their_own_averages():
    signals = table_signals(rows=(0, 2, 1, 1), sets=2)
    assert signals.entropy.tolist() == [
        pytest.approx([value / 16 for value in (19, 6, 7, 14, 7, 6)]),
        pytest.approx([value / 8 for value in (6, 4, 0, 0, 0, 0)]),
    ]
    assert signals.num_candidates.tolist() == [6, 3]
    assert choose(SELECTORS["entropy"], signals, 4) == [[0, 2, 3, 4], [0, 1, 2, -1]]
    # z-scores are over the steps of the own set: C of the first is 16, 7, 12, 10, 10, 2 sixteenths
    z = np.array([16, 7, 12, 10, 10, 2]) - 9.5
    z = z / np.sqrt((z**2).mean())
    change = np.array([6 + 7, 3 + 2, 4 + 3, 0 + 1]) - 6.5  # steps 1, 2, 4 and 5
    roec = np.zeros(6)
    roec[[1, 2, 4, 5]] = change / np.sqrt((change**2).mean())
    assert hybrid_score(signals)[0].tolist() == pytest.approx(((z + roec) / 2).tolist())


def test_running_averages():
    first, second = table_signals(), table_signals(rows=(1,))
    assert first.blend(None) is first
    blended = second.blend(first)
    expected = [0.9 * old / 24 + 0.1 * new / 8 for old, new in zip(MEAN_ENTROPY, [6, 4, 0, 0, 0, 0], strict=True)]
    assert blended.entropy.tolist() == [pytest.approx(expected)]
    assert blended.confidence_margin[0, 1] == pytest.approx(0.9 * 14 / 24 + 0.1 * 7 / 8)
    assert blended.roec[0, 2] == pytest.approx(0.9 * 9 / 24 + 0.1 * 4 / 8)
    assert blended.num_candidates.tolist() == [3]  # what is now
    assert blended.blend(first).entropy[0, 0] == pytest.approx(0.9 * 25 / 24 + 0.1 * expected[0])


def test_equal_signals_have_no_score():
    """z-scores are 0, so every choice is a tie and the first steps win."""
    flat = step_signals(torch.full((2, 6), 0.3), torch.full((2, 6), 0.7), leading([6, 6]), STEPS_PER_BLOCK)
    assert not hybrid_score(flat).any()
    for name in ("entropy", "confidence_margin", "roec", "roec_cm"):
        assert choose(SELECTORS[name], flat, 4) == [[0, 1, 2, 3]]
    assert choose(Threshold(0.0), flat, 6) == [[0, 1, 2, 3, 4, 5]]  # all are at the mean
    sampled = SELECTORS["sampled"](flat, 6, noise())
    assert sampled.probabilities[0].tolist() == pytest.approx([1 / 6] * 6)
    # Sums of the same numbers in another order differ in the last bit, which is no signal.
    entropy = torch.tensor([[0.1, 0.7, 0.1], [0.4, 0.4, 0.4], [0.7, 0.1, 0.7]], dtype=torch.float64)
    rounded = step_signals(entropy, 1 - entropy, leading([3] * 3, 3), STEPS_PER_BLOCK)
    assert len(set(rounded.confidence_margin[0].tolist())) > 1
    assert not hybrid_score(rounded).any()


def test_steps_that_no_completion_took_are_no_candidates():
    """Blocks that were finished early: the first after two steps, the second after one or two. What stands at a step
    that a completion did not take must not count."""
    taken = torch.tensor([[True, True, False, True, False, False], [True, True, False, True, True, False]])
    entropy, hesitation = (
        eighths([[8, 2, 99, 4, 99, 99], [6, 4, 99, 2, 6, 99]]),
        eighths([[9, 9, 99, 9, 99, 99], [9, 9, 99, 9, 9, 99]]),
    )
    signals = step_signals(entropy, 1 - hesitation, taken, STEPS_PER_BLOCK)
    assert signals.candidates.tolist() == [[True, True, False, True, True, False]]
    assert signals.num_candidates.tolist() == [4]
    assert (signals.entropy * 16).tolist() == [[14, 6, 0, 6, 6, 0]]
    assert (signals.roec * 16).tolist() == [[0, 8, 0, 0, 4, 0]]
    assert (signals.confidence_margin * 16).tolist() == [[18, 18, 0, 18, 9, 0]]
    for name in (*TABLE, "all"):
        assert choose(SELECTORS[name], signals, 6) == [[0, 1, 3, 4, -1, -1]], name
    assert choose(SELECTORS["uniform"], signals, 2) == [[0, 3]]  # 4/2 · (0.3, 1.3) are the places 0 and 2 of four
    assert choose(SELECTORS["entropy"], signals, 2) == [[0, 1]]
    points = torch.tensor([[0.0, 1 - 2.0**-53, 0, 0, 0, 0]], dtype=torch.float64)
    selection = SELECTORS["sampled"](signals, 2, points)
    assert selection.steps.tolist() == [[0, 4]]
    draws = selected_draws(selection, torch.zeros(2, dtype=torch.long), taken)
    assert draws.steps.tolist() == [[0, -1], [0, 4]]
    expected = 1 / (taken.sum(1, keepdim=True) * selection.probabilities) * torch.tensor([[1, 0], [1, 1]])
    torch.testing.assert_close(draws.weights, expected.float())


# ------------------------------------------- weights


def test_a_step_behind_the_end_is_an_empty_view():
    selection = StepSelection(torch.tensor([[1, 3, 5]]))
    draws = selected_draws(selection, torch.zeros(3, dtype=torch.long), leading([6, 3, 4]))
    assert draws.steps.tolist() == [[1, 3, 5], [1, -1, -1], [1, 3, -1]]
    assert draws.weights.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]  # still divided by three
    groups = selected_draws(
        StepSelection(torch.tensor([[0, 2], [1, -1]])), torch.tensor([1, 0, 1]), leading([3, 1, 3])
    )
    assert groups.steps.tolist() == [[1, -1], [0, -1], [1, -1]]
    assert groups.weights.tolist() == [[1, 0], [1, 0], [1, 0]]


def test_sampled_steps_are_drawn_from_the_softmax_of_the_score():
    q = np.exp(SCORE) / np.exp(SCORE).sum()
    edges = np.concatenate([[0], q.cumsum()])
    for step in range(6):
        for point, inside in ((edges[step] + 1e-9, step), (edges[step + 1] - 1e-9, step)):
            drawn = SELECTORS["sampled"](table_signals(), 1, torch.full((1, 6), point, dtype=torch.float64))
            assert drawn.steps.tolist() == [[inside]]
            assert drawn.probabilities.item() == pytest.approx(q[step], rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_sampled_steps_are_unbiased_for_the_mean_over_a_completions_steps(count):
    """Every joint draw, with its probability, for completions of 6, 3 and 4 steps."""
    taken = torch.tensor([6, 3, 4])
    values = torch.tensor([[3.0, -1, 4, 1.5, -9, 2]] * 3, dtype=torch.float64)  # f(step)
    q = np.exp(SCORE) / np.exp(SCORE).sum()
    middles = q.cumsum() - q / 2
    weighted, plain, total = torch.zeros(3), torch.zeros(3), 0.0
    for draw in product(range(6), repeat=count):
        points = torch.ones(1, 6, dtype=torch.float64)
        points[0, :count] = torch.tensor(middles[list(draw)])
        selection = SELECTORS["sampled"](table_signals(), count, points)
        assert selection.steps.tolist() == [list(draw)]
        draws = selected_draws(selection, torch.zeros(3, dtype=torch.long), leading(taken))
        empty = draws.steps < 0
        assert torch.equal(empty, torch.tensor(draw).expand(3, -1) >= taken.unsqueeze(1))
        assert not draws.weights[empty].any()
        probability = float(np.prod(q[list(draw)]))
        found = values.gather(1, draws.steps.clamp(min=0))
        weighted += probability * (draws.weights * found).mean(1)
        plain += probability * (~empty * found).mean(1)
        total += probability
    assert total == pytest.approx(1)
    expected = [values[row, :steps].mean().item() for row, steps in enumerate(taken)]
    assert weighted.tolist() == pytest.approx(expected, abs=1e-5)
    assert all(abs(a - b) > 0.1 for a, b in zip(plain.tolist(), expected, strict=True))  # the weights do it


# ------------------------------------------- brute force


def brute_signals(entropy, margin, taken, per_block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H, C and RoEC of one set of completions, step by step as ALGORITHMS.md states them."""
    rows, steps = entropy.shape
    mean_h, mean_c, mean_r = np.zeros(steps), np.zeros(steps), np.full(steps, np.nan)
    for step in range(steps):
        writing = [row for row in range(rows) if step < taken[row]]
        mean_h[step] = sum(entropy[row, step] for row in writing) / rows
        mean_c[step] = sum(1 - margin[row, step] for row in writing) / rows
        if step % per_block:
            mean_r[step] = sum(abs(entropy[row, step] - entropy[row, step - 1]) for row in writing) / rows
    return mean_h, mean_c, mean_r


def brute_z(values: np.ndarray) -> np.ndarray:
    """Population z-scores of what is not NaN; 0 elsewhere."""
    return np.nan_to_num((values - np.nanmean(values)) / np.nanstd(values))


def brute_choice(scores: np.ndarray, count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda step: (-scores[step], step))
    return sorted(order[:count])


@pytest.mark.parametrize("seed", range(40))
def test_selectors_match_their_formulas(seed):
    random = np.random.default_rng(seed)
    rows, blocks, per_block = random.integers(1, 7), random.integers(1, 5), random.integers(3, 6)
    steps = blocks * per_block
    entropy, margin = random.gamma(2, size=(rows, steps)), random.random((rows, steps))
    taken = random.integers(1, blocks + 1, rows) * per_block
    signals = step_signals(
        torch.from_numpy(entropy), torch.from_numpy(margin), leading(taken, int(steps)), int(per_block)
    )
    mean_h, mean_c, mean_r = (values[: taken.max()] for values in brute_signals(entropy, margin, taken, per_block))
    scores = {
        "entropy": mean_h,
        "confidence_margin": mean_c,
        "roec": brute_z(mean_r),
        "roec_cm": (brute_z(mean_r) + brute_z(mean_c)) / 2,
    }
    np.testing.assert_allclose(hybrid_score(signals)[0, : taken.max()], scores["roec_cm"], atol=1e-9)
    for count in {1, 2, min(steps, 5), steps}:
        for name, score in scores.items():
            expected = brute_choice(score, count)
            expected += [-1] * (count - len(expected))
            found = SELECTORS[name](signals, int(count), torch.rand(1, steps).double())
            assert found.steps.tolist() == [expected], name
            assert found.probabilities is None and not found.mean_over_chosen
        score, tau = scores["roec_cm"], random.normal()
        above = [s for s in range(len(score)) if score[s] >= score.mean() + tau * score.std()]
        expected = sorted(sorted(above, key=lambda step: -score[step])[:count])
        threshold = Threshold(tau)(signals, int(count), torch.rand(1, steps).double())
        assert [step for step in threshold.steps[0].tolist() if step >= 0] == expected


# ------------------------------------------- properties

CHOOSING = {name: selector for name, selector in SELECTORS.items() if name != "sampled"} | {
    "threshold": Threshold(0.2)
}


@dataclasses.dataclass
class Rollouts:
    """Signals of completions, in sixteenths, so that sums do not depend on their order."""

    entropy: torch.Tensor
    margin: torch.Tensor
    taken: torch.Tensor
    per_block: int

    def signals(self, order: list[int], sets: int = 1) -> StepSignals:
        rows = torch.tensor(order)
        return step_signals(
            self.entropy[rows],
            self.margin[rows],
            leading(self.taken[rows], self.entropy.size(1)),
            self.per_block,
            sets,
        )


@st.composite
def rollouts(draw) -> Rollouts:
    rows, blocks, per_block = 2 * draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    steps = blocks * per_block
    sixteenths = st.lists(st.integers(0, 16), min_size=rows * steps, max_size=rows * steps)
    entropy, margin = (torch.tensor(draw(sixteenths)).view(rows, steps) / 16 for _ in range(2))
    ends = draw(st.lists(st.integers(1, blocks), min_size=rows, max_size=rows))
    return Rollouts(entropy, margin, torch.tensor(ends) * per_block, per_block)


@pytest.mark.slow
@given(case=rollouts(), data=st.data(), name=st.sampled_from(sorted(CHOOSING)))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_what_every_selector_keeps_to(case, data, name):
    selector, (rows, steps) = CHOOSING[name], case.entropy.shape
    count = steps if name == "all" else data.draw(st.integers(1, steps))
    order = data.draw(st.permutations(range(rows)))
    noise = torch.from_numpy(np.random.default_rng(0).random((1, steps)))
    selection = selector(case.signals(list(range(rows))), count, noise)
    (chosen,) = selection.steps.tolist()
    candidates = int(case.taken.max())
    kept = [step for step in chosen if step >= 0]
    assert len(chosen) == count
    assert kept == sorted(set(kept))  # distinct, in the order of time
    assert all(step < candidates for step in kept)
    assert len(kept) <= min(count, candidates) if name == "threshold" else len(kept) == min(count, candidates)
    # the same whatever the order of the completions, and so whatever process they are on
    assert selector(case.signals(order), count, noise).steps.tolist() == [chosen]
    # a set of completions is chosen for as if it were alone
    halves = selector(case.signals(order, sets=2), count, noise.expand(2, -1))
    for half, part in enumerate((order[: rows // 2], order[rows // 2 :])):
        assert halves.steps[half].tolist() == selector(case.signals(part), count, noise).steps[0].tolist()
    # every completion has the steps it reached, and nothing else
    draws = selected_draws(selection, torch.zeros(rows, dtype=torch.long), leading(case.taken, steps))
    for row, taken in enumerate(case.taken.tolist()):
        reached = [step for step in kept if step < taken]
        assert [step for step in draws.steps[row].tolist() if step >= 0] == reached
        assert (draws.weights[row] > 0).sum() == len(reached)


@given(case=rollouts(), data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_drawn_steps_keep_to(case, data):
    rows, steps = case.entropy.shape
    count = data.draw(st.integers(1, steps))
    points = data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=steps, max_size=steps))
    noise = torch.tensor([points], dtype=torch.float64)
    selection = SELECTORS["sampled"](case.signals(list(range(rows))), count, noise)
    assert ((selection.steps >= 0) & (selection.steps < case.taken.max())).all()
    assert (selection.probabilities > 0).all() and (selection.probabilities <= 1).all()
    turned = SELECTORS["sampled"](case.signals(list(reversed(range(rows)))), count, noise)
    assert torch.equal(turned.steps, selection.steps)
    draws = selected_draws(selection, torch.zeros(rows, dtype=torch.long), leading(case.taken, steps))
    for row, slot in product(range(rows), range(count)):
        taken, step = int(case.taken[row]), int(selection.steps[0, slot])
        expected = 1 / (taken * selection.probabilities[0, slot]) if step < taken else 0
        assert draws.weights[row, slot] == pytest.approx(float(expected), rel=1e-6)


# ------------------------------------------- in the trainer

ATPO = method_named("atpo")


def with_function(selector, method: Method = ATPO) -> Method:
    """ATPO with a function for a selector."""
    trainer = partial(method.trainer, step_selector=selector)
    return dataclasses.replace(method, trainer=trainer, settings=method.settings | {"step_selector": None})


def trained(method: Method, output_dir, **settings):
    trainer = method.make(output_dir, **settings)
    trainer.train()
    return trainer


def written_out_loss(model, rows, trajectory, chosen: list[int], divide_by_reached: bool = False) -> torch.Tensor:
    """Clipped ratios, mean over the tokens of a step, mean over the chosen steps, mean over completions."""
    total = torch.zeros(())
    for row, unmask_step in enumerate(trajectory.unmask_step.tolist()):
        reached = [step for step in chosen if step in unmask_step]
        for step in reached:
            ids = trajectory.completion_ids[row].tolist()
            canvas = [token if 0 <= u < step else MASK for token, u in zip(ids, unmask_step, strict=True)]
            prompt, mask = rows["prompt_ids"][row : row + 1], rows["prompt_mask"][row : row + 1]
            logps = (canvas_logits(model, prompt, mask, torch.tensor([canvas]))[0] / 0.9).log_softmax(-1)
            terms = []
            for position in [position for position, u in enumerate(unmask_step) if u == step]:
                ratio = torch.exp(logps[position, ids[position]] - trajectory.logps[row, position])
                advantage = rows["advantages"][row]
                terms.append(torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            divisor = len(reached) if divide_by_reached else len(chosen)
            total = total - sum(terms) / len(terms) / divisor / len(trajectory.unmask_step)
    return total


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("name", ["roec_cm", "uniform"])
def test_the_loss_is_that_of_the_chosen_steps(name, tmp_path):
    trainer = ATPO.make(tmp_path, step_selector=name)
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory, _ = trainer.last_rollout
    (chosen,) = trainer.last_selection.tolist()
    taken = trajectory.unmask_step.max(1).values + 1
    assert (taken <= max(chosen)).any() and (taken > max(chosen)).any()
    with torch.no_grad():  # off policy, so that ratios are clipped
        trainer.model.lm_head.weight.mul_(1.5)

    def loss(part: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(trainer._view_loss(trainer.model, part, 0, view) for view in range(3))

    expected = written_out_loss(trainer.model, rows, trajectory, chosen)
    found = loss(rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.abs() > 1e-3
    torch.testing.assert_close(gradient(trainer.model, found), gradient(trainer.model, expected), rtol=1e-3, atol=1e-5)
    other = written_out_loss(trainer.model, rows, trajectory, chosen, divide_by_reached=True)
    assert (other - expected).abs() > 1e-3
    # a view behind the end of a completion has no loss
    early = int(taken.argmin())
    alone = {key: value[early : early + 1] if value.dim() else value for key, value in rows.items()}
    behind = [view for view, step in enumerate(chosen) if step >= taken[early]]
    assert behind and all(trainer._view_loss(trainer.model, alone, 0, view) == 0 for view in behind)


def test_selection_takes_the_signals_of_the_rollout(tmp_path):
    seen = []

    def spy(signals, count, noise):
        seen.append((signals, count, noise))
        return StepSelection(torch.tensor([[0, 1, 3]] * len(noise)))

    trainer = with_function(spy).make(tmp_path, num_iterations=2)
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory, _ = trainer.last_rollout
    taken = (trajectory.unmask_step.max(1).values + 1).numpy()
    entropy, margin = trajectory.step_entropy.double().numpy(), trajectory.step_margin.double().numpy()
    mean_h, mean_c, mean_r = brute_signals(entropy, margin, taken, 2)
    signals = seen[0][0]
    np.testing.assert_allclose(signals.entropy[0], mean_h, atol=1e-12)
    np.testing.assert_allclose(signals.confidence_margin[0], mean_c, atol=1e-12)
    np.testing.assert_allclose(signals.roec[0], np.nan_to_num(mean_r), atol=1e-12)
    assert [count for _, count, _ in seen] == [3, 3]  # once per inner update
    steps = torch.tensor([[0, 1, 3]] * 8)
    reached = steps < torch.from_numpy(taken).unsqueeze(1)
    for update in range(2):
        assert torch.equal(rows["view_steps"][:, update], steps.masked_fill(~reached, -1))
        assert torch.equal(rows["view_weights"][:, update], reached.float())
    # Noise is private to the rollout, the update and the set; the same for whoever makes it.
    rollout_of(trainer, "a b", "b a a")
    again = with_function(spy).make(tmp_path, num_iterations=2, signal_average="group")
    rollout_of(again, "b", "b a a")
    noises = [noise for _, _, noise in seen]
    assert all(noise.shape == (1, 4) and noise.dtype == torch.float64 for noise in noises[:4])
    assert len({tuple(noise[0].tolist()) for noise in noises[:4]}) == 4
    assert noises[4].shape == (2, 4) and torch.equal(noises[4][:1], noises[0])
    assert not torch.equal(noises[4][0], noises[4][1])


def test_every_group_may_have_steps_of_its_own(tmp_path):
    trainer = ATPO.make(tmp_path, step_selector="entropy", signal_average="group", num_mc_samples=2)
    rows = rollout_of(trainer, "a b", "b a a", "b b a b", "a")
    trajectory, _ = trainer.last_rollout
    taken = (trajectory.unmask_step.max(1).values + 1).numpy()
    entropy, margin = trajectory.step_entropy.double().numpy(), trajectory.step_margin.double().numpy()
    chosen = []
    for group in range(4):
        own = slice(4 * group, 4 * group + 4)
        mean_h, _, _ = brute_signals(entropy[own], margin[own], taken[own], 2)
        chosen.append(brute_choice(mean_h[: taken[own].max()], 2))
    assert trainer.last_selection.tolist() == chosen
    assert len({tuple(steps) for steps in chosen}) > 1
    for row in range(16):
        expected = [step if step < taken[row] else -1 for step in chosen[row // 4]]
        assert rows["view_steps"][row, 0].tolist() == expected


@pytest.mark.parametrize("name", ["agrpo", "atpo"])
def test_views_of_parallel_unmasking_have_something_to_score(name, tmp_path):
    """Blocks are finished before their last step, and no view is wasted on the steps that are left out."""
    settings = {"unmasking": "max_prob", "confidence_threshold": 0.5, "denoising_steps": 8, "num_mc_samples": 2}
    trainer = method_named(name).make(tmp_path, step_draws="uniform", **settings)
    rows = rollout_of(trainer, "a b", "b a")
    steps, drawn = rows["unmask_step"], rows["view_steps"]
    taken = (steps.unsqueeze(-1) == torch.arange(8)).any(1)
    assert (~taken & (torch.arange(8) < steps.max(1, keepdim=True).values)).any()  # there are gaps
    for view in range(2):
        targets = view_of(trainer, rows, 0, view).targets
        assert torch.equal(targets.any(1), drawn[:, 0, view] >= 0)
    if name == "agrpo":
        assert (drawn >= 0).all()
        torch.testing.assert_close(rows["view_weights"], torch.ones_like(rows["view_weights"]))  # a mean over them
    else:
        assert (drawn >= 0).any() and taken.any(0)[trainer.last_selection[0]].all()


@pytest.mark.slow
def test_signals_cost_no_forward(tmp_path):
    """The same forwards of the same rows, with a selector, with Monte-Carlo draws, and in every update."""
    shapes = {}
    for name in ("roec_cm", None):
        trainer = ATPO.make(tmp_path, step_selector=name, max_steps=2)
        with forwards_of(trainer.model) as calls:
            trainer.train()
        shapes[name] = [tuple(call["input_ids"].shape) for call in calls]
        assert trainer.last_selection is None or name is not None
    assert shapes["roec_cm"][:4] == shapes[None][:4]  # the first rollout, of the same weights
    assert shapes["roec_cm"][4:10] == shapes[None][4:10] == [(8, shapes[None][4][1])] * 6
    assert len(shapes["roec_cm"]) == len(shapes[None]) == 2 * (4 + 2 * 3)  # steps, micro-batches × views


@pytest.mark.slow
def test_a_threshold_by_name_and_as_an_object(tmp_path):
    named = trained(ATPO, tmp_path, step_selector="threshold", step_threshold=0.5)
    given = trained(with_function(Threshold(0.5)), tmp_path)
    other = trained(with_function(Threshold(-9.0)), tmp_path)
    assert torch.equal(parameters_of(named), parameters_of(given)) and not torch.equal(
        parameters_of(named), parameters_of(other)
    )
    chosen = int((named.last_selection >= 0).sum())
    assert 0 < chosen < 3
    rows = rollout_of(named, "a b", "b a a")
    views = rows["view_weights"][:, 0]
    assert views[views > 0].unique().tolist() == [3 / int((named.last_selection >= 0).sum())]


def test_evaluation_leaves_the_selection_of_training_alone(tmp_path):
    trainer = ATPO.make(tmp_path, signal_average="running", per_device_eval_batch_size=8)
    rollout_of(trainer, "a b", "b a a")
    steps = trainer.choices.likelihood.steps
    signals, selection, kept = steps.running, trainer.last_selection, trainer.last_rollout
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] and np.isfinite(first["eval_loss"])
    assert steps.running is signals and trainer.last_selection is selection
    assert trainer.last_rollout is kept


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_running_averages_survive_a_resume(stop, tmp_path, monkeypatch):
    """μ = 2: 2 is between two rollouts, 3 in the middle of one."""
    shared = dict(signal_average="running", max_steps=6, num_iterations=2, learning_rate=0.2, step_selector="sampled")
    whole = trained(ATPO, tmp_path / "whole", save_strategy="steps", save_steps=stop, **shared)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{stop}")

    def resumed():
        again = ATPO.make(tmp_path / "again", model=tiny_model(seed=9), **shared)
        again.train(resume_from_checkpoint=checkpoint)
        return again

    again = resumed()
    for name in ("entropy", "confidence_margin", "roec"):
        assert torch.equal(
            getattr(again.choices.likelihood.steps.running, name),
            getattr(whole.choices.likelihood.steps.running, name),
        ), name
    assert torch.equal(again.last_selection, whole.last_selection)
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert again.forward_units == whole.forward_units > 0
    # negative control: without them the averages start anew
    monkeypatch.setattr(ATPOTrainer, "_load_extra_state", lambda self, state: None)
    assert not torch.equal(
        resumed().choices.likelihood.steps.running.entropy, whole.choices.likelihood.steps.running.entropy
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_selector": "best"}, "step_selector must be one of all, .*, threshold; got 'best'"),
        ({"signal_average": "all"}, "signal_average must be one of batch, group, running; got 'all'"),
        ({"step_selector": "threshold"}, "belongs to step_selector='threshold'"),
        ({"step_threshold": 1.0}, "belongs to step_selector='threshold'"),
        ({"step_selector": "all"}, r"needs num_mc_samples = denoising_steps \(4\), got 3"),
        ({"num_mc_samples": 5}, "cannot choose num_mc_samples=5 of 4 denoising steps"),
        ({"step_draws": "entropy"}, "replaces the Monte-Carlo draws"),
        ({"step_reduction": "sum"}, "replaces the Monte-Carlo draws"),
        ({"step_selector": "sampled", "loss_type": "bnpo"}, "loss_type='bnpo' takes .* which step_selector='sampled'"),
        ({"step_selector": "sampled", "top_entropy_quantile": 0.5}, "top_entropy_quantile < 1 takes a statistic"),
        ({"step_selector": "sampled", "entropy_coef": 0.1}, "entropy_coef takes a statistic"),
        ({"step_selector": "sampled", "use_adaptive_entropy": True}, "entropy_coef takes a statistic"),
        ({"step_selector": "sampled", "beta": 0.1}, "KL term must carry the weights"),
        ({"step_selector": "threshold", "step_threshold": 0.0, "beta": 0.1}, "KL term must carry the weights"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        ATPO.make(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_selector": "roec"}, "Both a step_selector function and step_selector='roec' in the config are given"),
        ({"num_mc_samples": 5}, "cannot choose num_mc_samples=5 of 4 denoising steps"),
        ({"step_draws": "entropy"}, "replaces the Monte-Carlo draws"),
        ({"step_reduction": "sum", "loss_type": "dapo"}, "replaces the Monte-Carlo draws"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_a_function_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        with_function(SELECTORS["roec"]).make(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.1},
        {"step_selector": "sampled", "beta": 0.1, "loss_type": "dr_grpo"},
        {"step_selector": "all", "num_mc_samples": 4},
        {"step_selector": "random", "loss_type": "bnpo"},
        {"step_selector": "threshold", "step_threshold": 9.0},
    ],
    ids=lambda value: " ".join(map(str, value.values())),
)
def test_settings_that_fit_train(changes, tmp_path):
    trainer = ATPO.make(tmp_path, max_steps=2, num_iterations=2, learning_rate=0.1, **changes)
    before = parameters_of(trainer).clone()
    trainer.train()
    moved = not torch.equal(parameters_of(trainer), before)
    assert torch.isfinite(parameters_of(trainer)).all()
    assert moved == (changes.get("step_threshold") != 9.0)  # nothing lies that far above the mean


def test_any_trajectory_method_takes_a_selector(tmp_path):
    trainer = trained(method_named("agrpo"), tmp_path, step_draws="uniform", step_selector="roec_cm")
    assert (trainer.last_selection >= 0).all()
    assert TrajectoryGRPOConfig("unused", use_cpu=True, bf16=False).step_selector is None


def test_defaults_and_paper(tmp_path):
    config = ATPOConfig("unused", use_cpu=True, bf16=False)
    assert (config.step_selector, config.num_mc_samples, config.denoising_steps) == ("roec_cm", 8, 128)
    assert (config.step_draws, config.step_reduction, config.signal_average) == ("uniform", "mean", "batch")
    assert (config.loss_type, config.epsilon, config.beta, config.scale_rewards) == ("grpo", 0.2, 0.0, "group")
    assert config.unmasking == "random"
    trainer = ATPO.make(tmp_path)
    assert trainer.args.record_signals and not config.record_signals
    trainer.create_model_card(dataset_name="words")
    card = (tmp_path / "README.md").read_text()
    assert "2511.15208" in card and "ATPO" in card
