"""Steps whose number of tokens the network decides, against a replay that shares no code with the sampler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_sampling import always, canvas_before, distributions, entropy_of, network, rollout
from tiny import MASK, A, B, coded_prompts, forwards_of, tiny_model

from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample

ROWS = 24
BY_CONFIDENCE = SamplingConfig(12, 12, 4, 1.3, unmasking="max_prob", confidence_threshold=0.55)
BY_ENTROPY = SamplingConfig(12, 12, 4, 1.3, unmasking="entropy", entropy_bound=1.2)
RULES = {
    "threshold": BY_CONFIDENCE,
    "threshold, at least two": replace(BY_CONFIDENCE, denoising_steps=6),
    "threshold, else leftmost": replace(BY_CONFIDENCE, fallback="leftmost"),
    "threshold, at least two, else leftmost": replace(BY_CONFIDENCE, denoising_steps=6, fallback="leftmost"),
    "bound": BY_ENTROPY,
    "bound, at least two": replace(BY_ENTROPY, denoising_steps=6, entropy_bound=1.8),
}


def chosen(config: SamplingConfig, step: int, probabilities, masked: list[int]) -> tuple[set[int], bool]:
    """Positions that a step commits, given probabilities [L, V] and the masked positions of the block, and whether
    fewer of them reach the threshold or bound."""
    later = sum(config.commits()[step % config.steps_per_block + 1 :])
    least = max(1, len(masked) - later)
    if config.confidence_threshold is not None:
        order = sorted(masked, key=lambda i: -probabilities[i].max())
        passing = [i for i in order if probabilities[i].max() >= config.confidence_threshold]
    else:
        order = sorted(masked, key=lambda i: entropy_of(probabilities[i]))
        passing = [
            i
            for count, i in enumerate(order)
            if sum(entropy_of(probabilities[j]) for j in order[:count]) <= config.entropy_bound
        ]
    if config.fallback == "leftmost":
        order = passing + [i for i in sorted(masked) if i not in passing]
    return set(order[: max(least, len(passing))]), len(passing) < least


@pytest.mark.parametrize("config", RULES.values(), ids=RULES.keys())
def test_positions_of_every_step(config):
    model = tiny_model(3, 8.0)  # commits one to four tokens at a step
    trajectory = rollout(model, config, ROWS)
    sizes, fates = set(), set()
    for step in range(config.denoising_steps):
        probabilities = distributions(model, trajectory, step)
        canvas = canvas_before(trajectory, step)
        block = slice(step // config.steps_per_block * 4, step // config.steps_per_block * 4 + 4)
        for row in range(ROWS):
            masked = [i for i in range(block.start, block.stop) if canvas[row, i] == MASK]
            committed = {i for i in range(12) if trajectory.unmask_step[row, i] == step}
            if masked and (trajectory.unmask_step[row, block] >= 0).all():
                forced = bool(trajectory.forced[row, step])
                assert (committed, forced) == chosen(config, step, probabilities[row], masked), (row, step)
                fates.add(forced)
                sizes.add(len(committed))
                for i in committed:
                    policy = probabilities[row, i] ** (1 / 1.3)
                    expected = policy[trajectory.completion_ids[row, i]] / policy.sum()
                    assert trajectory.logps[row, i].exp().item() == pytest.approx(expected, rel=1e-4)
            else:
                assert not committed and not trajectory.forced[row, step]
    assert fates == {False} | ({True} if config.entropy_bound is None else set())  # its order starts below any bound
    assert sizes >= set(range(config.block_length // config.steps_per_block, 5))


@pytest.mark.parametrize("config", RULES.values(), ids=RULES.keys())
def test_a_block_ends_as_soon_as_it_is_written(config):
    model = network()
    with forwards_of(model) as calls:
        trajectory = rollout(model, config, ROWS)
    taken = [len({step for step in row if step >= 0}) for row in trajectory.unmask_step.tolist()]
    assert trajectory.row_forwards.tolist() == taken
    assert sum(len(call["input_ids"]) for call in calls) == sum(taken) < config.denoising_steps * ROWS
    assert trajectory.forwards == len(calls)
    assert len(set(taken)) > 2


def test_extreme_thresholds_commit_one_token_or_all():
    one = rollout(network(), replace(BY_CONFIDENCE, confidence_threshold=None), ROWS)
    never = rollout(network(), replace(BY_CONFIDENCE, confidence_threshold=1.0), ROWS)
    assert torch.equal(one.completion_ids, never.completion_ids) and torch.equal(one.unmask_step, never.unmask_step)
    zero = rollout(network(), replace(BY_ENTROPY, entropy_bound=0.0), ROWS)
    first = (zero.unmask_step == 0).sum(1)
    assert (first == 1).all()
    for config in (replace(BY_CONFIDENCE, confidence_threshold=1e-6), replace(BY_ENTROPY, entropy_bound=1e6)):
        trajectory = rollout(always(A, B), config, ROWS)
        assert trajectory.forwards == 3
        assert (trajectory.unmask_step == torch.tensor([0, 4, 8]).repeat_interleave(4)).all()


@pytest.mark.parametrize("config", RULES.values(), ids=RULES.keys())
def test_rows_do_not_depend_on_their_batch(config):
    model = network()
    prompts, mask = coded_prompts(ROWS)
    together = rollout(model, config, ROWS)
    for row in range(0, ROWS, 7):
        one = slice(row, row + 1)
        alone = sample(model, prompts[one], mask[one], config, row_generators(0, rows=[row]))
        assert torch.equal(alone.unmask_step[0], together.unmask_step[row])
        assert torch.equal(alone.completion_ids[0], together.completion_ids[row])


def test_signals_of_steps_that_a_row_did_not_take_are_zero():
    trajectory = rollout(network(), replace(BY_CONFIDENCE, record_signals=True), ROWS)
    took = torch.zeros(ROWS, 12, dtype=torch.bool)
    for row, steps in enumerate(trajectory.unmask_step.tolist()):
        took[row, [step for step in steps if step >= 0]] = True
    assert (trajectory.step_entropy[took] > 0).all() and (trajectory.step_margin[took] > 0).all()
    assert not trajectory.step_entropy[~took].any() and not trajectory.step_margin[~took].any()


def test_going_on_from_a_partly_written_block():
    """Nothing waits: a row with one open position is done after one step."""
    config, (prompts, mask) = BY_CONFIDENCE, coded_prompts(2)
    canvas = torch.full((2, 12), MASK)
    canvas[0, :3] = A
    state = CanvasState(canvas, torch.tensor([4, 12]))
    trajectory = sample(always(A, B), prompts, mask, config, row_generators(0, rows=range(2)), state=state)
    assert trajectory.row_forwards[0] == 1 and trajectory.unmask_step[0].tolist() == [-1] * 3 + [0] + [-1] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"confidence_threshold": 0.9}, r"confidence_threshold.*'max_prob' or 'low_confidence'; got 'random'"),
        ({"fallback": "leftmost"}, "fallback='leftmost' says which position commits.*Set confidence_threshold"),
        (
            {"fallback": "right", "confidence_threshold": 0.9, "unmasking": "max_prob"},
            "fallback must be one of surest, leftmost; got 'right'",
        ),
        ({"entropy_bound": 0.1}, "entropy_bound.*order of unmasking='entropy'; got 'random'"),
        ({"confidence_threshold": 0.0, "unmasking": "max_prob"}, r"must lie in \(0, 1\], got 0.0"),
        ({"confidence_threshold": 1.1, "unmasking": "max_prob"}, r"must lie in \(0, 1\], got 1.1"),
        ({"entropy_bound": -0.1, "unmasking": "entropy"}, "at least 0 nats, got -0.1"),
        ({"entropy_bound": 0.1, "confidence_threshold": 0.9, "unmasking": "entropy"}, "two rules for the same thing"),
    ],
)
def test_rules_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(12, 12, 4, **settings)
