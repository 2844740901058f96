"""Reused keys and values: exact with block-causal attention; with full attention, exactly as old as they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_continuation import mixed_states
from test_sampling import always, lockstep, network
from tiny import MASK, A, B, canvas_logits, coded_prompts, forwards_of, tiny_model, tiny_sdar, without_ends
from transformers import DynamicCache

from trl_diffusion.models import DreamModel, LLaDAModelLM, SDARForCausalLM, WindowCache
from trl_diffusion.models.layers import CACHE_KEYWORD
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample
from trl_diffusion.sampling.caches import BlockCache
from trl_diffusion.sampling.cost import completion_units
from trl_diffusion.sampling.unmasking import RULES

ROWS, PROMPT = 16, 8
CONFIG = SamplingConfig(12, 6, 4, 1.3)
ONE_EACH = SamplingConfig(12, 12, 4, 1.3)
PARALLEL = {"max_prob": {"confidence_threshold": 0.6}, "entropy": {"entropy_bound": 0.5}}


def block_causal(**overrides):
    """Texts end in different blocks."""
    return tiny_sdar(5, 10.0, 4, **overrides)


def draw(model, config: SamplingConfig, rows=range(ROWS), **kwargs):
    prompts, mask = coded_prompts(ROWS)
    return sample(model, prompts[list(rows)], mask[list(rows)], config, row_generators(0, rows=rows), **kwargs)


def assert_same(first, second, tolerance: float = 1e-5):
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.unmask_step, second.unmask_step)
    torch.testing.assert_close(first.logps, second.logps, rtol=1e-4, atol=tolerance)


# ------------------------------------------- block-causal attention


@pytest.mark.parametrize("config", [*(replace(CONFIG, unmasking=rule) for rule in RULES)], ids=RULES)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("origin", ["completion", "sequence"])
def test_the_block_cache_is_exact(config, parallel, origin):
    if parallel:
        if config.unmasking not in PARALLEL:
            pytest.skip("no rule of parallel unmasking has this order")
        config = replace(ONE_EACH, unmasking=config.unmasking, **PARALLEL[config.unmasking])
    model = block_causal(block_origin=origin)
    plain = draw(model, replace(config, cache="none"))
    cached = draw(model, config)
    ends = {tuple(row) for row in (plain.unmask_step.view(ROWS, 3, 4) >= 0).all(2).tolist()}
    assert len(ends) > 1  # rows leave the batch at different blocks
    assert_same(plain, cached)
    assert cached.forwards == plain.forwards + 1
    assert cached.row_units.sum() < plain.row_units.sum()


def test_a_finished_block_is_written_to_the_cache_with_its_tokens(monkeypatch):
    model = block_causal()
    exact = draw(model, CONFIG)
    monkeypatch.setattr(BlockCache, "_unwritten", property(lambda self: 0, lambda self, value: None))
    stale = draw(model, CONFIG)
    first_block = slice(0, 4)
    assert torch.equal(stale.completion_ids[:, first_block], exact.completion_ids[:, first_block])
    assert (stale.logps - exact.logps).abs().max() > 0.01


def test_columns_of_every_pass_and_one_for_the_prompt_of_a_group():
    model, rows = block_causal(), [0, 0, 0, 1, 1, 1]
    prompts, mask = coded_prompts(2)
    with forwards_of(model) as calls:
        trajectory = sample(model, prompts[rows], mask[rows], CONFIG, row_generators(0, rows=range(6)))
    shapes = [tuple(call["input_ids"].shape) for call in calls]
    assert shapes[0] == (2, PROMPT)  # once for each prompt
    assert [width for _, width in shapes[1:]] == [4, 4, 8, 4, 8, 4][: len(shapes) - 1]
    assert [height for height, _ in shapes[1:3]] == [6, 6]
    columns = PROMPT + 12
    whole = trajectory.steps_taken == 6
    assert whole.any()
    # a third of the prompt, then 3 blocks at 2 steps and two of them once more when they are finished
    expected = torch.full((int(whole.sum()),), (PROMPT / 3 + 6 * 4 + 2 * 4) / columns)
    torch.testing.assert_close(trajectory.row_units[whole], expected)
    assert completion_units(CONFIG, PROMPT, 4) == pytest.approx((PROMPT + 32) / columns)


@pytest.mark.parametrize("unmasking", ["random", "max_prob"])
@pytest.mark.parametrize("origin", ["completion", "sequence"])
def test_the_block_cache_from_partly_denoised_canvases(unmasking, origin):
    """Rows at different blocks: some wait, then all go on together."""
    model = block_causal(block_origin=origin)
    prompts, mask = coded_prompts(28)
    config = replace(CONFIG, unmasking=unmasking)
    state = mixed_states(network(), 28)
    plain, cached = (
        sample(model, prompts, mask, replace(config, cache=cache), row_generators(5, rows=range(28)), state=state)
        for cache in ("none", "auto")
    )
    assert len(set(plain.row_forwards.tolist())) > 2
    assert_same(plain, cached)


@pytest.mark.parametrize("given", [slice(4, 8), slice(0, 8), slice(6, 12)])
def test_the_block_cache_over_given_blocks(given):
    """A block that is given needs no pass of its own; what comes behind sees it all the same."""
    model = without_ends(block_causal())
    canvas = torch.full((ROWS, 12), MASK)
    canvas[:, given] = torch.randint(A, B + 1, canvas[:, given].shape, generator=torch.Generator().manual_seed(0))
    state = CanvasState(canvas, torch.full((ROWS,), 12))
    plain, cached = (draw(model, replace(CONFIG, cache=cache), state=state) for cache in ("none", "block"))
    assert (plain.row_forwards < 6).all() and (plain.unmask_step >= 0).any(1).all()
    assert_same(plain, cached)


def test_processes_that_share_weights_run_the_same_number_of_cached_passes():
    model = block_causal()
    steps = draw(model, CONFIG).steps_taken
    shares = [(steps == 2).nonzero().flatten().tolist(), (steps > 2).nonzero().flatten().tolist()]
    assert min(map(len, shares)) > 0
    alone = [draw(model, CONFIG, rows) for rows in shares]
    together = lockstep(lambda rank, any_process: draw(model, CONFIG, shares[rank], any_process=any_process))
    assert together[0].forwards == together[1].forwards > alone[0].forwards
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other, 0.0)


# ------------------------------------------- full attention


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("model_class", [LLaDAModelLM, DreamModel])
class TestApproximateCaches:
    def test_a_cache_that_is_renewed_at_every_step_is_exact(self, model_class, cache):
        model = network() if model_class is LLaDAModelLM else network("dream")
        renewed = draw(model, replace(CONFIG, cache=cache, cache_refresh=1))
        assert_same(renewed, draw(model, CONFIG), 0.0)
        assert torch.equal(renewed.row_units, renewed.row_forwards.float())

    def test_in_a_network_of_one_layer_only_changed_tokens_have_new_keys(self, model_class, cache):
        """There a column's keys and values depend on its own token alone, and only the active block changes."""
        shallow, deep = (tiny_model(5, 10.0, model_class, num_hidden_layers=layers) for layers in (1, 2))
        config = replace(CONFIG, unmasking="max_prob")
        assert_same(draw(shallow, config), draw(shallow, replace(config, cache=cache)))
        exact, cached = draw(deep, config), draw(deep, replace(config, cache=cache))
        assert (exact.logps - cached.logps).abs().max() > 0.01

    def test_tokens_of_full_passes_have_the_probabilities_of_the_network(self, model_class, cache):
        model = network() if model_class is LLaDAModelLM else network("dream")
        trajectory = draw(model, replace(CONFIG, cache=cache))
        prompts, mask = coded_prompts(ROWS)
        off = {True: [], False: []}
        for step in range(6):
            hidden = (trajectory.unmask_step >= step) | (trajectory.unmask_step < 0)
            canvas = trajectory.completion_ids.masked_fill(hidden, model.config.mask_token_id)
            with torch.no_grad():
                logits = canvas_logits(model, prompts, mask, canvas)
            exact = (logits / 1.3).log_softmax(-1).gather(-1, trajectory.completion_ids.unsqueeze(-1)).squeeze(-1)
            now = trajectory.unmask_step == step
            off[step % 2 == 0].append((exact - trajectory.logps)[now].abs().max())
        assert max(off[True]) < 1e-5 < 0.01 < max(off[False])

    def test_columns_of_every_pass(self, model_class, cache):
        model, shift = always(A, B, model=tiny_model(5, 10.0, model_class)), model_class.logit_shift
        config = replace(ONE_EACH, cache=cache, cache_refresh=3, temperature=0.0)
        with forwards_of(model) as calls:
            trajectory = draw(model, config)
        columns = PROMPT + 12
        widths = {"prefix": [12, 8, 4], "dual": [4, 4, 4]}[cache]
        expected = [width for w in widths for width in (columns, w + shift, w + shift, columns)]
        assert [call["input_ids"].size(1) for call in calls] == expected
        if not shift:
            units = torch.full((ROWS,), completion_units(config, PROMPT, None))
            torch.testing.assert_close(trajectory.row_units, units)


def test_a_window_at_the_first_column_keeps_what_lies_behind():
    """Dream with a prompt of one token: its logits are shifted, so the first block's window begins at column 0."""
    first, new = torch.randn(2, 1, 1, 5, 4, generator=torch.Generator().manual_seed(0)).unbind()
    cache = WindowCache(6)
    cache.window(0, 5).update(first, first, 0)
    keys, values = cache.window(0, 5).update(new[:, :, :3], new[:, :, :3], 0)
    assert torch.equal(keys, torch.cat([new[:, :, :3], first[:, :, 3:]], dim=2)) and torch.equal(keys, values)

    model, one_token = tiny_model(5, 10.0, DreamModel, num_hidden_layers=1), torch.tensor([[A], [B]])
    config = replace(CONFIG, unmasking="max_prob")
    plain, dual = (
        sample(model, one_token, None, replace(config, cache=cache), row_generators(0, rows=range(2)))
        for cache in ("none", "dual")
    )
    assert_same(plain, dual)  # in one layer only changed tokens have new keys


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_rows_that_finish_their_block_early_leave_the_window(cache):
    """The others' tokens are those they would have got alone."""
    model = tiny_model(5, 6.0)
    config = replace(ONE_EACH, unmasking="max_prob", confidence_threshold=0.7, cache=cache)
    with forwards_of(model) as calls:
        together = draw(model, config)
    assert len({len(call["input_ids"]) for call in calls if call["input_ids"].size(1) < PROMPT + 12}) > 1
    for row in range(0, ROWS, 5):
        alone = draw(model, config, [row])
        assert torch.equal(alone.completion_ids[0], together.completion_ids[row])
        torch.testing.assert_close(alone.logps[0], together.logps[row], rtol=1e-4, atol=1e-5)


# ------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "kv"}, "cache must be one of auto, none, prefix, dual, block; got 'kv'"),
        ({"cache_refresh": 2}, "cache_refresh=2 renews an approximate cache; with cache='auto' there is none"),
        ({"cache": "block", "cache_refresh": 2}, "with cache='block' there is none"),
        ({"cache": "dual", "cache_refresh": -1}, "cache_refresh must be at least 0"),
        ({"cache": "dual", "cache_refresh": 2}, "cache_refresh=2 never comes due: a block has 2 steps"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_a_cache_that_does_not_go_with_the_attention():
    with pytest.raises(ValueError, match="cache='block' needs block-causal attention, and llada attends to the whole"):
        draw(network(), replace(CONFIG, cache="block"))
    with pytest.raises(ValueError, match=r"sdar has block-causal attention.*cache='auto' in place of 'dual'"):
        draw(block_causal(), replace(CONFIG, cache="dual"))
    with pytest.raises(ValueError, match=r"sdar writes blocks of 4 tokens.*block_length=6\. Set block_length=4"):
        draw(block_causal(), SamplingConfig(12, 6, 6))


FAMILIES = pytest.mark.parametrize("model_class", [LLaDAModelLM, DreamModel, SDARForCausalLM])


@FAMILIES
def test_a_cache_that_the_attention_does_not_know_is_an_error(model_class):
    model, (prompts, _) = tiny_model(model_class=model_class), coded_prompts(2)
    with pytest.raises(TypeError, match=f"got {CACHE_KEYWORD}=DynamicCache.*use_cache=False"):
        model(prompts, use_cache=True)
    with pytest.raises(TypeError, match=f"got {CACHE_KEYWORD}=DynamicCache"):
        model(prompts, past_key_values=DynamicCache())
    states = torch.zeros(1, 2, model.config.hidden_size)
    angles = model.model.rotary_emb(states, torch.arange(2)[None])
    for layer in model.model.layers:
        with pytest.raises(TypeError, match=f"got a cache as 'renamed' and expects it as '{CACHE_KEYWORD}'"):
            layer(states, position_embeddings=angles, renamed=WindowCache(2))


@FAMILIES
def test_a_config_for_autoregressive_models_makes_no_growing_cache(model_class):
    model, (prompts, _) = tiny_model(model_class=model_class, use_cache=True), coded_prompts(2)
    output = model(prompts)
    assert output.logits.shape == (2, PROMPT, 5) and output.get(CACHE_KEYWORD) is None


@FAMILIES
def test_a_cache_in_training_mode_is_an_error(model_class):
    """Gradient checkpointing would drop it, and the window would be without the columns before it."""
    model, (prompts, _) = tiny_model(model_class=model_class), coded_prompts(2)
    cache = WindowCache(PROMPT)
    model.eval()(prompts, cache=cache.window(0, PROMPT))
    with pytest.raises(ValueError, match=r"in training mode.*model\.eval\(\)"):
        model.train()(prompts[:, 4:], cache=cache.window(4, PROMPT))
