"""ForkGRPO: forced steps, the law of the tokens drawn there, and the two limits of the threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods import method_named
from scipy.stats import chisquare
from test_exact_gradient import gradient
from tiny import MASK, canvas_logits, tiny_model
from trainer_helpers import loss_of_update, parameters_of, plan_of, rollout_of

from trl_diffusion.sampling import SamplingConfig, row_generators, sample

FORK, JUST = method_named("fork_grpo"), method_named("just_grpo")
ROWS, KEPT, REJECTED = 20_000, 1e-3, 1e-6
OURS = SamplingConfig(4, 4, 4, 0.8, unmasking="max_prob", confidence_threshold=0.8, fallback="leftmost")
PROMPT = torch.tensor([[2, 3, 2]])


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3)


@pytest.fixture(scope="module")
def first(model) -> torch.Tensor:
    """The network's distributions on the masked canvas, float64 [4, words]."""
    with torch.no_grad():
        logits = canvas_logits(model, PROMPT, torch.ones_like(PROMPT), torch.full((1, 4), MASK))
    return logits[0, :, :4].double().softmax(-1)


def p_value(model, config: SamplingConfig, expected: torch.Tensor) -> tuple[float, float]:
    """Of the leftmost tokens of completions whose first step is forced, and the share of these completions."""
    prompts = PROMPT.expand(ROWS, -1)
    drawn = sample(model, prompts, None, config, row_generators(0, rows=range(ROWS)))
    forced = drawn.forced[:, 0]
    assert torch.equal(drawn.unmask_step[forced, 0], torch.zeros_like(drawn.unmask_step[forced, 0]))
    assert ((drawn.unmask_step[forced] == 0).sum(1) == 1).all()  # one token
    counts = drawn.completion_ids[forced, 0].bincount(minlength=4).double()
    return chisquare(counts, expected * counts.sum()).pvalue, float(forced.float().mean())


def test_forced_tokens_follow_the_policy_with_our_rule_and_not_with_the_published_one(model, first):
    policy = first[0] ** (1 / 0.8)
    policy = policy / policy.sum()
    threshold = float(first.max()) + 0.01  # nothing reaches it, so the first step is forced
    p, share = p_value(model, replace(OURS, confidence_threshold=threshold), policy)
    assert share == 1 and p > KEPT
    # The same rule below the largest probability never forces the first step; the published one does, wherever only
    # unlikely tokens were drawn.
    threshold = float(first[0].max()) - 0.01
    assert threshold > first[0].sort().values[-2]
    published = replace(OURS, confidence_threshold=threshold, unmasking="low_confidence")
    p, share = p_value(model, published, policy)
    assert 0.05 < share < 0.95 and p < REJECTED
    prompts = PROMPT.expand(64, -1)
    ours = replace(OURS, confidence_threshold=threshold)
    assert not sample(model, prompts, None, ours, row_generators(0, rows=range(64))).forced[:, 0].any()


def rollout(trainer):
    rows = rollout_of(trainer, "a b", "b a a")
    trainer.current_gradient_accumulation_steps = 1
    return rows, trainer.last_rollout[0]


def test_without_certain_tokens_it_is_just_grpo_per_token(tmp_path):
    """A threshold that nothing reaches: text grows from left to right, and the mean over its n tokens learns."""
    trainer = FORK.make(tmp_path, confidence_threshold=1.0, block_length=1, num_iterations=1)
    rows, trajectory = rollout(trainer)
    sampled = trajectory.unmask_step >= 0
    assert torch.equal(trajectory.unmask_step[sampled], torch.arange(8).int().expand_as(sampled)[sampled])
    assert torch.equal(trajectory.forced, sampled)
    found = gradient(trainer.model, loss_of_update(trainer, rows))

    just = JUST.make(tmp_path, model=trainer.model, temperature=trainer.args.temperature, num_iterations=1)
    just.current_gradient_accumulation_steps = 1
    just.model.train()
    length = rows["completion_mask"].sum(1)
    assert len(length.unique()) > 2
    same = {name: rows[name] for name in ("completion_ids", "global_row", "prompt_ids", "prompt_mask", "advantages")}
    same |= plan_of(just, trajectory, same)
    same["num_items_in_batch"] = same["completion_mask"].sum()
    summed = gradient(just.model, loss_of_update(just, same))
    same["advantages"] = same["advantages"] * 8 / length  # JustGRPO divides by L
    torch.testing.assert_close(found, gradient(just.model, loss_of_update(just, same)), atol=1e-6, rtol=1e-5)
    assert (found - summed).norm() > 0.1 * found.norm() > 1e-2  # negative control: without the lengths


def test_where_everything_is_certain_nothing_learns(tmp_path):
    trainer = FORK.make(tmp_path, confidence_threshold=0.2, num_iterations=1)  # below 1 / 4 words
    rows, trajectory = rollout(trainer)
    assert not trajectory.forced.any() and (rows["advantages"] != 0).any()
    loss = loss_of_update(trainer, rows)
    assert loss.item() == 0
    assert not gradient(trainer.model, loss).any()
    before = parameters_of(trainer).clone()
    trainer.train()
    assert torch.equal(parameters_of(trainer), before)


def test_a_forced_step_must_commit_one_token(tmp_path):
    with pytest.raises(ValueError, match=r"denoising_steps must be max_completion_length.*got 4"):
        FORK.make(tmp_path, denoising_steps=4)
