"""Estimates against brute force over all masks, or over all trajectories, of a four-word model.

The expected values share no code with the library: a table of log-probabilities under every mask, by the ordinary
forward pass, and sums over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import combinations, permutations, product
from math import comb, exp, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from enumeration import enumerate_paths, trajectory_of
from methods import method_named
from tiny import END, MASK, TAIL, A, B, canvas_logits, tiny_model, without_ends
from trainer_helpers import logps_of, loss_of_update, num_views, plan_of, rollout_with

from trl_diffusion.likelihood import (
    NoisePlan,
    elbo_of_pairs,
    mean_of_targets,
    noised_views,
    score_views,
    stack_views,
    upper_bound_per_token,
)
from trl_diffusion.likelihood.plans import random_subsets, random_text, with_complements
from trl_diffusion.sampling.rollout import RowNoise
from trl_diffusion.trainers.coupled_grpo import coupled_statistic

PROMPT, LENGTH = (A, B, A), 5
COMPLETION = (A, B, END, A, TAIL)  # a text of 3 tokens
MASKS = tuple(product((False, True), repeat=LENGTH))
ORDERS = torch.tensor(list(permutations(range(LENGTH)))).double() / LENGTH
Mask = tuple[bool, ...]


# ------------------------------------------- brute force


@cache
def network(seed: int = 3):
    """In float64, so that differences are the formula's."""
    return tiny_model(seed=seed).double().eval()


@cache
def table(completion: tuple[int, ...] = COMPLETION, prompt: tuple[int, ...] = PROMPT, seed: int = 3):
    """log p(y_i | prompt, y with a mask) for every mask: {mask: [L]}."""
    masks = list(product((False, True), repeat=len(completion)))
    ids = torch.tensor([completion] * len(masks))
    canvas = ids.masked_fill(torch.tensor(masks), MASK)
    prompts = torch.tensor([prompt] * len(masks))
    with torch.no_grad():
        logits = canvas_logits(network(seed), prompts, torch.ones_like(prompts), canvas)
    logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return dict(zip(masks, logps.tolist(), strict=True))


def mask_of(chosen, length: int = LENGTH) -> Mask:
    return tuple(i in chosen for i in range(length))


def uniform_subsets(positions) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Non-empty subsets, the size uniform and the subset uniform given its size, with their probabilities."""
    positions = list(positions)
    for size in range(1, len(positions) + 1):
        for chosen in combinations(positions, size):
            yield 1 / len(positions) / comb(len(positions), size), chosen


def elbo(n: int = LENGTH, logps: dict[Mask, list[float]] | None = None) -> float:
    """E over k ~ U{1..n} and subsets of size k of the first n positions of (n/k) Σ ℓ, all behind them masked."""
    logps, behind = logps or table(), range(n, LENGTH)
    return sum(
        chance * n / len(chosen) * sum(logps[mask_of({*chosen, *behind})][i] for i in chosen)
        for chance, chosen in uniform_subsets(range(n))
    )


@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_elbo_is_the_mean_over_orders_of_the_chain_rule(n):
    """So the reference of this file is the likelihood bound that it should be."""
    chains = [
        sum(table()[mask_of({*order[t:], *range(n, LENGTH)})][i] for t, i in enumerate(order))
        for order in permutations(range(n))
    ]
    assert elbo(n) == pytest.approx(np.mean(chains), abs=1e-12)
    likelihood = np.mean(np.exp(chains))  # of writing this text, one token at a time in a random order
    assert elbo(n) <= log(likelihood) and (n == 1 or np.std(chains) > 0.1)


# ------------------------------------------- ESPO and SPG-random: the library's functions


def scored(plan: NoisePlan, completion: tuple[int, ...] = COMPLETION) -> torch.Tensor:
    """Log-probabilities [B, V, L] by the library, 0 where a position is no target."""
    batch, views, _ = plan.masked.shape
    ids = torch.tensor([completion] * batch)
    stacked = stack_views([noised_views(ids, plan.masked[:, v], plan.targets[:, v], MASK) for v in range(views)])
    prompts = torch.tensor([PROMPT] * batch * views)
    with torch.no_grad():
        logps = score_views(network(), prompts, torch.ones_like(prompts), ids.repeat(views, 1), stacked).logps
    return logps.double().unflatten(0, (views, batch)).transpose(0, 1)


def all_pairs() -> NoisePlan:
    """Every size 0..L with every order: 720 equally likely pairs."""
    counts = torch.arange(LENGTH + 1).repeat_interleave(len(ORDERS)).unsqueeze(1)
    return with_complements(random_subsets(counts, ORDERS.repeat(LENGTH + 1, 1).unsqueeze(1)))


def test_espo_estimate_averaged_over_all_masks_is_the_elbo():
    plan = all_pairs()
    assert len({tuple(mask) for mask in plan.masked[:, 0].tolist()}) == 32
    logps = scored(plan)
    estimates = elbo_of_pairs(logps, plan.masked)
    assert estimates.mean().item() == pytest.approx(elbo(), abs=1e-6)
    assert estimates.std() > 0.1

    size = plan.masked.sum(-1)
    # negative controls: L/k, as if there were no empty sets,
    naive = (LENGTH / size.clamp(min=1) * logps.sum(-1)).mean()
    assert abs(naive - elbo()) > 0.05
    # sizes 1..L alone,
    nonempty = estimates[(size > 0).all(1)].mean()
    assert abs(nonempty - elbo()) > 0.05
    # and the complement with the weight of the view it completes
    weights = (LENGTH + 1) / size[:, :1].clamp(min=1)
    assert abs((weights * logps.sum(-1)).mean() - elbo()) > 0.05


@pytest.mark.parametrize("n", [1, 3, 5])
def test_spg_random_estimate_averaged_over_all_masks_is_the_elbo_per_token(n):
    sizes = (torch.arange(n).repeat_interleave(len(ORDERS)).unsqueeze(1) + 0.5) / n
    noise = ORDERS.repeat(n, 1).unsqueeze(1)
    plan = random_text(sizes, noise, torch.full((len(noise),), n))
    estimates = mean_of_targets(scored(plan), plan.targets)
    assert estimates.mean().item() == pytest.approx(elbo(n) / n, abs=1e-6)
    if n < LENGTH:  # negative control: what is behind the text shown
        shown = NoisePlan(plan.targets, plan.targets, plan.rate)
        assert abs(mean_of_targets(scored(shown), plan.targets).mean().item() - elbo(n) / n) > 1e-2
    if n > 1:  # negative control: every subset equally likely
        chosen = {tuple(mask): value for mask, value in zip(plan.masked[:, 0].tolist(), estimates, strict=True)}
        assert abs(float(sum(chosen.values())) / len(chosen) - elbo(n) / n) > 1e-3


# ------------------------------------------- … and through the trainers


def make(name: str, folder, **settings):
    settings = {"max_completion_length": LENGTH, "block_length": LENGTH, "denoising_steps": LENGTH} | settings
    trainer = method_named(name).make(
        folder, model=tiny_model(seed=3).double(), **{"per_device_train_batch_size": 512, **settings}
    )
    trainer.model.train()
    return trainer


def planned(trainer, count: int, completion: tuple[int, ...] = COMPLETION, row: int | None = None, **more):
    """What the trainer plans for copies of one completion: global rows 0, 1, … or all the same."""
    ids = torch.tensor([completion] * count)
    rows = {
        "prompt_ids": torch.tensor([PROMPT] * count),
        "prompt_mask": torch.ones(count, len(PROMPT), dtype=torch.long),
        "completion_ids": ids,
        "global_row": torch.arange(count) if row is None else torch.full((count,), row),
        "num_items_in_batch": torch.tensor(count),
        "advantages": torch.zeros(count),
    }
    return rows | plan_of(trainer, SimpleNamespace(completion_ids=ids, given=None, **more), rows)


def feed(monkeypatch, *values: torch.Tensor) -> None:
    """The noise that the trainer draws next, in order, over and over."""
    queue: list[torch.Tensor] = []

    def draw(noise: RowNoise, *shape: int) -> torch.Tensor:
        queue[:] = queue or values
        assert queue[0].shape == (len(noise.generators), *shape)
        return queue.pop(0)

    monkeypatch.setattr(RowNoise, "uniform", draw)


@pytest.mark.parametrize("row", [0, 5])
@pytest.mark.parametrize("name", ["espo", "dmpo, wddo"])
def test_every_noise_that_pairs_can_get_averages_to_the_elbo(name, row, tmp_path, monkeypatch):
    """All sizes of the first pair of the batch and all orders, through the trainers' plans, views and scoring."""
    trainer = make(name, tmp_path, num_mc_samples=2)
    pairs = num_views(trainer) // 2
    noise = ORDERS.unsqueeze(1).expand(-1, pairs, -1)
    total = 0.0
    for offset in range(LENGTH + 1):
        feed(monkeypatch, torch.full((pairs,), (offset + 0.5) / (LENGTH + 1)).double(), noise)
        rows = planned(trainer, len(ORDERS), row=row)
        logps = logps_of(trainer, trainer.model, rows).double()
        assert len(rows["masked"][:, 0, 0].sum(-1).unique()) == 1  # one size per offset
        total += elbo_of_pairs(logps[:, 0], rows["masked"][:, 0]).mean().item() / (LENGTH + 1)
    assert total == pytest.approx(elbo(), abs=1e-6)


def looked_up(plan: NoisePlan) -> torch.Tensor:
    """Log-probabilities of a plan for one completion [V, L], from the library's scores of all 32 masks."""
    every = torch.tensor(MASKS).unsqueeze(1)
    logps = scored(NoisePlan(every, every, every.float().mean(-1)))[:, 0]
    return logps[(plan.masked[0].long() * 2 ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)] * plan.targets[0]


def z_score(samples: torch.Tensor, mean: float) -> float:
    return abs(samples.mean().item() - mean) / (samples.std().item() / len(samples) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["espo", "dmpo"])
def test_the_trainers_own_pairs_average_to_the_elbo(name, tmp_path):
    trainer = make(name, tmp_path, num_mc_samples=40_000, num_iterations=1)
    rows = {"completion_ids": torch.tensor([COMPLETION]), "global_row": torch.tensor([5])}
    rollout = rollout_with(trainer, SimpleNamespace(completion_ids=rows["completion_ids"]), rows)
    learned = trainer.choices.likelihood
    plan = (trainer.choices.credit.estimates or learned).noise.draw(rollout, 1)  # DMPO estimates its weights on these
    logps, hidden = (values.unflatten(0, (-1, 2)) for values in (looked_up(plan), plan.masked[0]))
    assert len(logps) == 20_000
    assert z_score(elbo_of_pairs(logps, hidden), elbo()) < 4
    naive = (LENGTH / hidden.sum(-1).clamp(min=1) * logps.sum(-1)).mean(1)
    assert z_score(naive, elbo()) > 8
    if name == "dmpo":  # the views that it learns on are others
        plan = learned.noise.draw(rollout, 0)
        logps, hidden = (values.unflatten(0, (-1, 2)) for values in (looked_up(plan), plan.masked[0]))
        assert z_score(elbo_of_pairs(logps, hidden), elbo()) > 8


def test_spg_random_trainers_own_views_average_to_the_elbo_per_token(tmp_path):
    trainer = make("spg, random", tmp_path, num_mc_samples=20_000, num_iterations=1, prompt_mask_probability=0.0)
    rows = planned(trainer, 1, row=5)
    plan = NoisePlan(rows["masked"][:, 0], rows["targets"][:, 0], rows["mask_rate"][:, 0])
    estimates = mean_of_targets(looked_up(plan).unsqueeze(1), plan.targets[0].unsqueeze(1)).squeeze(1)
    assert len(estimates) == 20_000
    assert z_score(estimates, elbo(3) / 3) < 4
    assert z_score(estimates, elbo(5) / 5) > 8


def test_spg_random_through_the_trainer_with_every_mask_of_text_and_prompt(tmp_path, monkeypatch):
    """E over prompt masks of the ELBO per token; a token of the prompt is masked with probability 0.15."""
    trainer = make("spg, random", tmp_path, num_mc_samples=1, prompt_mask_probability=0.15)
    cases = [
        (0.15 ** sum(mask) * 0.85 ** (3 - sum(mask)), (k + 0.5) / 3, order, [0.1 if m else 0.9 for m in mask])
        for mask in product((False, True), repeat=len(PROMPT))
        for k in range(3)
        for order in list(permutations((0.1, 0.2, 0.3)))
    ]
    chances, sizes, orders, prompts = (torch.tensor(values).double() for values in zip(*cases, strict=True))
    noise = torch.cat([orders, torch.full((len(orders), LENGTH - 3), 0.5)], 1).unsqueeze(1)
    feed(monkeypatch, sizes.unsqueeze(1), noise, prompts.unsqueeze(2))
    rows = planned(trainer, len(cases))
    assert chances.sum() / 18 == pytest.approx(1)
    logps = logps_of(trainer, trainer.model, rows).double()[:, 0]
    found = (chances / 18 * mean_of_targets(logps, rows["targets"][:, 0]).squeeze(1)).sum()

    expected = 0.0
    for mask in product((False, True), repeat=len(PROMPT)):
        chance = 0.15 ** sum(mask) * 0.85 ** (3 - sum(mask))
        prompt = tuple(MASK if hide else word for word, hide in zip(PROMPT, mask, strict=True))
        expected += chance * elbo(3, table(prompt=prompt)) / 3
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert abs(expected - elbo(3) / 3) > 1e-3  # the prompt's masks show


# ------------------------------------------- heuristics against their own formulas

LONG = (A, B, B, A, END, TAIL)  # 5 tokens, in blocks of 2: the last block has one


@pytest.mark.parametrize("scores_hidden", [False, True])
def test_block_random_averaged_over_all_noise_is_its_formula(scores_hidden, tmp_path, monkeypatch):
    """Mean over blocks, sizes and subsets of the mean log-probability; earlier blocks masked with 0.15."""
    context, n, size = 0.15, 5, 2
    trainer = make(
        "spg",
        tmp_path,
        num_mc_samples=1,
        max_completion_length=6,
        block_length=2,
        denoising_steps=6,
        prompt_mask_probability=context,
        scored="hidden" if scores_hidden else "block",
    )
    cases, expected, shown_context = [], 0.0, 0.0
    logps = table(LONG)
    for block in range(3):
        start, end = block * size, min(block * size + size, n)
        for masked in product((False, True), repeat=start):
            chance = context ** sum(masked) * (1 - context) ** (start - sum(masked)) / 3
            before = [0.05 if hide else 0.6 for hide in masked]
            for k in range(1, end - start + 1):
                for order in ((0.2, 0.7), (0.7, 0.2)):
                    noise = before + list(order) + [0.5] * (4 - start)
                    cases.append((chance / 2 / (end - start), (block + 0.5) / 3, (k - 0.5) / (end - start), noise))
            for subset_chance, chosen in uniform_subsets(range(start, end)):
                hidden = {*chosen, *(i for i in range(start) if masked[i]), *range(end, 6)}
                own = logps[mask_of(hidden, 6)]
                where = [i for i in hidden if i < n] if scores_hidden else chosen
                expected += chance * subset_chance * sum(own[i] for i in where) / len(where)
                if not any(masked):
                    bare = chance * subset_chance / (1 - context) ** start
                    shown_context += bare * sum(own[i] for i in where) / len(where)
    chances, blocks, counts, noise = (torch.tensor(values).double() for values in zip(*cases, strict=True))
    assert chances.sum() == pytest.approx(1)
    prompts = torch.full((len(cases), len(PROMPT), 1), 0.5).double()  # all shown
    feed(monkeypatch, counts.unsqueeze(1), noise.unsqueeze(1), blocks.unsqueeze(1), prompts)
    rows = planned(trainer, len(cases), LONG)
    scores = logps_of(trainer, trainer.model, rows).double()[:, 0]
    found = (chances * mean_of_targets(scores, rows["targets"][:, 0]).squeeze(1)).sum().item()
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(expected - shown_context) > 1e-3  # negative control: earlier blocks always shown


@pytest.mark.parametrize("rate", [0.3, 0.75])
def test_coupled_statistic_averaged_over_all_masks_is_its_formula(rate, tmp_path, monkeypatch):
    """½ [ℓ(full) + E ℓ in the view of the pair that masks the token]: at the rate, or at one minus it."""
    trainer = make("coupled_grpo", tmp_path, num_mc_samples=2)
    rates = torch.full((32, 1), (rate - 0.2) / 0.6).double()
    noise = torch.where(torch.tensor(MASKS), rate / 2, (1 + rate) / 2).double().unsqueeze(1)
    feed(monkeypatch, rates, noise)
    rows = planned(trainer, 32)
    rows["targets"] = rows["masked"]  # all tokens, the text's and those after it
    logps = logps_of(trainer, trainer.model, rows).double()[:, 0]
    share = rows["mask_rate"][:, 0].double()
    chances = torch.tensor([rate ** sum(mask) * (1 - rate) ** (LENGTH - sum(mask)) for mask in MASKS]).double()
    found = (chances.unsqueeze(1) * coupled_statistic(logps, share)).sum(0)

    expected = []
    for i in range(LENGTH):
        value = table()[(True,) * LENGTH][i]
        for mask, chance in zip(MASKS, chances.tolist(), strict=True):
            complement = tuple(not hide for hide in mask)
            value += chance * (table()[mask][i] / rate if mask[i] else table()[complement][i] / (1 - rate))
        expected.append(value / 2)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    # negative control: the rate of the mask for its complement too
    wrong = (chances.unsqueeze(1) * coupled_statistic(logps, torch.full_like(share, rate))).sum(0)
    assert (wrong - torch.tensor(expected)).abs().max() > 0.1


def test_uni_grpo_averaged_over_all_masks_is_its_formula(tmp_path, monkeypatch):
    """E over t ~ U(0.1, 0.9) and masks at rate t of the mean over the masked tokens of the text of −PPO + β k3."""
    trainer = make("uni_grpo", tmp_path, num_mc_samples=1, beta=0.3, gradient_accumulation_steps=1)
    trainer.current_gradient_accumulation_steps = 1
    noise = torch.where(torch.tensor(MASKS), 0.25, 0.75).double().unsqueeze(1)
    feed(monkeypatch, torch.full((32, 1), 0.5).double(), noise)
    rows = planned(trainer, 32)
    moved = tiny_model(seed=3).double()
    with torch.no_grad():
        moved.lm_head.weight.mul_(1.3)
    rows["old_per_token_logps"] = logps_of(trainer, moved, rows)
    rows["ref_per_token_logps"] = logps_of(trainer, network(seed=4), rows)
    rows["advantages"] = torch.full((32,), 0.7)

    def chance_of(size: int) -> float:
        density = np.polynomial.Polynomial([0, 1]) ** size * np.polynomial.Polynomial([1, -1]) ** (LENGTH - size)
        return (density.integ()(0.9) - density.integ()(0.1)) / 0.8

    found, expected, clipped = 0.0, 0.0, 0
    with torch.no_grad():
        ids = torch.tensor([COMPLETION] * 32)
        prompts = torch.tensor([PROMPT] * 32)
        canvas = ids.masked_fill(torch.tensor(MASKS), MASK)
        old = canvas_logits(moved, prompts, torch.ones_like(prompts), canvas).log_softmax(-1)
        old = old.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()
        for index, mask in enumerate(MASKS):
            chance = chance_of(sum(mask))
            one = {name: value[index : index + 1] if value.dim() else value for name, value in rows.items()}
            found += chance * trainer._view_loss(trainer.model, one, 0, 0).item()
            tokens = [i for i in range(3) if mask[i]]
            for i in tokens:
                ratio = exp(table()[mask][i] - old[index][i])
                gap = table(seed=4)[mask][i] - table()[mask][i]
                loss = -min(0.7 * ratio, 0.7 * min(max(ratio, 0.8), 1.2)) + 0.3 * (exp(gap) - gap - 1)
                expected += chance * loss / len(tokens)
                clipped += ratio > 1.2
    assert sum(chance_of(sum(mask)) for mask in MASKS) == pytest.approx(1)
    assert clipped and found == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_spg_upper_bound_averaged_over_all_pairs_of_views_is_its_formula(power):
    """(1/b) · mean over the positions that a view scores of log(mean over views of 1[scored] p^b / t)."""
    n, cases, expected = 3, [], 0.0
    for (p, first), (q, second) in product(uniform_subsets(range(n)), repeat=2):
        cases.append((p * q, mask_of(first), mask_of(second)))
        views = [(chosen, table()[mask_of({*chosen, 3, 4})]) for chosen in (first, second)]
        terms = []
        for i in sorted({*first, *second}):
            inner = sum(exp(power * logps[i]) / (len(chosen) / n) for chosen, logps in views if i in chosen)
            terms.append(log(inner / 2))
        expected += p * q * sum(terms) / len(terms) / power
    targets = torch.tensor([[first, second] for _, first, second in cases])
    behind = torch.arange(LENGTH) >= n
    logps = scored(NoisePlan(targets | behind, targets, targets.float().mean(-1)))
    bounds = upper_bound_per_token(logps, targets, torch.full((len(cases),), n), power)
    found = sum(chance * bound for (chance, _, _), bound in zip(cases, bounds.tolist(), strict=True))
    assert len(cases) == 49 and found == pytest.approx(expected, abs=1e-6)
    assert abs(found - elbo(3) / 3) > 1e-2


# ------------------------------------------- TraceRL


def reward_of(tokens: list[int]) -> float:
    return tokens.count(A) + 0.5 * (tokens[0] == tokens[3]) - 0.8 * (tokens[1:3] == [A, B])


def gradient(model, loss) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def rows_of(trainer, paths) -> dict[str, torch.Tensor]:
    trajectory = trajectory_of(paths, trainer.args.temperature)
    rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(len(paths))}
    rows["prompt_ids"] = torch.tensor([PROMPT] * len(paths))
    rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
    rows |= plan_of(trainer, trajectory, rows)
    rows["num_items_in_batch"] = rows["completion_mask"].sum()
    if "old_per_token_logps" not in rows:
        rows["old_per_token_logps"] = logps_of(trainer, trainer.model, rows)
    return rows


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.0), (0.8, 0.01)])
def test_tracerl_with_one_token_per_view_is_the_policy_gradient(temperature, beta, tmp_path):
    model = without_ends(tiny_model(seed=3).double())
    paths = enumerate_paths(model, list(PROMPT), 4, 2, 2, temperature)
    paths = [path for path in paths if not {TAIL, END} & set(path.tokens)]
    assert len(paths) == 4 * 16
    probability = torch.stack([path.probability for path in paths])
    assert probability.sum().item() == pytest.approx(1, abs=1e-9)
    rewards = torch.tensor([reward_of(path.tokens) for path in paths]).double()
    exact = gradient(model, (probability * rewards).sum()).float()
    assert exact.norm() > 0.1

    def found(shrink: int, late: int = 0) -> torch.Tensor:
        settings = {"max_completion_length": 4, "block_length": 2, "denoising_steps": 4, "shrink": shrink}
        trainer = method_named("tracerl").make(
            tmp_path, model=model, per_device_train_batch_size=64, temperature=temperature, beta=beta, **settings
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        rows = rows_of(trainer, paths)
        rows["advantages"] = (probability.detach() * rewards * len(paths)).float()
        assert rows["targets"].any(-1).all()
        rows["masked"] = rows["masked"].roll(-late, 2)
        if late:
            rows["old_per_token_logps"] = logps_of(trainer, model, rows)
        return -gradient(model, loss_of_update(trainer, rows)).float()

    # a mean over 4 views, where E[r] has the sum of their tokens
    torch.testing.assert_close(found(shrink=1), exact / 4, atol=1e-6, rtol=1e-5)

    # two steps per view: a mean over tokens too, of what it says it is, and that is not the policy gradient
    ids = torch.tensor([path.tokens for path in paths])
    prompts = torch.tensor([PROMPT] * len(paths))
    steps = torch.tensor([path.steps for path in paths])
    objective = torch.zeros(()).double()
    for first in (0, 2):
        logits = canvas_logits(model, prompts, torch.ones_like(prompts), ids.masked_fill(steps >= first, MASK))
        logps = (logits / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        own = ((steps == first) | (steps == first + 1)) * logps
        objective = objective + (probability.detach() * rewards * own.sum(1) / 4).sum()
    torch.testing.assert_close(found(shrink=2), gradient(model, objective).float(), atol=1e-6, rtol=1e-5)
    for wrong in (found(shrink=2), found(shrink=1, late=1)):
        assert (wrong - exact / 4).norm() > 1e-2 * (exact / 4).norm()
