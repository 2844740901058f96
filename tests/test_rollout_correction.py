"""Rollouts under an approximate cache: another policy wrote the completions, and the update knows it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from enumeration import enumerate_paths
from methods import method_named
from test_exact_gradient import PROMPT, as_rows, gradient, make_trainer, reward_of, trainer_gradient
from tiny import forwards_of, tiny_model
from trainer_helpers import largest_log_ratio, logps_of, loss_inputs, losses_seen, rollout_of, score, view_of
from trl import GRPOTrainer

from trl_diffusion.likelihood import Scores
from trl_diffusion.losses import TokenRatio
from trl_diffusion.runtime.scoring import ViewScorer
from trl_diffusion.trainers import AGRPOConfig

DUAL = {"cache": "dual", "unmasking": "max_prob", "denoising_steps": 8, "learning_rate": 0.0, "num_iterations": 2}


# ------------------------------------------- the gradient, when one network writes and another learns


def gradients(tmp_path, length: int, distance: float = 0.2, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(The policy gradient, that of the trainer's loss over all trajectories as often as another network writes
    them)."""
    model, writer = tiny_model(seed=3).double(), tiny_model(seed=3).double()
    with torch.no_grad():
        for parameter, other in zip(writer.parameters(), tiny_model(seed=4).double().parameters(), strict=True):
            parameter.lerp_(other, distance)
    paths, written = (enumerate_paths(net.eval(), PROMPT, length, length, 1) for net in (model, writer))
    assert [path.tokens for path in paths] == [path.tokens for path in written]
    probability = torch.stack([path.probability for path in paths])
    behaviour = torch.stack([path.probability for path in written]).detach()
    rewards = torch.tensor([reward_of(path.tokens) for path in paths], dtype=torch.float64)
    shape = dict(max_completion_length=length, block_length=length, denoising_steps=1, num_mc_samples=1)
    objective = dict(step_scope="exact", step_reduction="sum", step_draws="uniform", cache="dual", epsilon=1e6)
    trainer = make_trainer(model, tmp_path, len(paths), **shape, **objective, **settings)
    rows, _ = as_rows(
        trainer, [replace(path, token_logps=other.token_logps) for path, other in zip(paths, written, strict=True)]
    )
    rows["advantages"] = behaviour * (rewards - behaviour @ rewards) * len(paths)
    if "old_per_token_logps" not in rows:
        rows["old_per_token_logps"] = logps_of(trainer, model, rows)
    return gradient(model, (probability * rewards).sum()), -trainer_gradient(trainer, rows)


def test_recomputed_and_weighted_it_is_the_policy_gradient(tmp_path):
    exact, found = gradients(tmp_path, 1, rollout_correction_cap=1e6)
    torch.testing.assert_close(found, exact.to(found.dtype), atol=1e-5, rtol=1e-5)
    assert exact.norm() > 0.1


def test_cut_weights_lie_between_no_weights_and_all(tmp_path):
    exact, capped = gradients(tmp_path, 1, rollout_correction_cap=1.01)
    _, hardly = gradients(tmp_path, 1, rollout_correction_cap=1.05)
    distances = [(found - exact).norm().item() for found in (hardly, capped)]
    assert 1e-3 < distances[0] < distances[1]


def test_the_weights_of_several_tokens_bring_the_gradient_closer(tmp_path):
    """One weight per token leaves out what the others' probabilities would say."""
    exact, weighted = gradients(tmp_path, 2, rollout_correction_cap=1e6)
    _, plain = gradients(tmp_path, 2, rollout_correction_cap=1e-9)  # the same weight for every token
    cosine = [torch.cosine_similarity(found.double(), exact, dim=0).item() for found in (weighted, plain)]
    assert cosine[1] < cosine[0] < 1


def test_weights_do_not_help_where_the_writer_is_another_network(tmp_path):
    """The limit that the documentation names."""
    exact, weighted = gradients(tmp_path, 2, distance=1.0, rollout_correction_cap=1e6)
    _, plain = gradients(tmp_path, 2, distance=1.0, rollout_correction_cap=1e-9)
    cosine = [torch.cosine_similarity(found.double(), exact, dim=0).item() for found in (weighted, plain)]
    assert cosine[0] < 0 < cosine[1]


def test_behaviour_takes_the_ratio_to_the_policy_that_wrote(tmp_path):
    """Unclipped, that ratio is the weight: the same gradient, found without the extra pass."""
    exact, found = gradients(tmp_path, 1, rollout_correction="behaviour")
    torch.testing.assert_close(found, exact.to(found.dtype), atol=1e-5, rtol=1e-5)


# ------------------------------------------- in training


def weights_seen(trainer, monkeypatch) -> list[tuple[torch.Tensor, ...]]:
    """Weights, the rollout's and the old log-probabilities, and targets [B, L] of every view that is learned."""
    seen, collect = [], trainer._loss_inputs

    def record(model, rows, update, view):
        inputs = collect(model, rows, update, view)
        found = inputs.importance, inputs.old, inputs.views.targets
        weight, old, targets = (None if values is None else values[:, 0] for values in found)
        seen.append((weight, rows["rollout_logps"], old, targets))
        return inputs

    monkeypatch.setattr(trainer, "_loss_inputs", record)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agrpo", "agrpo, truncated support", "atpo", "trajectory_grpo"])
def test_recomputed_old_log_probabilities_are_the_networks(name, tmp_path, monkeypatch):
    trainer = method_named(name).make(tmp_path, **DUAL, max_steps=1, logging_steps=1)
    seen, weights = losses_seen(trainer, monkeypatch), weights_seen(trainer, monkeypatch)
    trainer.train()
    assert largest_log_ratio(seen) <= 1e-4
    off, total = [], 0.0
    for weight, rollout, old, targets in weights:
        torch.testing.assert_close(weight, (old - rollout * targets).exp().clamp(max=3.0))
        off.append((old - rollout)[targets].abs())
    mismatch = torch.cat(off)
    assert mismatch.max() > 0.05
    logged = trainer.state.log_history[0]
    assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(mismatch.max().item(), rel=1e-4)
    means = [part.mean().item() if len(part) else total for part in off]
    assert logged["sampling/sampling_logp_difference/mean"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert logged["rollout/max_abs_log_ratio"] <= 1e-4


def test_behaviour_ratios_start_away_from_one(tmp_path, monkeypatch):
    method = method_named("agrpo")
    trainer = method.make(tmp_path, **DUAL, rollout_correction="behaviour", max_steps=1, logging_steps=1)
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    assert largest_log_ratio(seen) > 0.05
    logged = trainer.state.log_history[0]
    assert logged["rollout/max_abs_log_ratio"] == pytest.approx(largest_log_ratio(seen), rel=1e-4)
    assert logged["sampling/sampling_logp_difference/max"] == pytest.approx(largest_log_ratio(seen), rel=1e-4)


@pytest.mark.slow
def test_weights_change_the_policy_term_and_not_the_kl(tmp_path, monkeypatch):
    """With TRL's own code: all weights 0 leave the KL term alone."""
    method = method_named("agrpo")

    def gradient_norm(folder, cap: float, beta: float) -> float:
        trainer = method.make(
            tmp_path / folder,
            **DUAL | {"loss_type": "dapo"},
            rollout_correction_cap=cap,
            beta=beta,
            max_steps=1,
            logging_steps=1,
        )
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.02)  # away from the reference
        trainer.train()
        return next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log)

    assert gradient_norm("policy", 1e-9, 0.0) < 1e-6 < 1e-2 < gradient_norm("whole", 3.0, 0.0)
    assert gradient_norm("kl", 1e-9, 1.0) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("correction", [{}, {"rollout_correction": "behaviour"}], ids=["default", "behaviour"])
def test_an_exact_rollout_needs_no_correction(correction, tmp_path):
    trainer = method_named("agrpo").make(
        tmp_path, **DUAL | {"cache": "none"} | correction, max_steps=1, logging_steps=1
    )
    trainer.train()
    assert not any("sampling_logp" in key for log in trainer.state.log_history for key in log)
    assert trainer.completion_cost().old == 0


@pytest.mark.slow
def test_an_exact_rollout_may_be_recomputed(tmp_path, monkeypatch):
    """Of a writer that rounds: its log-probabilities are off by up to 0.2, as bfloat16 leaves them."""
    settings = DUAL | {"cache": "none", "rollout_correction": "recompute", "rollout_correction_cap": 1.1}
    trainer = method_named("agrpo").make(tmp_path, **settings, max_steps=1, logging_steps=1)
    seen, weights = losses_seen(trainer, monkeypatch), weights_seen(trainer, monkeypatch)
    likelihood = trainer.choices.likelihood
    plan = likelihood.plan

    def rounded(rollout):
        trajectory = rollout.trajectory
        off = 0.4 * torch.rand(trajectory.logps.shape, generator=torch.Generator().manual_seed(0)) - 0.2
        trajectory.logps += off * (trajectory.unmask_step >= 0)
        return plan(rollout)

    monkeypatch.setattr(likelihood, "plan", rounded)
    trainer.train()
    assert largest_log_ratio(seen) <= 1e-4
    for weight, rollout, old, targets in weights:
        torch.testing.assert_close(weight, (old - rollout * targets).exp().clamp(max=1.1))
    assert max(float(weight.max()) for weight, *_ in weights) == pytest.approx(1.1)
    assert 0.1 < trainer.state.log_history[0]["sampling/sampling_logp_difference/max"] < 0.2 + 1e-4
    assert trainer.completion_cost().old == 2 * 3  # inner updates × views


# ------------------------------------------- columns

LONG, SHORT = " ".join(["a b"] * 20), "b a"  # so far apart that the sampler pads them apart


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agrpo", "dipo"])
def test_views_are_scored_on_the_rollouts_columns(name, tmp_path, monkeypatch):
    """Padding would move the positions, and with them what bfloat16 rounds."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "cache": "none"}
    trainer = method_named(name).make(tmp_path, **settings, max_steps=1)
    trainer.train_dataset = Dataset.from_dict({"prompt": [LONG, SHORT] * 2})
    widths, score = [], ViewScorer.score

    def record(self, model, rows, views, likelihood):
        with forwards_of(trainer.model) as calls:
            scores = score(self, model, rows, views, likelihood)
        shown = views.canvas.size(1) * (1 if views.context is None else 2)
        widths.append((calls[0]["input_ids"].size(1) - shown, rows["prompt_mask"].sum(1).max().item()))
        return scores

    monkeypatch.setattr(ViewScorer, "score", record)
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda rows: rows
    )  # one prompt a micro-batch
    trainer.train()
    assert {columns for columns, _ in widths} == {2, 40}
    assert all(columns == longest for columns, longest in widths)


def test_padding_that_other_rows_need_does_not_move_a_rows_positions(tmp_path):
    trainer = method_named("agrpo").make(tmp_path)
    rows = rollout_of(trainer, LONG, SHORT, copies=8)
    with forwards_of(trainer.model) as calls:
        score(trainer, trainer.model, rows, view_of(trainer, rows, 0, 0))
    positions = calls[0]["position_ids"]
    assert positions[0].tolist() == list(range(48))
    assert positions[8].tolist() == [0] * 38 + list(range(10))  # as in the rollout: 2 of the prompt, 8 of the canvas


def test_recomputed_log_probabilities_have_the_columns_of_the_update(tmp_path):
    trainer = method_named("agrpo").make(tmp_path, rollout_correction="recompute")
    assert "prompt_columns" not in rollout_of(trainer, LONG, SHORT, copies=8)
    trainer = method_named("agrpo").make(tmp_path)
    assert rollout_of(trainer, LONG, SHORT, copies=8)["prompt_columns"].tolist() == [40] * 8 + [2] * 8


@pytest.mark.parametrize(
    ("name", "settings"),
    [("tracerl", {"shrink": 2}), ("diffu_grpo", {}), ("espo", {})],
)
def test_views_that_are_scored_twice_keep_the_columns_of_the_batch(name, settings, tmp_path):
    """The old log-probabilities are computed in another order of rows than the update's."""
    assert "prompt_columns" not in rollout_of(method_named(name).make(tmp_path, **settings), "a b", "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_correction": "none"}, "must be one of recompute, behaviour; got 'none'"),
        ({"rollout_correction_cap": 2.0}, "rollout_correction_cap=2.0 would have no effect: .* with cache='auto'"),
        ({"rollout_correction_cap": 0.0, "cache": "dual"}, "must be positive, got 0.0"),
        (
            {"rollout_correction": "behaviour", "rollout_correction_cap": 2.0, "cache": "dual"},
            "only with rollout_correction='recompute' are tokens weighted; got rollout_correction='behaviour'",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        AGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


@pytest.mark.slow
def test_tracerl_recomputes_on_its_views(tmp_path, monkeypatch):
    """With one step per view it takes the rollout's log-probabilities, but not those of another policy."""
    trainer = method_named("tracerl").make(tmp_path, **DUAL | {"num_iterations": 1}, shrink=1, max_steps=1)
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    assert largest_log_ratio(seen) <= 1e-4


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"])
def test_weights_are_those_of_trl_in_every_loss(loss_type, tmp_path, monkeypatch):
    """Folded into the advantages they give the loss that TRL weights itself where vLLM has drawn the completions."""
    method = method_named("diffu_grpo")  # scores whole completions, as vespo needs
    trainer = method.make(tmp_path, loss_type=loss_type, beta=0.1)
    rows = rollout_of(trainer, "a b", "b")
    trainer.current_gradient_accumulation_steps = 2  # set by the training loop
    read, compute = {}, GRPOTrainer._compute_loss

    def record(self, model, inputs):
        read.update(inputs)
        return compute(self, model, inputs)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", record)
    targets = rows["completion_mask"].bool()
    generator = torch.Generator().manual_seed(0)
    logps, old, reference, importance = torch.rand(4, *targets.shape, generator=generator).unbind()
    scores = Scores((logps - 1).requires_grad_(), torch.ones_like(logps))
    found = {"old": old - 1, "reference": reference - 1, "entropies": scores.entropies}
    found = {name: values.unsqueeze(1) for name, values in found.items()}
    inputs = loss_inputs(scores.logps.unsqueeze(1), targets.unsqueeze(1), rows["advantages"], **found)
    weighted = replace(inputs, importance=(importance + 0.5).unsqueeze(1))

    found = trainer._token_loss(trainer.model, rows, TokenRatio(), weighted)
    (gradient,) = torch.autograd.grad(found, scores.logps)
    trainer._token_loss(trainer.model, rows, TokenRatio(), inputs)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    with trainer._as_trl_reads(scores):
        expected = compute(trainer, trainer.model, read | {"importance_sampling_ratio": importance + 0.5})
    (of_trl,) = torch.autograd.grad(expected / trainer.num_backwards(), scores.logps)
    torch.testing.assert_close(gradient, of_trl, rtol=1e-5, atol=1e-7)
    assert of_trl.norm() > 1e-3
