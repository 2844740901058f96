"""Every loss by hand on two completions of two tokens, by finite differences, and inside its trainer; bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log, tanh
from typing import Any

import pytest
import torch
from methods import method_named, text_reward
from tiny import MASK, canvas_logits, tiny_model
from trainer_helpers import estimate_views, loss_inputs, loss_of_update, parameters_of, rollout_of

from trl_diffusion.credit import (
    effective_sample_size,
    group_softmax,
    leave_one_out,
    opposed_softmax,
    population_z_score,
    scored_in_group,
    target_log_weights,
)
from trl_diffusion.credit.group_credit import GroupValues
from trl_diffusion.credit.target_weights import TargetWeights
from trl_diffusion.likelihood import elbo_of_pairs, mean_of_targets, upper_bound_per_token
from trl_diffusion.losses import WeightedLikelihood
from trl_diffusion.losses.bounds import sandwiched_bound
from trl_diffusion.losses.contrast import wddo_loss
from trl_diffusion.losses.estimate_loss import quadratic_kl
from trl_diffusion.losses.sequence_ratio import clipped_loss, sequence_ratio
from trl_diffusion.trainers import (
    CoupledGRPOConfig,
    DiffuGRPOConfig,
    DMPOConfig,
    ESPOConfig,
    GDPOConfig,
    GDSDConfig,
    SPGConfig,
    StableDRLConfig,
    StableESPOConfig,
    TraceRLConfig,
    UniGRPOConfig,
    WD1Config,
)
from trl_diffusion.trainers.coupled_grpo import coupled_statistic

# ------------------------------------------- by hand: two completions, two tokens


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(values) -> torch.Tensor:
    """Log-probabilities of given probabilities; 1 where nothing is scored."""
    return tensor(values).log()


def approx(expected: list, abs: float = 1e-6, nan_ok: bool = False):
    return pytest.approx(expected, abs=abs, nan_ok=nan_ok)


# A view that scores both tokens and one that scores the second; a view that scores the first and an empty one.
PROBABILITIES = logs([[[0.5, 0.25], [1.0, 0.4]], [[0.8, 1.0], [1.0, 1.0]]])
TARGETS = torch.tensor([[[1, 1], [0, 1]], [[1, 0], [0, 0]]]).bool()


def test_mean_of_targets_by_hand():
    # ½ log(½ · ¼) = −1.039721; log 0.4 = −0.916291; log 0.8 = −0.223144; nothing
    assert mean_of_targets(PROBABILITIES, TARGETS).tolist() == [approx([-1.039721, -0.916291]), approx([-0.223144, 0])]


def test_elbo_of_pairs_by_hand():
    hidden = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 0]]]).bool()
    logps = logs([[[0.5, 1.0], [1.0, 0.25]], [[0.8, 0.1], [1.0, 1.0]]])
    # L + 1 = 3. ½ [3/1 · log ½ + 3/1 · log ¼] = 1.5 · log ⅛; ½ [3/2 · log 0.08 + 0] = 0.75 · log 0.08
    assert elbo_of_pairs(logps, hidden).tolist() == approx([-3.119162, -1.894296])


def test_espo_by_hand():
    # exp((−2 + 2.4) / 2) = exp 0.2; exp((−3 + 2) / 2) = exp −0.5
    assert sequence_ratio(tensor([-2, -3]), tensor([-2.4, -2]), 2).tolist() == approx([1.221403, 0.606531])
    # A > 0: min(1.3, 1.25) and min(0.5, 0.9); A < 0: min(−1.3, −1.25) and min(−0.5, −0.9); inside: no clip
    ratio, advantages = tensor([1.3, 0.5, 1.3, 0.5, 1.1]), tensor([1, 1, -1, -1, -2])
    assert clipped_loss(ratio, advantages, low=0.1, high=0.25).tolist() == approx([-1.25, -0.5, 1.3, 0.9, 2.2])
    # 0.4² / (2 · 2) and 1² / (2 · 2)
    assert quadratic_kl(tensor([-2, -3]), tensor([-2.4, -2]), 2).tolist() == approx([0.04, 0.25])


def test_coupled_statistic_by_hand():
    # full mask: log ½, log ¼; first token masked at rate ¼: log 0.4; second at rate ¾: log 0.2
    logps = logs([[[0.5, 0.25], [0.4, 1.0], [1.0, 0.2]], [[0.5, 0.25], [1.0, 1.0], [0.4, 0.2]]])
    share = tensor([[1, 0.25, 0.75], [1, 0.25, 0.75]])
    # ½ [log ½ + log 0.4 / ¼] and ½ [log ¼ + log 0.2 / ¾]; in the second pair the complement masks both
    expected = [[-2.179155, -1.766106], [-0.957434, -1.766106]]
    found = coupled_statistic(logps, share)
    assert found.tolist() == [approx(row) for row in expected]
    # a pair and another one: the mean of their terms
    both = torch.cat([logps[:1], logps[1:, 1:]], 1), torch.cat([share[:1], share[1:, 1:]], 1)
    assert coupled_statistic(*both).tolist() == [approx([(-2.179155 - 0.957434) / 2, -1.766106])]


def test_wd1_by_hand():
    # softmax(1, −1) = 0.880797, 0.119203, and the reverse: the difference is tanh 1
    weights = opposed_softmax(tensor([[1, -1]]))
    assert weights.tolist() == [approx([tanh(1), -tanh(1)])]
    # −Σ weight · Σ ℓ = 0.761594 · (2.079442 − 2.525729) = −0.339890, as the mean over the group of G times that
    logps = logs([[[0.5, 0.25]], [[0.8, 0.1]]])
    losses = WeightedLikelihood("sum")(loss_inputs(logps, torch.ones(2, 1, 2).bool(), 2 * weights[0])).loss
    assert losses.tolist() == approx([3.167381, -3.847160]) and losses.mean().item() == approx(-0.339890)


def test_dmpo_by_hand():
    reference, current, rewards = tensor([[-1, -2]]), tensor([[-1.5, -1]]), tensor([[1, 0]])
    # (0.5, −1) + (1, 0) / ½
    log_weights = target_log_weights(reference, current, rewards, alpha=0.5, scale=2)
    assert log_weights.tolist() == [approx([2.5, -1])]
    # η = 3: 1.5 · (0.5, −1) + 3 · (1, 0)
    assert target_log_weights(reference, current, rewards, 0.5, 3).tolist() == [approx([3.75, -1.5])]
    assert target_log_weights(None, None, rewards, 0, 3).tolist() == [approx([3, 0])]
    weights = log_weights.softmax(1)
    assert weights.tolist() == [approx([0.970688, 0.029312])]  # 1 / (1 + e^−3.5)
    # ½ (−1.039721 − 0.916291) = −0.978006 and ½ (−0.223144 + 0) = −0.111572, times −0.5 and 0.5
    found = WeightedLikelihood("mean")(loss_inputs(PROBABILITIES, TARGETS, tensor([0.5, -0.5]))).loss
    assert found.tolist() == approx([0.489003, -0.055786])
    # log σ(0.2) = −0.598139, log σ(0.1) = −0.644397; log σ(−0.4) = −0.913015, log σ(−0.3) = −0.854355
    found = wddo_loss(tensor([1.5, 0.5]), tensor([0.2, -0.4]), tensor([-0.1, 0.3]))
    assert found.tolist() == approx([1.541605, 1.310863])


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_wddo_is_minimal_at_the_log_ratio_of_target_and_policy(weight):
    change = tensor(log(weight)).requires_grad_()
    (slope,) = torch.autograd.grad(wddo_loss(tensor(weight), change, change), change, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, change)
    assert abs(slope.item()) < 1e-12 and curvature.item() > 0.1


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("none", [0, 0, 0, 0]),
        ("group", [0.5] * 4),
        # softmax of (0.5, −1) − (2, 0) = (−1.5, −1) and of (0, 0) − (−2, 2)
        ("individual", [0.377541, 0.622459, 0.982014, 0.017986]),
        ("model", [0.5] * 4),  # as long as the policy is that of the rollout
    ],
)
def test_dmpo_baselines_by_hand(baseline, expected):
    credit = TargetWeights(alpha=0.5, scale=2.0, baseline=baseline, views=None)
    group = GroupValues(
        advantages=tensor([[1, 0], [-1, 1]]),
        lengths=torch.full((2, 2), 8),
        current=tensor([[-1.5, -1], [-3, -3]]),
        reference=tensor([[-1, -2], [-3, -3]]),
    )
    # (0.5, −1) + (2, 0) = (2.5, −1) and (0, 0) + (−2, 2)
    weights = tensor([0.970688, 0.029312, 0.017986, 0.982014])
    found = credit.weigh(group)
    assert found.values.flatten().tolist() == approx((2 * (weights - tensor(expected))).tolist())
    size = found.metrics["dmpo/effective_sample_size"]
    assert size == approx((1 / (0.970688**2 + 0.029312**2) + 1 / (0.017986**2 + 0.982014**2)) / 2, 1e-5)
    assert credit.refreshes == (baseline == "model")
    if baseline == "model":  # after an update: softmax of (1, 0) and of (0, 2)
        found = credit.weigh(replace(group, now=tensor([[-0.5, -1], [-3, -1]])))
        expected = tensor([0.731059, 0.268941, 0.119203, 0.880797])
        assert found.values.flatten().tolist() == approx((2 * (weights - expected)).tolist())


# ------------------------------------------- a group of rewards (none, 5, −2, −3), and one without any

SCORED = [None, 5.0, -2.0, -3.0]
SOFTMAX = [0.998754, 0.000911, 0.000335]  # of (5, −2, −3)
THIRD = 1 / 3


def less(baseline: list[float]) -> list[float]:
    """DMPO's weights less a baseline, times 4, because the loss is a mean over completions."""
    return [0, *(4 * (weight - base) for weight, base in zip(SOFTMAX, baseline, strict=True))]


GROUP_CREDIT: dict[str, tuple[dict[str, Any], list[float]]] = {
    "trajectory_grpo": ({"scale_rewards": "none"}, [0, 5, -2, -3]),
    # standard deviation √(38/2)
    "atpo": ({}, [0, 1.147053, -0.458821, -0.688232]),
    "spg": ({}, [0, 5, -2, -3]),
    "stable_drl": ({}, [0, 5, -2, -3]),
    "stable_espo": ({}, [0, 7.5, -3, -4.5]),
    "espo": ({}, [0, 7.5, -3, -4.5]),
    "gdpo": ({}, [0, 5, -2, -3]),
    "gdsd": ({}, [0, 7.5, -3, -4.5]),
    "coupled_grpo": ({}, [0, 7.5, -3, -4.5]),
    "tracerl": ({}, [0, 1.404879, -0.561951, -0.842927]),
    "dipo": ({}, [0, 1.404879, -0.561951, -0.842927]),
    # times 4, because the loss is a mean over completions
    "wd1": ({}, [0, 3.994037, -1.071862, -2.922175]),
    "dmpo": ({}, less([THIRD] * 3)),
    "dmpo, none": ({"weight_baseline": "none"}, less([0.0] * 3)),
    # of (−5, 2, 3)
    "dmpo, individual": (
        {"weight_baseline": "individual"},
        less([0.000245, 0.268876, 0.730879]),
    ),
    "dmpo, model": (
        {"weight_baseline": "model"},
        less([THIRD] * 3),
    ),
    # times 3: they have mean 1 over the three
    "dmpo, wddo": ({}, [0, 2.996260, 0.002732, 0.001005]),
}


@pytest.mark.parametrize("name", GROUP_CREDIT)
def test_a_completion_without_a_reward_is_left_out_of_its_group(name, tmp_path):
    settings, expected = GROUP_CREDIT[name]
    method = method_named(name if name in ("dmpo, wddo",) else name.split(",")[0])

    def reward(completions, **kwargs) -> list[float | None]:
        return [*SCORED, *[None] * 4]

    trainer = method.make(tmp_path, reward=reward, **settings)
    rows = rollout_of(trainer, "a b", "b a a")
    found = rows["advantages"]
    if name == "spg":  # times n over its mean
        length = rows["completion_mask"].sum(1)
        found = found / (length / length.float().mean())
    assert found[:4].tolist() == approx(expected, 1e-4)
    assert found[4:].tolist() == [0] * 4
    assert rows["advantages"].isfinite().all() and rows["advantages"][[0, 4, 5, 6, 7]].tolist() == [0] * 5
    if name.startswith("dmpo"):
        size = trainer._metrics["train"]["dmpo/effective_sample_size"]
        assert size == approx([1 / sum(weight**2 for weight in SOFTMAX)], 1e-4)  # of the group that has any


@pytest.mark.parametrize("name", ["wd1", "dmpo", "dmpo, wddo", "spg", "stable_drl", "gdsd"])
def test_a_completion_without_a_reward_learns_nothing(name, tmp_path):
    trainer = method_named(name).make(tmp_path, reward=lambda completions, **kwargs: SCORED * 2)
    rows = rollout_of(trainer, "a b b a b", "b a a b a")
    views = slice(None) if trainer.choices.scored_together else slice(1)
    targets = rows["targets"][:, 0, views]
    shape = targets.shape
    logps = (-torch.rand(shape, generator=torch.Generator().manual_seed(0)) * targets).requires_grad_()
    inputs = loss_inputs(logps, targets, rows["advantages"], lengths=rows["completion_mask"].sum(1))
    compared = torch.zeros_like(logps)
    inputs = replace(inputs, old=compared, reference=compared, estimate=trainer.choices.likelihood.estimate)
    losses = trainer.choices.loss(inputs).loss
    (slopes,) = torch.autograd.grad(losses.sum(), logps)
    slopes = (slopes * targets).abs().amax((1, 2))
    assert slopes[[0, 4]].tolist() == [0, 0] and slopes[[1, 2, 3, 5, 6, 7]].min() > 0


def test_the_model_baseline_leaves_out_what_has_no_reward(tmp_path):
    trainer = method_named("dmpo").make(tmp_path, weight_baseline="model", reward=lambda completions, **_: SCORED * 2)
    rows = rollout_of(trainer, "a b", "b a a")
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.1)
    before = rows["advantages"].view(2, 4)
    trainer._credit.refresh([rows], 4)
    weights = rows["advantages"].view(2, 4)
    assert weights[:, 0].tolist() == [0, 0] and weights.sum(1).tolist() == approx([0, 0], abs=4e-6)
    assert (weights - before).abs().max() > 4e-2  # the baseline was 1/3


SPG_LOGPS = logs([[[0.5, 0.25], [1.0, 0.4]], [[0.8, 1.0], [0.6, 1.0]]])
SPG_TARGETS = torch.tensor([[[1, 1], [0, 1]], [[1, 0], [1, 0]]]).bool()
SPG_LENGTH = torch.tensor([2, 1])


def test_spg_bounds_by_hand():
    # b = 2, t = (1, ½) and (1, 1). Position 1: log(½ · ¼); position 2: log(½ (1/16 + 0.16 / ½)) = log 0.19125; their
    # mean, halved. Second completion: log(½ (0.64 + 0.36)), halved
    upper = [(log(0.125) + log(0.19125)) / 4, log(0.5) / 2]
    assert upper == approx([-0.933404, -0.346574])
    assert upper_bound_per_token(SPG_LOGPS, SPG_TARGETS, SPG_LENGTH, 2.0).tolist() == approx(upper)
    # ½ (−1.039721 − 0.916291); ½ (log 0.8 + log 0.6)
    lower = [-0.978006, -0.366985]

    def bound(advantages: list[float], weight: float) -> list[float]:
        return sandwiched_bound(SPG_LOGPS, SPG_TARGETS, SPG_LENGTH, tensor(advantages), 2.0, weight).tolist()

    assert bound([1, 0], 0.25) == bound([0.1, 3], 1.0) == approx(lower)
    assert bound([-1, -1], 1.0) == approx(upper)
    assert bound([-1, -0.1], 0.0) == approx(lower)
    # ¼ · upper + ¾ · lower
    assert bound([-1, -1], 0.25) == approx([-0.966855, -0.361882])
    assert bound([-1, 1], 0.25) == approx([-0.966855, -0.366985])


def test_spg_bound_of_views_that_score_nothing_is_zero():
    nothing = torch.zeros(2, 2, 2).bool()
    logps = (SPG_LOGPS - 1).requires_grad_()
    bound = sandwiched_bound(logps * nothing, nothing, torch.tensor([1, 2]), tensor([-1, 1]), 1.5, 0.5)
    assert bound.tolist() == [0, 0]
    assert (torch.autograd.grad(bound.sum(), logps)[0] == 0).all()


def test_prompt_groups_by_hand():
    # rewards (3, 1): 3 − 1; rewards (0, 3, 6): 0 − 4.5
    assert leave_one_out(tensor([[1, -1]])).tolist() == [[2, -2]]
    assert leave_one_out(tensor([[-3, 0, 3]])).tolist() == [[-4.5, 0, 4.5]]
    assert leave_one_out(tensor([[0]])).tolist() == [[0]]
    # deviations (−1, −1, 2), variance 6/3
    assert population_z_score(tensor([[0, 0, 3], [5, 5, 5]])).tolist() == [
        approx([-0.707107, -0.707107, 1.414214]),
        [0, 0, 0],
    ]
    assert population_z_score(tensor([[1, 3]])).tolist() == [[-1, 1]]
    third = torch.tensor([[0.1, 0.1, 0.1]]) - torch.tensor([[0.1, 0.1, 0.1]]).mean()  # equal but for rounding
    assert population_z_score(third + torch.tensor([[0, 1e-8, -1e-8]])).tolist() == [[0, 0, 0]]
    # without a reward: rewards (–, 5, −2, −3): 5 + 2.5, −2 − 1, −3 − 1.5; deviations of variance 38/3
    nan = float("nan")
    scored, nothing = tensor([[nan, 5, -2, -3]]), tensor([[nan, nan]])
    assert leave_one_out(scored)[0].tolist() == approx([nan, 7.5, -3, -4.5], nan_ok=True)
    assert population_z_score(scored)[0].tolist() == approx([nan, 1.404879, -0.561951, -0.842927], nan_ok=True)
    # softmax (5, −2, −3) = 0.998754, 0.000911, 0.000335; softmax (−5, 2, 3) = 0.000245, 0.268876, 0.730879
    assert opposed_softmax(scored).tolist() == [approx([0, 0.998509, -0.267965, -0.730544])]
    assert scored_in_group(scored).tolist() == [[0, 3, 3, 3]]
    inf = float("inf")
    assert group_softmax(tensor([[-inf, 5, -2, -3], [-inf] * 4])).tolist() == [
        approx([0, 0.998754, 0.000911, 0.000335]),
        [0] * 4,
    ]
    assert group_softmax(scored).isnan().all()  # a likelihood that is no number is not a reward that is none
    for function in (leave_one_out, population_z_score):
        assert function(nothing).isnan().all()
        assert function(tensor([[nan, 0]]))[0].tolist() == approx([nan, 0], nan_ok=True)
    assert opposed_softmax(nothing).tolist() == scored_in_group(nothing).tolist() == [[0, 0]]
    # 1 / (¼ + ¼), 1 / 1, 1 / (0.64 + 0.04)
    assert effective_sample_size(tensor([[0.5, 0.5], [1, 0], [0.8, 0.2]])).tolist() == approx([2, 1, 1.470588])


# ------------------------------------------- finite differences

DIFFERENTIABLE: dict[str, tuple[Callable, list[torch.Tensor]]] = {
    "mean_of_targets": (lambda logps: mean_of_targets(logps * TARGETS, TARGETS), [PROBABILITIES]),
    "elbo_of_pairs": (
        lambda logps: elbo_of_pairs(logps * ~SPG_TARGETS[:1], ~SPG_TARGETS[:1]),
        [PROBABILITIES[:1] - 0.1],
    ),
    "sequence_ratio": (lambda elbo, old: sequence_ratio(elbo, old, 2), [tensor([-2, -3]), tensor([-2.4, -2])]),
    "clipped_loss": (
        lambda ratio, advantages: clipped_loss(ratio, advantages, 0.2, 0.2),
        [tensor([1.3, 0.5, 1.3, 0.5, 1.1]), tensor([1, 1, -1, -1, 2])],
    ),
    "quadratic_kl": (lambda elbo, other: quadratic_kl(elbo, other, 2), [tensor([-2, -3]), tensor([-2.4, -2])]),
    "coupled_statistic": (
        lambda logps: coupled_statistic(logps, tensor([[1, 0.25, 0.75]])),
        [logs([[[0.5, 0.25], [0.4, 0.9], [0.7, 0.2]]])],
    ),
    "opposed_softmax": (opposed_softmax, [tensor([[1, -1], [0.3, 0.2]])]),
    "wd1's loss": (
        lambda logps: WeightedLikelihood("sum")(loss_inputs(logps, TARGETS, tensor([1.5, -1.5]))).loss,
        [PROBABILITIES],
    ),
    "target_log_weights": (
        lambda *values: target_log_weights(*values, 0.5, 3),
        [tensor([-1, -2]), tensor([-1.5, -1]), tensor([1, 0])],
    ),
    "weighted_cross_entropy": (
        lambda logps: WeightedLikelihood("mean")(loss_inputs(logps * TARGETS, TARGETS, tensor([0.5, -0.5]))).loss,
        [PROBABILITIES],
    ),
    "wddo_loss": (wddo_loss, [tensor([1.5, 0.5]), tensor([0.2, -0.4]), tensor([-0.1, 0.3])]),
    "upper_bound_per_token": (
        lambda logps: upper_bound_per_token(logps, SPG_TARGETS, SPG_LENGTH, 1.5),
        [SPG_LOGPS],
    ),
    "sandwiched_bound": (
        lambda logps: sandwiched_bound(logps * SPG_TARGETS, SPG_TARGETS, SPG_LENGTH, tensor([-1, 1]), 1.5, 0.3),
        [SPG_LOGPS],
    ),
    "leave_one_out": (leave_one_out, [tensor([[-3, 0, 3]])]),
    "population_z_score": (population_z_score, [tensor([[0, 0.5, 3]])]),
    "effective_sample_size": (effective_sample_size, [tensor([[0.8, 0.2]])]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_finite_differences(name):
    function, inputs = DIFFERENTIABLE[name]
    inputs = [value.clone().requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    squares = function(*inputs).square().flatten()
    slopes = torch.autograd.grad((squares * torch.arange(1, len(squares) + 1)).sum(), inputs)
    assert all(slope.norm() > 1e-3 for slope in slopes)


# ------------------------------------------- inside the trainers: losses written out


@dataclass
class Batch:
    """One update of whole prompt groups as its written-out loss sees it, rows in the order of their global rows.

    Views come from the trainer; all else is computed here, by the ordinary forward pass and loops.
    """

    trainer: Any
    rows: dict[str, torch.Tensor]
    policy: Any
    old: Any
    reference: Any
    update: int
    size: int = 4

    def __post_init__(self):
        order = self.rows["global_row"].argsort()
        self.rows = {name: value[order] if value.dim() else value for name, value in self.rows.items()}
        self.ids = self.rows["completion_ids"]
        self.n = [next((i + 1 for i, token in enumerate(ids) if token < 2), len(ids)) for ids in self.ids.tolist()]
        texts = [ids[:n] for ids, n in zip(self.ids.tolist(), self.n, strict=True)]
        self.groups = torch.tensor(text_reward(None, texts)).view(-1, self.size)

    @property
    def centred(self) -> list[float]:
        return (self.groups - self.groups.mean(1, keepdim=True)).flatten().tolist()

    @property
    def left_out(self) -> list[float]:
        others = (self.groups.sum(1, keepdim=True) - self.groups) / (self.size - 1)
        return (self.groups - others).flatten().tolist()

    def softmax(self, values: torch.Tensor) -> torch.Tensor:
        """Over each prompt's completions, of [B]."""
        powers = values.view(-1, self.size).exp()
        return (powers / powers.sum(1, keepdim=True)).flatten()

    def views(self, update: int | None = None, temperature: float = 1.0):
        """Per view: targets [B, L] and log-probabilities [B, L] under policy, old policy and reference."""
        update = self.update if update is None else update
        rows, likelihood = self.rows, self.trainer.choices.likelihood
        if update == self.trainer.num_iterations:  # the views after the last update's
            rows, update = rows | estimate_views(self.trainer, rows), 0
            likelihood = self.trainer.choices.credit.estimates
        for view in range(likelihood.num_views):
            shown = likelihood.view(rows, update, view, MASK)
            prompt = self.rows["prompt_ids"] if shown.prompt_ids is None else shown.prompt_ids

            def logps(model, prompt=prompt, shown=shown) -> torch.Tensor:
                logits = canvas_logits(model, prompt, self.rows["prompt_mask"], shown.canvas) / temperature
                return logits.log_softmax(-1).gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

            with torch.no_grad():
                before, compared = logps(self.old), logps(self.reference)
            yield shown.targets, logps(self.policy), before, compared

    def elbos(self, update: int | None = None, part: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """Mean over views of (L + 1)/k Σ ℓ, under policy, old policy and reference; [B] each."""
        views, length = list(self.views(update))[part], self.ids.size(1)
        totals = []
        for which in (1, 2, 3):
            total = 0.0
            for view in views:
                masked = view[0].float()
                total = total + (length + 1) / masked.sum(1).clamp(min=1) * (view[which] * masked).sum(1)
            totals.append(total / len(views))
        return tuple(totals)


def ppo(ratio: torch.Tensor, advantage: float, epsilon: float) -> torch.Tensor:
    bounded = ratio.clamp(1 - epsilon, 1 + epsilon)
    return torch.minimum(ratio * advantage, bounded * advantage)


def k3(now: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
    return (compared - now).exp() - (compared - now) - 1


def espo(batch: Batch) -> torch.Tensor:
    now, old, reference = batch.elbos()
    terms = [
        -ppo(((now[i] - old[i]) / 8).exp(), advantage, 0.2) + 0.1 * (now[i] - reference[i]) ** 2 / 16
        for i, advantage in enumerate(batch.left_out)
    ]
    return sum(terms) / len(terms)


def gdpo(batch: Batch) -> torch.Tensor:
    """The rule with three times has the weights 5/18, 8/18 and 5/18."""
    elbos = [torch.zeros(len(batch.ids))] * 3
    for weight, (targets, *logps) in zip((5, 8, 5), batch.views(), strict=True):
        scale = weight / 18 * 8 / targets.sum(1)
        elbos = [total + scale * (own * targets).sum(1) for total, own in zip(elbos, logps, strict=True)]
    now, old, reference = elbos
    terms = [
        -ppo(((now[i] - old[i]) / 8).exp(), advantage, 0.5) + 0.1 * (now[i] - reference[i]) ** 2 / 16
        for i, advantage in enumerate(batch.centred)
    ]
    return sum(terms) / len(terms)


def gdsd(batch: Batch) -> torch.Tensor:
    """The views 2 i and 2 i + 1 are a sample: each token once, or with the ELBO's weights (L + 1)/k and halved."""
    views, losses = list(batch.views()), []
    for pair in (views[:2], views[2:]):
        weights = [torch.ones(8, 1)] * 2
        if batch.trainer.args.token_weights == "elbo":
            weights = [9 / 2 / view[0].sum(1, keepdim=True).clamp(min=1) for view in pair]
        now, old, reference = (
            sum((weight * view[0] * view[which]).sum(1) for weight, view in zip(weights, pair, strict=True))
            for which in (1, 2, 3)
        )
        wanted = 2 * torch.tensor(batch.left_out)
        losses.append((((now - old) / 8).clamp(log(0.5), log(3)) - wanted) ** 2 + 0.1 * (now - reference) ** 2 / 16)
    return sum(losses).mean() / 2


def coupled(batch: Batch) -> torch.Tensor:
    (_, *full), *pairs = list(batch.views())
    share = batch.rows["mask_rate"][:, batch.update].tolist()
    terms = []
    for i, advantage in enumerate(batch.left_out):
        for j in range(batch.n[i]):
            now, old, reference = (
                sum(
                    (full[which][i, j] + view[1 + which][i, j] / share[i][1 + v]) / 2
                    for v, view in enumerate(pairs)
                    if view[0][i, j]
                )
                / (len(pairs) / 2)
                for which in range(3)
            )
            terms.append(-ppo((now - old).exp(), advantage, 0.5) + 0.01 * k3(now, reference))
    return sum(terms) / len(terms)


def uni_grpo(batch: Batch) -> torch.Tensor:
    total, views = 0.0, list(batch.views())
    for targets, now, old, reference in views:
        for i, advantage in enumerate(batch.centred):
            scored = [j for j in range(batch.n[i]) if targets[i, j]]
            terms = [
                -ppo((now - old)[i, j].exp(), advantage, 0.2) + 0.04 * k3(now[i, j], reference[i, j]) for j in scored
            ]
            total = total + sum(terms) / max(len(terms), 1)
    return total / len(views) / len(batch.ids)


def tracerl(batch: Batch) -> torch.Tensor:
    """The old policy is also the one of the KL, which is a sum over a view's tokens."""
    deviations = batch.groups.std(1, keepdim=True, correction=0).expand_as(batch.groups).flatten().tolist()
    losses = [[] for _ in batch.ids]
    for targets, now, old, _ in batch.views(temperature=0.9):
        for i, advantage in enumerate(batch.centred):
            scored = targets[i].nonzero().flatten().tolist()
            gains = [ppo((now - old)[i, j].exp(), advantage / deviations[i], 0.2) for j in scored]
            if scored:
                losses[i].append(-sum(gains) / len(gains) + 0.1 * sum(k3(now[i, j], old[i, j]) for j in scored))
    assert len({len(own) for own in losses}) > 1  # some texts ended early
    return sum(sum(own) / len(own) for own in losses) / len(losses)


def trajectory_grpo(batch: Batch) -> torch.Tensor:
    """`dapo` over the real steps: every token of the blocks up to the one in which the text ends, in blocks of four
    positions that two steps write. A uniform draw of a step stands for as many steps as these blocks have."""
    blocks = [-(-n // 4) for n in batch.n]
    assert 4 * sum(blocks) != sum(batch.n)
    total, views = 0.0, list(batch.views(temperature=0.9))
    for targets, now, old, _ in views:
        for i, advantage in enumerate(batch.centred):
            for j in targets[i].nonzero().flatten().tolist():
                total = total - 2 * blocks[i] * ppo((now - old)[i, j].exp(), advantage, 0.2)
    return total / len(views) / (4 * sum(blocks))


def wd1(batch: Batch) -> torch.Tensor:
    advantages = torch.tensor(batch.centred)
    weights = batch.softmax(advantages) - batch.softmax(-advantages)
    text = torch.arange(8) < torch.tensor(batch.n).unsqueeze(1)
    losses = [-(weights * (logps * text).sum(1)).sum() / len(batch.groups) for _, logps, _, _ in batch.views()]
    return sum(losses) / len(losses)


def dmpo_weights(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The rollout's weights, with the same likelihoods for the baseline `individual`."""
    _, old, reference = batch.elbos(batch.trainer.num_iterations)
    rewards = batch.groups.flatten() / batch.trainer.args.alpha
    return batch.softmax(reference - old + rewards), batch.softmax(reference - old - rewards)


def dmpo(batch: Batch) -> torch.Tensor:
    weights, opposite = dmpo_weights(batch)
    now, old, _ = batch.elbos(batch.trainer.num_iterations)
    baseline = {
        "none": torch.zeros_like(weights),
        "group": torch.full_like(weights, 1 / batch.size),
        "individual": opposite,
        "model": batch.softmax(now - old).detach(),
    }[batch.trainer.args.weight_baseline]
    total, views = 0.0, list(batch.views())
    for targets, logps, _, _ in views:
        mean = torch.stack([logps[i][targets[i]].sum() / max(int(targets[i].sum()), 1) for i in range(len(targets))])
        total = total - ((weights - baseline) * mean).sum() / len(views)
    return total / len(batch.groups)


def wddo(batch: Batch) -> torch.Tensor:
    weights = dmpo_weights(batch)[0] * batch.size
    half = batch.trainer.args.num_mc_samples
    changes = [now - old for now, old, _ in (batch.elbos(part=part) for part in (slice(half), slice(half, None)))]
    first, second = (1 / (1 + (-change).exp()) for change in changes)
    return -(weights * first.log() + (1 - second).log()).sum() / len(batch.ids)


def spg_bounds(batch: Batch) -> list[torch.Tensor]:
    """Per token, of every completion."""
    args, views, bounds = batch.trainer.args, list(batch.views()), []
    upper_weight = {"mix": 0.5, "upper": 1.0, "lower": 0.0}[args.negative_bound]
    for i, advantage in enumerate(batch.centred):
        scored = [[j for j in range(8) if view[0][i, j]] for view in views]
        lower = sum(sum(view[1][i, j] for j in own) / len(own) for view, own in zip(views, scored, strict=True)) / 2
        inner: dict[int, Any] = {}
        for view, own in zip(views, scored, strict=True):
            for j in own:
                inner[j] = inner.get(j, 0.0) + (args.bound_power * view[1][i, j]).exp() / (len(own) / batch.n[i]) / 2
        upper = sum(value.log() for value in inner.values()) / len(inner) / args.bound_power
        bounds.append(lower if advantage > 0 else upper_weight * upper + (1 - upper_weight) * lower)
    return bounds


def spg(batch: Batch) -> torch.Tensor:
    terms = zip(batch.centred, spg_bounds(batch), batch.n, strict=True)
    return -sum(advantage * bound * n for advantage, bound, n in terms) / sum(batch.n)


def stable_weights(batch: Batch, log_ratios: list[torch.Tensor]) -> list[torch.Tensor]:
    """Clipped to 1 ± 0.2 and divided by their sum over the prompt's four completions."""
    ratios = torch.stack(log_ratios).detach().exp().clamp(0.8, 1.2).view(-1, 4)
    assert (
        (ratios == 1).all() or (ratios == 0.8).any() or (ratios == 1.2).any()
    )  # as the policy wrote them, or clipped
    return list((ratios / ratios.sum(1, keepdim=True)).flatten())


def stable_drl(batch: Batch) -> torch.Tensor:
    """The ELBO per token is estimated on the views that would come after the last update's."""
    log_ratios = [torch.zeros(())] * len(batch.n)
    views = list(batch.views(batch.trainer.num_iterations))
    for targets, now, old, _ in views:
        means = ((now - old) * targets).sum(1) / targets.sum(1) / len(views)
        log_ratios = [total + own for total, own in zip(log_ratios, means, strict=True)]
    terms = zip(stable_weights(batch, log_ratios), batch.centred, spg_bounds(batch), strict=True)
    return -sum(weight * advantage * bound for weight, advantage, bound in terms) / len(batch.groups)


def stable_espo(batch: Batch) -> torch.Tensor:
    then_now, then_old, _ = batch.elbos(batch.trainer.num_iterations)
    weights = stable_weights(batch, list((then_now - then_old) / 8))
    now, _, reference = batch.elbos()
    gains = [weight * a * elbo / 8 for weight, a, elbo in zip(weights, batch.left_out, now, strict=True)]
    return -sum(gains) / len(batch.groups) + 0.1 * ((now - reference) ** 2).mean() / 16


MORE_WORDS = {"prompt_mask_probability": 0.3}  # short prompts: so that masks differ between updates
WRITTEN_OUT: dict[str, tuple[str, Callable[[Batch], torch.Tensor], dict[str, Any]]] = {
    "trajectory_grpo": ("trajectory_grpo", trajectory_grpo, {"scale_rewards": "none"}),
    "espo": ("espo", espo, {"beta": 0.1}),
    "gdpo": ("gdpo", gdpo, {"beta": 0.1}),
    "gdsd": ("gdsd", gdsd, {"beta": 0.1, "psi": 2.0, "epsilon_high": 2.0}),
    "gdsd, elbo": ("gdsd", gdsd, {"beta": 0.1, "psi": 2.0, "epsilon_high": 2.0, "token_weights": "elbo"}),
    "coupled_grpo": ("coupled_grpo", coupled, {"num_mc_samples": 4}),
    "uni_grpo": ("uni_grpo", uni_grpo, {"num_mc_samples": 2}),
    "tracerl": ("tracerl", tracerl, {"beta": 0.1}),
    "wd1": ("wd1", wd1, MORE_WORDS),
    "dmpo": ("dmpo", dmpo, {}),
    "dmpo, individual": ("dmpo", dmpo, {"weight_baseline": "individual", "alpha": 0.5}),
    "dmpo, none": ("dmpo", dmpo, {"weight_baseline": "none"}),
    "dmpo, model": ("dmpo", dmpo, {"weight_baseline": "model"}),
    "dmpo, wddo": ("dmpo, wddo", wddo, {}),
    "spg": ("spg", spg, MORE_WORDS),
    "spg, upper": ("spg", spg, MORE_WORDS | {"negative_bound": "upper", "bound_power": 1.0}),
    "spg, lower": ("spg", spg, MORE_WORDS | {"negative_bound": "lower"}),
    "spg, hidden": ("spg", spg, MORE_WORDS | {"scored": "hidden"}),
    "spg, random": ("spg, random", spg, MORE_WORDS),
    "stable_drl": ("stable_drl", stable_drl, MORE_WORDS),
    "stable_espo": ("stable_espo", stable_espo, {"beta": 0.1}),
}


def gradient(loss: torch.Tensor, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_trainers_loss_is_the_written_out_one(name, tmp_path):
    method, written_out, settings = WRITTEN_OUT[name]
    trainer = method_named(method).make(tmp_path, **{"gradient_accumulation_steps": 1, "num_iterations": 2} | settings)
    trainer.current_gradient_accumulation_steps = 1
    start, reference = tiny_model(seed=3), tiny_model(seed=3)
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.8)
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(reference.state_dict())
    rows = rollout_of(trainer, "a b b a b", "b a a b a")
    moved = 1.02 if name == "dmpo, wddo" else 1.2  # further away its second term is as good as constant
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(moved)
    if trainer.choices.credit.refreshes:
        trainer._credit.refresh([rows], 4)
    losses = []
    for update in range(2):
        batch = Batch(trainer, rows, trainer.model, start, reference, update)
        found = loss_of_update(trainer, rows, update)
        expected = written_out(batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        slope = gradient(expected, trainer.model)
        assert slope.norm() > 1e-3
        torch.testing.assert_close(gradient(found, trainer.model), slope, rtol=1e-3, atol=1e-4 * float(slope.norm()))
        unmoved = written_out(Batch(trainer, rows, start, start, reference, update))
        assert (found - unmoved).abs() > 1e-4  # the weights did move
        losses.append(float(expected))
    assert (abs(losses[0] - losses[1]) > 1e-4) == method_named(method).fresh_views


EVALUATED = {
    "trajectory_grpo": {"num_mc_samples": 4},
    "uni_grpo": {},
    "tracerl": {},
    "wd1": {"num_mc_samples": 3},
    "dmpo": {},
    "espo": {},
    "spg": {},
}


@pytest.mark.parametrize("name", EVALUATED)
def test_the_evaluation_loss_is_the_written_out_one_over_all_views(name, tmp_path):
    method, written_out, settings = WRITTEN_OUT[name]
    settings = {"num_iterations": 1} | settings | EVALUATED[name]
    trainer = method_named(method).make(tmp_path, **settings)
    trainer.model.eval()
    prompts = [{"prompt": prompt} for prompt in ("a b b a b", "b a a b a") for _ in range(4)]
    rows = trainer._generate_and_score_completions(prompts)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.2)  # on policy a loss of ratios does not depend on the views
        found = trainer._compute_loss(trainer.model, rows)
        start = tiny_model(seed=3)
        batch = Batch(trainer, rows, trainer.model, start, start, 0)
        torch.testing.assert_close(found, written_out(batch), rtol=1e-4, atol=1e-6)
        first = trainer.num_backwards() * trainer._view_loss(trainer.model, rows, 0, 0)
    assert (trainer.num_backwards() > 1) == ((first - found).abs() > 1e-4)  # negative control


# ------------------------------------------- groups and micro-batches

GROUPED = {
    "wd1": ("wd1", wd1, MORE_WORDS),
    "dmpo": ("dmpo", dmpo, {}),
    "dmpo, wddo": ("dmpo, wddo", wddo, {"learning_rate": 1.0}),
}
# 4 prompts × 3 completions. B = G; B ≠ G: all, two prompts, and micro-batches that cut through groups
SPLITS = [(3, 4), (12, 1), (6, 2), (4, 3), (2, 6)]


def trained(name: str, folder, batch: int, accumulation: int, **settings):
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = method_named(name).make(folder, num_generations=3, **split, **settings)
    before = parameters_of(trainer).clone()
    trainer.train()
    return trainer, parameters_of(trainer) - before


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPED)
def test_one_update_is_the_written_out_gradient_whatever_the_micro_batches(name, tmp_path):
    method, written_out, settings = GROUPED[name]
    updates = []
    for batch, accumulation in SPLITS:
        trainer, update = trained(method, tmp_path / str(batch), batch, accumulation, **settings)
        updates.append(update)
        if batch == 12:
            (rows,) = trainer._buffered_inputs
            start = tiny_model(seed=3)
            expected = -gradient(written_out(Batch(trainer, rows, start, start, start, 0, size=3)), start)
    assert expected.norm() > 1e-2
    for update in updates:
        assert (update - updates[0]).norm() <= 1e-5 * updates[0].norm()
        assert (update - expected).norm() <= 1e-4 * expected.norm()
    # negative control: groups of the wrong rows
    wrong = -gradient(written_out(Batch(trainer, _regrouped(rows), start, start, start, 0, size=3)), start)
    assert (wrong - expected).norm() > 1e-2 * expected.norm()


def _regrouped(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return rows | {"global_row": (rows["global_row"] + 1) % 12}


THREE_UPDATES = {"num_iterations": 3, "max_steps": 3}
# Methods whose weights may follow the policy from update to update: settings with which they do, and settings with
# which they do not.
REFRESHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dmpo": ({"weight_baseline": "model"}, {}),
    "stable_drl": ({"epsilon": 0.9, "epsilon_high": 5.0}, {"epsilon": 0.0}),
}


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.parametrize(
    ("splits", "settings"),
    [
        ([(12, 1), (3, 4), (2, 6)], [{}] * 3),
        # two updates per pass through the rollout batch, each on half of it
        ([(6, 1), (2, 3)], [{"steps_per_generation": 2 * steps} for steps in (1, 3)]),
    ],
    ids=["one update per pass", "two updates per pass"],
)
@pytest.mark.parametrize("name", REFRESHED)
def test_weights_of_the_moment_do_not_depend_on_the_micro_batches(name, splits, settings, tmp_path):
    own, fixed = (THREE_UPDATES | more for more in REFRESHED[name])
    updates = [
        trained(name, tmp_path / str(split[0]), *split, **own, **more)[1]
        for split, more in zip(splits, settings, strict=True)
    ]
    for update in updates[1:]:
        assert (update - updates[0]).norm() <= 1e-4 * updates[0].norm()
    other = trained(name, tmp_path / "fixed", *splits[0], **fixed, **settings[0])[1]
    assert (other - updates[0]).norm() > 1e-2 * updates[0].norm()  # negative control


@pytest.mark.slow
@pytest.mark.parametrize("name", REFRESHED)
def test_weights_of_the_moment_do_not_depend_on_the_order_of_rows(name, tmp_path, monkeypatch):
    settings = THREE_UPDATES | REFRESHED[name][0]
    expected = trained(name, tmp_path / "shuffled", 4, 3, **settings)[1]
    shuffle = "trl.trainer.grpo_trainer.shuffle_sequence_dict"
    monkeypatch.setattr(shuffle, lambda rows: {k: v.flip(0) if v.dim() else v for k, v in rows.items()})
    found = trained(name, tmp_path / "reversed", 4, 3, **settings)[1]
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.slow
def test_dmpo_model_baseline_is_the_policys_own_change_before_each_update(tmp_path, monkeypatch):
    method = method_named("dmpo")
    trainer = method.make(
        tmp_path,
        num_generations=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        **THREE_UPDATES,
        weight_baseline="model",
    )
    seen: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    losses = trainer._loss_inputs

    def record(model, rows, update, view):
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        seen.append((update, dict(rows), weights))
        return losses(model, rows, update, view)

    monkeypatch.setattr(trainer, "_loss_inputs", record)
    trainer.train()
    assert len(seen) == 3 * 3 * 4  # updates × micro-batches × views
    baselines = []
    for update in range(3):
        own = [(rows, weights) for u, rows, weights in seen if u == update][::4]
        rows = {name: torch.cat([part[name] for part, _ in own]) for name in own[0][0] if own[0][0][name].dim()}
        policy = tiny_model(seed=3)
        policy.load_state_dict(own[0][1])
        start = tiny_model(seed=3)
        batch = Batch(trainer, rows, policy, start, start, update, size=3)
        now, old, _ = batch.elbos(3)
        expected = batch.softmax(now - old).detach()
        weights = batch.softmax(torch.tensor(batch.centred) / trainer.args.alpha)  # the reference wrote the rollout
        torch.testing.assert_close(batch.rows["advantages"], 3 * (weights - expected), rtol=1e-4, atol=3e-5)
        baselines.append(expected)
    assert torch.allclose(baselines[0], torch.tensor(1 / 3), atol=1e-5)
    for earlier, later in pairwise(baselines):
        assert (earlier - later).abs().max() > 1e-3  # one update late would show


# ------------------------------------------- bad input

CONFIGS: dict[str, Any] = {
    "dmpo": DMPOConfig,
    "espo": ESPOConfig,
    "gdpo": GDPOConfig,
    "gdsd": GDSDConfig,
    "coupled": CoupledGRPOConfig,
    "wd1": WD1Config,
    "spg": SPGConfig,
    "stable": StableDRLConfig,
    "stable espo": StableESPOConfig,
    "uni": UniGRPOConfig,
    "tracerl": TraceRLConfig,
    "diffu": DiffuGRPOConfig,
}


def config(name: str, **settings):
    # 240: whole groups of every default size
    return CONFIGS[name](
        "unused", **{"use_cpu": True, "bf16": False, "per_device_train_batch_size": 240, "report_to": []} | settings
    )


ODD = "complementary pairs, so num_mc_samples must be even; got 3"
NORMALISED = {"multi_objective_aggregation": "normalize_then_sum"}
SEQUENCE = {"importance_sampling_level": "sequence"}
NO_EFFECT = r"{}={} would have no effect: the loss of {} does not use it\. Leave it at {}\."
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("dmpo", {"alpha": -0.1}, r"alpha is a temperature and must not be negative; got -0\.1"),
    ("dmpo", {"alpha": 0.0}, r"alpha=0 needs a weight_scale: the weights are the softmax of weight_scale"),
    ("dmpo", {"weight_scale": 0.0}, r"weight_scale must be positive; got 0\.0"),
    ("dmpo", {"alpha": 0.0, "weight_scale": -1.0}, r"weight_scale must be positive; got -1\.0"),
    ("dmpo", {"weight_baseline": "mean"}, r"must be one of group, individual, model, none; got 'mean'"),
    ("dmpo", {"objective": "ddo"}, r"objective must be one of cross_entropy, wddo; got 'ddo'"),
    ("dmpo", {"objective": "wddo"}, r"has no weight baseline; set weight_baseline='none', got 'group'"),
    ("dmpo", {"scale_rewards": "group"}, r"scale_rewards must be 'none'; got 'group'\. To change how much"),
    (
        "wd1",
        {"scale_rewards": "batch"},
        r"softmax of the rewards themselves: scale_rewards must be 'none'; got 'batch'",
    ),
    ("dmpo", NORMALISED, r"multi_objective_aggregation must be 'sum_then_normalize'; got 'normalize_then_sum'"),
    ("wd1", NORMALISED, r"multi_objective_aggregation must be 'sum_then_normalize'; got 'normalize_then_sum'"),
    ("dmpo", {"num_mc_samples": 3}, f"DMPOConfig takes its views in {ODD}"),
    ("espo", {"num_mc_samples": 3}, f"ESPOConfig takes its views in {ODD}"),
    ("coupled", {"num_mc_samples": 3}, f"CoupledGRPOConfig takes its views in {ODD}"),
    ("uni", SEQUENCE, "UniGRPOConfig scores a part of the tokens per view, which has no sequence-level ratio"),
    ("coupled", SEQUENCE, "got importance_sampling_level='sequence'. Set .*='token' and .*, or use ESPO"),
    ("uni", {"loss_type": "vespo"}, "no sequence-level ratio; got loss_type='vespo'"),
    ("tracerl", SEQUENCE, "TraceRLConfig scores a part of the tokens per view"),
    ("espo", SEQUENCE, NO_EFFECT.format("importance_sampling_level", "'sequence'", "ESPOConfig", "'token'")),
    ("wd1", {"epsilon": 0.3}, NO_EFFECT.format("epsilon", r"0\.3", "WD1Config", r"0\.2")),
    ("wd1", {"beta": 0.04}, NO_EFFECT.format("beta", r"0\.04", "WD1Config", r"0\.0")),
    ("dmpo", {"beta": 0.1}, NO_EFFECT.format("beta", r"0\.1", "DMPOConfig", r"0\.0")),
    ("dmpo", {"epsilon_high": 0.3}, NO_EFFECT.format("epsilon_high", r"0\.3", "DMPOConfig", "None")),
    ("gdsd", {"num_mc_samples": 3}, f"GDSDConfig takes its views in {ODD}"),
    ("gdsd", {"psi": 0.0}, r"psi must be positive, so that good completions become more likely; got 0\.0"),
    ("gdsd", {"token_weights": "tlc"}, "token_weights must be one of equal, elbo; got 'tlc'"),
    ("gdsd", {"epsilon": 1.0}, r"epsilon must lie in \[0, 1\) and epsilon_high be at least 0; got 1\.0 and 1\.0"),
    ("gdpo", {"num_mc_samples": 0}, "num_mc_samples must be at least 1, got 0"),
    ("gdpo", {"loss_type": "grpo"}, NO_EFFECT.format("loss_type", "'grpo'", "GDPOConfig", "'dapo'")),
    ("gdpo", {"prompt_mask_probability": 1.0}, r"prompt_mask_probability must lie in \[0, 1\), got 1\.0"),
    ("espo", {"loss_type": "grpo"}, NO_EFFECT.format("loss_type", "'grpo'", "ESPOConfig", "'dapo'")),
    ("espo", {"use_bias_correction_kl": True}, "use_bias_correction_kl=True would have no effect"),
    ("spg", {"beta": 0.1}, NO_EFFECT.format("beta", r"0\.1", "SPGConfig", r"0\.0")),
    ("spg", {"delta": 3.0}, NO_EFFECT.format("delta", r"3\.0", "SPGConfig", "None")),
    ("wd1", {"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 would have no effect"),
    ("wd1", {"entropy_coef": 0.01}, "entropy_coef=0.01 would have no effect"),
    ("spg", {"noise_block_length": 48}, r"noise_block_length \(48\) must divide the canvas of .* 256"),
    ("spg", {"noise_block_length": 0}, r"noise_block_length \(0\) must divide the canvas"),
    ("spg", {"noise": "full"}, r"noise must be one of block_random, random; got 'full'"),
    ("spg", {"scored": "all"}, r"scored must be one of block, hidden; got 'all'"),
    ("spg", {"negative_bound": "none"}, r"negative_bound must be one of mix, upper, lower; got 'none'"),
    ("spg", {"bound_power": 0.0}, r"bound_power must be positive and mix_weight lie in \[0, 1\]; got 0\.0 and 0\.5"),
    ("spg", {"mix_weight": 1.5}, r"mix_weight lie in \[0, 1\]; got 1\.5 and 1\.5"),
    ("stable", {"epsilon": 1.0}, r"epsilon must lie in \[0, 1\) and epsilon_high be at least 0; got 1\.0 and 1\.0"),
    ("stable espo", {"epsilon_high": -0.1}, r"and epsilon_high be at least 0; got 0\.2 and -0\.1"),
    ("stable", {"beta": 0.1}, NO_EFFECT.format("beta", r"0\.1", "StableDRLConfig", r"0\.0")),
    ("stable espo", {"loss_type": "grpo"}, NO_EFFECT.format("loss_type", "'grpo'", "StableESPOConfig", "'dapo'")),
    ("uni", {"min_mask_rate": 0.0}, r"0 < min_mask_rate <= max_mask_rate <= 1; got 0\.0 and 0\.9"),
    ("uni", {"min_mask_rate": 0.6, "max_mask_rate": 0.4}, r"got 0\.6 and 0\.4"),
    ("dmpo", {"max_mask_rate": 1.1}, r"got 0\.1 and 1\.1"),
    ("coupled", {"max_mask_rate": 1.0}, "max_mask_rate must be below 1: the complement of a full mask scores nothing"),
    ("wd1", {"prompt_mask_probability": 1.0}, r"prompt_mask_probability must lie in \[0, 1\), got 1\.0"),
    ("spg", {"prompt_mask_probability": -0.1}, r"prompt_mask_probability must lie in \[0, 1\), got -0\.1"),
    ("tracerl", {"shrink": 0}, r"shrink must lie between 1 and denoising_steps=128; got 0"),
    ("tracerl", {"shrink": 129}, r"shrink must lie between 1 and denoising_steps=128; got 129"),
    ("tracerl", {"num_mc_samples": 4}, r"with shrink=8 makes 16, got num_mc_samples=4\. Leave it out"),
    ("tracerl", {"loss_type": "dapo"}, r"need loss_type='luspo'; got 'dapo'"),
    ("tracerl", {"top_entropy_quantile": 0.2}, r"need top_entropy_quantile=1\.0; got 0\.2"),
    ("tracerl", {"sync_ref_model": True}, r"need sync_ref_model=False; got True"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD, ids=[f"{name} {settings}" for name, settings, _ in BAD])
def test_bad_settings_are_refused_with_the_reason(name, settings, message):
    with pytest.raises(ValueError, match=message):
        config(name, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dmpo", {"alpha": 0.0, "weight_scale": 10.0}),
        ("dmpo", {"objective": "wddo", "weight_baseline": "none"}),
        ("espo", {"beta": 0.0, "epsilon": 0.0, "epsilon_high": 0.3}),
        ("coupled", {"num_mc_samples": 4, "max_mask_rate": 0.99}),
        ("diffu", SEQUENCE),
        ("spg", {"noise_block_length": 64}),
        ("stable", {"epsilon": 0.99, "epsilon_high": 4.0}),
        ("tracerl", {"shrink": 1, "num_mc_samples": 128}),
        ("uni", {"min_mask_rate": 0.5, "max_mask_rate": 0.5}),
    ],
)
def test_what_lies_next_to_bad_settings_is_taken(name, settings):
    made = config(name, **settings)
    assert all(getattr(made, field) == value for field, value in settings.items())


def test_without_alpha_dmpo_runs_no_likelihoods_and_no_reference(tmp_path):
    trainer = method_named("dmpo").make(tmp_path, alpha=0.0, weight_scale=2.0)
    assert trainer.ref_model is None
    rows = rollout_of(trainer, "a b", "b")
    rewards = Batch(trainer, rows, None, None, None, 0).groups
    expected = 4 * ((2 * rewards).softmax(1) - 1 / 4)
    torch.testing.assert_close(rows["advantages"].view(2, 4), expected, rtol=1e-4, atol=4e-5)
    assert trainer.choices.credit.estimates is None


# ------------------------------------------- defaults and papers

D1 = dict(
    max_completion_length=256,
    block_length=32,
    denoising_steps=128,
    temperature=0.9,
    unmasking="low_confidence",
    learning_rate=3e-6,
    lr_scheduler_type="constant",
    adam_beta1=0.9,
    adam_beta2=0.99,
    weight_decay=0.1,
    max_grad_norm=0.2,
    num_generations=6,
    scale_rewards="none",
    use_bias_correction_kl=False,
    disable_dropout=True,
    importance_sampling_level="token",
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "dmpo": dict(
        num_generations=16,
        num_iterations=8,
        num_mc_samples=4,
        temperature=0.2,
        alpha=0.04,
        weight_scale=None,
        weight_baseline="group",
        objective="cross_entropy",
        min_mask_rate=0.1,
        max_mask_rate=1.0,
        beta=0.0,
    ),
    "espo": dict(
        num_iterations=8,
        num_mc_samples=4,
        denoising_steps=256,
        temperature=1.0,
        weight_decay=0.01,
        epsilon=0.2,
        beta=1e-3,
    ),
    "gdpo": dict(
        num_iterations=12,
        num_mc_samples=3,
        prompt_mask_probability=0.15,
        learning_rate=3e-7,
        epsilon=0.5,
        epsilon_high=None,
        beta=0.0,
    ),
    "gdsd": dict(
        num_generations=16,
        num_iterations=8,
        num_mc_samples=4,
        denoising_steps=256,
        temperature=1.0,
        weight_decay=0.01,
        psi=10.0,
        token_weights="equal",
        epsilon=4e-4,
        epsilon_high=None,
        beta=1e-3,
    ),
    "coupled": dict(
        num_generations=10,
        num_iterations=2,
        num_mc_samples=2,
        denoising_steps=256,
        temperature=1.0,
        learning_rate=1e-6,
        min_mask_rate=0.2,
        max_mask_rate=0.8,
        epsilon=0.5,
        beta=0.01,
        loss_type="dapo",
    ),
    "wd1": dict(num_iterations=8, num_mc_samples=1, prompt_mask_probability=0.15, beta=0.0),
    "spg": dict(
        num_iterations=4,
        num_mc_samples=2,
        prompt_mask_probability=0.15,
        noise="block_random",
        noise_block_length=None,
        scored="block",
        negative_bound="mix",
        bound_power=1.5,
        mix_weight=0.5,
        beta=0.0,
    ),
    "stable": dict(
        num_generations=16,
        num_iterations=2,
        num_mc_samples=2,
        learning_rate=2e-6,
        lr_scheduler_type="linear",
        epsilon=0.2,
        epsilon_high=None,
        prompt_mask_probability=0.15,
        noise="block_random",
        negative_bound="mix",
        bound_power=1.5,
        mix_weight=0.5,
        beta=0.0,
    ),
    "uni": dict(
        num_iterations=4,
        num_mc_samples=1,
        min_mask_rate=0.1,
        max_mask_rate=0.9,
        epsilon=0.2,
        beta=0.04,
        loss_type="grpo",
    ),
    "tracerl": dict(num_iterations=1, num_mc_samples=16, shrink=8, epsilon=0.2, beta=0.01, loss_type="luspo"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_papers(name):
    made = config(name)
    expected = D1 | DEFAULTS[name]
    assert {field: getattr(made, field) for field in expected} == expected


@pytest.mark.parametrize(
    ("name", "shown", "paper"),
    [
        ("dmpo", "DMPO", "2510.08233"),
        ("espo", "ESPO", "2512.03759"),
        ("gdpo", "GDPO", "2510.08554"),
        ("gdsd", "GDSD", "2605.29398"),
        ("coupled_grpo", "coupled-GRPO", "2506.20639"),
        ("wd1", "wd1", "2507.08838"),
        ("spg", "SPG", "2510.09541"),
        ("stable_drl", "StableDRL", "2603.06743"),
        ("stable_espo", "StableDRL on ESPO", "2603.06743"),
        ("uni_grpo", "UniGRPO", "2505.15809"),
        ("tracerl", "TraceRL", "2509.06949"),
    ],
)
def test_the_model_card_names_the_method_and_cites_its_paper(name, shown, paper, tmp_path):
    trainer = method_named(name).make(tmp_path)
    trainer.create_model_card(dataset_name="words")
    card = (tmp_path / "README.md").read_text()
    assert shown in card and f"arXiv:{paper}" in card and trainer._paper["title"] in card
    assert all(tag in card for tag in trainer._tag_names)
