"""diffu-GRPO: its prompt masks, the same for all three likelihoods of an update, and its loss written out."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from methods import method_named
from scipy.stats import binomtest, chi2_contingency
from tiny import MASK, TAIL, A, canvas_logits, forwards_of, tiny_model
from trainer_helpers import (
    hidden_by_row,
    largest_log_ratio,
    loss_of_update,
    losses_seen,
    parameters_of,
    rollout_of,
    rollout_with,
    score,
    view_of,
)

from trl_diffusion.likelihood import noised_views
from trl_diffusion.trainers import DiffuGRPOConfig

DIFFU = method_named("diffu_grpo")
PAPER = {"num_mc_samples": 1}  # one view
KEPT, REJECTED = 1e-3, 1e-6  # p-values, as in test_sampling.py

# Long enough that two masks of a prompt never agree by chance (0.745⁴⁰)
WORDS = np.random.default_rng(0).choice(["a", "b"], size=(4, 40))
LONG = [" ".join(words[: 40 - 3 * index]) for index, words in enumerate(WORDS)]


def masked_views(trainer, rows: dict[str, torch.Tensor], updates: int) -> torch.Tensor:
    """The prompts that the views of every update show, [updates, B, P]."""
    return torch.stack([view_of(trainer, rows, update, 0).prompt_ids for update in range(updates)])


# ------------------------------------------- property 1, with four masks


@pytest.mark.slow
def test_1_ratios_are_one_under_four_different_prompt_masks(tmp_path, monkeypatch):
    trainer = DIFFU.make(tmp_path, learning_rate=0.0, num_iterations=4, max_steps=8, **PAPER)
    trainer.train_dataset = Dataset.from_dict({"prompt": LONG * 2})
    seen = losses_seen(trainer, monkeypatch)
    with forwards_of(trainer.model) as policy, forwards_of(trainer.ref_model) as reference:
        trainer.train()
    assert len(seen) == 8 * 2  # updates × micro-batches
    assert largest_log_ratio(seen) <= 1e-4
    assert largest_log_ratio(seen, to="reference") <= 1e-4

    # Every row is shown four masks in a rollout, and no other row the same ones.
    hidden = hidden_by_row(seen, 8, 1)[:, 0]
    for update, other in combinations(range(8), 2):
        assert (hidden[update] != hidden[other]).any(1).all()
    for row, other in combinations(range(16), 2):
        assert (hidden[:, row] != hidden[:, other]).any(1).all()

    # What the three networks were fed, update by update: the same rows under the same masks.
    def fed(calls: list[dict], micro_batches: slice) -> list[list[int]]:
        return sorted(row for call in calls[micro_batches] for row in call["input_ids"].tolist())

    calls = [call for call in policy if call.get("targets") is not None]
    assert len(calls) == 2 * (8 + 8) and len(reference) == 2 * 8
    for rollout in range(2):
        old, learned = calls[16 * rollout : 16 * rollout + 8], calls[16 * rollout + 8 : 16 * rollout + 16]
        compared = reference[8 * rollout : 8 * rollout + 8]
        for update in range(4):
            own = slice(2 * update, 2 * update + 2)
            assert fed(old, own) == fed(learned, own) == fed(compared, own)
            assert fed(old, own) != fed(learned, slice(2 * (3 - update), 2 * (3 - update) + 2))  # of another update


def test_1_negative_control_the_masks_of_the_first_update_for_all(tmp_path):
    """As the published code does: log-probabilities of one mask against those of another."""
    trainer = DIFFU.make(tmp_path, num_iterations=4, **PAPER)
    rows = rollout_of(trainer, *LONG[:2])
    assert rows["old_per_token_logps"].shape == rows["ref_per_token_logps"].shape == (8, 4, 1, 8)
    first = rows["old_per_token_logps"][:, 0, 0]
    for update in range(4):
        views = view_of(trainer, rows, update, 0)
        with torch.no_grad():
            logps = score(trainer, trainer.model, rows, views).logps
        old = rows["old_per_token_logps"][:, update, 0]
        assert (logps - old)[views.targets].abs().max() <= 1e-4
        assert (logps - rows["ref_per_token_logps"][:, update, 0])[views.targets].abs().max() <= 1e-4
        assert ((logps - first)[views.targets].abs().max() > 1e-4) == (update > 0)


# ------------------------------------------- the masks


def prompt_masks(trainer, rows: int, padding: int = 0, first: int = 0, words: int = 40, **where) -> torch.Tensor:
    """Bool [rows, M, padding + words]."""
    ids = torch.full((rows, padding + words), A)
    ids[:, :padding] = TAIL
    own = torch.arange(first, first + rows)
    batch = {"prompt_ids": ids, "prompt_mask": (ids != TAIL).long(), "global_row": own}
    batch["completion_ids"] = torch.full((rows, 8), A)
    trajectory = SimpleNamespace(completion_ids=batch["completion_ids"])
    rollout = rollout_with(trainer, trajectory, batch, mode=where.get("mode", "train"), number=where.get("number", 0))
    plan = trainer.choices.likelihood.noise.draw(rollout, where.get("update", 0))
    assert plan.masked.all() and plan.masked.shape == (rows, trainer.args.num_mc_samples, 8)
    return plan.prompt_masked


def test_prompt_tokens_are_masked_independently_with_the_given_probability(tmp_path):
    trainer = DIFFU.make(tmp_path, num_mc_samples=2)
    masks = torch.stack([prompt_masks(trainer, 64, padding=5, update=update) for update in range(6)])
    assert not masks[..., :5].any()  # padding is nothing to hide
    masks = masks[..., 5:].numpy()
    assert masks.size == 30_720
    assert binomtest(int(masks.sum()), masks.size, 0.15).pvalue > KEPT
    assert binomtest(int(masks.sum()), masks.size, 0.17).pvalue < REJECTED

    def dependence(first: np.ndarray, second: np.ndarray) -> float:
        pairs = np.stack([first.ravel(), second.ravel()])
        return chi2_contingency([[((pairs[0] == a) & (pairs[1] == b)).sum() for b in (0, 1)] for a in (0, 1)]).pvalue

    assert dependence(masks[1:], masks[:-1]) > KEPT  # updates
    assert dependence(masks[:, 1:], masks[:, :-1]) > KEPT  # rows
    assert dependence(masks[:, :, 0], masks[:, :, 1]) > KEPT  # views
    assert dependence(masks[..., 1:], masks[..., :-1]) > KEPT  # tokens
    assert dependence(masks, masks | (masks.cumsum(-1) % 7 == 1)) < REJECTED


def test_7_prompt_masks_are_keyed_by_the_global_row_and_ignore_padding(tmp_path):
    trainer = DIFFU.make(tmp_path, num_mc_samples=2)
    masks = prompt_masks(trainer, 8)
    assert torch.equal(prompt_masks(trainer, 3, first=5), masks[5:])  # as another process makes them
    assert torch.equal(prompt_masks(trainer, 8, padding=24)[..., 24:], masks)
    assert torch.equal(prompt_masks(trainer, 8, words=30), masks[..., 10:])  # counted from the right
    assert not torch.equal(prompt_masks(trainer, 3, first=4), masks[5:])
    assert not torch.equal(prompt_masks(trainer, 8, update=1), masks)
    assert not torch.equal(prompt_masks(trainer, 8, mode="eval"), masks)
    assert not torch.equal(prompt_masks(trainer, 8, number=1), masks)
    assert not torch.equal(prompt_masks(DIFFU.make(tmp_path, num_mc_samples=2, seed=1), 8), masks)


def test_views_hide_the_canvas_and_the_chosen_prompt_tokens():
    completion_ids, targets = torch.tensor([[2, 3, 0, 0]]), torch.tensor([[True, True, True, False]])
    prompt_ids, hidden = torch.tensor([[0, 2, 3, 2]]), torch.tensor([[False, False, True, False]])
    everywhere = torch.ones_like(targets)
    views = noised_views(completion_ids, everywhere, targets, MASK, prompt_ids, hidden)
    assert views.canvas.tolist() == [[MASK] * 4] and torch.equal(views.targets, targets)
    assert views.prompt_ids.tolist() == [[0, 2, MASK, 2]]
    assert prompt_ids.tolist() == [[0, 2, 3, 2]]


def test_without_masks_the_prompt_is_shown(tmp_path):
    trainer = DIFFU.make(tmp_path, prompt_mask_probability=0.0, num_iterations=2, **PAPER)
    rows = rollout_of(trainer, *LONG[:2])
    assert torch.equal(masked_views(trainer, rows, 2), rows["prompt_ids"].expand(2, -1, -1))
    assert torch.equal(rows["old_per_token_logps"][:, 0], rows["old_per_token_logps"][:, 1])


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_a_probability_outside_of_0_and_1_is_refused(probability, tmp_path):
    with pytest.raises(ValueError, match=rf"prompt_mask_probability must lie in \[0, 1\), got {probability}"):
        DIFFU.make(tmp_path, prompt_mask_probability=probability)


# ------------------------------------------- property 3: the loss, written out


def written_out_loss(policy, old, reference, rows, shown: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over all tokens up to the first end token of −min(ρA, clip(ρ, ½, 3⁄2) A) + 0.04 k3."""
    canvas = torch.full_like(rows["completion_ids"], MASK)

    def logps(model) -> torch.Tensor:
        logits = canvas_logits(model, shown, rows["prompt_mask"], canvas) / temperature
        return logits.log_softmax(-1).gather(-1, rows["completion_ids"].unsqueeze(-1)).squeeze(-1)

    now = logps(policy)
    with torch.no_grad():
        before, compared = logps(old), logps(reference)
    terms = []
    for row, ids in enumerate(rows["completion_ids"].tolist()):
        ends = [position for position, token in enumerate(ids) if token < 2]
        for position in range(ends[0] + 1 if ends else len(ids)):
            ratio = (now - before)[row, position].exp()
            advantage = rows["advantages"][row]
            gap = (compared - now)[row, position]
            kl = gap.exp() - gap - 1
            terms.append(-torch.min(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage) + 0.04 * kl)
    return sum(terms) / len(terms)


def test_3_the_loss_is_the_clipped_ratio_and_k3_of_one_step_likelihoods(tmp_path):
    settings = {"gradient_accumulation_steps": 1, "num_iterations": 2, "epsilon": 0.5} | PAPER
    trainer = DIFFU.make(tmp_path, **settings)
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, *LONG[:2])
    start = tiny_model(seed=3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.2)
    shown = masked_views(trainer, rows, 2)
    assert not torch.equal(shown[0], shown[1])

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))])

    def expected(update: int, **changes) -> torch.Tensor:
        return written_out_loss(trainer.model, start, start, rows, shown[update], **changes)

    for update in range(2):
        found = loss_of_update(trainer, rows, update)
        torch.testing.assert_close(found, expected(update), rtol=1e-4, atol=1e-6)
        slope = gradient(expected(update))
        torch.testing.assert_close(gradient(found), slope, rtol=1e-3, atol=1e-5)
        assert slope.norm() > 1e-2
        assert (found - expected(1 - update)).abs() > 1e-3  # another mask,
        assert (found - expected(update, temperature=0.9)).abs() > 1e-3  # the sampler's temperature,
    without_kl = DIFFU.make(tmp_path, beta=0.0, **settings)
    without_kl.current_gradient_accumulation_steps = 1
    without_kl.model = trainer.model  # and no KL would all show
    assert (without_kl._view_loss(trainer.model, rows, 0, 0) - expected(0)).abs() > 1e-3


def test_several_views_are_averaged(tmp_path):
    trainer = DIFFU.make(tmp_path, gradient_accumulation_steps=1, epsilon=0.5, num_mc_samples=3)
    trainer.current_gradient_accumulation_steps = 1
    rows = rollout_of(trainer, *LONG[:2])
    start = tiny_model(seed=3)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    shown = [view_of(trainer, rows, 0, view).prompt_ids for view in range(3)]
    expected = sum(written_out_loss(trainer.model, start, start, rows, prompt) for prompt in shown) / 3
    found = loss_of_update(trainer, rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------- TRL's surroundings


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_ends_in_the_same_weights(stop, tmp_path):
    """μ = 2: 2 is between two rollouts, 3 in the middle of one, whose old log-probabilities the buffer keeps."""
    settings = dict(max_steps=5, num_iterations=2, learning_rate=0.2)
    whole = DIFFU.make(tmp_path / "whole", save_strategy="steps", save_steps=stop, **settings)
    whole.train()
    again = DIFFU.make(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert torch.equal(parameters_of(again), parameters_of(whole))
    assert again.forward_units == whole.forward_units > 0


def test_evaluation_has_masks_of_its_own(tmp_path):
    trainer = DIFFU.make(tmp_path, per_device_eval_batch_size=8)
    trainer.eval_dataset = Dataset.from_dict({"prompt": LONG})
    units = trainer.forward_units
    first, second = trainer.evaluate(), trainer.evaluate()
    assert np.isfinite(first["eval_loss"]) and first["eval_loss"] == second["eval_loss"]
    assert trainer.forward_units == units and trainer._rollouts["train"] == 0


def test_truncated_completions_can_be_left_out(tmp_path):
    trainer = DIFFU.make(tmp_path, mask_truncated_completions=True, max_completion_length=4, block_length=2)
    rows = rollout_of(trainer, "a b", "b a a")
    truncated = ~trainer.family.is_end(rows["completion_ids"]).any(1)
    assert truncated.any() and not truncated.all()
    assert (rows["completion_mask"].any(1) == ~truncated).all()


def test_defaults_and_paper(tmp_path):
    config = DiffuGRPOConfig("unused", use_cpu=True, bf16=False, per_device_train_batch_size=6)
    assert (config.max_completion_length, config.block_length, config.denoising_steps) == (256, 32, 128)
    assert (config.temperature, config.top_k, config.top_p, config.unmasking) == (0.9, 0, 1.0, "low_confidence")
    assert (config.num_generations, config.num_iterations, config.num_mc_samples) == (6, 12, 1)
    assert (config.prompt_mask_probability, config.epsilon, config.beta) == (0.15, 0.5, 0.04)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (3e-6, "constant", 0)
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (0.9, 0.99, 0.1, 0.2)
    assert (config.loss_type, config.scale_rewards, config.use_bias_correction_kl) == ("dapo", "none", False)
    assert config.disable_dropout and config.importance_sampling_level == "token"
    trainer = DIFFU.make(tmp_path)
    trainer.create_model_card(dataset_name="words")
    card = (tmp_path / "README.md").read_text()
    assert "2504.12216" in card and "diffu-GRPO" in card
