"""DiPO and TraceRL on block-causal models: views within blocks, the loss by hand, the policy gradient, refusals."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from enumeration import enumerate_paths, trajectory_of
from methods import METHODS, block_causal, full_attention, method_named
from test_likelihood_enumeration import gradient, reward_of
from tiny import END, MASK, TAIL, A, B, tiny_sdar, without_ends
from trainer_helpers import logps_of, loss_of_update, parameters_of, plan_of, rollout_of

from trl_diffusion.likelihood.plans import block_steps
from trl_diffusion.trainers import AGRPOTrainer, DiPOConfig, TraceRLConfig

DIPO, TRACERL = method_named("dipo"), method_named("tracerl, block")

# ------------------------------------------- views


def test_views_within_blocks_by_hand():
    # three blocks of four positions, three steps each; the last block was not written
    unmask_step = torch.tensor([[0, 2, 1, 0, 4, 3, 5, 3, -1, -1, -1, -1]], dtype=torch.int32)
    plan = block_steps(unmask_step, steps_per_block=3, shrink=1)
    shown = ["".join(".x"[int(flag)] for flag in row) for row in plan.masked[0]]
    assert shown == ["xxxxxxxxxxxx", ".xx.x.x.xxxx", ".x....x.xxxx"]
    targets = ["".join(".x"[int(flag)] for flag in row) for row in plan.targets[0]]
    assert targets == ["x..x.x.x....", "..x.x.......", ".x....x....."]
    assert plan.rate.tolist() == [pytest.approx([1, 8 / 12, 6 / 12])]


@pytest.mark.parametrize(
    ("steps", "shrink", "views"), [(1, 1, 1), (4, 1, 4), (4, 2, 2), (4, 3, 2), (5, 2, 3), (4, 4, 1)]
)
def test_views_within_blocks_cover_every_sampled_token_once(steps, shrink, views):
    generator = torch.Generator().manual_seed(0)
    within = torch.randint(0, steps, (6, 3, 5), generator=generator)
    unmask_step = (within + steps * torch.arange(3).view(1, 3, 1)).flatten(1)
    unmask_step[:3, 10:] = -1
    plan = block_steps(unmask_step, steps, shrink)
    assert plan.targets.size(1) == views and torch.equal(plan.targets.sum(1), (unmask_step >= 0).long())
    assert not (plan.targets & ~plan.masked).any() and plan.masked[:3, :, 10:].all()
    assert torch.equal(plan.masked[:, :1] & ~plan.masked, (plan.masked[:, :1] & ~plan.masked).cummax(1).values)


# ------------------------------------------- the loss


def logps_step_by_step(model, rows: dict[str, torch.Tensor], unmask_step: torch.Tensor, temperature: float):
    """[B, L]: every token on the canvas before its own step, row by row and step by step, without padding."""
    logps = torch.zeros(unmask_step.shape)
    for row, step in product(range(len(logps)), range(8)):
        prompt = rows["prompt_ids"][row, rows["prompt_mask"][row].bool()]
        hidden = (unmask_step[row] >= step) | (unmask_step[row] < 0)
        ids = torch.cat([prompt, rows["completion_ids"][row].masked_fill(hidden, MASK)])
        logits = model(input_ids=ids.unsqueeze(0), canvas_start=len(prompt)).logits[0, len(prompt) :]
        own = (logits.index_fill(-1, torch.tensor([MASK]), -torch.inf) / temperature).log_softmax(-1)
        chosen = own.gather(-1, rows["completion_ids"][row].unsqueeze(-1)).squeeze(-1)
        logps[row] = torch.where(unmask_step[row] == step, chosen, logps[row])
    return logps


def drifted(method, folder, **settings):
    """A trainer whose policy has moved since its rollout; the rollout's rows and steps."""
    trainer = method.make(folder, top_k=0, per_device_train_batch_size=16, gradient_accumulation_steps=1, **settings)
    rows = rollout_of(trainer, "a b", "b a a", "a", "b b a b")
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.mul_(1.15 if "proj" in name else 1.0)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, rows, trainer.last_rollout[0].unmask_step


def terms_of(trainer, rows, unmask_step, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clipped terms and log-ratios of all tokens, and which are in the texts; [B, L] each."""
    now = logps_step_by_step(trainer.model, rows, unmask_step, trainer.args.temperature)
    old = trainer.last_rollout[0].logps
    rewards = trainer.last_rollout[1].rewards.sum(1).view(-1, 4)
    spread = rewards.std(1, keepdim=True, correction=0)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / spread.where(spread > 1e-3, 1.0)
    ratio, advantages = (now - old).exp(), advantages.view(-1, 1)
    terms = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    length = trainer.family.effective_length(rows["completion_ids"])
    return terms, now - old, torch.arange(8) < length.unsqueeze(1)


@pytest.mark.slow
def test_dipo_is_the_mean_over_tokens_of_their_clipped_ratios(tmp_path):
    trainer, rows, unmask_step = drifted(DIPO, tmp_path)
    terms, change, text = terms_of(trainer, rows, unmask_step, 0.8, 1.28)
    expected = -terms[text].sum() / text.sum()
    found = loss_of_update(trainer, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(trainer.model, found), gradient(trainer.model, expected), atol=1e-5, rtol=1e-4)
    beyond = change.exp()[text]
    assert (beyond > 1.28).any() and (beyond < 0.8).any() and ((beyond > 1.2) & (beyond < 1.28)).any()
    symmetric = -terms_of(trainer, rows, unmask_step, 0.8, 1.2)[0][text].sum() / text.sum()
    assert abs(symmetric - expected) > 1e-4


def test_block_tracerl_is_the_mean_over_views_of_a_mean_gain_less_a_summed_kl(tmp_path):
    trainer, rows, unmask_step = drifted(TRACERL, tmp_path, shrink=1, beta=0.1)
    terms, change, text = terms_of(trainer, rows, unmask_step, 0.8, 1.2)
    divergence = (-change).exp() + change - 1
    losses = []
    for row in range(len(text)):
        views = [text[row] & (unmask_step[row] % 4 == step) for step in range(4)]
        gains = [terms[row][view].mean() - 0.1 * divergence[row][view].sum() for view in views if view.any()]
        losses.append(-sum(gains) / len(gains))
    assert len({int((unmask_step[row] % 4)[text[row]].unique().numel()) for row in range(len(text))}) > 1
    torch.testing.assert_close(loss_of_update(trainer, rows), sum(losses) / len(losses), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_prompts_whose_rewards_are_equal_change_nothing(tmp_path):
    trainer = DIPO.make(tmp_path, reward=lambda completions, **kwargs: [1.0] * len(completions), max_steps=2)
    before = parameters_of(trainer).clone()
    trainer.train()
    assert torch.equal(parameters_of(trainer), before)


# ------------------------------------------- the policy gradient

PROMPT, LENGTH, BLOCK = (A, B), 4, 2  # the prompt fills a block, so blocks are the same from column 0


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("method", [DIPO, TRACERL], ids=lambda method: method.name)
def test_one_token_per_step_gives_the_policy_gradient(method, temperature, tmp_path):
    model = without_ends(tiny_sdar(seed=3, block_size=BLOCK).double())
    paths = enumerate_paths(model, list(PROMPT), LENGTH, BLOCK, 2, temperature)
    paths = [path for path in paths if not {TAIL, END} & set(path.tokens)]
    assert len(paths) == 4 * 16
    probability = torch.stack([path.probability for path in paths])
    assert probability.sum().item() == pytest.approx(1, abs=1e-9)
    rewards = torch.tensor([reward_of(path.tokens) for path in paths]).double()
    exact = gradient(model, (probability * rewards).sum()).float()
    assert exact.norm() > 0.1

    def found(shrink: int = 1, late: int = 0) -> torch.Tensor:
        trainer = method.make(
            tmp_path,
            model=model,
            per_device_train_batch_size=64,
            gradient_accumulation_steps=1,
            temperature=temperature,
            top_k=0,
            max_completion_length=LENGTH,
            block_length=BLOCK,
            denoising_steps=LENGTH,
            shrink=shrink,
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        trajectory = trajectory_of(paths, temperature)
        rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(len(paths))}
        rows["prompt_ids"] = torch.tensor([PROMPT] * len(paths))
        rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
        rows |= plan_of(trainer, trajectory, rows)
        rows["num_items_in_batch"] = rows["completion_mask"].sum()
        rows["advantages"] = (probability.detach() * rewards * len(paths)).float()
        rows["masked"] = rows["masked"].roll(-late, 2)
        if shrink > 1 or late:
            rows["old_per_token_logps"] = logps_of(trainer, model, rows)
        return -gradient(model, loss_of_update(trainer, rows)).float()

    # a mean over 4 tokens, or over 2 views of 2 tokens each
    torch.testing.assert_close(found(), exact / 4, atol=1e-6, rtol=1e-5)
    for wrong in (found(shrink=2), found(late=1)):
        assert (wrong - exact / 4).norm() > 0.05 * (exact / 4).norm()


# ------------------------------------------- which models, which settings

NOISED = [
    method
    for method in METHODS
    if method.views not in ("drawn", "every", "chosen", "sampled", "within") and method.credit != "process_reward"
]


@pytest.mark.parametrize("method", NOISED, ids=lambda method: method.name)
def test_views_of_the_whole_canvas_refuse_a_block_causal_model(method, tmp_path):
    with pytest.raises(ValueError, match=r"noises the canvas as a whole, and sdar has block-causal .* Use DiPO"):
        method.make(tmp_path, model=block_causal())


@pytest.mark.parametrize("method", [DIPO, TRACERL], ids=lambda method: method.name)
def test_views_within_blocks_refuse_full_attention(method, tmp_path):
    with pytest.raises(ValueError, match=r"needs block-causal attention; llada attends to the whole canvas"):
        method.make(tmp_path, model=full_attention())


def test_the_blocks_of_the_sampler_are_those_of_attention(tmp_path):
    for method in (DIPO, method_named("agrpo")):
        with pytest.raises(ValueError, match=r"sdar writes blocks of 4 tokens.* Set block_length=4"):
            method.make(tmp_path, model=block_causal(), block_length=8)
    assert isinstance(method_named("agrpo").make(tmp_path, model=block_causal()), AGRPOTrainer)


SMALL = {"per_device_train_batch_size": 240, "use_cpu": True, "bf16": False, "report_to": []}
BLOCKS = {"max_completion_length": 64, "block_length": 4, "denoising_steps": 64, "block_causal": True}
BAD = [
    (DiPOConfig, {"shrink": 5}, r"shrink must lie between 1 and the 4 denoising steps of a block; got 5"),
    (DiPOConfig, {"denoising_steps": 128, "shrink": 3}, r"between 1 and the 2 denoising steps of a block; got 3"),
    (
        DiPOConfig,
        {"num_mc_samples": 8},
        r"the 4 denoising steps of a block with shrink=1 makes 4, got num_mc_samples=8",
    ),
    (DiPOConfig, {"loss_type": "grpo"}, r"loss_type must be 'dapo'; got 'grpo'"),
    (DiPOConfig, {"beta": 0.1}, r"beta must be 0\.0; got 0\.1\. TraceRL with block_causal=True has a KL"),
    (DiPOConfig, {"importance_sampling_level": "sequence"}, "DiPOConfig scores a part of the tokens per view"),
    (TraceRLConfig, BLOCKS, r"shrink must lie between 1 and the 4 denoising steps of a block; got 8"),
]


@pytest.mark.parametrize(("config", "settings", "message"), BAD, ids=range(len(BAD)))
def test_bad_settings_are_refused_with_the_reason(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config("unused", **SMALL | settings)


def test_defaults():
    made = DiPOConfig("unused", **SMALL)
    assert (made.epsilon, made.epsilon_high, made.beta, made.loss_type) == (0.2, 0.28, 0.0, "dapo")
    assert (made.num_mc_samples, made.shrink, made.num_iterations, made.num_generations) == (4, 1, 1, 8)
    assert (made.block_length, made.denoising_steps, made.max_completion_length) == (4, 256, 256)
    assert (made.temperature, made.top_k, made.learning_rate, made.unmasking) == (1.0, 50, 1e-6, "max_prob")
    assert TraceRLConfig("unused", **SMALL | BLOCKS | {"shrink": 2}).num_mc_samples == 2


def test_the_model_card_names_dipo_and_cites_its_paper(tmp_path):
    trainer = DIPO.make(tmp_path)
    trainer.create_model_card(dataset_name="words")
    card = (tmp_path / "README.md").read_text()
    assert "DiPO" in card and "arXiv:2512.22234" in card and trainer._paper["title"] in card
