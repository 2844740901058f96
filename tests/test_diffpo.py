"""DiFFPO: tokens split at a step, the enumerated surrogate, and weights that compare a view with the rollout."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from methods import method_named
from test_likelihood_enumeration import feed
from test_properties import one_step
from tiny import END, MASK, TAIL, A, B, tiny_model
from trainer_helpers import loss_of_update, num_views, plan_of, rollout_of, view_of

from trl_diffusion.likelihood import SplitAtSteps, SplitViews
from trl_diffusion.likelihood.plans import draw_taken, split_at_steps
from trl_diffusion.losses import SequenceRatio

DIFFPO, DIFFU = method_named("diffpo"), method_named("diffu_grpo")
PROMPT = (A, B, A)
COMPLETION, STEPS = (A, B, A, END, TAIL), (2, 0, 1, 2, -1)  # step 3 was not taken; a text of 4 tokens
DRAWN = (-1.9, -0.6, -0.4, -2.5, 0.0)  # recorded log-probabilities of the rollout
ADVANTAGES = (1.5, -0.8, 0.4)


def brute_force(model, step: int, temperature: float) -> torch.Tensor:
    """log p [4] of the text, each token on the canvas that a step gives it, by forward passes of its own."""
    found = []
    for i in range(4):
        whole = [MASK] * 5
        before = [token if 0 <= s < step else MASK for token, s in zip(COMPLETION, STEPS, strict=True)]
        canvas = whole if STEPS[i] < step else before
        logits = model(input_ids=torch.tensor([[*PROMPT, *canvas]])).logits[0, len(PROMPT) + i, :4]
        found.append((logits / temperature).log_softmax(-1)[COMPLETION[i]])
    return torch.stack(found)


def made(folder, monkeypatch, **settings):
    """A trainer in float64, and rows for each step that the completion took: 0, 1 and 2."""
    sizes = dict(max_completion_length=5, block_length=5, denoising_steps=4, per_device_train_batch_size=12)
    trainer = DIFFPO.make(folder, model=tiny_model(seed=3).double(), beta=0.0, **sizes | settings)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    feed(monkeypatch, (torch.arange(3).double().unsqueeze(1) + 0.5) / 3)
    trajectory = SimpleNamespace(
        completion_ids=torch.tensor([COMPLETION] * 3),
        unmask_step=torch.tensor([STEPS] * 3, dtype=torch.int32),
        logps=torch.tensor([DRAWN] * 3).double(),
        given=None,
        support=None,
        prompt_columns=None,
    )
    rows = {"completion_ids": trajectory.completion_ids, "global_row": torch.arange(3)}
    rows["prompt_ids"] = torch.tensor([PROMPT] * 3)
    rows["prompt_mask"] = torch.ones_like(rows["prompt_ids"])
    rows |= plan_of(trainer, trajectory, rows)
    rows["num_items_in_batch"] = torch.tensor(12 * trainer.args.steps_per_generation)
    rows["advantages"] = torch.tensor(ADVANTAGES).double()
    rows["old_per_token_logps"] = trainer._logps(rows, trainer.choices.likelihood, range(1)).double()
    return trainer, rows


def gradient(model, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])


def surrogate(model, cap: float | None, temperature: float, steps=range(3)) -> torch.Tensor:
    """Mean over steps and tokens of A · weight · log p; its gradient is that of the ratios on policy."""
    total = torch.zeros((), dtype=torch.float64)
    for step, advantage in zip(steps, ADVANTAGES, strict=True):
        logps = brute_force(model, step, temperature)
        weights = (logps.detach() - torch.tensor(DRAWN[:4]).double()).exp()
        weights = torch.ones_like(weights) if cap is None else weights.clamp(max=cap)
        total = total + (advantage * weights * logps).sum()
    return total / 12


@pytest.mark.parametrize("cap", [2.0, 0.7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_over_all_steps_is_that_of_the_enumerated_surrogate(cap, temperature, tmp_path, monkeypatch):
    trainer, rows = made(tmp_path, monkeypatch, weight_cap=cap, temperature=temperature)
    model = trainer.model
    found = gradient(model, -loss_of_update(trainer, rows))
    exact = gradient(model, surrogate(model, cap, temperature))
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=1e-5)
    # negative controls: another cap, the temperature of the full vocabulary, everything on the masked canvas
    for wrong in (
        surrogate(model, 1.1, temperature),
        surrogate(model, cap, 1.7 - temperature),
        surrogate(model, cap, temperature, steps=(0, 0, 0)),
    ):
        assert (gradient(model, wrong) - found).norm() > 0.02 * found.norm()


def test_the_estimate_is_the_mean_over_drawn_steps(tmp_path, monkeypatch):
    trainer, rows = made(tmp_path, monkeypatch, temperature=1.0)
    likelihood, logps = trainer.choices.likelihood, rows["old_per_token_logps"][:, 0]
    facts = likelihood.scored(rows, 0, range(2), rows["targets"][:, 0])
    expected = torch.stack([brute_force(trainer.model, step, 1.0).sum() for step in range(3)])
    torch.testing.assert_close(likelihood.estimate(logps, facts), expected.detach(), atol=1e-6, rtol=1e-6)
    assert expected.std() > 0.05


def test_every_token_is_scored_once_for_each_step():
    steps = torch.tensor([[3, 1, 0, 2, -1, -1], [0, 0, 1, 1, 5, 5]], dtype=torch.int32)
    plan = split_at_steps(steps, torch.tensor([[0, 2], [1, 5]]))
    assert (plan.targets.sum(1) == 2).all() and not (plan.targets & ~plan.masked).any()
    assert plan.masked[:, ::2].all()
    assert plan.targets[0, 0].tolist() == [False] * 6 and plan.masked[0, 1].all()
    assert plan.targets[0, 2].tolist() == [False, True, True, False, False, False]
    assert plan.masked[1, 3].tolist() == [False] * 4 + [True] * 2
    # negative control: what is masked is not what is scored, or tokens would be scored twice
    assert (plan.masked.sum(1) > 2).any()


def test_steps_are_drawn_evenly_among_those_that_were_taken():
    steps = torch.tensor([[0, 3, 3, 6], [2, 2, 2, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    noise = ((torch.arange(600).double() + 0.5) / 600).expand(3, -1)
    drawn = draw_taken(noise, steps, 8)
    assert torch.bincount(drawn[0], minlength=8).tolist() == [200, 0, 0, 200, 0, 0, 200, 0]
    assert drawn[1].unique().tolist() == [2] and drawn[2].unique().tolist() == [7]


@pytest.mark.slow
def test_with_one_step_it_is_diffu_grpo_without_prompt_noise(tmp_path):
    """The only step is 0: all tokens are scored on the masked canvas, where they were drawn, with weights of 1."""
    alike = dict(block_length=8, denoising_steps=1, temperature=1.0, beta=0.1, num_iterations=2, max_steps=2)
    settings = {"num_mc_samples": 1, "prompt_mask_probability": 0.0}
    host = one_step(DIFFU, tmp_path, **alike | settings)
    assert host.norm() > 1e-2
    torch.testing.assert_close(one_step(DIFFPO, tmp_path, **alike), host, atol=1e-5, rtol=1e-4)
    noised = one_step(DIFFU, tmp_path, **alike | settings | {"prompt_mask_probability": 0.5})  # negative control
    assert (noised - host).norm() > 1e-2 * host.norm()


@pytest.mark.slow
def test_at_step_0_without_weights_it_is_diffu_grpo_without_prompt_noise(tmp_path, monkeypatch):
    alike = dict(temperature=1.0, beta=0.1)
    settings = {"num_mc_samples": 1, "prompt_mask_probability": 0.0}
    host = one_step(DIFFU, tmp_path, **alike | settings)
    drawn = one_step(DIFFPO, tmp_path, weight_cap=None, **alike)
    module = "trl_diffusion.likelihood.noises.draw_taken"
    monkeypatch.setattr(module, lambda noise, *_: torch.zeros_like(noise, dtype=torch.long))
    torch.testing.assert_close(one_step(DIFFPO, tmp_path, weight_cap=None, **alike), host, atol=1e-5, rtol=1e-4)
    assert (drawn - host).norm() > 1e-2 * host.norm()  # negative controls: drawn steps, and weights
    assert (one_step(DIFFPO, tmp_path, **alike) - host).norm() > 1e-2 * host.norm()


def weights_of(trainer, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of all targets of a first update, and whether their view is the state they were drawn in; [V, B, L]."""
    unmask_step, weights, same = trainer.last_rollout[0].unmask_step, [], []
    for view in range(num_views(trainer)):
        shown = view_of(trainer, rows, 0, view)
        weight = trainer._loss_inputs(trainer.model, rows, 0, view).importance[:, 0]
        weights.append(torch.where(shown.targets, weight, torch.nan))
        before = (unmask_step.unsqueeze(1) >= unmask_step.unsqueeze(2)) | (unmask_step < 0).unsqueeze(1)
        hidden = (shown.canvas == MASK).unsqueeze(1)
        same.append((before == hidden).all(2) & shown.targets)
    return torch.stack(weights), torch.stack(same)


@pytest.mark.parametrize("support", [{}, {"top_k": 3, "top_p": 0.95}], ids=["all words", "truncated"])
def test_weights_are_1_where_the_view_is_the_state_and_never_above_the_cap(support, tmp_path):
    trainer = DIFFPO.make(tmp_path, denoising_steps=8, weight_cap=1.5, temperature=0.7, **support)
    rows = rollout_of(trainer, "a b", "b a a", copies=8)
    weights, same = weights_of(trainer, rows)
    assert same.sum() > 10 and (same[1].sum() > 3)
    torch.testing.assert_close(weights[same], torch.ones_like(weights[same]), atol=1e-5, rtol=0)
    others = weights[~same & ~weights.isnan()]
    assert weights.nan_to_num(nan=0.0).max() <= 1.5 and (others == 1.5).any()
    assert (others - 1).abs().max() > 0.1 and others.min() < 0.9  # negative control: elsewhere they differ
    # negative control: at another temperature than the sampler's, weights of the same state are not 1
    trainer.choices.likelihood.at_sampling_temperature = False
    rows["old_per_token_logps"] = trainer._logps(rows, trainer.choices.likelihood, range(trainer.num_iterations))
    assert (weights_of(trainer, rows)[0][same] - 1).abs().max() > 0.05


def test_text_that_was_given_is_shown_in_both_views(tmp_path, monkeypatch):
    trainer, rows = made(tmp_path, monkeypatch)
    trajectory = SimpleNamespace(
        completion_ids=rows["completion_ids"],
        unmask_step=torch.tensor([[-1, 0, 1, 2, -1]] * 3, dtype=torch.int32),
        logps=rows["rollout_logps"],
        given=torch.tensor([[True, False, False, False, False]] * 3),
        support=None,
        prompt_columns=None,
    )
    planned = plan_of(trainer, trajectory, rows)
    assert not planned["masked"][..., 0].any() and planned["masked"][:, 0, 0, 1:].all()
    assert planned["targets"].sum(2).squeeze(1).tolist() == [[0, 1, 1, 1, 0]] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mc_samples": 3}, "num_mc_samples must be even; got 3"),
        ({"weight_cap": 0.0}, "weight_cap must be positive, or None for no weights; got 0.0"),
        ({"loss_type": "grpo"}, r"sums over tokens: one of dr_grpo, dapo, cispo, luspo. Got 'grpo'"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "no sequence-level ratio"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DIFFPO.make(tmp_path, **settings)


def test_weights_need_a_loss_of_tokens(tmp_path):
    choices = {"likelihood": SplitViews(SplitAtSteps()), "loss": SequenceRatio()}
    with pytest.raises(ValueError, match="weighs single tokens, which needs the loss TokenRatio; got SequenceRatio"):
        DIFFPO.make(tmp_path, choices=choices)
    DIFFPO.make(tmp_path, choices=choices | {"likelihood": SplitViews(SplitAtSteps(), cap=None)})
