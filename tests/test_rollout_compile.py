"""`rollout_compile`: the steps of a rollout by a compiled network are those of the network as it is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from methods import method_named
from peft import LoraConfig, get_peft_model
from test_continuation import mixed_states
from tiny import A, coded_prompts, tiny_mixture, tiny_model, tiny_sdar
from torch._dynamo.testing import CompileCounterWithBackend

from trl_diffusion.adapters.merging import merged_adapter
from trl_diffusion.models import DreamModel, compiled_windows, fused
from trl_diffusion.models.compiled_windows import window_states
from trl_diffusion.models.fused import fuse_elementwise
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.sampling import SamplingConfig, row_generators, sample
from trl_diffusion.sampling.static_windows import StaticWindowCache, padded_rows

pytestmark = pytest.mark.slow

ROWS = 16
NETWORKS = {
    "llada": lambda **more: tiny_model(5, 10.0, **more),
    "dream": lambda: tiny_model(5, 10.0, DreamModel),  # its windows begin a column earlier
    "sdar": lambda **more: tiny_sdar(5, 10.0, 4, **more),
    "sdar, blocks from the start of the sequence": lambda: tiny_sdar(5, 10.0, 4, block_origin="sequence"),
}
SETTINGS = {
    "random": {},
    "greedy": {"temperature": 0.0, "unmasking": "max_prob"},
    "parallel": {"denoising_steps": 12, "unmasking": "max_prob", "confidence_threshold": 0.6},
    "signals": {"record_signals": True, "top_k": 3},
}


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    """Trace as for any backend, but run the graphs operation by operation; counts graphs."""
    torch._dynamo.reset()
    made = CompileCounterWithBackend("eager")
    traced = torch.compile(window_states, fullgraph=True, backend=made)
    made.calls, made.sizes = 0, set()

    def run(network, embedded, columns, seen, keys_and_values):
        made.calls += 1
        made.sizes.add((*embedded.shape[:2], keys_and_values.capacity))
        return traced(network, embedded, columns, seen, keys_and_values)

    monkeypatch.setattr(compiled_windows, "compiled", lambda device_type: run)
    yield made
    torch._dynamo.reset()


def drawn(model, rows: int = ROWS, **settings):
    """Draw twice, as it is and compiled."""
    cache = "dual" if model.family.attention_block is None else "block"
    config = SamplingConfig(
        **{"canvas_length": 12, "denoising_steps": 6, "block_length": 4, "cache": cache} | settings
    )
    prompts, mask = (part[:rows] for part in coded_prompts(ROWS))
    return [
        sample(model, prompts, mask, replace(config, rollout_compile=on), row_generators(0, rows=range(rows)))
        for on in (False, True)
    ]


def assert_same(plain, compiled, tolerance: float = 1e-6):
    assert torch.equal(plain.completion_ids, compiled.completion_ids)
    assert torch.equal(plain.unmask_step, compiled.unmask_step)
    torch.testing.assert_close(compiled.logps, plain.logps, atol=tolerance, rtol=tolerance)
    assert plain.forwards == compiled.forwards
    torch.testing.assert_close(compiled.row_units, plain.row_units)


# ------------------------------------------- rollouts


@pytest.mark.parametrize("name", NETWORKS)
def test_rollouts_are_the_same(name, counter):
    model, ends = NETWORKS[name](), set()
    for settings in SETTINGS.values():
        counter.calls = 0
        plain, compiled = drawn(model, **{"temperature": 1.3} | settings)
        assert_same(plain, compiled)
        assert 0 < counter.calls < compiled.forwards  # full forwards and prefills run as they are
        ends |= {tuple(row) for row in (plain.unmask_step.view(ROWS, 3, 4) >= 0).all(2).tolist()}
    assert len(ends) > 1 or name == "dream"  # rows leave the batch at different blocks


def test_renewed_caches(counter):
    plain, compiled = drawn(tiny_model(5, 10.0), denoising_steps=12, cache_refresh=2)
    assert_same(plain, compiled)
    assert counter.calls == compiled.forwards // 2  # every other step computes all columns


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_canvases_that_are_continued(name):
    """Rows at different blocks, on canvases of different length."""
    model, (prompts, mask) = NETWORKS[name](), coded_prompts(28)
    config = SamplingConfig(12, 6, 4, 1.3, cache="block" if name == "sdar" else "dual")
    state = mixed_states(NETWORKS["llada"](), 28)
    assert_same(
        *(
            sample(
                model,
                prompts,
                mask,
                replace(config, rollout_compile=on),
                row_generators(5, rows=range(28)),
                state=state,
            )
            for on in (False, True)
        )
    )


def test_a_prompt_shorter_than_a_block_precedes_no_cache():
    model = tiny_sdar(5, 10.0, 4, block_origin="sequence")
    config, prompt = SamplingConfig(12, 6, 4, cache="block"), torch.tensor([[0], [1]])
    assert_same(
        *(
            sample(model, prompt, None, replace(config, rollout_compile=on), row_generators(0, rows=range(2)))
            for on in (False, True)
        )
    )


@pytest.mark.parametrize("family", ["lladamoe", "llada2_moe"])
def test_mixtures_of_experts(family, counter):
    model = tiny_mixture(family)
    block = model.family.attention_block or 4
    # their logits are larger
    assert_same(*drawn(model, canvas_length=2 * block, denoising_steps=4, block_length=block), tolerance=1e-5)
    assert counter.calls


def test_fused_layers(counter, monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda function: function)
    model = tiny_model(5, 10.0)
    plain, _ = drawn(model)
    fuse_elementwise(model)
    assert_same(plain, drawn(model)[1])
    assert counter.calls


@pytest.mark.thorough
@pytest.mark.release
def test_kernels_give_the_same(monkeypatch):
    monkeypatch.undo()
    assert_same(*drawn(tiny_model(5, 10.0)))
    assert_same(*drawn(tiny_model(5, 10.0), temperature=0.0, unmasking="max_prob"))


# ------------------------------------------- how often it is compiled


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_it_is_compiled_once_for_all_sizes(name, counter):
    """Batches, prompts, blocks of the canvas and windows of one and two blocks."""
    model, cache = NETWORKS[name](max_position_embeddings=128), "dual" if name == "llada" else "block"
    for rows, prompt, canvas in ((16, 8, 12), (9, 70, 8), (3, 5, 16), (1, 8, 8)):
        config = SamplingConfig(canvas, canvas // 2, 4, cache=cache, rollout_compile=True)
        prompts = torch.full((rows, prompt), A)
        sample(model, prompts, None, config, row_generators(0, rows=range(rows)))
    rows, widths, capacities = map(set, zip(*counter.sizes, strict=True))
    assert {2, 4, 16} <= rows and widths == ({4} if name == "llada" else {4, 8}) and capacities == {64, 128}
    # Sizes that are equal in the first call are taken for one size; then a second graph is for all.
    assert counter.frame_count <= 2


def test_new_weights_are_seen_without_compiling_again(counter):
    model = tiny_model(5, 10.0)
    first = drawn(model)
    graphs = counter.frame_count
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)  # as an optimizer changes them
    second = drawn(model)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(0.9 * weight.detach()))  # as merging does, in other memory
    third = drawn(model)
    for pair in (first, second, third):
        assert_same(*pair)
    assert (first[1].logps - second[1].logps).abs().max() > 0.01 < (second[1].logps - third[1].logps).abs().max()
    assert counter.frame_count == graphs


# ------------------------------------------- adapters and trainers

LORA = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def test_adapters_merged_and_not(counter):
    # In float32 an adapter's products differ by more than 1e-6 on some processors.
    model = get_peft_model(tiny_model(5, 10.0), copy.deepcopy(LORA)).double()
    apart = drawn(model)
    with merged_adapter(model):
        merged = drawn(model)
    assert_same(*apart)
    assert_same(*merged)
    torch.testing.assert_close(merged[1].logps, apart[1].logps, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2  # layers with an adapter, and without


TRAINED = {
    "merged, checkpointed": ("agrpo", {"peft_config": LORA, "cache": "dual", "gradient_checkpointing": True}),
    "cast once": ("agrpo", {"peft_config": LORA, "cache": "dual", "bf16": True}),
    "all weights": ("dipo", {}),
    "continuations": ("sapo", {"cache": "dual", "unmasking": "max_prob"}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_rollouts_after_an_update(case, tmp_path, counter):
    name, settings = TRAINED[case]
    found = []
    for on in (False, True):
        trainer = method_named(name).make(
            tmp_path / str(on), max_steps=2, rollout_compile=on, **copy.deepcopy(settings)
        )
        trainer.train()
        found.append(trainer.last_rollout[0])  # after an update
    plain, compiled = found
    equal = plain.completion_ids == compiled.completion_ids
    bf16 = settings.get("bf16", False)
    assert equal.float().mean() > 0.9 if bf16 else equal.all()
    tolerance = 0.1 if bf16 else 1e-4
    torch.testing.assert_close(compiled.logps[equal], plain.logps[equal], atol=tolerance, rtol=tolerance)
    assert counter.calls and counter.frame_count <= 2


# ------------------------------------------- keys and values


def test_rows_are_padded_to_powers_of_two():
    assert [padded_rows(rows) for rows in (1, 2, 3, 4, 5, 16, 17)] == [2, 2, 4, 4, 8, 16, 32]


def test_tensors_stay_where_they_are_until_the_padded_rows_change():
    cache, whole = StaticWindowCache(10), torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 10, 2)
    assert cache.capacity == 64
    cache.window(0, 10).update(whole, whole, 0)
    address = cache.keys[0].data_ptr()
    cache.keep(torch.tensor([0, 2, 3]))
    assert cache.keys[0].data_ptr() == address and cache.keys[0][:3, 0, 0, 0].tolist() == [0, 2, 3]
    assert cache.keys[0][0, 0, :, 0].tolist() == [0.0] * 64
    cache.window(4, 10, step_end=6)
    keys, _ = cache.update(7 + 0 * whole[:, :, :2], whole[:, :, :2], 0)
    assert keys.shape == (4, 1, 64, 2) and keys[1, 0, :10, 0].tolist() == [2, 2, 2, 2, 7, 7, 2, 2, 2, 2]
    cache.keep(torch.tensor([2]))
    assert cache.keys[0].shape == (2, 1, 64, 2) and cache.keys[0][0, 0, :7, 0].tolist() == [3, 3, 3, 3, 7, 7, 3]


def test_what_is_not_visible_is_hidden():
    cache = StaticWindowCache(10)
    cache.window(0, 6).update(torch.ones(3, 1, 6, 2), torch.ones(3, 1, 6, 2), 0)
    cache.window(4, 6, step_end=6)
    everything = cache.seen(None, 3, 2)
    assert everything.shape == (4, 1, 2, 64) and everything[..., :6].all() and not everything[..., 6:].any()
    shown = torch.ones(3, 1, 2, 6, dtype=torch.bool)
    shown[2, ..., :3] = False
    bias = torch.zeros(3, 1, 2, 6).masked_fill(~shown, torch.finfo(torch.float32).min)
    for given in (shown, bias):
        found = cache.seen(given, 3, 2)
        assert torch.equal(found[:3, ..., :6], shown) and torch.equal(found[3], found[2])


# ------------------------------------------- refusals


@pytest.mark.parametrize(
    ("cache", "words"), [("none", "cache='none' they compute all columns"), ("prefix", "compute ever fewer columns")]
)
def test_a_cache_without_steps_of_one_shape_is_refused(cache, words):
    with pytest.raises(
        ValueError, match=rf"rollout_compile=True.*{words}\. Set cache='dual'.*leave rollout_compile out"
    ):
        SamplingConfig(12, 6, 4, cache=cache, rollout_compile=True)


@pytest.mark.parametrize(("steps", "more"), [(3, {}), (6, {"cache_refresh": 1})], ids=["one step", "renewed"])
def test_steps_that_all_compute_all_columns_are_refused(steps, more):
    with pytest.raises(ValueError, match=r"would compile nothing: .* every step computes all columns"):
        SamplingConfig(12, steps, 4, cache="dual", rollout_compile=True, **more)


def test_full_attention_without_a_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"llada attends to the whole canvas.*cache='auto' they compute all columns"):
        method_named("agrpo").make(tmp_path, rollout_compile=True)


def sharded(model):
    return {"any_process": lambda here: here}


def quantised(model):
    model.hf_quantizer = object()
    return {}


def eager(model):
    model.config._attn_implementation = "eager"
    return {}


def compiled_in_place(model):
    model.model.compile(backend="eager")
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sharded, "divided among processes"),
        (quantised, "quantised"),
        (eager, "'sdpa', got 'eager'"),
        (compiled_in_place, "compiled in place"),
    ],
)
def test_what_cannot_be_compiled_is_refused(change, words, counter):
    model, (prompts, mask) = tiny_model(5, 10.0), coded_prompts(2)
    config = SamplingConfig(8, 4, 4, cache="dual", rollout_compile=True)
    more = change(model)
    with pytest.raises(ValueError, match=f"rollout_compile=True cannot be done: .*{words}.* Leave it out"):
        sample(model, prompts, mask, config, row_generators(0, rows=range(2)), **more)
    assert not counter.calls


@pytest.mark.parametrize("launch", [Launch(2, {"zero_optimization": {"stage": 3}}), Launch(2, fsdp=True)], ids=str)
def test_divided_weights_are_refused_at_the_start(launch, tmp_path, monkeypatch):
    trainer = method_named("agrpo").make(tmp_path, cache="dual", rollout_compile=True)
    with pytest.raises(ValueError, match=r"cannot be done: weights are divided among processes \(ZeRO-3 or FSDP\)"):
        replace(trainer.as_run(), launch=launch)
    monkeypatch.setattr(Launch, "of_trainer", lambda trainer: launch)
    with pytest.raises(ValueError, match=r"cannot be done: weights are divided among processes"):
        method_named("agrpo").make(tmp_path, cache="dual", rollout_compile=True)


def test_a_machine_without_compiler_says_so_at_the_start(tmp_path, monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(fused, "compiled", fail)
    with pytest.raises(ValueError, match=r"rollout_compile compiles kernels for cpu.*leave rollout_compile out"):
        method_named("agrpo").make(tmp_path, cache="dual", rollout_compile=True)
