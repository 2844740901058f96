"""Blocks of attention that are counted from the start of the sequence, as SDAR counts them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from methods import method_named
from peft import LoraConfig, get_peft_model
from tiny import END, MASK, TAIL, A, coded_prompts, tiny_mixture, tiny_model, tiny_sdar
from trainer_helpers import largest_log_ratio, losses_seen
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trl_diffusion.cli.loading import LoadingArguments
from trl_diffusion.credit.step_aware_states import probe_points, probe_state
from trl_diffusion.credit.step_draws import eligible_steps
from trl_diffusion.evaluation import load_model
from trl_diffusion.family import family_of
from trl_diffusion.likelihood import noised_views, score_views, trajectory_views
from trl_diffusion.likelihood.plans import block_steps
from trl_diffusion.models import Fast_dLLM_QwenForCausalLM, SDARConfig, SDARForCausalLM
from trl_diffusion.models.block_attention import block_causal_bias, sees_all
from trl_diffusion.sampling import SamplingConfig, row_generators, sample

BLOCK, CANVAS, ROWS, SHIFTED_SEED = 4, 8, 16, 10
CONFIG = SamplingConfig(CANVAS, CANVAS, BLOCK, temperature=0.0, unmasking="max_prob")


def network(**overrides) -> SDARForCausalLM:
    return tiny_sdar(9, 10.0, BLOCK, block_origin="sequence", **overrides).eval()


def shifted(**overrides) -> Fast_dLLM_QwenForCausalLM:
    """The first token of a block is predicted from the block before it."""
    return tiny_model(SHIFTED_SEED, 10.0, Fast_dLLM_QwenForCausalLM, block_size=BLOCK, **overrides).eval()


NETWORKS = pytest.mark.parametrize("build", [network, shifted])


def drawn(model, config: SamplingConfig = CONFIG, rows: int = ROWS, **options):
    """Prompts of 5 to 8 tokens in one batch, so that every P mod 4 occurs, and their completions."""
    ids, mask = coded_prompts(rows)
    return ids, mask, sample(model, ids, mask, config, row_generators(3, rows=range(rows)), **options)


# ------------------------------------------- SDAR's own loop, written from its description


def stock(model):
    """The network as transformers' own class."""
    qwen2 = isinstance(model, Qwen2ForCausalLM)
    config_class, model_class = (Qwen2Config, Qwen2ForCausalLM) if qwen2 else (Qwen3Config, Qwen3ForCausalLM)
    settings = {key: value for key, value in model.config.to_dict().items() if key in config_class().to_dict()}
    twin = model_class(config_class(**settings | {"rope_parameters": model.config.rope_parameters}))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@torch.no_grad()
def stock_logits(twin, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one text (long [T]) whose tokens see the blocks up to their own, counted from its start."""
    block = torch.arange(len(ids)) // BLOCK
    bias = torch.zeros(len(ids), len(ids)).masked_fill(block > block[:, None], torch.finfo(torch.float32).min)
    logits = twin(input_ids=ids[None], attention_mask=bias[None, None], use_cache=False).logits[0]
    logits[:, MASK] = -torch.inf
    return logits


def plain_completion(twin, prompt: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Complete one prompt greedily, a token a step, the surest first: tokens and their log-probabilities [length].

    Blocks of the whole text are finished one after the other, beginning with the one that holds the end of the prompt.
    """
    shift = isinstance(twin, Qwen2ForCausalLM)  # the logits at i - 1 predict the token at i
    text = torch.cat([prompt, torch.full((length,), MASK)])
    logps = torch.zeros(len(text))
    for block in range(len(prompt) // BLOCK, -(-len(text) // BLOCK)):
        first, end = block * BLOCK, min((block + 1) * BLOCK, len(text))
        while (text[first:end] == MASK).any():
            log_probs = stock_logits(twin, text[:end]).log_softmax(-1)
            if shift:
                log_probs = torch.cat([log_probs[:1], log_probs[:-1]])
            surest = log_probs.exp().amax(-1).masked_fill(text[:end] != MASK, -1.0)
            surest[:first] = -1.0
            place = int(surest.argmax())
            text[place], logps[place] = int(log_probs[place].argmax()), log_probs[place].max()
        if torch.isin(text[max(first, len(prompt)) : end], torch.tensor([TAIL, END])).any():
            break
    return text[len(prompt) :].masked_fill(text[len(prompt) :] == MASK, TAIL), logps[len(prompt) :]


@NETWORKS
@pytest.mark.parametrize("cache", ["none", "block"])
def test_sampling_is_the_plain_loop_for_every_remainder_in_one_batch(cache, build):
    model = build()
    ids, mask, trajectory = drawn(model, replace(CONFIG, cache=cache))
    assert {*(mask.sum(1) % BLOCK).tolist()} == {0, 1, 2, 3}
    twin = stock(model)
    for row in range(ROWS):
        tokens, logps = plain_completion(twin, ids[row, mask[row].bool()], CANVAS)
        assert trajectory.completion_ids[row].tolist() == tokens.tolist()
        torch.testing.assert_close(trajectory.logps[row], logps, atol=1e-5, rtol=1e-5)
    ended = (trajectory.unmask_step < 0).any(1)
    assert 0 < int(ended.sum()) < ROWS  # some texts end before the canvas does, and some do not


def test_the_origins_differ_unless_the_prompt_fills_its_blocks():
    _, mask, ours = drawn(network())
    _, _, other = drawn(tiny_sdar(9, 10.0, BLOCK).eval())
    differs = (ours.logps - other.logps).abs().amax(1) > 1e-4
    whole = mask.sum(1) % BLOCK == 0
    assert whole.any() and not differs[whole].any() and differs[~whole].any()


@NETWORKS
def test_drawn_completions_do_not_depend_on_the_batch_or_on_sharing(build):
    config = replace(CONFIG, temperature=1.0, unmasking="random")
    model = build()
    ids, mask, together = drawn(model, config)
    _, _, shared = drawn(model, config, any_process=lambda here: here)
    assert torch.equal(shared.completion_ids, together.completion_ids)
    for row in range(ROWS):
        alone = sample(model, ids[row : row + 1], mask[row : row + 1], config, row_generators(3, rows=[row]))
        assert torch.equal(alone.completion_ids[0], together.completion_ids[row])
        torch.testing.assert_close(alone.logps[0], together.logps[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["none", "block"])
@pytest.mark.parametrize("sharing", [None, lambda here: here])
@NETWORKS
def test_prompts_shorter_than_a_block(cache, sharing, build):
    model = build()
    ids = torch.tensor([[TAIL, TAIL, A], [TAIL, A, A + 1], [A, A + 1, A]])
    mask = (ids != TAIL).long()
    config = replace(CONFIG, cache=cache)
    trajectory = sample(model, ids, mask, config, row_generators(0, rows=range(3)), any_process=sharing)
    for row in range(3):
        tokens, _ = plain_completion(stock(model), ids[row, mask[row].bool()], CANVAS)
        assert trajectory.completion_ids[row].tolist() == tokens.tolist()


def test_no_rows():
    empty = torch.zeros(0, 3, dtype=torch.long)
    trajectory = sample(network(), empty, empty, CONFIG, [])
    assert trajectory.completion_ids.shape == (0, CANVAS)


def test_an_end_token_of_the_prompt_ends_no_text():
    model = tiny_sdar(5, 10.0, BLOCK, block_origin="sequence").eval()  # a network that ends no text early
    ids = torch.tensor([[A, A, A, A + 1, A, END]])
    trajectory = sample(model, ids, None, CONFIG, row_generators(0, rows=[0]))
    tokens, _ = plain_completion(stock(model), ids[0], CANVAS)
    assert trajectory.completion_ids[0].tolist() == tokens.tolist()
    assert (trajectory.unmask_step[0, 2:] >= 0).any()  # written past the block that the prompt ends in


def test_an_observer_sees_positions_of_the_completion():
    seen = torch.full((ROWS, CANVAS), -1)

    def observe(commits):
        seen[commits.rows, commits.positions] = commits.steps.long()

    _, _, trajectory = drawn(network(), observer=observe)
    assert torch.equal(seen, trajectory.unmask_step.long())


def test_generate_completes_every_remainder():
    model = network()
    ids, mask = coded_prompts(4)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, denoising_steps=8)
    twin = stock(model)
    for row in range(4):
        tokens, _ = plain_completion(twin, ids[row, mask[row].bool()], 6)
        ended = [place for place, token in enumerate(tokens.tolist()) if token in (TAIL, END)]
        length = ended[0] + 1 if ended else 6
        assert output[row, 8 : 8 + length].tolist() == tokens[:length].tolist()


# ------------------------------------------- scoring


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_blocks_are_counted_from_the_first_token_that_is_shown(attention, padding):
    model = network(attn_implementation=attention)
    ids = torch.randint(0, MASK, (2, 11), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.full((2, padding), TAIL), ids], dim=1)
    mask = (torch.arange(11 + padding) >= padding).long().expand(2, -1)
    logits = model(input_ids=padded, attention_mask=mask, canvas_start=5 + padding).logits[:, padding:]
    for row in range(2):
        expected = stock_logits(stock(model), ids[row])
        torch.testing.assert_close(logits[row, :, :MASK], expected[:, :MASK], atol=1e-4, rtol=1e-4)


def test_the_mask_with_a_start_for_each_row_is_that_of_each_row():
    mask = torch.ones(3, 12, dtype=torch.long)
    starts = torch.tensor([0, 1, 5])
    together = block_causal_bias(mask, 3, torch.float32, starts, noisy_copy=4)
    for row, start in enumerate(starts.tolist()):
        alone = block_causal_bias(mask[:1], 3, torch.float32, start, noisy_copy=4)
        assert torch.equal(together[row], alone[0])


@NETWORKS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trajectory_views_give_the_log_probabilities_of_the_rollout(temperature, build):
    model = build()
    ids, mask, trajectory = drawn(model, replace(CONFIG, temperature=temperature))
    scored = torch.zeros_like(trajectory.logps)
    for step in range(int(trajectory.unmask_step.max()) + 1):
        steps = torch.full((ROWS,), step)
        views = trajectory_views(trajectory.completion_ids, trajectory.unmask_step, steps, MASK)
        for columns in (None, trajectory.prompt_columns):
            scores = score_views(model, ids, mask, trajectory.completion_ids, views, prompt_columns=columns)
            torch.testing.assert_close(scores.logps, trajectory.logps * views.targets, atol=1e-5, rtol=1e-5)
        scored += scores.logps
    torch.testing.assert_close(scored, trajectory.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [network, shifted, lambda: tiny_mixture("sdar_moe", block_origin="sequence").eval()])
def test_two_streams_replay_the_rollout_of_every_remainder(build):
    model = build()
    ids, mask, trajectory = drawn(model, replace(CONFIG, temperature=1.0, unmasking="random"))
    plan = block_steps(trajectory.unmask_step, BLOCK, 1)
    scored = torch.zeros_like(trajectory.logps)
    for view in range(BLOCK):
        views = noised_views(
            trajectory.completion_ids, plan.masked[:, view], plan.targets[:, view], MASK, two_stream=True
        )
        scored += score_views(model, ids, mask, trajectory.completion_ids, views).logps
    torch.testing.assert_close(scored, trajectory.logps, atol=1e-5, rtol=1e-5)
    # Without the prompt's end in the noised copy the first block would be scored on another text.
    model.block_origin = "completion"
    views = noised_views(trajectory.completion_ids, plan.masked[:, 0], plan.targets[:, 0], MASK, two_stream=True)
    other = score_views(model, ids, mask, trajectory.completion_ids, views).logps
    assert (other - trajectory.logps * plan.targets[:, 0]).abs().max() > 1e-3


@NETWORKS
@pytest.mark.parametrize(
    ("name", "least"), [("agrpo", 20), ("agrpo, max_prob", 20), ("mapg", 20), ("fork_grpo", 5), ("dipo", 20)]
)
def test_ratios_start_at_one(name, least, build, tmp_path, monkeypatch):
    """ForkGRPO learns at forced steps alone, which are few."""
    trainer = method_named(name).make(tmp_path, model=build(), learning_rate=0.0)
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    assert sum(x["targets"].sum() for x in seen) > least and largest_log_ratio(seen) <= 1e-5


# ------------------------------------------- windows without a mask


def test_a_window_needs_no_mask_where_the_mask_hides_nothing():
    for start, first, visible in product(range(5), range(9), range(1, 12)):
        if first >= visible:
            continue
        bias = block_causal_bias(torch.ones(1, visible), 3, torch.float32, start, first)
        assert sees_all(3, start, first, visible) == (not bias.any())


@NETWORKS
def test_steps_inside_a_block_have_no_mask_and_the_same_logits(build, monkeypatch):
    model, masks = build(), []
    ids, mask = coded_prompts(8)
    ids, mask = ids[:, 3:], mask[:, 3:]  # no padding
    attention = type(model)._attention

    def recorded(self, *args, **kwargs):
        masks.append(attention(self, *args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(type(model), "_attention", recorded)
    without = sample(model, ids, mask, CONFIG, row_generators(0, rows=range(8)))
    # The first window of a block also computes the block before it; a shifted one always begins there. The passes over
    # the prompts and the blocks' other windows see everything that there is.
    unmasked = sum(seen is None for seen in masks)
    assert unmasked >= 2 * (BLOCK - 1) if not model.logit_shift else unmasked <= 1
    monkeypatch.setattr("trl_diffusion.models.diffusion_lm.sees_all", lambda *args: False)
    masks.clear()
    masked = sample(model, ids, mask, CONFIG, row_generators(0, rows=range(8)))
    assert all(seen is not None for seen in masks)
    assert torch.equal(without.completion_ids, masked.completion_ids)
    torch.testing.assert_close(without.logps, masked.logps, atol=1e-6, rtol=1e-6)


# ------------------------------------------- credit


def test_exact_scope_ends_with_the_block_that_holds_the_end():
    family = family_of(network())
    text = torch.full((4, CANVAS), A)
    text[:, 3] = END
    tail = torch.arange(4)
    steps = eligible_steps(text, torch.zeros(4, CANVAS), family, "exact", BLOCK, 2, tail)
    # position 3 lies in the first block of the completion only where the prompt fills its own
    assert steps.tolist() == [2, 4, 4, 4]


def test_states_of_whole_blocks_lie_on_the_grid():
    model = network()
    _, mask, trajectory = drawn(model, replace(CONFIG, temperature=1.0))
    family, tail = family_of(model), family_of(model).prompt_tail(mask.sum(1))
    points = probe_points(trajectory, family, "block", BLOCK, torch.full((ROWS,), 0.5), tail)
    state = probe_state(trajectory, family, "block", BLOCK, points, CANVAS, tail)
    written = (state.canvas != MASK).sum(1)
    assert torch.equal(written[points > 0], (points * BLOCK - tail)[points > 0])
    assert (points > 0).any()
    # A state that the rollout passed through, continued with its own noise, gives its own completion.
    kept = probe_state(trajectory, family, "keep", BLOCK, torch.full((ROWS,), 3), 0, tail)
    _, _, again = drawn(model, replace(CONFIG, temperature=1.0), state=kept)
    unfinished = (trajectory.unmask_step >= 3).any(1)
    assert torch.equal(again.completion_ids[unfinished], trajectory.completion_ids[unfinished])


# ------------------------------------------- settings


def test_the_origin_is_saved_and_checked(tmp_path):
    for origin in ("sequence", "completion"):
        tiny_sdar(block_origin=origin).save_pretrained(tmp_path / origin)
        assert family_of(SDARForCausalLM.from_pretrained(tmp_path / origin)).block_origin == origin
    assert SDARConfig().block_origin == "sequence"
    with pytest.raises(ValueError, match="block_origin must be one of"):
        SDARConfig(block_origin="prompt")


def test_commands_can_say_the_origin(tmp_path):
    model = load_model("embedded_sdar", block_origin="sequence")[0]
    assert family_of(model).block_origin == "sequence"
    assert family_of(load_model("embedded_sdar")[0]).block_origin == "completion"
    folder = tmp_path / "adapter"
    lora = LoraConfig(r=2, target_modules="all-linear")
    get_peft_model(load_model("embedded_sdar")[0], lora).save_pretrained(folder)
    arguments = LoadingArguments(adapter=str(folder), block_origin="sequence")
    assert family_of(arguments.load("cpu")[0]).block_origin == "sequence"
    with pytest.raises(TypeError, match="block_origin"):
        load_model("embedded", block_origin="sequence")  # full attention has no blocks


def test_grid_has_a_block_more_where_a_completion_can_begin_inside_one():
    family = family_of(network())
    grid = CONFIG.on_grid(family)
    assert (grid.canvas_length, grid.denoising_steps, grid.steps_per_block) == (CANVAS + BLOCK, CANVAS + BLOCK, BLOCK)
    for other in (replace(family, block_origin="completion"), replace(family, attention_block=None)):
        assert CONFIG.on_grid(other) is CONFIG
    assert family.prompt_tail(torch.tensor([4, 5, 6, 7])).tolist() == [0, 1, 2, 3]
    assert CONFIG.commits() == grid.commits()
