"""Likelihoods and losses combine: every pair trains, or is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from enumeration import enumerate_paths
from methods import Method
from test_exact_gradient import trajectory_of
from tiny import END, TAIL, tiny_model, without_ends
from trainer_helpers import (
    largest_log_ratio,
    loss_of_update,
    losses_seen,
    num_views,
    parameters_of,
    plan_of,
    rollout_of,
    view_of,
)

from trl_diffusion.credit import ChosenSteps, DrawnSteps, SelectedSteps, leave_one_out
from trl_diffusion.credit.step_selection import select_roec_cm
from trl_diffusion.likelihood import (
    Bernoulli,
    FullMask,
    Likelihood,
    MaskedViews,
    QuadratureSubsets,
    ReplayViews,
    SubsetPairs,
    TextSubsets,
    TrajectoryViews,
)
from trl_diffusion.losses import (
    Contrast,
    LogRatioRegression,
    Loss,
    SandwichedBound,
    SequenceRatio,
    TokenRatio,
    WeightedLikelihood,
)
from trl_diffusion.runtime.earlier_buffers import upgrade
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.trainers import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_diffusion.trainers.coupled_grpo import CoupledMasks, CoupledViews

BASE = Method("composed", DiffusionGRPOTrainer, DiffusionGRPOConfig, {"num_mc_samples": 8})
SAMPLING = SamplingConfig(canvas_length=8, denoising_steps=4, block_length=4, temperature=0.9)

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "drawn steps, sum": lambda: TrajectoryViews(DrawnSteps(3), SAMPLING),
    "drawn steps, mean": lambda: TrajectoryViews(DrawnSteps(3, "entropy", reduction="mean"), SAMPLING),
    "chosen steps, merged": lambda: TrajectoryViews(ChosenSteps(2, "all"), SAMPLING, merge=2),
    "selected steps": lambda: TrajectoryViews(SelectedSteps(2, select_roec_cm), SAMPLING),
    "replay": lambda: ReplayViews(SAMPLING),
    "replay, two steps": lambda: ReplayViews(SAMPLING, shrink=2, mean_over="tokens"),
    "full mask": lambda: MaskedViews(FullMask(1, 0.15)),
    "random masks": lambda: MaskedViews(Bernoulli(2, 0.1, 0.9)),
    "masks and complements": lambda: MaskedViews(Bernoulli(4, 0.1, 0.9, complements=True), "canvas"),
    "subset pair": lambda: MaskedViews(SubsetPairs(1), "canvas"),
    "subset pairs": lambda: MaskedViews(SubsetPairs(2), "canvas"),
    "subsets of fixed sizes": lambda: MaskedViews(QuadratureSubsets(3, 0.15), "canvas"),
    "subsets of a block": lambda: MaskedViews(TextSubsets(2, 4, 0.15)),
    "subsets of the text": lambda: MaskedViews(TextSubsets(2)),
    "coupled": lambda: CoupledViews(CoupledMasks(1, 0.2, 0.8)),
}
LOSSES: dict[str, Callable[[], Loss]] = {
    "token ratio": TokenRatio,
    "sequence ratio": SequenceRatio,
    "summed likelihood": lambda: WeightedLikelihood("sum"),
    "mean likelihood": lambda: WeightedLikelihood("mean"),
    "bounds": SandwichedBound,
    "contrast": Contrast,
    "log-ratio regression": lambda: LogRatioRegression(1.0, 0.5, 0.5),
}
NO_ESTIMATE = "gives none: it averages over chosen steps"
NO_SUBSETS = "masks what the denoising steps left"
NO_HALVES = "two independent, unbiased estimates of the ELBO"
REFUSED = {
    ("drawn steps, mean", "sequence ratio"): NO_ESTIMATE,
    ("selected steps", "sequence ratio"): NO_ESTIMATE,
    **{(name, "bounds"): NO_SUBSETS for name in LIKELIHOODS if "steps" in name or name == "replay"},
    ("drawn steps, mean", "log-ratio regression"): NO_ESTIMATE,
    ("selected steps", "log-ratio regression"): NO_ESTIMATE,
    **{(name, "contrast"): NO_HALVES for name in LIKELIHOODS if name != "subset pairs"},
}


def compose(folder, likelihood: str, loss: str, **settings: Any) -> DiffusionGRPOTrainer:
    choices = {"likelihood": LIKELIHOODS[likelihood](), "loss": LOSSES[loss](), "credit": leave_one_out}
    return BASE.make(folder, choices=choices, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(product(LIKELIHOODS, LOSSES)), ids=" × ".join)
def test_every_likelihood_goes_with_every_loss_or_is_refused_with_the_reason(pair, tmp_path, monkeypatch):
    if pair in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[pair]):
            compose(tmp_path, *pair)
        return
    trainer = compose(tmp_path, *pair, num_iterations=2, logging_steps=1)
    seen = losses_seen(trainer, monkeypatch)
    before = parameters_of(trainer).clone()
    trainer.train()
    assert trainer.state.global_step == 1 and (parameters_of(trainer) - before).norm() > 1e-4
    assert trainer.args.num_mc_samples == trainer.choices.likelihood.num_views
    assert sum(view["targets"].sum() for view in seen) > 0
    if trainer.choices.loss.needs_old:
        assert largest_log_ratio(seen) <= 1e-4  # on policy every ratio is 1
        assert trainer.state.log_history[0]["rollout/max_abs_log_ratio"] <= 1e-3


def test_the_old_policys_log_probabilities_count(tmp_path, monkeypatch):
    """Negative control of the ratios above: with those of another policy they are not 1."""
    trainer = compose(tmp_path, "subset pairs", "sequence ratio")
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop
    rows = rollout_of(trainer, "a b", "b a a")
    rows["old_per_token_logps"] = rows["old_per_token_logps"] * 1.2
    seen = losses_seen(trainer, monkeypatch)
    trainer._compute_loss(trainer.model, rows)
    assert largest_log_ratio(seen) > 1e-2


# ------------------------------------------- a method that no paper has: ESPO's ratio on the rollout's own steps

PROMPT, LENGTH, BLOCK = [2, 3, 2], 4, 2


def reward_of(tokens: list[int]) -> float:
    return tokens.count(2) + 0.5 * (tokens[0] == tokens[3]) - 0.8 * (tokens[1:3] == [2, 3])


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([slopes.flatten() for slopes in gradients if slopes is not None])


@pytest.fixture
def model():
    # Without end tokens, so that all of a canvas is text; float64, so that differences are the formula's.
    return without_ends(tiny_model(seed=3).double()).eval()


def composed_rows(trainer, paths) -> dict[str, torch.Tensor]:
    trajectory = trajectory_of(paths, 1.0)
    rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(len(paths))}
    rows["prompt_ids"] = torch.tensor([PROMPT] * len(paths))
    rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
    rows |= plan_of(trainer, trajectory, rows)
    if isinstance(trainer.choices.likelihood, TrajectoryViews):  # in place of draws their expectation: every step once
        steps = torch.arange(LENGTH).expand(len(paths), 1, -1)
        rows |= {"view_steps": steps, "view_weights": torch.full(steps.shape, float(LENGTH))}
    return rows


EVERY_STEP = SamplingConfig(canvas_length=LENGTH, denoising_steps=LENGTH, block_length=BLOCK, temperature=1.0)


@pytest.mark.parametrize("views", ["replay", "drawn"])
@pytest.mark.parametrize("low", [1e6, 0.05], ids=["unclipped", "clipped"])
def test_sequence_ratio_on_the_rollouts_own_steps_is_its_formula(model, views, low, tmp_path):
    """Mean of −min(ρA, clip(ρ) A), ρ = (p / p_old)^(1/L) of the trajectory, over every path; its gradient on policy is
    that of E[r] / L."""
    likelihood = ReplayViews(EVERY_STEP) if views == "replay" else TrajectoryViews(DrawnSteps(LENGTH), EVERY_STEP)
    old = without_ends(tiny_model(seed=3).double()).eval()
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.mul_(1.1)
    paths, before = (enumerate_paths(net, PROMPT, LENGTH, BLOCK, BLOCK) for net in (model, old))
    paths, before = ([path for path in found if not {TAIL, END} & set(path.tokens)] for found in (paths, before))
    trainer = BASE.make(
        tmp_path,
        model=model,
        choices={"likelihood": likelihood, "loss": SequenceRatio(low, low)},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        block_length=BLOCK,
        denoising_steps=LENGTH,
        temperature=1.0,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = composed_rows(trainer, paths)
    rewards = torch.tensor([reward_of(path.tokens) for path in paths]).double()

    # on policy: E[A ∇ρ] = ∇E[r] / L
    probability = torch.stack([path.probability for path in paths])
    rows["advantages"] = probability.detach() * rewards * len(paths)
    exact = gradient(model, (probability * rewards).sum()) / LENGTH
    found = -gradient(model, loss_of_update(trainer, rows))
    torch.testing.assert_close(found, exact.to(found.dtype), atol=1e-6, rtol=1e-5)
    assert exact.norm() > 0.02

    # after an update of the policy
    advantages = rewards - rewards.mean()
    rows["advantages"] = advantages
    rows["old_per_token_logps"] = trajectory_of(before, 1.0).logps
    now, then = (
        torch.stack([sum(x for x in path.token_logps if x is not None) for path in found]) for found in (paths, before)
    )
    ratio = ((now - then) / LENGTH).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + low) * advantages).mean()
    found_loss = loss_of_update(trainer, rows)
    torch.testing.assert_close(found_loss.double(), expected, atol=1e-6, rtol=1e-5)
    slope = gradient(model, expected)
    torch.testing.assert_close(gradient(model, found_loss), slope.to(found.dtype), atol=1e-6, rtol=1e-4)
    assert ((ratio - 1).abs() > 0.05).any()  # the clip is at work, where there is one
    # negative control: the ratio without its root
    unrooted = -torch.minimum(ratio**LENGTH * advantages, (ratio**LENGTH).clamp(1 - low, 1 + low) * advantages).mean()
    assert (unrooted - expected).abs() > 1e-4


# ------------------------------------------- what is handed over is checked


@pytest.mark.parametrize(
    ("choices", "settings", "error", "message"),
    [
        ({}, {}, NotImplementedError, "does not say in which views .* Pass `likelihood=`"),
        ({"likelihood": FullMask()}, {}, TypeError, "likelihood must be a Likelihood, got FullMask"),
        ({"likelihood": MaskedViews(FullMask()), "loss": max}, {}, TypeError, "loss must be a Loss, got builtin"),
        (
            {"likelihood": MaskedViews(FullMask()), "credit": 1},
            {},
            TypeError,
            r"credit must be a Credit or a function",
        ),
        (
            {"likelihood": MaskedViews(FullMask(2))},
            {"num_mc_samples": 3},
            ValueError,
            "num_mc_samples=3, but the likelihood that was given has 2 views",
        ),
        (
            {"likelihood": MaskedViews(SubsetPairs(1)), "loss": SequenceRatio()},
            {"epsilon": 0.3},
            ValueError,
            "epsilon=0.3 would have no effect: the loss of SequenceRatio",
        ),
        (
            {"likelihood": MaskedViews(QuadratureSubsets(8)), "loss": LogRatioRegression(samples=2)},
            {},
            ValueError,
            r"divides the views into 2 parts .* MaskedViews\(noise=QuadratureSubsets.* has 1\. Set samples=1",
        ),
        (
            {"likelihood": TrajectoryViews(DrawnSteps(2), SAMPLING)},
            {"loss_type": "grpo", "beta": 0.1},
            ValueError,
            "the KL term must carry the weights of TrajectoryViews",
        ),
        (
            {"likelihood": MaskedViews(Bernoulli(2, 0.1, 0.9))},
            {"importance_sampling_level": "sequence"},
            ValueError,
            "has no sequence-level ratio",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(choices, settings, error, message, tmp_path):
    plain = replace(BASE, settings={})
    settings = {"num_mc_samples": 8} | settings
    with pytest.raises(error, match=message):
        plain.make(tmp_path, choices=choices, **settings)


@pytest.mark.slow
def test_a_composed_run_resumes_with_the_same_choices_alone(tmp_path):
    settings: dict[str, Any] = dict(max_steps=2, num_mc_samples=8)
    compose(
        tmp_path / "run", "subset pairs", "sequence ratio", **settings, save_strategy="steps", save_steps=1
    ).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    compose(tmp_path / "same", "subset pairs", "sequence ratio", **settings).train(resume_from_checkpoint=checkpoint)
    other = compose(tmp_path / "other", "subsets of the text", "sequence ratio", **settings)
    with pytest.raises(ValueError, match=r"SubsetPairs\(pairs=2\).*TextSubsets"):
        other.train(resume_from_checkpoint=checkpoint)


def test_advantages_may_differ_between_the_views_of_a_completion(tmp_path):
    """A credit per view: the loss of a view is proportional to the view's own advantage."""
    trainer = compose(tmp_path, "random masks", "summed likelihood")
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, "a b", "b a a")
    plain = [trainer._view_loss(trainer.model, rows, 0, view) for view in range(2)]
    rows["view_advantages"] = rows["advantages"].view(-1, 1, 1) * torch.tensor([1.0, -3.0])
    own = [trainer._view_loss(trainer.model, rows, 0, view) for view in range(2)]
    torch.testing.assert_close(torch.stack(own), torch.stack(plain) * torch.tensor([1.0, -3.0]))
    assert abs(plain[1]) > 1e-4


def test_weighted_likelihood_on_drawn_steps_is_reinforce(model, tmp_path):
    """Every step once, as its expected weight has it: the gradient of Σ p A log p over the paths, that of E[r]."""
    paths = enumerate_paths(model, PROMPT, LENGTH, BLOCK, BLOCK)
    paths = [path for path in paths if not {TAIL, END} & set(path.tokens)]
    choices = {
        "likelihood": TrajectoryViews(DrawnSteps(LENGTH), EVERY_STEP),
        "loss": WeightedLikelihood("sum"),
    }
    settings: dict[str, Any] = dict(max_completion_length=LENGTH, block_length=BLOCK, denoising_steps=LENGTH)
    trainer = BASE.make(tmp_path, model=model, choices=choices, temperature=1.0, **settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = composed_rows(trainer, paths)
    rewards = torch.tensor([reward_of(path.tokens) for path in paths]).double()
    probability = torch.stack([path.probability for path in paths])
    exact = gradient(model, (probability * rewards).sum())
    rows["advantages"] = probability.detach() * rewards * len(paths)
    found = -gradient(model, loss_of_update(trainer, rows))
    torch.testing.assert_close(found, exact.to(found.dtype), atol=1e-6, rtol=1e-5)
    # negative control: views without their weights
    rows["view_weights"] = torch.ones_like(rows["view_weights"])
    wrong = -gradient(model, loss_of_update(trainer, rows))
    assert (wrong - exact).norm() > 0.5 * exact.norm()


# ------------------------------------------- text that was on the canvas beforehand


@pytest.mark.parametrize("name", ["drawn steps, sum", "replay", "full mask", "random masks", "subset pairs"])
def test_given_text_is_shown_in_every_view_and_never_a_target(name, tmp_path):
    trainer = compose(tmp_path, name, "token ratio")
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory, _ = trainer.last_rollout
    given = torch.zeros_like(rows["completion_ids"], dtype=torch.bool)
    given[:, 1:3] = True
    steps = trajectory.unmask_step.masked_fill(given, -1)
    trajectory = replace(trajectory, unmask_step=steps, given=given)
    rows |= plan_of(trainer, trajectory, rows)
    targets = 0
    for view in range(num_views(trainer)):
        shown = view_of(trainer, rows, 0, view)
        assert torch.equal(shown.canvas[given], rows["completion_ids"][given])
        assert not shown.targets[given].any()
        targets += shown.targets.sum()
    assert targets > 0


# ------------------------------------------- rollout batches of earlier checkpoints


def test_rollout_batches_of_earlier_checkpoints_are_read():
    rows = {"advantages": torch.ones(2), "hidden": torch.ones(2, 1, 1, 4), "hidden_share": torch.ones(2, 1, 1)}
    weights, baseline = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5])

    def read(**more):
        (found,) = upgrade([rows | more], 2, refreshes=False)
        assert "hidden" not in found and found["masked"].shape == (2, 1, 1, 4) and "mask_rate" in found
        return found["advantages"].tolist()

    assert read() == [1, 1]
    assert read(length_weight=torch.tensor([0.5, 1.5])) == [0.5, 1.5]  # SPG
    assert read(weights=2 * weights) == [1.5, 0.5]  # wd1
    assert read(weights=weights, weight_baseline=baseline, rollout_elbo=baseline) == [0.5, -0.5]  # DMPO
    assert upgrade(None, 2, refreshes=False) is None
    assert upgrade([{"masked": weights}], 2, refreshes=True) == [{"masked": weights}]  # of this version
    with pytest.raises(ValueError, match="in the middle of a rollout batch whose weights change"):
        upgrade([rows], 2, refreshes=True)
