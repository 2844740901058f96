"""The eight properties that hold for every method that declares them (tests/methods.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from methods import Method, text_reward, with_property
from peft import LoraConfig
from transformers import TrainerCallback

import trl_diffusion.trainers.diffusion_grpo as base
from trl_diffusion.sampling import row_generators


def methods(number: int):
    return pytest.mark.parametrize("method", with_property(number), ids=lambda method: method.name)


def parameters_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def one_step(method: Method, output_dir, **settings) -> torch.Tensor:
    """Change of the parameters in one update with SGD, rate 1, no clipping."""
    trainer = method.make(output_dir, **settings)
    before = parameters_of(trainer).clone()
    trainer.train()
    return parameters_of(trainer) - before


def recorded_scores(trainer, monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What every loss evaluation sees, in order."""
    seen = []
    score = trainer._score

    def spy(model, rows, views):
        scores = score(model, rows, views)
        if model.training:
            seen.append({**rows, "logps": scores.logps.detach(), "targets": views.targets, "canvas": views.canvas})
        return scores

    monkeypatch.setattr(trainer, "_score", spy)
    return seen


@methods(1)
def test_1_ratios_are_one_on_policy(method, tmp_path, monkeypatch):
    trainer = method.make(tmp_path, learning_rate=0.0, num_iterations=3, max_steps=6)
    seen = recorded_scores(trainer, monkeypatch)
    trainer.train()
    assert len(seen) == 6 * 2 * trainer.args.num_mc_samples  # updates × micro-batches × views
    log_ratios = torch.cat([(x["logps"] - x["old_per_token_logps"])[x["targets"]] for x in seen])
    assert log_ratios.numel() > 100
    assert log_ratios.abs().max() <= 1e-4
    rows = torch.cat([x["global_row"] for x in seen[:2]])
    assert rows.tolist() != sorted(rows.tolist())  # TRL shuffled them
    steps = torch.cat([x["view_steps"] for x in seen])
    assert not torch.equal(steps[:, 0], steps[:, 1])  # masks differ between updates …
    assert not (steps == steps[0]).all()  # … and between rows
    # negative control: the network that scores is not the one that wrote
    other = method.make(tmp_path, learning_rate=0.0, max_steps=1)
    late = recorded_scores(other, monkeypatch)
    compute = other._compute_loss

    def drifted(model, inputs):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return compute(model, inputs)

    monkeypatch.setattr(other, "_compute_loss", drifted)
    other.train()
    assert max((x["logps"] - x["old_per_token_logps"])[x["targets"]].abs().max() for x in late) > 1e-4


@methods(1)
def test_1_the_metric_reports_the_largest_log_ratio(method, tmp_path):
    trainer = method.make(tmp_path, learning_rate=0.0, max_steps=1, logging_steps=1)
    trainer.train()
    logged = [x["rollout/max_abs_log_ratio"] for x in trainer.state.log_history if "rollout/max_abs_log_ratio" in x]
    assert len(logged) == 1 and 0 <= logged[0] <= 1e-4


@methods(2)
def test_2_views_cover_every_eligible_token_as_often_as_they_claim(method, tmp_path, monkeypatch):
    draws = 8000
    trainer = method.make(tmp_path, num_mc_samples=draws)
    # One training row batch, without the loss: only the plan is looked at.
    trainer.model.train()
    batch = [{"prompt": "a b"}] * 4 + [{"prompt": "b a a"}] * 4
    rows = trainer._generate_and_score_completions(batch)
    eligible = rows["completion_mask"].bool()
    steps, weights = rows["view_steps"][:, 0], rows["view_weights"][:, 0]
    covered, own_weight = torch.zeros_like(rows["old_per_token_logps"]), torch.zeros_like(rows["old_per_token_logps"])
    for row in range(len(eligible)):
        hits = (steps[row].unsqueeze(1) == rows["unmask_step"][row]) * weights[row].unsqueeze(1)
        covered[row], own_weight[row] = hits.mean(0), hits.max(0).values
    num_eligible = (rows["unmask_step"].masked_fill(~eligible, -1).max(1).values + 1).unsqueeze(1)
    claim = torch.ones_like(covered) if trainer.args.step_reduction == "sum" else 1 / num_eligible.expand_as(covered)
    assert eligible.any() and not eligible.all()
    # A step's share of the unit interval has two ends, each within one stratum: it is off by less than two draws.
    drawn = eligible & (own_weight > 0)
    assert drawn.sum() >= 0.8 * eligible.sum()
    assert ((covered - claim).abs() < 2 * own_weight / draws)[drawn].all()
    views = trainer._view_of(rows, 0, 0)
    assert not (views.targets & ~eligible).any()


@methods(4)
@pytest.mark.parametrize(
    "other",
    [
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        {"pad_to_multiple_of": 16},
        {"order": "reversed"},
    ],
    ids=["one micro-batch", "groups over micro-batches", "more left padding", "row order"],
)
def test_4_the_update_does_not_depend_on_how_rows_are_laid_out(method, other, tmp_path, monkeypatch):
    reference = one_step(method, tmp_path / "a")
    other = dict(other)
    if other.pop("order", None):
        shuffle = "trl.trainer.grpo_trainer.shuffle_sequence_dict"
        monkeypatch.setattr(shuffle, lambda rows: {k: v.flip(0) if v.dim() else v for k, v in rows.items()})
    assert reference.norm() > 1e-2
    torch.testing.assert_close(one_step(method, tmp_path / "b", **other), reference, rtol=1e-4, atol=1e-6)


@methods(4)
def test_4_negative_control_other_completions_give_another_update(method, tmp_path):
    reference = one_step(method, tmp_path / "a")
    assert (one_step(method, tmp_path / "b", seed=43) - reference).norm() > 1e-2 * reference.norm()


def never_ties(completions, **kwargs) -> list[float]:
    return [float(row) for row in range(len(completions))]


@methods(5)
@pytest.mark.parametrize("num_mc_samples", [1, 8])
def test_5_one_optimizer_step_per_update(method, num_mc_samples, tmp_path, monkeypatch):
    trainer = method.make(tmp_path, num_mc_samples=num_mc_samples, max_steps=3, learning_rate=1e-2, reward=never_ties)
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


@methods(6)
def test_6_groups_are_normalised_over_the_whole_group(method, tmp_path):
    trainer = method.make(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)  # B = 2, G = 4
    trainer.model.train()
    batch = [{"prompt": prompt} for prompt in ("a b", "b", "a", "b a") for _ in range(4)]
    rows = trainer._generate_and_score_completions(batch)
    length = trainer.family.effective_length(rows["completion_ids"]).tolist()
    ids = [x[:n] for x, n in zip(rows["completion_ids"].tolist(), length, strict=True)]
    groups = torch.tensor(text_reward(None, ids)).view(-1, 4)
    centred = groups - groups.mean(1, keepdim=True)
    if trainer.args.scale_rewards == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(rows["advantages"].view(-1, 4), centred, rtol=1e-4, atol=1e-5)
    assert centred.abs().max() > 0.1


@methods(7)
def test_7_noise_is_private_and_keyed_by_the_global_row(method, tmp_path):
    trainer = method.make(tmp_path, num_iterations=2)
    trainer.model.train()
    batch = [{"prompt": "a b"}] * 8
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    rows = trainer._generate_and_score_completions(batch)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert rows["global_row"].tolist() == list(range(8))
    # one prompt, eight streams
    assert len({tuple(x) for x in torch.cat([rows["completion_ids"], rows["unmask_step"]], 1).tolist()}) > 4

    # The stream of a row is a function of (seed, rollout, row): replaying it alone gives the same completion.
    model, config = trainer.model, trainer.args.sampling_config()
    for row in (0, 5):
        stream = row_generators(trainer.args.seed, base.TRAIN_ROLLOUT, 0, rows=[row])
        alone = base.sample(model, rows["prompt_ids"][:1], None, config, stream)
        assert torch.equal(alone.completion_ids[0], rows["completion_ids"][row])
    # The next rollout of the same prompts differs.
    again = trainer._generate_and_score_completions(batch)
    assert not torch.equal(again["completion_ids"], rows["completion_ids"])


@methods(8)
def test_8_rollouts_and_scoring_run_without_dropout_and_without_autograd(method, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    settings = {"loss_type": "dr_grpo", "beta": 0.1, "disable_dropout": False, "num_iterations": 2}
    trainer = method.make(tmp_path, peft_config=lora, **settings)
    modes = []
    head = trainer.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: modes.append((module.training, output.requires_grad)))
    trainer.model.train()
    rows = trainer._generate_and_score_completions([{"prompt": "a b"}] * 8)
    assert modes and all(mode == (False, False) for mode in modes)
    assert trainer.model.training
    assert not rows["old_per_token_logps"].requires_grad and not rows["ref_per_token_logps"].requires_grad
