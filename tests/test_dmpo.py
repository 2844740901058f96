"""DMPO: where it converges to, on a policy that can be enumerated; and its trainer on the four-word model.

The enumerable policy is a table: for every canvas of three positions over three words, and every masked position of
it, one softmax. It writes in random order, one position per step. Nothing is sampled: a prompt's group is all 27
completions with their exact probabilities, the views are all masks with theirs, and the library's own functions are
given both.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from methods import PROMPTS, method_named, text_reward
from peft import LoraConfig
from tiny import MASK, canvas_logits, tiny_model
from trainer_helpers import estimate_views, loss_inputs, parameters_of, rollout_of, view_of

from trl_diffusion.credit import effective_sample_size, target_log_weights
from trl_diffusion.likelihood import elbo_of_pairs
from trl_diffusion.losses import WeightedLikelihood
from trl_diffusion.losses.contrast import wddo_loss

# ------------------------------------------- the enumerable policy

WORDS, LENGTH = 3, 3
COMPLETIONS = torch.tensor(list(product(range(WORDS), repeat=LENGTH)))  # [27, 3]
HIDDEN = torch.tensor(
    list(product((False, True), repeat=LENGTH))
)  # [8, 3]; the complement of HIDDEN[i] is HIDDEN[7 - i]
SIZES = HIDDEN.sum(1)
ORDERS = list(permutations(range(LENGTH)))
PAIRS = torch.stack([HIDDEN, ~HIDDEN], 1).repeat(len(COMPLETIONS), 1, 1)  # [27 · 8, 2, 3]

# A canvas is a number in base 4, where 3 is the mask.
CANVAS = (COMPLETIONS.unsqueeze(1).masked_fill(HIDDEN, WORDS) * torch.tensor([16, 4, 1])).sum(-1)
ENTRY = (CANVAS.unsqueeze(-1) * LENGTH + torch.arange(LENGTH)) * WORDS + COMPLETIONS.unsqueeze(1)  # [27, 8, 3]

# Probability of each mask: subsets whose size is uniform on 0..L, and independent masks at a rate t ~ U(0.1, 1).
BY_SIZE = torch.tensor([1 / ((LENGTH + 1) * math.comb(LENGTH, size)) for size in SIZES.tolist()], dtype=torch.float64)
NODES, WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(4))  # exact: degree 3 in t
RATES = (0.55 + 0.45 * NODES).unsqueeze(1)
BY_RATE = (WEIGHTS.unsqueeze(1) / 2 * RATES**SIZES * (1 - RATES) ** (LENGTH - SIZES)).sum(0)


def logps_of(table: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [27, 8, 3] of the hidden words of every completion under every mask, 0 elsewhere."""
    return table.log_softmax(-1).flatten()[ENTRY] * HIDDEN


def log_probability(table: torch.Tensor) -> torch.Tensor:
    """log p(y) of random-order sampling: the mean over orders of the product of conditionals; [27]."""
    logps, paths = logps_of(table), []
    for order in ORDERS:
        hidden, path = len(HIDDEN) - 1, torch.zeros(len(COMPLETIONS), dtype=torch.float64)
        for position in order:
            path = path + logps[:, hidden, position]
            hidden -= 2 ** (LENGTH - 1 - position)
        paths.append(path)
    return torch.stack(paths).logsumexp(0) - math.log(len(ORDERS))


def pairs_of(table: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [27 · 8, 2, 3] of every completion under every mask and its complement."""
    logps = logps_of(table)
    return torch.stack([logps, logps.flip(1)], 2).flatten(0, 1)


def elbo(table: torch.Tensor) -> torch.Tensor:
    """The library's estimate, averaged over all masks; [27]."""
    return elbo_of_pairs(pairs_of(table), PAIRS).unflatten(0, (-1, len(HIDDEN))) @ BY_SIZE


def conditionals_of(joint: torch.Tensor) -> torch.Tensor:
    """The table [64, 3, 3] of a distribution [27]: what it says of every masked word, given the words shown."""
    mass = torch.zeros((WORDS + 1) ** LENGTH * LENGTH * WORDS, dtype=torch.float64)
    shares = joint.view(-1, 1, 1).expand(ENTRY.shape)
    mass.index_put_((ENTRY[:, HIDDEN],), shares[:, HIDDEN], accumulate=True)
    mass = mass.view(-1, LENGTH, WORDS)
    return torch.where(mass.sum(-1, keepdim=True) > 0, mass, 1.0).log()


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARDS = torch.rand(len(COMPLETIONS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CONSISTENT = conditionals_of(noise(2, len(COMPLETIONS)).softmax(0))
INCONSISTENT = noise(3, 64, LENGTH, WORDS)
REFERENCES = {"consistent": CONSISTENT, "inconsistent": INCONSISTENT}
EVERY_TARGET = [(name, alpha) for name in REFERENCES for alpha in (0.2, 1.0)]


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Total variation between two distributions given by their logarithms, up to a constant."""
    return float((first.softmax(0) - second.softmax(0)).abs().sum() / 2)


def in_group(policy: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """Softmax over an infinite group drawn from the policy, summed over the copies of each completion; [27]."""
    return (log_weights + log_probability(policy)).softmax(0)


def weights_of(policy, reference, rewards, alpha: float, scale: float | None = None) -> torch.Tensor:
    log_weights = target_log_weights(elbo(reference), elbo(policy), rewards, alpha, scale or 1 / alpha)
    return in_group(policy, log_weights)


def cross_entropy(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The library's loss in expectation: over a rate t ~ U(0.1, 1), a mask and its complement."""
    of_pairs = (weights.unsqueeze(1) * BY_RATE).flatten()
    return WeightedLikelihood("mean")(loss_inputs(pairs_of(table), PAIRS, of_pairs)).loss.sum()


def minimised(loss, start: torch.Tensor) -> torch.Tensor:
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=100, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def updated(table: torch.Tensor, loss, updates: int, rate: float = 10.0) -> torch.Tensor:
    """Gradient descent: the constant rate is large because a loss is a mean over all states."""
    table = table.clone()
    for _ in range(updates):
        (gradient,) = torch.autograd.grad(loss(table.requires_grad_()), table)
        table = table.detach() - rate * gradient
    return table


def with_baseline(
    baseline: str, reference, alpha: float, rollouts: int, *, start=None, updates: int = 8, rewards=REWARDS
) -> torch.Tensor:
    """`rollouts` groups, each used for μ = 8 updates with its weights frozen."""
    policy = reference if start is None else start
    for _ in range(rollouts):
        old, weights = policy, weights_of(policy, reference, rewards, alpha)
        frozen = {
            "none": torch.zeros_like(weights),
            "group": log_probability(old).exp(),
            "individual": weights_of(old, reference, -rewards, alpha),
            "model": None,
        }[baseline]

        def loss(table, old=old, weights=weights, frozen=frozen):
            now = in_group(old, elbo(table.detach()) - elbo(old)) if frozen is None else frozen
            return cross_entropy(table, weights - now)

        policy = updated(policy, loss, updates)
    return policy


# ------------------------------------------- the policy and the group are what they claim to be


def test_the_elbo_is_the_log_likelihood_only_of_a_consistent_policy():
    for table in REFERENCES.values():
        logps, chains = logps_of(table), []
        for order in ORDERS:  # E over orders of the sum of log conditionals, another form of the same bound
            masks = [sum(2 ** (LENGTH - 1 - p) for p in order[step:]) for step in range(LENGTH)]
            chains.append(logps[:, masks, list(order)].sum(1))
        torch.testing.assert_close(elbo(table), torch.stack(chains).mean(0))
        torch.testing.assert_close(log_probability(table).exp().sum(), torch.ones((), dtype=torch.float64))
        assert (elbo(table) <= log_probability(table) + 1e-12).all()
    torch.testing.assert_close(elbo(CONSISTENT), log_probability(CONSISTENT))
    assert (log_probability(INCONSISTENT) - elbo(INCONSISTENT)).min() > 0.01
    assert BY_SIZE.sum() == pytest.approx(1) and BY_RATE.sum() == pytest.approx(1)


def test_the_weights_are_those_of_a_large_group_of_completions():
    """As the trainer computes them: one softmax over the completions that were drawn."""
    drawn = torch.multinomial(
        log_probability(INCONSISTENT).exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    policy, alpha = conditionals_of(log_probability(INCONSISTENT).exp()), 0.5
    log_weights = target_log_weights(elbo(INCONSISTENT), elbo(policy), REWARDS, alpha, 1 / alpha)
    found = torch.zeros(27, dtype=torch.float64).index_add_(0, drawn, log_weights[drawn].softmax(0))
    expected = weights_of(policy, INCONSISTENT, REWARDS, alpha)
    assert (found - expected).abs().sum() / 2 < 0.01
    assert (log_weights.softmax(0) - expected).abs().sum() / 2 > 0.1  # without the policy's own probabilities


def test_without_a_baseline_the_loss_is_minimal_at_the_conditionals_of_the_weights():
    weights = noise(4, 27).softmax(0)
    found = minimised(lambda table: cross_entropy(table, weights), INCONSISTENT)
    assert distance(log_probability(found), weights.log()) < 1e-3
    torch.testing.assert_close(elbo(found), weights.log(), atol=1e-2, rtol=0)  # it is consistent
    torch.testing.assert_close(
        cross_entropy(found, weights), cross_entropy(conditionals_of(weights), weights), atol=1e-7, rtol=0
    )


# ------------------------------------------- where it converges to


@pytest.mark.parametrize(("name", "alpha"), EVERY_TARGET)
def test_rollouts_trained_to_convergence_reach_the_target(name, alpha):
    reference = policy = REFERENCES[name]
    target = log_probability(reference) + REWARDS / alpha
    limit = elbo(reference) + REWARDS / alpha
    for _ in range(4):
        weights = weights_of(policy, reference, REWARDS, alpha)
        policy = minimised(lambda table, weights=weights: cross_entropy(table, weights), policy)
    assert distance(elbo(policy), limit) < 0.02
    assert distance(log_probability(policy), limit) < 0.02
    if name == "consistent":
        assert distance(log_probability(policy), target) < 0.02
    else:
        assert distance(log_probability(policy), target) > 0.05  # the limit is not the target
    assert distance(log_probability(reference), target) > 0.1  # there was something to learn


WRONG = {
    "likelihood terms dropped": lambda reference, policy, alpha: target_log_weights(None, None, REWARDS / alpha, 0, 1),
    "likelihood terms flipped": lambda reference, policy, alpha: target_log_weights(
        elbo(policy), elbo(reference), REWARDS, alpha, 1 / alpha
    ),
    "reward flipped": lambda reference, policy, alpha: target_log_weights(
        elbo(reference), elbo(policy), -REWARDS, alpha, 1 / alpha
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("name", "alpha"), EVERY_TARGET)
def test_negative_control_wrong_weights_miss_the_target(name, alpha, wrong):
    """Every rollout is trained to the minimum, which `conditionals_of` knows."""
    reference = policy = REFERENCES[name]
    limit, right = elbo(reference) + REWARDS / alpha, reference
    for _ in range(4):
        policy = conditionals_of(in_group(policy, WRONG[wrong](reference, policy, alpha)))
        right = conditionals_of(weights_of(right, reference, REWARDS, alpha))
    assert distance(elbo(policy), limit) > 0.1 and distance(log_probability(policy), limit) > 0.1
    assert distance(elbo(right), limit) < 1e-6


@pytest.mark.parametrize("baseline", ["group", "model"])
@pytest.mark.parametrize(("name", "alpha"), EVERY_TARGET)
def test_with_a_baseline_repeated_rollouts_reach_the_targets_elbo(name, alpha, baseline):
    """Frozen weights of both signs have no minimum, so rollouts are repeated until the policy no longer moves."""
    reference = REFERENCES[name]
    policy = with_baseline(baseline, reference, alpha, 40)
    limit = elbo(reference) + REWARDS / alpha
    assert distance(elbo(policy), limit) < 0.02
    if name == "consistent" and alpha == 1.0:
        assert distance(log_probability(policy), limit) < 0.02
    assert distance(log_probability(reference), limit) > 0.1


def test_with_a_group_baseline_a_mild_tilt_is_reached_by_the_samples_too():
    """Rewards within 1.5 α of each other, where the test above has 5 α."""
    policy = with_baseline("group", CONSISTENT, 0.2, 40, rewards=0.3 * REWARDS)
    target = log_probability(CONSISTENT) + 0.3 * REWARDS / 0.2
    assert distance(log_probability(policy), target) < 0.02
    assert distance(log_probability(CONSISTENT), target) > 0.1


@pytest.mark.slow
def test_with_a_group_baseline_all_weights_vanish_where_the_elbos_fit_whatever_is_sampled():
    """W = w − 1/G is zero as soon as ELBO − ELBO_ref − r/α is constant, consistent or not: an optimum of its own."""
    alpha = 0.2
    policy = with_baseline("group", CONSISTENT, alpha, 60)
    target = log_probability(CONSISTENT) + REWARDS / alpha
    left = weights_of(policy, CONSISTENT, REWARDS, alpha) - log_probability(policy).exp()
    assert left.abs().sum() / 2 < 0.02 and distance(elbo(policy), target) < 0.02
    assert distance(log_probability(policy), target) > 0.02  # but it does not sample from the target
    onwards = with_baseline("none", CONSISTENT, alpha, 60, start=policy)
    assert distance(log_probability(onwards), target) < 0.02


def test_frozen_weights_less_a_group_baseline_have_no_minimum():
    """Why a rollout batch must not be used for ever: the more updates, the further from the target."""
    few, many = (with_baseline("group", CONSISTENT, 1.0, 1, updates=updates) for updates in (16, 400))
    target = log_probability(CONSISTENT) + REWARDS
    assert distance(log_probability(few), target) < distance(log_probability(CONSISTENT), target)
    assert distance(log_probability(many), target) > 0.3
    same = with_baseline("none", CONSISTENT, 1.0, 1, updates=400)
    assert distance(log_probability(same), target) < 0.02


def test_the_individual_baseline_does_not_have_the_target_as_its_optimum():
    target = log_probability(CONSISTENT) + REWARDS
    at_target = conditionals_of(target.softmax(0))
    stays = with_baseline("group", CONSISTENT, 1.0, 10, start=at_target)
    torch.testing.assert_close(stays.softmax(-1), at_target.softmax(-1))
    leaves = with_baseline("individual", CONSISTENT, 1.0, 10, start=at_target)
    assert distance(log_probability(leaves), target) > 0.1
    assert log_probability(leaves).softmax(0) @ REWARDS > target.softmax(0) @ REWARDS  # it goes on to higher rewards


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_proximal_form_goes_a_part_of_the_way(scale):
    """log p_n = (1 − ηα) log p_{n−1} + ηα log p* up to a constant."""
    alpha, policy = 1.0, CONSISTENT
    target = log_probability(CONSISTENT) + REWARDS / alpha
    expected = log_probability(CONSISTENT)
    for _ in range(3):
        policy = conditionals_of(weights_of(policy, CONSISTENT, REWARDS, alpha, scale))
        expected = (1 - scale * alpha) * expected + scale * alpha * target
        assert distance(log_probability(policy), expected) < 1e-6
    assert (distance(log_probability(policy), target) < 1e-6) == (scale == 1.0)


def test_without_alpha_every_rollout_climbs_the_reward_by_the_same_amount():
    """α = 0: p_n ∝ p_{n−1} · e^{ηr}, without any likelihood, so nothing holds it near the reference."""
    policy = CONSISTENT
    for _ in range(3):
        policy = conditionals_of(in_group(policy, target_log_weights(None, None, REWARDS, 0.0, 0.7)))
    assert distance(log_probability(policy), log_probability(CONSISTENT) + 3 * 0.7 * REWARDS) < 1e-6
    assert distance(log_probability(policy), log_probability(CONSISTENT) + 0.7 * REWARDS) > 0.1


# ------------------------------------------- WDDO


def wddo(table: torch.Tensor, old: torch.Tensor, weights: torch.Tensor, size: float = 1.0) -> torch.Tensor:
    """The loss of a group drawn from the old policy, G·w = W(y) / p_old(y) (or 1/`size` of it), many views."""
    probability, change = log_probability(old).exp(), elbo(table) - elbo(old)
    return probability @ wddo_loss(weights / probability / size, change, change)


@pytest.mark.parametrize(("name", "alpha"), EVERY_TARGET)
def test_wddo_reaches_the_targets_elbo(name, alpha):
    reference = policy = REFERENCES[name]
    limit = elbo(reference) + REWARDS / alpha
    for _ in range(3):
        weights = weights_of(policy, reference, REWARDS, alpha)
        policy = minimised(lambda table, old=policy, weights=weights: wddo(table, old, weights), policy)
    assert distance(elbo(policy), limit) < 0.02
    if name == "consistent":
        assert distance(log_probability(policy), limit) < 0.02


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_negative_control_wddo_with_weights_that_sum_to_one(alpha):
    """Of 16 completions: every ELBO sinks by log 16 below what a distribution needs, and the samples pay for it."""
    weights = weights_of(CONSISTENT, CONSISTENT, REWARDS, alpha)
    limit = log_probability(CONSISTENT) + REWARDS / alpha
    right, wrong = (minimised(lambda t, n=size: wddo(t, CONSISTENT, weights, n), CONSISTENT) for size in (1, 16))
    assert distance(log_probability(right), limit) < 0.02
    assert distance(log_probability(wrong), limit) > 0.1
    assert (elbo(wrong) - elbo(right)).exp().median() == pytest.approx(1 / 16, rel=0.05)


def test_views_of_wddo_bias_one_rollout_and_others_make_up_for_it():
    """The loss is not linear in D. With two pairs of views per D, as by default: all pairs of pairs, exactly."""
    first, second = (x.flatten() for x in torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"))
    chance, limit = BY_SIZE[first] * BY_SIZE[second], log_probability(CONSISTENT) + REWARDS / 0.2

    def estimates(table: torch.Tensor) -> torch.Tensor:
        of_pairs = elbo_of_pairs(pairs_of(table), PAIRS).unflatten(0, (-1, len(HIDDEN)))
        return (of_pairs[:, first] + of_pairs[:, second]) / 2

    policy, distances = CONSISTENT, []
    for _ in range(4):
        probability, old = log_probability(policy).exp(), estimates(policy)
        ratio = (weights_of(policy, CONSISTENT, REWARDS, 0.2) / probability).unsqueeze(1)

        def loss(table, probability=probability, old=old, ratio=ratio):
            change = estimates(table) - old
            return probability @ wddo_loss(ratio, change, change) @ chance

        policy = minimised(loss, policy)
        distances.append(distance(elbo(policy), limit))
    assert distances[0] > 0.05 > 0.02 > distances[-1]


# ------------------------------------------- effective sample size


def test_effective_sample_size():
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.25, 0.25, 0]])
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([4, 1, 2, 8 / 3]))


# ------------------------------------------- the trainer

DMPO = method_named("dmpo")
WDDO: dict[str, Any] = {"objective": "wddo", "weight_baseline": "none"}


def elbo_by_hand(model, rows: dict[str, torch.Tensor], masked: torch.Tensor) -> torch.Tensor:
    """Mean over views [B, V, L] of (L + 1)/k Σ log p of the k masked tokens, by the ordinary forward pass; [B]."""
    ids = rows["completion_ids"]
    estimates = []
    for hidden in masked.unbind(1):
        logits = canvas_logits(model, rows["prompt_ids"], rows["prompt_mask"], ids.masked_fill(hidden, MASK))
        logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        total, count = (logps * hidden).sum(1), hidden.sum(1)
        estimates.append((ids.size(1) + 1) * total / count.clamp(min=1))
    return torch.stack(estimates).mean(0)


def rewards_of(trainer, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    length = trainer.family.effective_length(rows["completion_ids"]).tolist()
    texts = [ids[:n] for ids, n in zip(rows["completion_ids"].tolist(), length, strict=True)]
    return torch.tensor(text_reward(None, texts)).view(-1, 4)


@torch.no_grad()
def weights_by_hand(trainer, rows: dict[str, torch.Tensor], reference) -> torch.Tensor:
    """[N, G], where the model that wrote the rows is still that of the trainer."""
    masked = estimate_views(trainer, rows)["masked"][:, 0]
    trainer.model.eval()
    gap = (elbo_by_hand(reference, rows, masked) - elbo_by_hand(trainer.model, rows, masked)).view(-1, 4)
    return (gap + rewards_of(trainer, rows) / trainer.args.alpha).softmax(1)


@torch.no_grad()
def move(model) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


@pytest.mark.parametrize("kind", ["object", "path", "lora"])
def test_weights_compare_the_policy_with_its_reference(kind, tmp_path):
    start = tiny_model(seed=3)
    settings: dict[str, Any] = {"alpha": 2.0, "num_iterations": 2}
    if kind == "path":
        start.save_pretrained(tmp_path / "model")
        settings["model"] = str(tmp_path / "model")
    if kind == "lora":  # an adapter that already differs from nothing
        torch.manual_seed(0)
        settings["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = DMPO.make(tmp_path, **settings)
    assert (trainer.ref_model is None) == (kind == "lora")
    if kind != "lora":
        move(trainer.model)
    rows = rollout_of(trainer, "a b", "b a a")
    expected = weights_by_hand(trainer, rows, start)
    torch.testing.assert_close(rows["advantages"].view(-1, 4), 4 * (expected - 1 / 4), rtol=1e-3, atol=4e-5)
    without = (rewards_of(trainer, rows) / 2.0).softmax(1)
    assert (without - expected).abs().max() > 0.05
    logged = trainer._metrics["train"]["dmpo/effective_sample_size"]
    assert logged == [pytest.approx((1 / expected.square().sum(1)).mean().item(), rel=1e-3)]
    assert trainer._metrics["train"]["dmpo/max_weight"] == [
        pytest.approx(expected.max(1).values.mean().item(), rel=1e-3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, WDDO], ids=["cross_entropy", "wddo"])
def test_a_few_rollouts_raise_the_reward(settings, tmp_path):
    """Random order at temperature 1, as the theory has it; with α = 0.2 the target is little but `a a a a a a a a`."""
    trainer = DMPO.make(
        tmp_path,
        model=tiny_model(seed=3, scale=2.0),
        alpha=0.2,
        num_generations=16,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        unmasking="random",
        temperature=1.0,
        block_length=8,
        denoising_steps=8,
        optim="adamw_torch",
        learning_rate=0.01,
        num_iterations=2,
        max_steps=16,
        logging_steps=1,
        **settings,
    )
    before = parameters_of(trainer).clone()
    trainer.train()
    assert (parameters_of(trainer) - before).abs().max() > 0.01
    rollouts = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in rollouts]
    assert len(rewards) == 8 and rewards[0] < 1 and np.mean(rewards[-2:]) > 5
    assert all(1 <= entry["dmpo/effective_sample_size"] <= 16 for entry in rollouts)
    assert all(0 < entry["dmpo/max_weight"] <= 1 for entry in rollouts)


COSTS: dict[
    str, tuple[dict[str, Any], int, int, int]
] = {  # per rollout of μ = 2 updates and V views: views scored by policy and reference, and views that learn
    "group": ({}, 1, 1, 2),
    "individual": ({"weight_baseline": "individual"}, 1, 1, 2),
    "model": ({"weight_baseline": "model"}, 2, 1, 2),
    "alpha 0": ({"alpha": 0.0, "weight_scale": 1.0}, 0, 0, 2),
    "alpha 0, model": ({"alpha": 0.0, "weight_scale": 1.0, "weight_baseline": "model"}, 2, 0, 2),
    "wddo": (WDDO, 2 + 4, 2, 4),  # weights and old log-probabilities, all on twice the views
    "wddo, alpha 0": (WDDO | {"alpha": 0.0, "weight_scale": 1.0}, 4, 0, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COSTS)
def test_forward_units_are_those_of_the_likelihoods_that_are_needed(case, tmp_path):
    settings, by_policy, by_reference, learned = COSTS[case]
    trainer = DMPO.make(tmp_path, num_mc_samples=2, num_iterations=2, max_steps=4, learning_rate=0.1, **settings)
    assert (trainer.ref_model is None) == (by_reference == 0)
    counted: Counter = Counter()

    def counter(name: str):
        def count(module, args, kwargs):
            scores = kwargs.get("targets") is not None
            kind = "learned" if torch.is_grad_enabled() else name if scores else "sampled"
            counted[kind] += len(kwargs["input_ids"])

        return count

    trainer.model.register_forward_pre_hook(counter("policy"), with_kwargs=True)
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_pre_hook(counter("reference"), with_kwargs=True)
    trainer.train()
    rows = 2 * 16 * 2  # rollouts × completions × views
    assert counted["policy"] == by_policy * rows and counted["reference"] == by_reference * rows
    assert counted["learned"] == learned * rows
    expected = (by_policy + by_reference + 3 * learned) * rows + counted["sampled"]
    assert trainer.forward_units == pytest.approx(expected)
    assert 2 * 16 * 2 <= counted["sampled"] <= 2 * 16 * 4  # steps per completion


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["group", "model"])
def test_a_run_resumed_within_a_rollout_batch_ends_in_the_same_weights(baseline, tmp_path):
    """Update 4 is the second of its batch: `model` compares with the ELBO that the buffer keeps."""
    settings = dict(max_steps=5, num_iterations=2, learning_rate=0.2, weight_baseline=baseline)
    whole = DMPO.make(tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    before = parameters_of(whole).clone()
    whole.train()
    again = DMPO.make(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert (parameters_of(whole) - before).abs().max() > 1e-3
    assert again.forward_units == whole.forward_units > 0


def test_truncated_completions_learn_nothing_and_are_weighed_like_the_others(tmp_path):
    settings: dict[str, Any] = {"max_completion_length": 4, "block_length": 2, "alpha": 2.0, "temperature": 2.0}
    trainer = DMPO.make(tmp_path, mask_truncated_completions=True, **settings)
    move(trainer.model)
    rows = rollout_of(trainer, *PROMPTS)
    truncated = ~trainer.family.is_end(rows["completion_ids"]).any(1)
    assert truncated.any() and not truncated.all()
    assert (rows["completion_mask"].any(1) == ~truncated).all()
    views = torch.stack([view_of(trainer, rows, 0, view).targets for view in range(4)], 1)
    assert not views[truncated].any() and views[~truncated].any(2).any(1).all()
    expected = weights_by_hand(trainer, rows, tiny_model(seed=3))
    torch.testing.assert_close(rows["advantages"].view(-1, 4), 4 * (expected - 1 / 4), rtol=1e-3, atol=4e-5)


@pytest.mark.parametrize("settings", [{}, WDDO], ids=["cross_entropy", "wddo"])
def test_evaluation_draws_with_the_same_noise_and_leaves_training_alone(settings, tmp_path):
    trainer = DMPO.make(tmp_path, per_device_eval_batch_size=8, **settings)
    trainer.eval_dataset = Dataset.from_dict({"prompt": PROMPTS[:4]})
    first, second = trainer.evaluate(), trainer.evaluate()
    assert np.isfinite(first["eval_loss"]) and first["eval_loss"] == second["eval_loss"]
    assert 1 <= first["eval_dmpo/effective_sample_size"] <= 4
    assert trainer.forward_units == 0 and trainer._rollouts["train"] == 0
