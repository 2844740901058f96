"""MAPG: the probability of positions, its gradient by enumeration, and steps that are scored together."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from math import factorial

import pytest
import torch
from enumeration import enumerate_paths, trajectory_of
from methods import method_named
from test_exact_gradient import PROMPT, gradient, reward_of
from test_sampling import network, rollout
from tiny import MASK, tiny_model
from trainer_helpers import largest_log_ratio, loss_of_update, losses_seen, num_views, plan_of, rollout_of, view_of

from trl_diffusion.distribution import ordered_choice
from trl_diffusion.sampling import SamplingConfig

METHOD = method_named("mapg")
TAU = 0.5


def made(model, folder, paths, block: int, steps: int, temperature: float):
    """A trainer with a view for every step, and its rows with advantages that make its loss −E[r] / L."""
    length = len(paths[0].tokens)
    sizes = dict(max_completion_length=length, block_length=block, denoising_steps=steps, num_mc_samples=steps)
    trainer = METHOD.make(
        folder, model=model, temperature=temperature, position_temperature=TAU, num_generations=2, **sizes
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trajectory = trajectory_of(paths, temperature)
    rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(len(paths))}
    rows["prompt_ids"] = torch.tensor([PROMPT] * len(paths))
    rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
    rows |= plan_of(trainer, trajectory, rows)
    # The order counts too, so that there is something to learn about it.
    rewards = torch.tensor([reward_of(path.tokens) + (path.steps[1] < path.steps[0]) for path in paths]).double()
    probability = torch.stack([path.probability for path in paths])
    rows["advantages"] = probability.detach() * rewards * len(paths)
    return trainer, rows, gradient(model, (probability * rewards).sum())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("length", "block"), [(4, 2), (3, 3)], ids=["one token a step", "two tokens, then one"])
def test_gradient_is_that_of_the_enumerated_reward_over_orders_and_tokens(length, block, temperature, tmp_path):
    model = tiny_model(seed=3).double().eval()  # float64, so that differences are the formula's
    paths = enumerate_paths(model, PROMPT, length, block, 2, temperature, position_temperature=TAU)
    assert float(sum(path.probability for path in paths).detach()) == pytest.approx(1.0, abs=1e-9)
    trainer, rows, exact = made(model, tmp_path, paths, block, 2 * length // block, temperature)
    found = -gradient(model, loss_of_update(trainer, rows)) * length
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-5)
    assert exact.norm() > 0.1
    # negative control: without the term of the positions
    tokens = trajectory_of(paths, temperature).logps
    assert (tokens - rows["old_per_token_logps"]).abs().max() > 0.1
    del rows["position_ranks"]
    rows["old_per_token_logps"] = tokens
    assert (-gradient(model, loss_of_update(trainer, rows)) * length - exact).norm() > 0.02 * exact.norm()


def test_probabilities_of_ordered_choices_sum_to_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64)
    exists = torch.ones(4, dtype=torch.bool)
    for count in (1, 2, 3, 4):
        total, with_repeats = 0.0, 0.0
        for order in permutations(range(4)):
            logps = ordered_choice(scores[list(order)], exists)
            # every order of the rest stands for the same choice, so each is counted (4 − k)! times
            total += float(logps[:count].sum().exp()) / factorial(4 - count)
            with_repeats += float(scores[list(order)].log_softmax(0)[:count].sum().exp()) / factorial(4 - count)
        assert total == pytest.approx(1.0, abs=1e-12)
        assert count == 1 or with_repeats < 0.6


def test_items_that_do_not_exist_are_never_left_and_have_no_gradient():
    scores = torch.tensor([[0.3, 2.0, 1e9, torch.nan], [0.5, 0.1, 0.2, 0.0]], requires_grad=True)
    exists = torch.tensor([[True, True, False, False], [True] * 4])
    logps = ordered_choice(scores, exists)
    expected = [0.3 - torch.tensor([0.3, 2.0]).logsumexp(0), 0.0, 0.0, 0.0]
    torch.testing.assert_close(logps[0], torch.tensor(expected))
    logps.sum().backward()
    assert torch.equal(scores.grad[0, 2:], torch.zeros(2)) and scores.grad.isfinite().all()
    assert ordered_choice(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)).shape == (3, 0)


def test_a_small_temperature_gives_the_order_of_max_prob():
    """The tokens' noise of a first block is the same, so completions of one block are equal bit by bit."""
    config = SamplingConfig(8, 8, 8, 1.3, unmasking="plackett_luce", position_temperature=1e-9)
    greedy = rollout(network(), replace(config, unmasking="max_prob", position_temperature=0.5))
    cold, warm = rollout(network(), config), rollout(network(), replace(config, position_temperature=2.0))
    assert torch.equal(cold.unmask_step, greedy.unmask_step)
    assert torch.equal(cold.completion_ids, greedy.completion_ids) and torch.equal(cold.logps, greedy.logps)
    assert not torch.equal(warm.unmask_step, greedy.unmask_step)
    assert cold.position_logps.abs().max() < 1e-3 < warm.position_logps.abs().max()


def test_positions_of_later_blocks_never_compete(tmp_path):
    trainer = METHOD.make(tmp_path)
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory, _ = trainer.last_rollout
    seen = 0
    for view in range(num_views(trainer)):
        steps, shown = rows["view_steps"][:, 0, view], view_of(trainer, rows, 0, view)
        for row, step in enumerate(steps.tolist()):
            block = range(step // 4 * 4, step // 4 * 4 + 4)  # four steps and four positions per block
            masked = [i for i in block if step >= 0 and shown.canvas[row, i] == MASK]
            assert shown.choice.open[row].nonzero().flatten().tolist() == masked
            seen += len(masked) > 1 and step < 4
            if len(masked) == 1:  # nothing to choose
                assert trajectory.position_logps[row, masked[0]] == 0
    assert seen > 4


def test_agrpo_counts_drawn_positions_too(tmp_path, monkeypatch):
    method = method_named("agrpo")
    trainer = method.make(tmp_path, learning_rate=0.0, unmasking="plackett_luce", denoising_steps=4)
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    assert largest_log_ratio(seen) <= 1e-4
    trajectory, _ = trainer.last_rollout
    tokens = [view | {"old": view["old"] - trajectory.position_logps[view["global_row"]]} for view in seen]
    tokens = [view | {"old": view["old"] * view["targets"]} for view in tokens]
    assert largest_log_ratio(tokens) > 0.1  # negative control: the record of the tokens alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merged_steps": 3, "unmasking": "low_confidence"}, "must divide the 4 denoising steps of a block; got 3"),
        ({"merged_steps": 0}, "must divide the 4 denoising steps of a block; got 0"),
        ({"merged_steps": 2}, "must not be drawn from the policy: unmasking='plackett_luce'"),
        (
            {"merged_steps": 2, "unmasking": "low_confidence", "num_mc_samples": 5},
            "4 views of 2 of 8 denoising steps, so num_mc_samples is at most that; got 5",
        ),
        ({"position_temperature": 0.0}, "position_temperature must be positive and finite, got 0.0"),
        ({"position_temperature": 0.2, "unmasking": "max_prob"}, "'max_prob' does not draw positions"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' would"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        METHOD.make(tmp_path, **settings)
