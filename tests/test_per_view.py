"""Credit of single views and tokens: risk, greedy fills, and how late a token was expected."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from methods import block_causal, method_named, text_reward
from test_sampling import distributions, network, rollout
from tiny import MASK, TAIL, canvas_logits
from trainer_helpers import loss_of_update, num_views, rollout_of, view_of

from trl_diffusion.credit import FillAdvantages, GroupViews, ProgressWeights, StepwiseRisk
from trl_diffusion.likelihood import MaskedViews, Strata
from trl_diffusion.losses import SequenceRatio
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.unmasking import RULES

EGSPO, STEP_RS, DACA = method_named("egspo"), method_named("step_rs"), method_named("daca")


def values(advantages: torch.Tensor, shown: torch.Tensor, **others) -> GroupViews:
    return GroupViews(advantages, shown.expand(*advantages.shape, 1, -1), others.pop("rewards", advantages), **others)


# ------------------------------------------- risk


@pytest.mark.parametrize("successes", [1, 3, 5])
def test_risk_rescales_the_advantages_of_binary_rewards(successes):
    rewards = torch.tensor([[1.0] * successes + [0.0] * (6 - successes)])
    centred, shown = rewards - rewards.mean(), torch.tensor([0.0, 0.25, 0.9])
    found = StepwiseRisk(2.0, -1.0).of_views(values(centred, shown))[0, :, 0]
    rate = successes / 6
    for view, beta in enumerate((2.0, 1.25, -0.7)):
        factor = (math.exp(beta) - 1) / (beta * (1 + rate * (math.exp(beta) - 1)))
        torch.testing.assert_close(found[:, view], factor * centred[0], rtol=1e-5, atol=1e-6)
    assert (found[:, 0] - found[:, 2]).abs().max() > 0.05  # β matters


def test_risk_is_its_formula_and_ignores_completions_without_a_reward():
    rewards = torch.tensor([[0.3, 2.0, -1.0, torch.nan], [0.5, 0.5, 0.1, 0.0]])
    centred, shown = rewards - rewards.nanmean(1, keepdim=True), torch.tensor([0.5])
    found = StepwiseRisk(0.0, 3.0).of_views(values(centred, shown))[:, :, 0, 0]
    for group, own in ((0, [0.3, 2.0, -1.0]), (1, [0.5, 0.5, 0.1, 0.0])):
        mean = sum(math.exp(1.5 * r) for r in own) / len(own)
        expected = [(math.exp(1.5 * r) / mean - 1) / 1.5 for r in own]
        torch.testing.assert_close(found[group, : len(own)], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    none = StepwiseRisk(0.0, 0.0).of_views(values(centred, shown))[:, :, 0, 0]
    torch.testing.assert_close(none, centred, equal_nan=True)


def test_the_share_that_is_shown_is_that_of_each_view(tmp_path):
    trainer = STEP_RS.make(tmp_path, first_risk=1.5, last_risk=-0.5)
    rows = rollout_of(trainer, "a b", "b a a")
    shown = torch.stack([(view_of(trainer, rows, 0, view).canvas != MASK).float().mean(1) for view in range(3)], 1)
    assert len(shown.unique()) > 3
    group = GroupViews(rows["advantages"].view(-1, 4), shown.view(-1, 4, 1, 3), rows["advantages"].view(-1, 4))
    expected = StepwiseRisk(1.5, -0.5).of_views(group).flatten(0, 1)
    torch.testing.assert_close(rows["view_advantages"], expected)
    assert (expected - rows["advantages"].view(-1, 1, 1)).abs().max() > 0.1


# ------------------------------------------- greedy fills


def test_fills_count_by_what_the_group_gained_over_them():
    advantages = torch.tensor([[1.0, -1.0, torch.nan]])
    rewards, nan = torch.tensor([[4.0, 2.0, torch.nan]]), torch.nan
    fills = torch.tensor([[[1.0, nan], [1.0, 2.0], [nan, nan]]]).view(1, 3, 1, 2)
    found = FillAdvantages(0.5).of_views(values(advantages, torch.zeros(2), rewards=rewards, fills=fills))[0, :, 0]
    # gained 3 and 1 at the first view, and nothing to compare at the second
    assert found[:2].tolist() == [[1 + 0.5 * 1, 1.0], [-1 - 0.5 * 1, -1.0]]


def test_fills_are_the_likeliest_tokens_of_each_view_and_judged_by_all_rewards(tmp_path):
    judged = []

    def length(completions, completion_ids, **_):
        judged.append(completion_ids)
        return [0.1 * len(ids) for ids in completion_ids]

    def recorded(completions, completion_ids, prompts, trainer_state, **_):
        assert len(prompts) == len(completion_ids) and trainer_state is not None
        return [
            None if ids == [TAIL] else value
            for ids, value in zip(completion_ids, text_reward(None, completion_ids), strict=True)
        ]

    trainer = EGSPO.make(tmp_path, reward=recorded, beta=0.0)
    trainer.reward_funcs.append(trainer._reward_guard.wrap(length))
    trainer.reward_func_names.append("length")
    trainer.reward_processing_classes.append(None)
    trainer.reward_weights = torch.tensor([1.0, 2.0])
    trainer._view_credit = replace(trainer._view_credit, reward_weights=trainer.reward_weights)
    rows = rollout_of(trainer, "a b", "b a a")
    views = [view_of(trainer, rows, 0, view) for view in range(num_views(trainer))]
    expected = torch.full((8, len(views)), torch.nan)
    for number, view in enumerate(views):
        with torch.no_grad():
            logits = canvas_logits(trainer.model.eval(), rows["prompt_ids"], rows["prompt_mask"], view.canvas)
        filled = torch.where(view.canvas == MASK, logits.argmax(-1), view.canvas)
        n = trainer.family.effective_length(filled).tolist()
        for row in view.targets.any(1).nonzero().flatten().tolist():
            ids = filled[row].tolist()[: n[row]]
            own = 0.0 if ids == [TAIL] else text_reward(None, [ids])[0]
            expected[row, number] = own + 2.0 * 0.1 * len(ids)
    assert expected.isnan().any() or len(judged) == 1 + len(views)
    rewards = trainer.last_rollout[1].rewards
    gained = ((rewards * trainer.reward_weights).nansum(1, keepdim=True) - expected).view(2, 4, -1)
    centred = (gained - gained.nanmean(1, keepdim=True)).nan_to_num(nan=0.0).flatten(0, 1)
    found = rows["view_advantages"][:, 0]
    torch.testing.assert_close(found, rows["advantages"].unsqueeze(1) + 0.5 * centred, atol=1e-5, rtol=1e-5)
    assert centred.abs().max() > 0.1


def test_fills_cost_their_passes_and_change_the_update(tmp_path):
    trainer = EGSPO.make(tmp_path, beta=0.0)
    before = trainer.forward_units
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory, _ = trainer.last_rollout
    present = sum(view_of(trainer, rows, 0, view).targets.any(1).sum() for view in range(num_views(trainer)))
    assert trainer.forward_units - before == pytest.approx(float(trajectory.row_units.sum() + present))
    assert trainer.completion_cost().probe == num_views(trainer)
    trainer.current_gradient_accumulation_steps = 1
    head = trainer.model.lm_head.weight
    (own,) = torch.autograd.grad(loss_of_update(trainer, rows), head)
    del rows["view_advantages"]
    (without,) = torch.autograd.grad(loss_of_update(trainer, rows), head)
    assert (without - own).norm() > 1e-2 * own.norm()
    plain = EGSPO.make(tmp_path, fill_weight=0.0)
    assert plain.completion_cost().probe == 0 and "view_advantages" not in rollout_of(plain, "a b")


def test_what_cannot_be_filled_or_judged_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"FillAdvantages\(weight=0.5\) lets the network fill the whole canvas.*sdar"):
        EGSPO.make(tmp_path, model=block_causal())
    assigned = EGSPO.make(tmp_path)._view_credit
    with pytest.raises(ValueError, match="with reward functions alone; got the reward model Linear"):
        replace(assigned, reward_functions=[torch.nn.Linear(1, 1)])


# ------------------------------------------- when tokens were expected


@pytest.mark.parametrize("unmasking", RULES)
def test_tokens_are_settled_from_the_step_on_that_expected_them(unmasking):
    model = network()
    trajectory = rollout(model, SamplingConfig(8, 8, 4, 1.3, unmasking=unmasking, record_signals=True), rows=24)
    likeliest = torch.stack(
        [torch.tensor(distributions(model, trajectory, step)[..., :4]).argmax(-1) for step in range(8)]
    )
    fates = set()
    for row, position in (trajectory.unmask_step >= 0).nonzero().tolist():
        written, token = int(trajectory.unmask_step[row, position]), trajectory.completion_ids[row, position]
        first = settled = written // 4 * 4
        for step in range(first, written + 1):
            if likeliest[step, row, position] != token:
                settled = step + 1
        assert trajectory.settled_step[row, position] == settled
        fates.add((settled == first, settled == written + 1))
    assert len(fates) == 3 and (trajectory.settled_step[trajectory.unmask_step < 0] == -1).all()
    assert rollout(model, SamplingConfig(8, 8, 4, 1.3, unmasking=unmasking), rows=1).settled_step is None


def test_late_tokens_weigh_more_and_a_text_weighs_one():
    steps = torch.tensor([[0, 2, 3, 4, -1], [1, 0, 4, 5, 6]])
    trajectory = SimpleNamespace(unmask_step=steps, settled_step=torch.tensor([[0, 1, 4, 5, -1], [0, 1, 6, 5, 4]]))
    text = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    known = SimpleNamespace(trajectory=trajectory, text=text, sampling=SimpleNamespace(steps_per_block=4))
    found = ProgressWeights(0.5).token_weights(known)
    late = torch.tensor([[0.0, 1 / 3, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    expected = (0.5 + late) * text / torch.tensor([[0.5 + 7 / 12], [1.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), text.sum(1).float())


def test_weights_of_tokens_multiply_their_terms(tmp_path):
    trainer = DACA.make(tmp_path, beta=0.0, num_mc_samples=1)
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, "a b", "b a a")
    weights = rows["token_weights"]
    assert (weights > 0).eq(rows["completion_mask"].bool()).all() and len(weights.unique()) > 4

    def slopes(weights: torch.Tensor) -> torch.Tensor:
        loss = loss_of_update(trainer, rows | {"token_weights": weights})
        return torch.autograd.grad(loss, trainer.model.lm_head.weight)[0]

    # the loss is linear in the weights: those of single positions add up to it
    apart = [torch.zeros_like(weights).index_copy(1, torch.tensor([i]), weights[:, [i]]) for i in range(8)]
    torch.testing.assert_close(sum(slopes(part) for part in apart), slopes(weights), atol=1e-6, rtol=1e-4)
    assert (slopes(weights) - slopes(torch.ones_like(weights))).norm() > 1e-2 * slopes(weights).norm()


def test_weights_of_tokens_need_a_loss_of_tokens(tmp_path):
    choices = {"likelihood": MaskedViews(Strata(2)), "loss": SequenceRatio()}
    with pytest.raises(ValueError, match=r"ProgressWeights\(floor=0.5\) weighs single tokens.*Got SequenceRatio"):
        DACA.make(tmp_path, choices=choices, num_mc_samples=4, beta=0.04)
    with pytest.raises(ValueError, match="vespo"):
        DACA.make(tmp_path, loss_type="vespo")
    with pytest.raises(ValueError, match="progress_floor must be positive, got 0"):
        DACA.make(tmp_path, progress_floor=0.0)
    with pytest.raises(ValueError, match="A canvas of 8 positions has no 9 strata"):
        DACA.make(tmp_path, num_mc_samples=9)
