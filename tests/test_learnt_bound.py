"""A learnt entropy bound: bounds for each row of a rollout, and the gradient of their policy by enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods import method_named, text_reward
from peft import LoraConfig
from test_sampling import network
from tiny import A, B, canvas_logits, tiny_model
from trainer_helpers import parameters_of, rollout_of

from trl_diffusion.credit import leave_one_out
from trl_diffusion.runtime.bound_policy import BOUNDS, BoundPolicy, prompt_states, reinforce_loss, speed_rewards
from trl_diffusion.sampling import SamplingConfig, row_generators, sample

DIFFPO = method_named("diffpo")
CONFIG = SamplingConfig(8, 8, 4, 1.3, unmasking="entropy", entropy_bound=0.2)
LEARNT = {"learn_bound": True, "unmasking": "entropy", "entropy_bound": 0.2, "denoising_steps": 8}


def weights_of(policy: BoundPolicy) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in policy.state_dict().items()}


def drawn(model, bounds: list[float] | None, rows: list[int], config: SamplingConfig = CONFIG):
    """Completions of one prompt with the private streams of these rows."""
    given = None if bounds is None else torch.tensor(bounds, dtype=torch.float64)
    return sample(
        model, torch.tensor([[A, B, A]] * len(rows)), None, config, row_generators(0, rows=rows), bounds=given
    )


def test_rows_with_bounds_of_their_own_are_written_as_with_that_bound_alone():
    model, rows = network(), list(range(24))
    bounds = [BOUNDS[row % 7] for row in rows]
    together = drawn(model, bounds, rows)
    for bound in BOUNDS:
        own = [row for row in rows if bounds[row] == bound]
        alone = drawn(model, None, own, replace(CONFIG, entropy_bound=bound))
        assert torch.equal(together.unmask_step[own], alone.unmask_step)
        assert torch.equal(together.completion_ids[own], alone.completion_ids)
        torch.testing.assert_close(together.logps[own], alone.logps)
    same = drawn(model, None, rows)  # negative control: the config's bound for all
    assert not torch.equal(same.unmask_step, together.unmask_step)
    equal = drawn(model, [0.2] * 24, rows)
    assert torch.equal(equal.unmask_step, same.unmask_step) and torch.equal(equal.logps, same.logps)


@pytest.mark.parametrize(
    ("bounds", "config", "message"),
    [
        ([0.1, 0.2], SamplingConfig(8, 8, 4, 1.0), "entropy_bound, which is not set"),
        ([0.1], CONFIG, r"bounds must be 2 numbers of at least 0 nats.*shape \(1,\)"),
        ([0.1, -0.1], CONFIG, "bounds must be 2 numbers of at least 0 nats"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds, config, message):
    with pytest.raises(ValueError, match=message):
        drawn(network(), bounds, [0, 1], config)


def rewards_of_bounds(model) -> torch.Tensor:
    """What a completion with the same noise earns under each bound, float64 [7]."""
    written = drawn(model, list(BOUNDS), [5] * 7, replace(CONFIG, canvas_length=8, denoising_steps=8))
    rewards = torch.tensor(text_reward(None, written.completion_ids.tolist())).double()
    paid = speed_rewards(rewards, written.row_forwards, 8, 1.0)
    assert len(written.row_forwards.unique()) > 2
    return paid


def test_the_gradient_of_the_bounds_is_that_of_the_enumerated_reward():
    """Over all pairs of choices for two completions of a prompt, each with the probability of the pair."""
    model = network()
    state = prompt_states(model, torch.tensor([[A, B, A]]), torch.ones(1, 3, dtype=torch.long)).double()
    policy = BoundPolicy(state.size(1), 0.1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, state.size(1), generator=generator, dtype=torch.float64).requires_grad_()
    bias = policy.bias.detach().double().requires_grad_()
    rewards = rewards_of_bounds(model)

    def logits(rows: int) -> torch.Tensor:
        return torch.nn.functional.linear(state.expand(rows, -1), weight, bias)

    def slope(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, (weight, bias))])

    chances = logits(1).softmax(-1).squeeze(0)
    exact = slope((chances * rewards).sum())
    chances = chances.detach()

    def estimate(advantages_of) -> torch.Tensor:
        total = torch.zeros_like(exact)
        for first in range(7):
            for second in range(7):
                pair = torch.tensor([first, second])
                advantages = advantages_of(rewards[pair].unsqueeze(0)).squeeze(0)
                total += chances[first] * chances[second] * slope(-reinforce_loss(logits(2), pair, advantages))
        return total

    found = estimate(lambda r: leave_one_out(r - r.mean(1, keepdim=True)))
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-9)
    assert exact.norm() > 1e-3
    # negative controls: the mean of the whole group holds the own reward; and rewards of the other completion
    assert (estimate(lambda r: r - r.mean(1, keepdim=True)) - exact).norm() > 0.1 * exact.norm()
    assert (estimate(lambda r: r.flip(1)) - exact).norm() > 0.1 * exact.norm()


def test_a_step_of_learning_is_gradient_descent_on_the_loss():
    policy, states = BoundPolicy(3, 0.05), torch.nn.functional.normalize(torch.arange(12.0).view(4, 3) + 1, dim=-1)
    choices, advantages = torch.tensor([0, 2, 6, 2]), torch.tensor([1.0, -0.5, 0.2, 0.0])
    chances = policy(states).softmax(-1).detach()
    slopes = (advantages.unsqueeze(1) * (torch.nn.functional.one_hot(choices, 7) - chances)) / 4
    before = weights_of(policy)
    policy.learn(states, choices, advantages, rate=0.5)
    torch.testing.assert_close(weights_of(policy)["weight"], before["weight"] + 0.5 * slopes.T @ states)
    torch.testing.assert_close(weights_of(policy)["bias"], before["bias"] + 0.5 * slopes.sum(0))


def test_bounds_are_drawn_with_their_probabilities_and_start_at_one():
    policy, count = BoundPolicy(2, 0.5), 1200
    noise = (torch.arange(count).double() + 0.5) / count
    found = torch.bincount(policy.choose(torch.zeros(count, 2), noise), minlength=7).tolist()
    assert found == [100, 100, 100, 100, 100, 600, 100]
    assert policy.choose(torch.zeros(3, 2), None).tolist() == [5, 5, 5]


def test_faster_completions_earn_more_and_failures_nothing():
    steps = torch.arange(1, 9)
    paid = speed_rewards(torch.ones(8), steps, 8, 2.0)
    assert paid[0] == 1 and paid[-1] == pytest.approx(1 / 64) and (paid.diff() < 0).all()
    assert torch.equal(speed_rewards(torch.ones(8), steps, 8, 0.0), torch.ones(8))
    assert (speed_rewards(-torch.ones(8), steps, 8, 1.0) == 0).all()
    assert speed_rewards(torch.tensor([torch.nan]), torch.tensor([3]), 8, 1.0).isnan().all()


def test_states_are_means_over_the_prompt_alone_and_do_not_depend_on_padding():
    model = tiny_model(seed=3)
    ids, mask = torch.tensor([[0, 0, A, B], [A, A, B, B]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    states = prompt_states(model.train(), ids, mask)
    assert model.training and not states.requires_grad
    alone = prompt_states(model, ids[:1, 2:], mask[:1, 2:])
    torch.testing.assert_close(states[:1], alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        seen: list[torch.Tensor] = []
        handle = model.model.norm.register_forward_hook(lambda _, __, hidden: seen.append(hidden))
        canvas_logits(model.eval(), ids[1:, :1], mask[1:, :1], ids[1:, 1:])
        handle.remove()
    mean = seen[0][0].mean(0)
    torch.testing.assert_close(states[1], mean / mean.norm(), atol=1e-5, rtol=1e-5)


# ------------------------------------------- through the trainer


def test_a_rollout_draws_bounds_from_private_streams_and_trains_their_policy(tmp_path, monkeypatch):
    trainer = DIFFPO.make(tmp_path, bound_learning_rate=2.0, **LEARNT)
    before, learnt = weights_of(trainer.bound_policy), []
    monkeypatch.setattr(trainer.bound_policy, "learn", lambda *given: learnt.append(given))
    torch_state = torch.get_rng_state()
    rollout_of(trainer, "a b", "b a a", copies=8)
    assert torch.equal(torch.get_rng_state(), torch_state)
    trajectory, finished = trainer.last_rollout
    ((states, choices, advantages, rate),) = learnt
    assert rate == 2.0 and len(choices.unique()) > 3
    assert torch.equal(states[:8], states[:1].expand(8, -1)) and not torch.equal(states[0], states[8])
    # steps beyond those that the bound lets merge: the same streams and bounds, without the trainer
    for row in (0, 3, 12):
        again = sample(
            trainer.model,
            torch.tensor([[2, 3]] if row < 8 else [[3, 2, 2]]),
            None,
            replace(trainer.args.sampling_config(), entropy_bound=BOUNDS[choices[row]]),
            row_generators(trainer.args.seed, 0, 0, rows=[row]),
        )
        assert torch.equal(again.unmask_step[0], trajectory.unmask_step[row])
    paid = finished.rewards[:, 0].clamp(min=0) * (9 - trajectory.row_forwards) / 8
    groups = paid.view(-1, 4)
    expected = groups - (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(advantages, expected.flatten(), atol=1e-5, rtol=1e-5)
    assert expected.abs().max() > 0.1 and torch.equal(before["bias"], weights_of(trainer.bound_policy)["bias"])


def test_evaluations_take_the_likeliest_bound_and_do_not_train(tmp_path):
    trainer = DIFFPO.make(tmp_path, **LEARNT)
    trainer.model.eval()
    before = weights_of(trainer.bound_policy)
    trainer._generate_and_score_completions([{"prompt": "a b"}] * 4)
    assert set(trainer._bound_choice[1].tolist()) == {BOUNDS.index(0.2)}
    assert torch.equal(before["bias"], weights_of(trainer.bound_policy)["bias"])


@pytest.mark.slow
def test_paying_for_speed_raises_the_bound_and_paying_for_nothing_leaves_it(tmp_path):
    settings = LEARNT | {
        "max_steps": 6,
        "learning_rate": 0.0,
        "reward": lambda completions, **_: [1.0] * len(completions),
    }
    paid = DIFFPO.make(tmp_path, bound_learning_rate=20.0, **settings)
    before = weights_of(paid.bound_policy)["bias"].softmax(0) @ torch.tensor(BOUNDS)
    paid.train()
    assert weights_of(paid.bound_policy)["bias"].softmax(0) @ torch.tensor(BOUNDS) > before + 0.05
    unpaid = DIFFPO.make(tmp_path, bound_learning_rate=20.0, speed_exponent=0.0, **settings)
    start = weights_of(unpaid.bound_policy)
    unpaid.train()
    assert torch.equal(weights_of(unpaid.bound_policy)["bias"], start["bias"])  # negative control


@pytest.mark.slow
def test_a_resumed_run_has_the_policy_of_one_that_was_not_stopped(tmp_path):
    settings = LEARNT | {"num_iterations": 2, "max_steps": 5, "learning_rate": 0.05}
    whole = DIFFPO.make(tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = DIFFPO.make(tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    start = weights_of(resumed.bound_policy)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    for name, value in weights_of(whole.bound_policy).items():
        assert torch.equal(value, weights_of(resumed.bound_policy)[name])
        assert not torch.equal(value, start[name])


@pytest.mark.slow
def test_an_adapter_learns_bounds_too(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = DIFFPO.make(tmp_path, peft_config=lora, **LEARNT)
    before = weights_of(trainer.bound_policy)["weight"]
    ids, mask = torch.tensor([[A, B]]), torch.ones(1, 2, dtype=torch.long)
    adapted = prompt_states(trainer.model, ids, mask)
    with trainer.model.disable_adapter():
        assert not torch.allclose(prompt_states(trainer.model, ids, mask), adapted)
    trainer.train()
    assert not torch.equal(weights_of(trainer.bound_policy)["weight"], before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speed_exponent": 2.0}, "speed_exponent=2.0 would have no effect: set learn_bound=True"),
        ({"bound_learning_rate": 0.1}, "bound_learning_rate=0.1 would have no effect"),
        (LEARNT | {"bound_learning_rate": -1.0}, "bound_learning_rate must be at least 0, got -1.0"),
        ({"learn_bound": True}, "needs unmasking='entropy' and an entropy_bound .* got entropy_bound=None"),
        (LEARNT | {"entropy_bound": 0.3}, "one of 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0; got entropy_bound=0.3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DIFFPO.make(tmp_path, **settings)


def test_continuations_without_the_bound_are_refused(tmp_path):
    probed = replace(DIFFPO, wrap=method_named("sapo").wrap)
    with pytest.raises(ValueError, match="learn_bound=True does not go with a StepAwareReward"):
        probed.make(tmp_path, **LEARNT)


def test_sharded_weights_are_refused(tmp_path):
    trainer = DIFFPO.make(tmp_path, **LEARNT)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="needs whole weights on every process: it works with DDP and ZeRO-1 and 2"):
        trainer._set_up_rollouts()
