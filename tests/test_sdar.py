"""Block-causal attention: what a token sees, one and two streams, and what is scored and trained on them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from methods import method_named
from tiny import MASK, TAIL, coded_prompts, forwards_of, tiny_model, tiny_sdar
from trainer_helpers import largest_log_ratio, losses_seen
from transformers import AutoConfig, AutoModelForCausalLM

from trl_diffusion.evaluation.lm_eval.likelihood_bound import is_greedy, log_likelihood_bound
from trl_diffusion.likelihood import noised_views, score_views, stack_views, trajectory_views
from trl_diffusion.likelihood.plans import block_steps
from trl_diffusion.models import SDARConfig, SDARForCausalLM
from trl_diffusion.models.block_attention import block_causal_bias
from trl_diffusion.sampling import SamplingConfig, Trajectory, row_generators, sample
from trl_diffusion.trainers.sft import masked_loss

ROWS, PROMPT, CANVAS, BLOCK = 16, 8, 12, 4


def network(**overrides) -> SDARForCausalLM:
    """Its texts end in different blocks."""
    return tiny_sdar(5, 10.0, BLOCK, **overrides).eval()


# ------------------------------------------- what a token sees


@pytest.mark.parametrize(("start", "noisy", "first"), [(0, 0, 0), (3, 0, 0), (5, 0, 6), (4, 5, 0), (3, 6, 2)])
def test_the_mask_by_brute_force(start, noisy, first):
    columns, size = 16, 3
    mask = (torch.arange(columns) >= torch.tensor([[0], [2], [5]])).long()
    bias = block_causal_bias(mask, size, torch.float32, start, first, noisy)
    assert bias.shape == (3, 1, columns - first, columns)
    for row, query, key in product(range(3), range(first, columns), range(columns)):
        clean = columns - noisy  # columns from there on are the copy of those before
        places = [column - noisy if column >= clean else column for column in (query, key)]
        blocks = [(place - start) // size for place in places]
        copies = [column >= clean for column in (query, key)]
        own, earlier = blocks[1] == blocks[0] and copies[1] == copies[0], blocks[1] < blocks[0] and not copies[1]
        sees = own or earlier
        expected = (sees and bool(mask[row, key])) or key == query
        assert (bias[row, 0, query - first, key] == 0) == expected
    assert set(bias.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_token_sees_its_block_and_earlier_ones(attention):
    model = network(attn_implementation=attention)
    ids = torch.randint(0, MASK, (1, 14), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % MASK
    for start, first in ((0, 4), (2, 6), (7, 7), (10, 6)):  # the block that column 7 is in starts at `first`
        logits = [model(input_ids=x, canvas_start=start).logits[0] for x in (ids, changed)]
        differs = (logits[0] - logits[1]).abs().amax(-1)
        assert differs[:first].max() == 0 and differs[first:].min() > 1e-3


@pytest.mark.parametrize("padding", [1, 3, 4])
def test_left_padding_changes_nothing_where_the_start_of_the_completion_is_given(padding):
    model, length = network(), 11
    ids = torch.randint(0, MASK, (2, length), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((2, padding), TAIL), ids], dim=1)
    mask = (torch.arange(length + padding) >= padding).long().expand(2, -1)
    plain = model(input_ids=ids, canvas_start=5).logits
    logits = model(input_ids=padded, attention_mask=mask, canvas_start=5 + padding).logits[:, padding:]
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)
    from_column_0 = model(input_ids=padded, attention_mask=mask).logits[:, padding:]
    assert ((from_column_0 - plain).abs().max() > 1e-3) == (padding != 3)  # 5 + 3 is where a block starts anyway


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_finite_under_autocast(attention):
    model = network(attn_implementation=attention)
    ids, mask = coded_prompts(4)
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [6], [7]])).long()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids, attention_mask=mask).logits.isfinite().all()


def by_blocks(model, prompt: torch.Tensor, clean: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of one canvas, each block behind the finished blocks before it, one pass per block."""
    logits = []
    for first in range(0, len(canvas), BLOCK):
        ids = torch.cat([prompt, clean[:first], canvas[first : first + BLOCK]])
        logits.append(model(input_ids=ids.unsqueeze(0), canvas_start=len(prompt)).logits[0, -BLOCK:])
    return torch.cat(logits)


def noised(rows: int = 4) -> tuple[torch.Tensor, ...]:
    """Prompts and their mask, completions, and which positions are masked; bool [rows, L]."""
    generator = torch.Generator().manual_seed(2)
    completions = torch.randint(0, MASK, (rows, CANVAS), generator=generator)
    return *coded_prompts(rows), completions, torch.rand(rows, CANVAS, generator=generator) < 0.5


def test_a_noised_copy_gives_every_block_what_it_saw():
    model, (prompts, mask, completions, hidden) = network(), noised()
    canvas = completions.masked_fill(hidden, MASK)
    logits = model(
        input_ids=torch.cat([prompts, completions, canvas], dim=1),
        attention_mask=torch.cat([mask, torch.ones_like(completions), torch.ones_like(canvas)], dim=1),
        canvas_start=PROMPT,
        noisy_copy=CANVAS,
    ).logits
    for row in range(len(prompts)):
        prompt = prompts[row, mask[row].bool()]
        expected = by_blocks(model, prompt, completions[row], canvas[row])
        torch.testing.assert_close(logits[row, -CANVAS:], expected, atol=1e-5, rtol=1e-5)
        clean = by_blocks(model, prompt, completions[row], completions[row])
        torch.testing.assert_close(logits[row, PROMPT:-CANVAS], clean, atol=1e-5, rtol=1e-5)
        without = by_blocks(model, prompt, canvas[row], canvas[row])  # behind noised blocks
        assert (without - expected)[BLOCK:].abs().max() > 1e-2


def test_a_noised_copy_needs_block_causal_attention():
    with pytest.raises(ValueError, match=r"would see the tokens to predict\. LLaDAModelLM has full attention"):
        tiny_model()(input_ids=torch.zeros(1, 8, dtype=torch.long), noisy_copy=2)


# ------------------------------------------- loading


def test_published_configs_name_an_attention_that_is_not_used(tmp_path):
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "flex_attention"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    for given in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=given)
        assert model.config._attn_implementation == given


@pytest.mark.parametrize("load", [AutoModelForCausalLM, SDARForCausalLM, AutoConfig, SDARConfig])
def test_an_attention_that_is_asked_for_and_not_there_is_refused(load, tmp_path):
    network().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="runs with attn_implementation 'eager' or 'sdpa'; got 'flex_attention'"):
        load.from_pretrained(tmp_path, attn_implementation="flex_attention")


# ------------------------------------------- rollouts and their replay

CONFIGS = {
    "random": SamplingConfig(CANVAS, 12, BLOCK, 1.3),
    "random, 2 tokens": SamplingConfig(CANVAS, 6, BLOCK, 1.3),
    "max_prob": SamplingConfig(CANVAS, 12, BLOCK, 1.3, unmasking="max_prob"),
    "max_prob, 3 steps, top-k": SamplingConfig(CANVAS, 9, BLOCK, 1.3, unmasking="max_prob", top_k=3, top_p=0.9),
    "threshold": SamplingConfig(CANVAS, 12, BLOCK, 1.3, unmasking="max_prob", confidence_threshold=0.5),
    "entropy bound": SamplingConfig(CANVAS, 12, BLOCK, 1.3, unmasking="entropy", entropy_bound=0.6),
}


def rollout(model, config: SamplingConfig) -> Trajectory:
    """Rows with padding, some of which end early."""
    prompts, mask = coded_prompts(ROWS)
    trajectory = sample(model, prompts, mask, config, row_generators(0, rows=range(ROWS)))
    sampled = trajectory.unmask_step.view(ROWS, -1, BLOCK) >= 0
    assert len(sampled.all(2).sum(1).unique()) > 1 and torch.equal(sampled.all(2), sampled.any(2))
    return trajectory


def replayed(model, trajectory: Trajectory, config: SamplingConfig, shrink: int = 1) -> torch.Tensor:
    """Log-probabilities [B, L] of all tokens by views within blocks, and how often each was scored."""
    prompts, mask = coded_prompts(ROWS)
    plan = block_steps(trajectory.unmask_step, config.steps_per_block, shrink)
    total = torch.zeros(ROWS, CANVAS)
    for view in range(plan.masked.size(1)):
        views = noised_views(
            trajectory.completion_ids, plan.masked[:, view], plan.targets[:, view], MASK, two_stream=True
        )
        scores = score_views(
            model, prompts, mask, trajectory.completion_ids, views, config.temperature, trajectory.support
        )
        total += scores.logps
    return total


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_a_trajectory_is_replayed_exactly_in_as_many_passes_as_a_block_has_steps(config):
    model = network()
    trajectory = rollout(model, config)
    with forwards_of(model.model) as calls:
        logps = replayed(model, trajectory, config)
    assert len(calls) == config.steps_per_block
    torch.testing.assert_close(logps, trajectory.logps, atol=1e-5, rtol=1e-5)
    assert (logps != 0).sum() > 50


@torch.no_grad()
def test_what_is_not_an_exact_replay():
    """Two steps per view, blocks behind noised ones, or blocks that start elsewhere."""
    model, config = network(), CONFIGS["random"]
    trajectory, (prompts, mask) = rollout(model, config), coded_prompts(ROWS)
    sampled = trajectory.unmask_step >= 0
    assert (replayed(model, trajectory, config, shrink=2) - trajectory.logps).abs()[sampled].max() > 0.1
    plan = block_steps(trajectory.unmask_step, config.steps_per_block, 1)
    single = noised_views(trajectory.completion_ids, plan.masked[:, 0], plan.targets[:, 0], MASK)
    first_steps = single.targets[:, BLOCK:]
    beside = replace(single, context=trajectory.completion_ids)
    scores = [
        score_views(model, prompts, mask, trajectory.completion_ids, views, config.temperature).logps[:, BLOCK:]
        for views in (single, beside)
    ]
    assert (scores[0] - trajectory.logps[:, BLOCK:]).abs()[first_steps].max() > 0.1
    torch.testing.assert_close(scores[1][first_steps], trajectory.logps[:, BLOCK:][first_steps], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_stream_is_enough_for_the_canvas_before_a_step():
    """What AGRPO and ATPO score: the blocks before are finished, and those behind are not seen."""
    model, config = network(), CONFIGS["random, 2 tokens"]
    trajectory, (prompts, mask) = rollout(model, config), coded_prompts(ROWS)
    total = torch.zeros(ROWS, CANVAS)
    for step in range(config.denoising_steps):
        steps = torch.full((ROWS,), step)
        views = trajectory_views(trajectory.completion_ids, trajectory.unmask_step, steps, MASK)
        total += score_views(model, prompts, mask, trajectory.completion_ids, views, config.temperature).logps
    torch.testing.assert_close(total, trajectory.logps, atol=1e-5, rtol=1e-5)


def test_agrpo_trains_a_block_causal_model_on_the_rollouts_probabilities(tmp_path, monkeypatch):
    trainer = method_named("agrpo").make(tmp_path, model=tiny_sdar(21), learning_rate=0.0, pad_to_multiple_of=3)
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    assert sum(x["targets"].sum() for x in seen) > 20 and largest_log_ratio(seen) <= 1e-4


def test_views_of_a_batch_keep_their_completions():
    _, _, completions, hidden = noised()
    views = [noised_views(completions, part, part, MASK, two_stream=True) for part in (hidden, ~hidden)]
    assert torch.equal(stack_views(views).context, completions.repeat(2, 1))
    assert stack_views([noised_views(completions, hidden, hidden, MASK)] * 2).context is None
    assert views[0].forward_units(prompt_length=8) == pytest.approx(4 * (8 + 2 * CANVAS) / (8 + CANVAS))
    assert noised_views(completions, hidden, hidden, MASK).forward_units(8) == 4


# ------------------------------------------- supervised fine-tuning


def test_the_sft_loss_is_that_of_every_block_behind_finished_ones():
    model, (prompts, mask, completions, hidden) = network(), noised()
    level = torch.tensor([0.3, 0.5, 0.7, 0.9])
    loss = masked_loss(model, prompts, mask, completions, hidden, level, model.family)
    expected, single = 0.0, 0.0
    for row in range(4):
        prompt, canvas = prompts[row, mask[row].bool()], completions[row].masked_fill(hidden[row], MASK)
        for behind in (completions[row], canvas):
            logits = by_blocks(model, prompt, behind, canvas).index_fill(-1, torch.tensor([MASK]), -torch.inf)
            own = -logits.log_softmax(-1)[range(CANVAS), completions[row]][hidden[row]].sum() / level[row]
            expected, single = (expected + own, single) if behind is not canvas else (expected, single + own)
    torch.testing.assert_close(loss, expected / 4 / CANVAS, atol=1e-5, rtol=1e-5)
    assert (single / 4 / CANVAS - loss).abs() > 0.05

    found = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(expected / 4 / CANVAS, list(model.parameters()))
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4)


# ------------------------------------------- likelihood bounds


def test_bounds_for_full_attention_are_refused():
    with pytest.raises(ValueError, match="for full attention only: sdar writes blocks of 4 tokens"):
        log_likelihood_bound(network(), [[2]], [[2, 3]], row_generators(0, rows=[0]))
    with pytest.raises(ValueError, match="for full attention only: sdar writes blocks of 4 tokens"):
        is_greedy(network(), [2], [2, 3])


def test_generate_writes_blocks_of_the_attention():
    model, (prompts, mask) = network(), coded_prompts(4)
    steps = model.generate(prompts, mask, max_new_tokens=CANVAS, return_trajectory=True).unmask_step
    blocks = steps.view(4, CANVAS // BLOCK, BLOCK)
    for earlier, later in zip(blocks[:, :-1].unbind(1), blocks[:, 1:].unbind(1), strict=True):
        written = (later >= 0).all(1)
        assert (earlier[written].amax(1) < later[written].amin(1)).all()
    with pytest.raises(ValueError, match="Set block_length=4"):
        model.generate(prompts, mask, max_new_tokens=CANVAS, block_length=6)
