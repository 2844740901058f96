"""Views against a replay of the sampler, and their scores against what the sampler recorded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import MASK, TAIL, A, canvas_logits, coded_prompts, coded_row, forwards_of, tiny_model

from trl_diffusion.likelihood import Views, score_views, trajectory_views
from trl_diffusion.models import DreamModel
from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.sampling.unmasking import RULES

ROWS, LENGTH, STEPS, BLOCK = 32, 9, 6, 3
FAMILIES = ["llada", "dream"]
# temperature, top_k, top_p
POLICIES = [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 3, 0.85), (1.3, 9, 0.95)]


def network(family: str = "llada", **overrides):
    """Seeds picked so that texts end in different blocks."""
    if family == "llada":
        return tiny_model(5, 10.0, **overrides)
    return tiny_model(2, 10.0, DreamModel, **overrides)


def rollout(model, temperature=1.3, top_k=0, top_p=1.0, unmasking="random"):
    prompts, mask = coded_prompts(ROWS)
    config = SamplingConfig(LENGTH, STEPS, BLOCK, temperature, top_k, top_p, unmasking)
    return sample(model, prompts, mask, config, row_generators(1, rows=range(ROWS)))


def views_of(trajectory, step: int) -> Views:
    steps = torch.full((len(trajectory.completion_ids),), step)
    return trajectory_views(trajectory.completion_ids, trajectory.unmask_step, steps, MASK)


# ------------------------------------------- views


@pytest.mark.parametrize("unmasking", RULES)
def test_views_are_what_the_sampler_fed_to_the_network(unmasking):
    model = network()
    with forwards_of(model) as calls:
        trajectory = rollout(model, unmasking=unmasking)
    assert len(calls) == STEPS
    fed = [{coded_row(ids): ids[8:] for ids in call["input_ids"]} for call in calls]
    assert 0 < len(fed[4]) < len(fed[2]) < ROWS == len(fed[0])
    for step in range(STEPS):
        views, late = views_of(trajectory, step), views_of(trajectory, step + 1)
        for row, canvas in fed[step].items():
            assert views.canvas[row].tolist() == canvas.tolist()
            assert late.canvas[row].tolist() != canvas.tolist()
            behind = trajectory.completion_ids[row]
            if step + 1 < STEPS and row in fed[step + 1]:
                behind = fed[step + 1][row]
            elif row not in fed[-1]:  # the last step of a row: the canvas behind its block was filled
                block = slice(0, (step // 2 + 1) * BLOCK)
                behind = torch.cat([behind[block], canvas[block.stop :]])
            assert views.targets[row].tolist() == (canvas != behind).tolist()
            assert views.targets[row].sum() == 2 - step % 2  # three positions in two steps
        gone = [row for row in range(ROWS) if row not in fed[step]]
        assert not views.targets[gone].any()


@given(
    canvas=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 7)), min_size=1, max_size=12),
    later=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_sampled_token_is_a_target_exactly_once(canvas, later):
    completion_ids = torch.tensor([[token for token, _ in canvas]])
    unmask_step = torch.tensor([[step for _, step in canvas]], dtype=torch.int32)
    sampled, times = unmask_step >= 0, torch.zeros_like(completion_ids)
    shown_before = torch.zeros_like(sampled)
    for step in range(9 + later):
        views = trajectory_views(completion_ids, unmask_step, torch.tensor([step]), MASK)
        hidden = views.canvas == MASK
        times += views.targets
        assert not (views.targets & ~hidden).any()
        assert hidden[~sampled].all() and not views.targets[~sampled].any()
        assert torch.equal(views.canvas[~hidden], completion_ids[~hidden])
        assert not (shown_before & hidden).any()  # what was shown stays shown
        shown_before = ~hidden
    assert torch.equal(times, sampled.long())
    assert torch.equal(shown_before, sampled)


def test_rows_may_ask_for_different_steps():
    completion_ids = torch.tensor([[A, A + 1, A, TAIL]] * 3)
    unmask_step = torch.tensor([[1, 0, 2, -1]] * 3, dtype=torch.int32)
    views = trajectory_views(completion_ids, unmask_step, torch.tensor([0, 2, 1]), MASK)
    assert views.canvas.tolist() == [[MASK] * 4, [A, A + 1, MASK, MASK], [MASK, A + 1, MASK, MASK]]
    assert views.targets.int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]


def test_a_row_without_a_step_has_an_empty_view():
    completion_ids = torch.tensor([[A, A + 1, A, TAIL]] * 2)
    unmask_step = torch.tensor([[1, 0, 2, -1]] * 2, dtype=torch.int32)
    views = trajectory_views(completion_ids, unmask_step, torch.tensor([-1, 1]), MASK)
    assert views.canvas[0].tolist() == [MASK] * 4
    assert views.targets.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]  # what was never sampled is no target


def test_a_view_may_bring_a_noised_prompt():
    model = network()
    trajectory = rollout(model)
    prompts, mask = coded_prompts(ROWS)
    plain = views_of(trajectory, 2)
    noised = prompts.masked_fill((torch.arange(8) == 6) & (mask == 1), MASK)
    scores = score(model, trajectory, Views(plain.canvas, plain.targets, noised))
    log_probs = (canvas_logits(model, noised, mask, plain.canvas) / 1.3).log_softmax(-1)
    expected = log_probs.gather(-1, trajectory.completion_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores.logps[plain.targets], expected[plain.targets], atol=1e-5, rtol=0)
    assert not torch.allclose(score(model, trajectory, plain).logps, scores.logps, atol=0.05)


# ------------------------------------------- scores


def score(model, trajectory, views: Views, **changes):
    prompts, mask = coded_prompts(ROWS)
    settings = dict(temperature=trajectory.temperature or 1.0, support=trajectory.support)
    return score_views(model, prompts, mask, trajectory.completion_ids, views, **settings | changes)


def replayed(model, trajectory, late: int = 0, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of all steps together; the canvas may be `late` steps behind the targets."""
    logps, entropies = torch.zeros(ROWS, LENGTH), torch.zeros(ROWS, LENGTH)
    for step in range(STEPS):
        views = Views(views_of(trajectory, step + late).canvas, views_of(trajectory, step).targets)
        with torch.no_grad():
            scores = score(model, trajectory, views, **changes)
        assert not scores.logps[~views.targets].any() and not scores.entropies[~views.targets].any()
        logps, entropies = logps + scores.logps, entropies + scores.entropies
    return logps, entropies


@pytest.mark.parametrize("unmasking", RULES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_all_steps_reproduce_the_rollout(family, policy, unmasking):
    model = network(family)
    trajectory = rollout(model, *policy, unmasking)
    assert 0.2 < (trajectory.unmask_step >= 0).float().mean() < 0.95
    logps, entropies = replayed(model, trajectory)
    assert torch.allclose(logps, trajectory.logps, atol=1e-5)
    assert torch.allclose(entropies, trajectory.entropies, atol=1e-5)

    def differs(**changes) -> bool:
        return not torch.allclose(replayed(model, trajectory, **changes)[0], trajectory.logps, atol=0.05)

    assert differs(late=1) and differs(late=-1)
    assert differs(temperature=trajectory.temperature + 0.5)
    assert policy[1:] != (3, 0.85) or differs(support=None)


def test_greedy_rollouts_are_scored_at_temperature_one():
    model = network()
    trajectory = rollout(model, temperature=0.0, top_k=2, unmasking="max_prob")
    logps, entropies = replayed(model, trajectory)
    assert torch.allclose(logps, trajectory.logps, atol=1e-5)
    assert torch.allclose(entropies, trajectory.entropies, atol=1e-5)


def test_scores_do_not_depend_on_padding_or_batch():
    model = network("dream")
    trajectory = rollout(model, 1.3, 3, 0.85)
    prompts, mask = coded_prompts(ROWS)
    views = trajectory_views(trajectory.completion_ids, trajectory.unmask_step, torch.arange(ROWS) % STEPS, MASK)
    together = score(model, trajectory, views)
    for row in range(ROWS):
        own = slice(row, row + 1)
        alone = score_views(
            model,
            prompts[own, row % 4 :],
            mask[own, row % 4 :],
            trajectory.completion_ids[own],
            Views(views.canvas[own], views.targets[own]),
            trajectory.temperature,
            trajectory.support[own],
        )
        assert torch.allclose(alone.logps[0], together.logps[row], atol=1e-5)
        assert torch.allclose(alone.entropies[0], together.entropies[row], atol=1e-5)
    unmasked = score_views(
        model, prompts, torch.ones_like(mask), trajectory.completion_ids, views, 1.3, trajectory.support
    )
    assert not torch.allclose(unmasked.logps, together.logps, atol=0.05)  # the padding was there to be seen


def test_lm_head_is_evaluated_at_targets_alone():
    model = network()
    trajectory = rollout(model)
    views = views_of(trajectory, 3)
    with forwards_of(model.lm_head) as calls:
        score(model, trajectory, views)
    assert [call["args"][0].shape[:-1].numel() for call in calls] == [views.targets.sum().item()]
    assert 0 < views.targets.sum() < views.targets.numel() / 4


def test_views_without_targets_score_zero_with_zero_gradient():
    model = network()
    trajectory = rollout(model, 1.3, 3, 0.85)
    views = views_of(trajectory, STEPS - 1)
    some = score(model, trajectory, views)
    empty = ~views.targets.any(1)
    assert 0 < empty.sum() < ROWS
    assert not some.logps[empty].any() and some.logps[~empty].any()
    none = score(model, trajectory, views_of(trajectory, STEPS))
    assert none.logps.shape == (ROWS, LENGTH) and not none.logps.any() and not none.entropies.any()
    (none.logps.sum() + none.entropies.sum()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_that_of_full_logits(family, policy):
    model = network(family)
    trajectory = rollout(model, *policy)
    views = trajectory_views(trajectory.completion_ids, trajectory.unmask_step, torch.arange(ROWS) % STEPS, MASK)
    noise = torch.Generator().manual_seed(0)
    weight, entropy_weight = torch.randn(2, ROWS, LENGTH, generator=noise)

    def gradient(logps, entropies) -> list[torch.Tensor]:
        loss = (weight * logps + entropy_weight * entropies)[views.targets].sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    ours = gradient(*score(model, trajectory, views))

    logits = canvas_logits(model, *coded_prompts(ROWS), views.canvas) / trajectory.temperature
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if trajectory.support is not None:
        allowed = (trajectory.support.unsqueeze(-1) == torch.arange(logits.size(-1))).any(-2)
        allowed |= ~views.targets.unsqueeze(-1)  # nothing is recorded of the others, and nothing is asked
    allowed &= torch.arange(logits.size(-1)) != MASK
    log_probs = logits.masked_fill(~allowed, -1e9).log_softmax(-1)
    logps = log_probs.gather(-1, trajectory.completion_ids.unsqueeze(-1)).squeeze(-1)
    plain = gradient(logps, -(log_probs.exp() * log_probs).sum(-1))

    def agree(others: list[torch.Tensor]) -> bool:
        pairs = zip(others, plain, strict=True)
        return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max())) for one, other in pairs)

    assert min(one.abs().max() for one in plain) > 1e-3
    assert agree(ours)
    assert not agree(gradient(*score(model, trajectory, views, temperature=trajectory.temperature + 0.05)))
