"""The properties that hold for every method that declares them (tests/methods.py).

Property 3, enumeration, has other formulas for every method: test_exact_gradient.py, test_step_selection.py and
test_diffu_grpo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from methods import METHODS, Method, method_named, text_reward, with_property
from peft import LoraConfig
from tiny import END, MASK, TAIL
from trainer_helpers import (
    hidden_by_row,
    largest_log_ratio,
    losses_seen,
    num_views,
    parameters_of,
    plan_of,
    rollout_of,
    view_of,
)
from transformers import TrainerCallback

from trl_diffusion.sampling import Trajectory, row_generators, sample
from trl_diffusion.sampling.trajectory import taken_steps
from trl_diffusion.streams import Purpose

pytestmark = pytest.mark.slow


def methods(number: int):
    return pytest.mark.parametrize("method", with_property(number), ids=lambda method: method.name)


def one_step(method: Method, output_dir, **settings) -> torch.Tensor:
    """Change of the parameters in one update with SGD, rate 1, no clipping."""
    trainer = method.make(output_dir, **settings)
    before = parameters_of(trainer).clone()
    trainer.train()
    return parameters_of(trainer) - before


@pytest.fixture(scope="module")
def reference_update(tmp_path_factory) -> Callable[[Method], torch.Tensor]:
    """The update of a method as it is, computed once for all tests that compare with it."""
    folder = tmp_path_factory.mktemp("reference")
    updates = cache(lambda name: one_step(method_named(name), folder / name))
    return lambda method: updates(method.name)


@methods(1)
def test_1_ratios_are_one_on_policy(method, tmp_path, monkeypatch):
    trainer = method.make(tmp_path, learning_rate=0.0, num_iterations=3, max_steps=6)
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    views = num_views(trainer)
    assert len(seen) == 6 * 2 * views  # updates × micro-batches × views
    assert sum(x["targets"].sum() for x in seen) > 100
    assert largest_log_ratio(seen) <= 1e-4
    if seen[0]["reference"] is not None:
        assert largest_log_ratio(seen, to="reference") <= 1e-4
    rows = torch.cat([seen[0]["global_row"], seen[views]["global_row"]]).tolist()
    assert rows != sorted(rows)  # TRL shuffled them
    hidden = hidden_by_row(seen, 6, views)
    assert not (hidden == hidden[:, :, :1]).all()  # masks differ between rows …
    for first, second in combinations(hidden[:3], 2):  # … and between the updates of a rollout
        assert torch.equal(first, second) != method.fresh_views


@methods(1)
def test_1_negative_control_a_network_that_is_not_the_one_that_wrote(method, tmp_path, monkeypatch):
    trainer = method.make(tmp_path, learning_rate=0.0)
    seen, compute = losses_seen(trainer, monkeypatch), trainer._compute_loss

    def drifted(model, inputs):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_compute_loss", drifted)
    trainer.train()
    assert largest_log_ratio(seen) > 1e-4


@methods(1)
def test_1_the_metric_reports_the_largest_log_ratio(method, tmp_path):
    trainer = method.make(tmp_path, learning_rate=0.0, max_steps=1, logging_steps=1)
    trainer.train()
    logged = [x["rollout/max_abs_log_ratio"] for x in trainer.state.log_history if "rollout/max_abs_log_ratio" in x]
    assert len(logged) == 1 and 0 <= logged[0] <= 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS if m.any_rollout], ids=lambda method: method.name)
def test_rollouts_whose_steps_commit_as_many_tokens_as_are_certain(method, tmp_path, monkeypatch):
    """Trajectories with numbers of steps of their own train every method; ratios stay one."""
    settings = {"unmasking": "max_prob", "confidence_threshold": 0.6, "num_iterations": 1, "max_steps": 1}
    trainer = method.make(tmp_path, **settings)
    seen = losses_seen(trainer, monkeypatch) if 1 in method.applies else None
    before = parameters_of(trainer).clone()
    trainer.train()
    unmask_step = trainer.last_rollout[0].unmask_step.tolist()
    taken = [len(set(row) - {-1}) for row in unmask_step]
    assert any(len(steps) <= max(steps) for row in unmask_step if (steps := set(row) - {-1}))  # some skip a step
    assert len(set(taken)) > 1
    assert not torch.equal(parameters_of(trainer), before)
    if seen is not None:
        assert sum(x["targets"].sum() for x in seen) > 0
        assert largest_log_ratio(seen) <= 1e-4


def committed_steps(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The eligible steps N of each completion, long [B, 1]."""
    eligible = rows["completion_mask"].bool()
    assert eligible.any() and not eligible.all()
    return (rows["unmask_step"].masked_fill(~eligible, -1).max(1).values + 1).unsqueeze(1).long()


def coverage(rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """How often all draws of steps cover each token, weighted and per draw, and the weight of a hit; [B, L] each."""
    covered, weight = torch.zeros(rows["unmask_step"].shape), torch.zeros(rows["unmask_step"].shape)
    steps, weights = rows["view_steps"].flatten(1), rows["view_weights"].flatten(1)
    for row, unmask_step in enumerate(rows["unmask_step"]):
        hits = (steps[row].unsqueeze(1) == unmask_step) * weights[row].unsqueeze(1)
        covered[row], weight[row] = hits.mean(0), hits.max(0).values
    return covered, weight


def drawn_steps_cover(method: Method, folder) -> None:
    draws = 8000
    trainer = method.make(folder, num_mc_samples=draws)
    rows = rollout_of(trainer, "a b", "b a a")
    eligible, steps = rows["completion_mask"].bool(), committed_steps(rows)
    covered, weight = coverage(rows)
    claim = torch.ones_like(covered) if trainer.args.step_reduction == "sum" else 1 / steps.expand_as(covered)
    # A step's share of the unit interval has two ends, each within one stratum: it is off by less than two draws.
    drawn = eligible & (weight > 0)
    assert drawn.sum() >= 0.8 * eligible.sum()
    assert ((covered - claim).abs() < 2 * weight / draws)[drawn].all()
    assert not (view_of(trainer, rows, 0, 0).targets & ~eligible).any()


def sampled_steps_cover(method: Method, folder) -> None:
    """A selector draws at most S steps at once, so many inner updates make many draws."""
    trainer = method.make(folder, num_iterations=1500)
    rows = rollout_of(trainer, "a b", "b a a")
    eligible, claim = rows["completion_mask"].bool(), 1 / committed_steps(rows)
    covered, weight = coverage(rows)
    draws = 1500 * trainer.args.num_mc_samples
    # independent draws: five standard deviations of a frequency, at most ½/√draws each
    assert ((covered - claim).abs() < 2.5 * weight / draws**0.5)[eligible].all()
    assert (weight[eligible] > 0).all() and not covered[~eligible].any()
    unweighted = coverage(rows | {"view_weights": torch.ones_like(rows["view_weights"])})[0]
    assert not ((unweighted - claim).abs() < 2.5 * weight / draws**0.5)[eligible].all()


def every_step_covers(method: Method, folder) -> None:
    """Each step of the kind that learns has one view, and its weight makes the mean over views the claimed one."""
    trainer = method.make(folder)
    rows = rollout_of(trainer, "a b", "b a a")
    trajectory, _ = trainer.last_rollout
    likelihood = trainer.choices.likelihood
    eligible, steps = rows["completion_mask"].bool(), torch.arange(8 // likelihood.merge)
    unmask_step = trajectory.unmask_step // likelihood.merge
    learns = (steps < committed_steps(rows)) & taken_steps(unmask_step, len(steps))
    if trajectory.forced is not None:
        assert (learns & ~trajectory.forced).any()
        learns &= trajectory.forced
    if likelihood.steps.rule == "top_entropy":
        for row in unmask_step.tolist():  # one token a step
            assert len(set(row) - {-1}) == len(row) - row.count(-1)
        taken, end = unmask_step >= 0, len(steps)
        of_step = torch.zeros(len(learns), end + 1)
        of_step.scatter_(1, torch.where(taken, unmask_step, end).long(), trajectory.entropies)
        for row in range(len(learns)):
            half = -(-int(learns[row].sum()) // 2)
            count = half if likelihood.steps.share == 0.5 else likelihood.steps.count
            order = sorted(steps[learns[row]].tolist(), key=lambda step, row=row: (-of_step[row, step], step))
            learns[row] = torch.isin(steps, torch.tensor(order[:count]))
    fixed = likelihood.steps.rule == "top_entropy" and likelihood.steps.share != 0.5
    assert learns.any(1).all() and (fixed or len(learns.sum(1).unique()) > 1)
    views = torch.stack([view_of(trainer, rows, 0, view).targets for view in range(num_views(trainer))], 1)
    of_token = learns.gather(1, unmask_step.clamp(min=0).long()) & eligible
    assert torch.equal(views.sum(1), of_token.long())
    assert of_token[unmask_step == 0].any()  # the tokens of the first step too
    covered, _ = coverage(rows | {"unmask_step": unmask_step})
    claim = 1 / learns.sum(1, keepdim=True) if likelihood.steps.reduction == "mean" else torch.ones(len(learns), 1)
    torch.testing.assert_close(covered, of_token * claim)


def chosen_steps_cover(method: Method, folder) -> None:
    trainer = method.make(folder)
    rows = rollout_of(trainer, "a b", "b a a")
    ((*chosen,),) = trainer.last_selection.tolist()
    assert len(set(chosen)) == trainer.args.num_mc_samples and min(chosen) >= 0
    taken = committed_steps(rows).squeeze(1)
    assert taken.min() <= max(chosen)  # some completion ended before
    for view, step in enumerate(chosen):
        targets = view_of(trainer, rows, 0, view).targets
        assert torch.equal(targets, (rows["unmask_step"] == step) & rows["completion_mask"].bool())
        assert torch.equal(targets.any(1), step < taken)
        assert torch.equal(rows["view_weights"][:, 0, view], (step < taken).float())


def text_of(rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bool [B, L], the tokens up to and including the first end token."""
    text = torch.zeros_like(rows["completion_ids"], dtype=torch.bool)
    for row, ids in enumerate(rows["completion_ids"].tolist()):
        ends = [position for position, token in enumerate(ids) if token in (TAIL, END)]
        text[row, : ends[0] + 1 if ends else None] = True
    assert not text.all()
    return text


def noised_rows(method: Method, folder) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A rollout batch, and what its views hide and score: two bool [updates, views, B, L]."""
    trainer = method.make(folder, num_iterations=2)
    rows = rollout_of(trainer, "a b", "b a a")
    rows["unmask_step"] = trainer.last_rollout[0].unmask_step
    views = [[view_of(trainer, rows, update, view) for view in range(num_views(trainer))] for update in range(2)]
    hidden = torch.stack([torch.stack([view.canvas == MASK for view in update]) for update in views])
    targets = torch.stack([torch.stack([view.targets for view in update]) for update in views])
    for view in (view for update in views for view in update):
        assert torch.equal(view.canvas[view.canvas != MASK], rows["completion_ids"][view.canvas != MASK])
    assert not (targets & ~hidden).any()
    return rows, hidden, targets


def masked_canvas_covers(method: Method, folder) -> None:
    rows, hidden, targets = noised_rows(method, folder)
    assert hidden.all() and (targets == text_of(rows)).all()
    assert torch.equal(rows["completion_mask"].bool(), text_of(rows))


def random_rates_cover(method: Method, folder) -> None:
    """Whatever is hidden of what may learn is scored; masks are independent."""
    rows, hidden, targets = noised_rows(method, folder)
    learns = rows["completion_mask"].bool()
    assert torch.equal(learns, text_of(rows)) or learns.all()
    assert torch.equal(targets, hidden & learns)
    assert 0 < hidden.float().mean() < 1 and len(hidden.flatten(0, 2).unique(dim=0)) > 4


def parts_cover(method: Method, folder) -> None:
    """Every position of the canvas is hidden once, and every token of the text scored once."""
    rows, hidden, targets = noised_rows(method, folder)
    assert (hidden.sum(1) == 1).all() and (targets.sum(1) == text_of(rows)).all()
    sizes = hidden.sum(-1)
    assert (sizes.amax() - sizes.amin() <= 1) and hidden.size(1) > 1
    assert len(hidden.flatten(0, 2).unique(dim=0)) > 8  # the parts are random


def pairs_cover(method: Method, folder) -> None:
    """Every position of the canvas once per pair."""
    _, hidden, targets = noised_rows(method, folder)
    assert torch.equal(hidden, targets)
    assert (hidden[:, ::2] != hidden[:, 1::2]).all()
    assert len({tuple(sizes) for sizes in hidden.sum(-1)[:, ::2].flatten(1).T.tolist()}) > 2  # sizes differ


def fixed_sizes_cover(method: Method, folder) -> None:
    """Of the canvas's 8 positions, 8 t + ½ rounded up or down are hidden in the view of time t, and scored."""
    _, hidden, targets = noised_rows(method, folder)
    assert torch.equal(hidden, targets)
    times = torch.from_numpy(np.polynomial.legendre.leggauss(hidden.size(1))[0] + 1) / 2
    excess = hidden.sum(-1) - (8 * times + 0.5).view(1, -1, 1)
    assert (excess > -1).all() and (excess < 1).all() and (excess > 0).any() and (excess < 0).any()
    assert len(hidden.flatten(0, 2).unique(dim=0)) > 4


def coupled_pairs_cover(method: Method, folder) -> None:
    """Every token of the text once in the masked canvas, and once per pair."""
    rows, hidden, targets = noised_rows(method, folder)
    assert hidden[:, 0].all() and (hidden[:, 1::2] != hidden[:, 2::2]).all()
    assert (targets.sum(1) == 2 * text_of(rows)).all()


def blocks_cover(method: Method, folder) -> None:
    """A subset of one block of the text; later blocks and all behind the text hidden and never scored."""
    rows, hidden, targets = noised_rows(method, folder)
    text = text_of(rows)
    assert targets.any(-1).all() and not (targets & ~text).any()
    blocks = targets.unflatten(-1, (2, 4)).any(-1)
    assert (blocks.sum(-1) == 1).all() and blocks.flatten(0, 2).any(0).all()
    later = targets.flip(-1).cumsum(-1).flip(-1) == 0
    behind = torch.cat(
        [torch.zeros_like(later[..., :4]), (~blocks[..., 1:] & blocks[..., :1]).expand(*later.shape[:-1], 4)], -1
    )
    assert (hidden | ~behind).all() and (hidden | text).all()


def subsets_of_the_text_cover(method: Method, folder) -> None:
    rows, hidden, targets = noised_rows(method, folder)
    text = text_of(rows)
    assert torch.equal(targets, hidden & text) and (hidden | text).all() and targets.any(-1).all()
    assert len(targets.sum(-1).unique()) > 2


def split_steps_cover(method: Method, folder) -> None:
    """Every token of the text once: on the masked canvas if it was written before a step, else on that step's."""
    rows, hidden, targets = noised_rows(method, folder)
    text, unmask_step = text_of(rows), rows["unmask_step"]
    assert hidden.size(1) == 2 and hidden[:, 0].all() and (targets.sum(1) == text).all()
    drawn = set()
    for update, row in product(range(2), range(len(text))):
        fits = [
            step
            for step in set(unmask_step[row].tolist()) - {-1}
            if torch.equal(hidden[update, 1, row], (unmask_step[row] >= step) | (unmask_step[row] < 0))
            and torch.equal(targets[update, 0, row], text[row] & (unmask_step[row] < step))
        ]
        assert len(fits) == 1  # one of the steps that were taken
        drawn |= {tuple(fits)}
    assert len(drawn) > 3


def step_groups_cover(method: Method, folder, steps: int = 8) -> None:
    """Every token of the text once, in the view of its own step and its neighbours."""
    rows, hidden, targets = noised_rows(method, folder)
    sampled, shrink = rows["unmask_step"] >= 0, 2
    trajectory_steps = torch.where(sampled, rows["unmask_step"] % steps, -1)
    assert targets.size(1) == steps // shrink and not sampled.all()
    assert (targets.sum(1) == text_of(rows)).all()
    for view in range(targets.size(1)):
        assert torch.equal(targets[0, view], text_of(rows) & (trajectory_steps // shrink == view))
        assert torch.equal(hidden[0, view], (trajectory_steps >= shrink * view) | (trajectory_steps < 0))


def step_groups_of_blocks_cover(method: Method, folder) -> None:
    """The same with the steps of all blocks at once, which one view then shows and hides."""
    if method.name == "dipo":
        method = replace(method, settings=method.settings | {"shrink": 2})
    step_groups_cover(method, folder, steps=4)


COVERAGE = {
    "drawn": drawn_steps_cover,
    "every": every_step_covers,
    "sampled": sampled_steps_cover,
    "chosen": chosen_steps_cover,
    "masked": masked_canvas_covers,
    "rate": random_rates_cover,
    "parts": parts_cover,
    "split": split_steps_cover,
    "pairs": pairs_cover,
    "sizes": fixed_sizes_cover,
    "coupled": coupled_pairs_cover,
    "blocks": blocks_cover,
    "text": subsets_of_the_text_cover,
    "groups": step_groups_cover,
    "within": step_groups_of_blocks_cover,
}


@methods(2)
def test_2_views_cover_every_eligible_token_as_often_as_they_claim(method, tmp_path):
    COVERAGE[method.views](method, tmp_path)


# Groups over micro-batches, with more left padding, in another order.
SEVERAL: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "pad_to_multiple_of": 16,
    "order": "reversed",
}
TOGETHER: dict[str, Any] = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


@methods(4)
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(SEVERAL, id="several micro-batches"),
        pytest.param(TOGETHER, id="one micro-batch", marks=pytest.mark.thorough),
    ],
)
def test_4_the_update_does_not_depend_on_how_rows_are_laid_out(method, other, reference_update, tmp_path, monkeypatch):
    reference = reference_update(method)
    other = dict(other)
    if other.pop("order", None):
        shuffle = "trl.trainer.grpo_trainer.shuffle_sequence_dict"
        monkeypatch.setattr(shuffle, lambda rows: {k: v.flip(0) if v.dim() else v for k, v in rows.items()})
    assert reference.norm() > 1e-2
    found = one_step(method, tmp_path, **other)
    assert (found - reference).norm() <= 5e-6 * reference.norm()  # float32, in another order of sums


@methods(4)
def test_4_negative_control_other_completions_give_another_update(method, reference_update, tmp_path):
    reference = reference_update(method)
    assert (one_step(method, tmp_path, seed=43) - reference).norm() > 1e-2 * reference.norm()


def test_4_no_two_methods_make_the_same_update(reference_update):
    """So that no entry of the list tests another one's code."""
    updates = [reference_update(method) for method in METHODS]
    for first, second in combinations(updates, 2):
        if first.shape == second.shape:  # of one network
            assert (first - second).norm() > 1e-2 * first.norm()


def never_ties(completions, **kwargs) -> list[float]:
    return [float(row) for row in range(len(completions))]


@methods(5)
@pytest.mark.parametrize("views", ["few_views", "many_views"])
def test_5_one_optimizer_step_per_update(method, views, tmp_path, monkeypatch):
    settings = getattr(method, views) | {"denoising_steps": 8}  # a selector takes no more views than steps
    trainer = method.make(tmp_path, max_steps=3, learning_rate=1e-2, reward=never_ties, **settings)
    changes = []

    class Count(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            changes.append(parameters_of(trainer).clone())

    trainer.add_callback(Count())
    before = parameters_of(trainer).clone()
    trainer.train()
    assert trainer.state.global_step == 3 and len(changes) == 3
    for earlier, later in zip([before, *changes[:-1]], changes, strict=True):
        assert not torch.equal(earlier, later)
    assert trainer._step == 3 * trainer.args.gradient_accumulation_steps


def outcome_alone(trainer, rows: dict[str, torch.Tensor], centred: torch.Tensor, rewards: torch.Tensor) -> None:
    torch.testing.assert_close(rows["advantages"].view(-1, 4), centred, atol=1e-5, rtol=1e-5)


def outcome_by_length(trainer, rows, centred: torch.Tensor, rewards: torch.Tensor) -> None:
    length = rows["completion_mask"].sum(1).view(-1, 4)
    expected = centred * length / length.float().mean()
    torch.testing.assert_close(rows["advantages"].view(-1, 4), expected, atol=1e-5, rtol=1e-5)
    assert (expected - centred).abs().max() > 1e-2


def outcome_and_process_reward(trainer, rows, centred: torch.Tensor, rewards: torch.Tensor) -> None:
    """Success rate of two continuations, so 0, ½ or 1, minus that of the group of four, for successes alone."""
    probe, extra = trainer._probe.settings, rows["advantages"].view(-1, 4) - centred
    success = (rewards >= probe.success_threshold).float()
    probed = (centred > 0) & (success == 1)
    assert extra[~probed].abs().max() < 1e-5
    rate = extra + success.mean(1, keepdim=True)
    differs = probed & (extra.abs() > 1e-5)  # completions of one block have no state in between
    assert differs.any()
    assert ((rate * probe.num_rollouts).round() / probe.num_rollouts - rate)[differs].abs().max() < 1e-5
    halves = success.unflatten(1, (2, 2)).mean(2).repeat_interleave(2, dim=1)
    assert (halves != success.mean(1, keepdim=True))[differs].any()  # the rate of half a group would show


def left_out_mean(trainer, rows, centred: torch.Tensor, rewards: torch.Tensor) -> None:
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    torch.testing.assert_close(rows["advantages"].view(-1, 4), rewards - others, atol=1e-5, rtol=1e-5)


def population_z_score(trainer, rows, centred: torch.Tensor, rewards: torch.Tensor) -> None:
    expected = centred / rewards.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(rows["advantages"].view(-1, 4), expected, atol=1e-4, rtol=1e-4)


def softmax_of_the_target(trainer, rows, centred: torch.Tensor, rewards: torch.Tensor) -> None:
    """The reference is the policy before the first update, so the weights are those of exp(r/α)."""
    weights = (rewards / trainer.args.alpha).softmax(1)
    baseline = 1 / 4 if trainer.args.weight_baseline == "group" else 0
    torch.testing.assert_close(rows["advantages"].view(-1, 4), 4 * (weights - baseline), atol=4e-5, rtol=1e-4)


def difference_of_softmaxes(trainer, rows, centred: torch.Tensor, rewards: torch.Tensor) -> None:
    expected = 4 * (centred.softmax(1) - (-centred).softmax(1))
    torch.testing.assert_close(rows["advantages"].view(-1, 4), expected, atol=1e-5, rtol=1e-5)


CREDIT = {
    "outcome": outcome_alone,
    "by_length": outcome_by_length,
    "process_reward": outcome_and_process_reward,
    "leave_one_out": left_out_mean,
    "z_score": population_z_score,
    "softmax": softmax_of_the_target,
    "opposed_softmax": difference_of_softmaxes,
}


@methods(6)
def test_6_groups_are_normalised_over_the_whole_group(method, tmp_path):
    trainer = method.make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)  # B = 2, G = 4
    rows = rollout_of(trainer, "a b", "b", "a", "b a")
    length = trainer.family.effective_length(rows["completion_ids"]).tolist()
    ids = [x[:n] for x, n in zip(rows["completion_ids"].tolist(), length, strict=True)]
    rewards = torch.tensor(text_reward(None, ids)).view(-1, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    if trainer.args.scale_rewards == "group":
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    assert centred.abs().max() > 0.1
    CREDIT[method.credit](trainer, rows, centred, rewards)


@methods(7)
def test_7_noise_is_private_and_keyed_by_the_global_row(method, tmp_path):
    trainer = method.make(tmp_path, num_iterations=2)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    rows = rollout_of(trainer, "a b", copies=8)
    trajectory, _ = trainer.last_rollout
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert rows["global_row"].tolist() == list(range(8))
    # one prompt, eight streams
    assert len({tuple(x) for x in torch.cat([trajectory.completion_ids, trajectory.unmask_step], 1).tolist()}) > 4

    # The stream of a row is a function of (seed, rollout, row): replaying it alone gives the same completion.
    model, config = trainer.model, trainer.args.sampling_config()
    for row in (0, 5):
        stream = row_generators(trainer.args.seed, Purpose.TRAIN_ROLLOUT, 0, rows=[row])
        alone = sample(model, rows["prompt_ids"][:1], None, config, stream)
        assert torch.equal(alone.completion_ids[0], rows["completion_ids"][row])
        assert torch.equal(alone.unmask_step[0], trajectory.unmask_step[row])
    # The next rollout of the same prompts differs.
    again = rollout_of(trainer, "a b", copies=8)
    assert not torch.equal(again["completion_ids"], rows["completion_ids"])


def part_of(trajectory: Trajectory, rows: list[int]) -> Trajectory:
    tensors = {field.name: getattr(trajectory, field.name) for field in fields(trajectory)}
    return replace(
        trajectory, **{name: value[rows] for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    )


def shown(trainer, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Prompt, canvas and targets of every view of two inner updates, [views, B, tokens]."""
    places = product(range(2), range(num_views(trainer)))
    views = [view_of(trainer, rows, update, view) for update, view in places]
    prompts = [rows["prompt_ids"] if x.prompt_ids is None else x.prompt_ids for x in views]
    return torch.stack([torch.cat([p, x.canvas, x.targets], 1) for p, x in zip(prompts, views, strict=True)])


@pytest.mark.parametrize(
    "method",
    # what a selector draws is shared by completions: test_step_selection.py
    [method for method in with_property(7) if method.views not in ("chosen", "sampled")],
    ids=lambda method: method.name,
)
def test_7_views_of_a_completion_are_drawn_from_its_own_stream(method, tmp_path):
    trainer = method.make(tmp_path, num_iterations=2)
    rows = rollout_of(trainer, "b b a b", copies=8)
    trajectory, _ = trainer.last_rollout
    apart = [7, 2, 5, 0, 4, 1]

    def planned(own: list[int], rollout: int = 0, **changes: torch.Tensor) -> torch.Tensor:
        """What the views show if the trainer plans them for some of the rows alone."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "global_row", "advantages")
        part = {name: rows[name][own] for name in names}
        part |= changes
        return shown(trainer, part | plan_of(trainer, part_of(trajectory, own), part, number=rollout))

    expected = shown(trainer, rows)[:, apart]
    assert torch.equal(planned(apart), expected)
    if method.fresh_views:
        assert not torch.equal(planned(apart, rollout=1), expected)
        assert not torch.equal(planned(apart, global_row=torch.tensor(apart[::-1])), expected)


@methods(8)
def test_8_rollouts_and_scoring_run_without_dropout_and_without_autograd(method, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    settings = method.compares | {"disable_dropout": False, "num_iterations": 2}
    trainer = method.make(tmp_path, peft_config=lora, **settings)
    modes = []
    norm = trainer.model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, output: modes.append((module.training, output.requires_grad)))
    rows = rollout_of(trainer, "a b", copies=8)
    assert modes and all(mode == (False, False) for mode in modes)
    assert trainer.model.training
    assert not any(value.requires_grad for value in rows.values())
    assert ("ref_per_token_logps" in rows) == ("beta" in method.compares and not method.name.startswith("tracerl"))
