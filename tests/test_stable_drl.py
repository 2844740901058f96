"""StableDRL: its weights by hand, the bounds that they promise, and its runs against those of its hosts."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from methods import method_named
from trainer_helpers import loss_of_update, parameters_of, rollout_of

from trl_diffusion.credit import Credit, SelfNormalisedWeights
from trl_diffusion.credit.group_credit import GroupValues
from trl_diffusion.credit.stable_weights import self_normalised
from trl_diffusion.losses.sequence_ratio import clipped_loss

HOSTS = ("stable_drl", "stable_espo")
EVERY = torch.ones(1, 4, dtype=torch.bool)


def weights_of(*log_ratios: float, scored: torch.Tensor = EVERY, low: float = 0.2, high: float = 0.2) -> list[float]:
    return self_normalised(torch.tensor([log_ratios]).double(), scored, low, high)[0].tolist()


# ------------------------------------------- the weights


def test_weights_by_hand():
    # ratios 1.1, 2 → 1.2, 0.5 → 0.8, 0.9; their sum is 4
    assert weights_of(log(1.1), log(2), log(0.5), log(0.9)) == pytest.approx([0.275, 0.3, 0.2, 0.225])
    assert weights_of(0, 0, 0, 0) == [0.25] * 4
    # the third has no reward: 1.1 + 1.2 + 0.9 = 3.2
    some = torch.tensor([[True, True, False, True]])
    assert weights_of(log(1.1), log(2), 9.0, log(0.9), scored=some) == pytest.approx([0.34375, 0.375, 0, 0.28125])
    assert weights_of(1, 2, 3, 4, scored=~EVERY) == [0] * 4
    # the release's range: 0.5, 8 → 5, 1, 1
    assert weights_of(log(0.5), log(8), 0, 0, low=0.99, high=4.0) == pytest.approx([1 / 15, 2 / 3, 2 / 15, 2 / 15])


def test_weights_of_a_prompt_are_a_convex_combination_whatever_the_ratios():
    log_ratios = 30 * torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    weights = self_normalised(log_ratios, torch.ones(500, 6, dtype=torch.bool), 0.2, 0.3)
    torch.testing.assert_close(weights.sum(1), torch.ones(500))
    # the largest possible one has 1.3 where the five others have 0.8
    assert weights.min() >= 0.8 / (0.8 + 5 * 1.3) - 1e-6 and weights.max() <= 1.3 / (1.3 + 5 * 0.8) + 1e-6


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_an_outlier_of_twenty_counts_as_its_clip(advantage):
    """Whatever the sign of A; where ratios are clipped on one side alone, it explodes."""
    advantages = torch.tensor([[advantage, -advantage, 0.5, -0.5]]).double()
    credit = SelfNormalisedWeights(0.2, 0.2, views=None)
    known: dict[str, Any] = dict(lengths=torch.full((1, 4), 8), current=torch.full((1, 4), -9.0).double())
    tokens = torch.tensor([[8, 3, 5, 8]])

    def loss(log_ratio: float) -> float:
        now = known["current"].clone()
        now[0, 0] += log_ratio * tokens[0, 0]
        group = GroupValues(advantages, now=now, estimated_tokens=tokens, **known)
        return float(credit.weigh(group).values.mean())

    assert loss(20.0) == pytest.approx(loss(log(1.2))) == pytest.approx(loss(1e4))
    assert loss(-20.0) == pytest.approx(loss(log(0.8)))
    assert abs(loss(20.0) - loss(0.0)) <= 0.2  # of max |A| = 1
    # negative control: the ratio that is clipped where A > 0 alone
    conditional = clipped_loss(torch.tensor(exp(20.0)), torch.tensor(advantage), 0.2, 0.2)
    assert (conditional > 1e8) == (advantage < 0)


def test_metrics_by_hand():
    now = torch.tensor([[log(1.1), log(2), log(0.5), log(0.9)]]) * 8
    group = GroupValues(torch.randn(1, 4), torch.full((1, 4), 8), torch.zeros(1, 4), None, now, torch.full((1, 4), 8))
    metrics = SelfNormalisedWeights(0.2, 0.2, None).weigh(group).metrics
    size = 1 / (0.275**2 + 0.3**2 + 0.2**2 + 0.225**2)
    assert metrics == pytest.approx({"stable_drl/clipped_share": 0.5, "stable_drl/effective_sample_size": size})


# ------------------------------------------- inside the trainers


def moved_trainer(name: str, folder, **settings):
    """A trainer whose policy has moved since it wrote its rows, with the weights of the moment."""
    trainer = method_named(name).make(folder, gradient_accumulation_steps=1, num_iterations=2, **settings)
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, "a b b a b", "b a a b a")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.2)
    return trainer, rows


def gradient(trainer, rows: dict[str, torch.Tensor], update: int = 1) -> torch.Tensor:
    slopes = torch.autograd.grad(loss_of_update(trainer, rows, update), list(trainer.model.parameters()))
    return torch.cat([slope.flatten() for slope in slopes])


@pytest.mark.parametrize("name", HOSTS)
def test_an_outlier_among_the_estimates_moves_the_loss_by_no_more_than_its_clip(name, tmp_path):
    """One completion's estimate is 20 nats per token off; the update stays in the hull of those without it."""
    trainer, rows = moved_trainer(name, tmp_path)
    score, tokens = trainer._credit.score, rows["estimated_tokens"]

    def refreshed(log_ratio: float) -> torch.Tensor:
        """The loss, if the first completion's ratio is that and all others are 1."""

        def shifted(own, likelihood, updates, reference):
            logps = score(own, likelihood, updates, reference)
            now = likelihood.estimate(
                logps[:, 0], likelihood.scored(own, 0, range(likelihood.num_views), own["targets"][:, 0])
            )
            wanted = rows["current"] + log_ratio * tokens * (torch.arange(8) == 0)
            return logps * (wanted / now).view(-1, 1, 1, 1)  # estimates are linear in log-probabilities

        replace(trainer._credit, score=shifted).refresh([rows], 4)
        return loss_of_update(trainer, rows, 1).detach()

    unmoved, clipped, outlier = (refreshed(value) for value in (0.0, log(1.2), 20.0))
    torch.testing.assert_close(outlier, clipped, rtol=1e-4, atol=1e-6)
    assert (clipped - unmoved).abs() > 1e-4
    below = refreshed(-20.0)
    torch.testing.assert_close(below, refreshed(log(0.8)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", HOSTS)
def test_the_gradient_of_a_prompt_is_no_longer_than_its_longest_term(name, tmp_path):
    """‖Σ w A ∇B‖ ≤ max |A| ‖∇B‖ over its completions, where the mean over a prompt's four of 4 w A B is Σ w A B."""
    trainer, rows = moved_trainer(name, tmp_path, epsilon=0.9, epsilon_high=5.0)
    own = rows["group_advantages"]
    trainer._credit.refresh([rows], 4)
    only = rows | {"advantages": rows["advantages"] * (torch.arange(8) < 4) * 2}  # one prompt, as a mean over four
    found = gradient(trainer, only).norm()
    terms = [gradient(trainer, rows | {"advantages": own * (torch.arange(8) == row) * 8}).norm() for row in range(4)]
    assert 1e-3 < found <= max(terms)
    weights = rows["advantages"][:4] / own[:4] / 4
    assert weights.sum().item() == pytest.approx(1, rel=1e-4) and weights.std() > 1e-3
    # negative control: a ratio of e³ that is neither clipped nor normalised leaves the hull
    outlier = (torch.arange(8) < 4) * (1 + (exp(3) - 1) * (torch.arange(8) == terms.index(max(terms))))
    assert gradient(trainer, rows | {"advantages": own * outlier * 2}).norm() > max(terms)


@pytest.mark.parametrize("name", HOSTS)
def test_before_the_first_update_it_is_its_host_with_uniform_weights(name, tmp_path):
    """For SPG without its weight by length; the same masks, so the same update."""
    host = {"stable_drl": "spg", "stable_espo": "espo"}[name]
    settings: dict[str, Any] = dict(num_mc_samples=2, num_iterations=1, num_generations=4)

    def update(method: str, case: str, **more) -> torch.Tensor:
        trainer = method_named(method).make(tmp_path / case, **settings, **more)
        before = parameters_of(trainer).clone()
        trainer.train()
        return parameters_of(trainer) - before

    found = update(name, "stable")
    plain = {"choices": {"credit": Credit()}} if host == "spg" else {}
    expected = update(host, "host", **plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.norm() > 1e-2
    if host == "spg":  # negative control: with SPG's own weights
        assert (update(host, "own") - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("name", HOSTS)
def test_ratios_are_one_until_the_policy_moves(name, tmp_path):
    """Estimates before and now are on the same views, in other batches."""
    trainer = method_named(name).make(tmp_path, num_iterations=2)
    rows = rollout_of(trainer, "a b b a", "b a a")
    before = rows["advantages"].clone()
    trainer._credit.refresh([{k: v[i::2] if v.dim() else v for k, v in rows.items()} for i in range(2)], 4)
    metrics = trainer._credit.refresh([rows], 4)
    torch.testing.assert_close(rows["advantages"], before, rtol=1e-4, atol=1e-5)
    assert metrics["stable_drl/clipped_share"] == 0
    assert metrics["stable_drl/effective_sample_size"] == pytest.approx(4, rel=1e-4)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    assert trainer._credit.refresh([rows], 4)["stable_drl/clipped_share"] > 0
    assert (rows["advantages"] - before).abs().max() > 1e-2


def test_truncated_completions_are_weighed_like_the_others(tmp_path):
    """Their text counts in the estimate per token although none of it learns."""
    settings: dict[str, Any] = {"max_completion_length": 4, "block_length": 2, "temperature": 2.0}
    trainer, rows = moved_trainer("stable_drl", tmp_path, mask_truncated_completions=True, **settings)
    learns = rows["completion_mask"].any(1)
    assert learns.any() and not learns.all()
    texts = trainer.family.effective_length(rows["completion_ids"])
    assert torch.equal(rows["estimated_tokens"], texts) and (rows["group_lengths"][~learns] == 0).all()
    trainer._credit.refresh([rows], 4)
    assert rows["advantages"].isfinite().all() and rows["advantages"].abs().max() < 20


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_a_run_resumed_within_a_rollout_batch_ends_in_the_same_weights(name, tmp_path):
    """Update 4 is the second of its batch: its weights compare with the estimates that the buffer keeps."""
    settings = dict(max_steps=5, num_iterations=2, learning_rate=0.2)
    method = method_named(name)
    whole = method.make(tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    whole.train()
    again = method.make(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert again.forward_units == whole.forward_units > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTS)
def test_logs_and_cost(name, tmp_path):
    """One more set of views at the rollout, and one before each later update, without gradient."""
    settings: dict[str, Any] = dict(max_steps=4, logging_steps=1, learning_rate=0.1)
    if name == "stable_espo":
        settings["beta"] = 0.0  # no passes of a reference
    trainer = method_named(name).make(tmp_path, **settings)
    rows = 16 * trainer.choices.likelihood.num_views
    sampled = []

    def count(module, args, kwargs):
        if kwargs.get("targets") is None:
            sampled.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    assert trainer.forward_units == pytest.approx(sum(sampled) + 2 * (1 + 1) * rows + 3 * 4 * rows)
    sizes = [x["stable_drl/effective_sample_size"] for x in trainer.state.log_history if "loss" in x]
    assert (
        sizes[0] == pytest.approx(4, rel=1e-3) and all(2 < size <= 4 + 1e-4 for size in sizes) and min(sizes) < 3.999
    )
