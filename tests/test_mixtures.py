"""Mixtures of experts: routers, LoRA on experts, what a token costs, and rollouts scored as they were drawn."""

from __future__ import annotations

import json

import pytest
import torch
from methods import method_named
from model_helpers import random_weights, write_checkpoint, write_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import MASK as TINY_MASK
from tiny import MIXTURES, coded_prompts, tiny_mixture
from trainer_helpers import largest_log_ratio, losses_seen
from transformers import AutoConfig, AutoModelForCausalLM

from trl_diffusion.adapters import export_adapter
from trl_diffusion.adapters.coverage import lora_coverage
from trl_diffusion.adapters.targets import LinearLayers, native_lora_config
from trl_diffusion.likelihood import score_views, trajectory_views
from trl_diffusion.models import (
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAModelLM,
    LLaDAMoEConfig,
)
from trl_diffusion.runtime.cost import network_shape
from trl_diffusion.sampling import SamplingConfig, row_generators, sample

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CANVAS, ROWS = 12, 16
mixtures = pytest.mark.parametrize("family", list(MIXTURES))


def network(family: str, **overrides):
    return tiny_mixture(family, **overrides).eval()


def rollout(model, cache: str = "none"):
    prompts, mask = coded_prompts(ROWS)
    config = SamplingConfig(CANVAS, 6, 4, 1.3, cache=cache)
    return sample(model, prompts, mask, config, row_generators(0, rows=range(ROWS))), config


# ------------------------------------------- rollouts and their scores


@mixtures
@torch.no_grad()
def test_rollouts_are_scored_as_they_were_sampled(family):
    model, (prompts, mask) = network(family), coded_prompts(ROWS)
    trajectory, config = rollout(model)
    total = torch.zeros(ROWS, CANVAS)
    for step in range(config.denoising_steps):
        views = trajectory_views(
            trajectory.completion_ids, trajectory.unmask_step, torch.full((ROWS,), step), TINY_MASK
        )
        total += score_views(model, prompts, mask, trajectory.completion_ids, views, config.temperature).logps
    assert (total != 0).sum() > 50
    torch.testing.assert_close(total, trajectory.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sdar_moe", "llada2_moe"])
@torch.no_grad()
def test_the_block_cache_changes_nothing(family):
    model = network(family)
    plain, cached = rollout(model)[0], rollout(model, "block")[0]
    assert torch.equal(plain.completion_ids, cached.completion_ids)
    torch.testing.assert_close(plain.logps, cached.logps, atol=1e-5, rtol=1e-5)


@mixtures
def test_agrpo_trains_on_the_rollouts_probabilities(family, tmp_path, monkeypatch):
    model = network(family, seed=21, scale=6.0, router_aux_loss_coef=0.01)
    trainer = method_named("agrpo").make(tmp_path, model=model, learning_rate=0.0, pad_to_multiple_of=3)
    # TRL would add the load-balancing loss of the checkpoint's config, and ask for the routers' scores
    assert not trainer.aux_loss_enabled and model.config.router_aux_loss_coef == 0.01
    seen = losses_seen(trainer, monkeypatch)
    trainer.train()
    assert sum(x["targets"].sum() for x in seen) > 20 and largest_log_ratio(seen) <= 1e-4


@mixtures
def test_every_parameter_gets_a_gradient(family):
    model = network(family)
    ids = torch.randint(0, 4, (4, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6, 12).repeat(4, 1)
    model(input_ids=ids, positions=positions, targets=ids[:, 6:]).log_probs.sum().backward()
    assert all(value.grad.abs().max() > 0 for value in model.parameters())


def test_the_load_balancing_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.001 is not supported: the load-balancing loss"):
        method_named("agrpo").make(tmp_path, model=network("lladamoe"), router_aux_loss_coef=1e-3)


# ------------------------------------------- routers


@pytest.mark.parametrize("family", ["lladamoe", "sdar_moe"])
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_routers_compute_in_float32(family, how):
    model = network(family)
    router, stock = model.model.layers[1].mlp.gate, type(model.model.layers[1].mlp.gate).__mro__[2]
    if how == "cast":
        model.bfloat16()
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    if how == "cast":
        hidden = hidden.bfloat16()
    exact = (hidden.double() @ router.weight.double().T).softmax(-1)
    weights, chosen = exact.topk(2, dim=-1)
    if router.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits, found, experts = router(hidden)
        rounded = stock.forward(router, hidden)[0]
    assert logits.dtype == found.dtype == torch.float32 and torch.equal(experts, chosen)
    torch.testing.assert_close(found.double(), weights, rtol=1e-5, atol=1e-6)
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - logits).abs().max() > 1e-4


def test_llada2_s_router_computes_in_float32_under_autocast():
    """Experts are chosen by sigmoid plus bias, out of the groups whose two best are best, and weighed without it."""
    router = network("llada2_moe", num_experts=8, n_group=4, topk_group=2).model.layers[1].mlp.gate
    router.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, chosen = router(hidden)
        rounded = type(router).__mro__[1].forward(router, hidden)[0]
    assert logits.dtype == weights.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    for token in range(40):
        scores = (hidden[token].double() @ router.weight.double().T).sigmoid()
        biased = scores + router.e_score_correction_bias.double()
        groups = biased.view(4, 2).sum(1).topk(2).indices
        open_ = {2 * int(group) + place for group in groups for place in (0, 1)}
        best = sorted(open_, key=lambda expert: -float(biased[expert]))[:2]
        assert set(chosen[token].tolist()) == set(best)
        expected = 2.5 * scores[chosen[token]] / scores[best].sum()
        torch.testing.assert_close(weights[token].double(), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------- LoRA


@mixtures
def test_lora_adapts_experts_by_their_parameters_alone(family, tmp_path):
    torch.manual_seed(0)
    base, ids = network(family), torch.randint(0, 4, (4, 12), generator=torch.Generator().manual_seed(0))
    plain = base(input_ids=ids).logits
    both = native_lora_config(
        LoraConfig(r=2, target_modules="all-linear", target_parameters=EXPERTS, init_lora_weights=False), base
    )
    model = get_peft_model(base, both).eval()
    counts = {row.name: (row.adapted, row.total) for row in lora_coverage(model)}
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (2, 2))
    assert counts == {
        **attention,
        **(dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (2, 2)) if family == "llada2_moe" else {}),
        "lm_head": (0, 1),
        "experts.gate_up_proj": (2, 2),
        "experts.down_proj": (2, 2),
    }
    positions = torch.arange(6, 12).repeat(4, 1)
    output = model(input_ids=ids, positions=positions, targets=ids[:, 6:])
    output.log_probs.sum().backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    kinds = 4 + 2 + 3 * (family == "llada2_moe")  # attention, experts and the shared expert
    assert len(trained) == 2 * 2 * kinds and all(
        "lora_" in name and value.grad.any() for name, value in trained.items()
    )

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(network(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-6, atol=1e-6)
    with again.disable_adapter():
        assert torch.equal(again(input_ids=ids).logits, plain)
    expected = model(input_ids=ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@mixtures
def test_a_parameter_that_is_not_there_is_refused(family):
    with pytest.raises(
        ValueError, match=r"has 'experts\.up_proj', which matches no parameter.*experts\.down_proj, mlp"
    ):
        native_lora_config(LoraConfig(target_parameters=["experts.up_proj"]), network(family))
    alone = native_lora_config(LoraConfig(target_parameters=EXPERTS), network(family))
    assert alone.target_modules is None
    counts = {row.name: row.adapted for row in lora_coverage(get_peft_model(network(family), alone))}
    assert counts["experts.down_proj"] == 2 and counts["q_proj"] == counts["lm_head"] == 0


# ------------------------------------------- what a token costs


@mixtures
def test_a_token_goes_through_its_own_experts_only(family):
    model = network(family, num_experts=8)
    shape = network_shape(model)
    shared = 3 * 16 * 8 * (family == "llada2_moe")
    # q, o: 16 × 16; k, v: 16 × 16 with as many heads; 2 of 8 experts with 3 matrices of 16 × 8
    experts = 2 * 3 * 16 * 8 + shared
    assert (shape.body, shape.last, shape.head) == (4 * 256 + experts + 2 * 256, 2 * 256 + experts, 5 * 16)
    assert (shape.trained_body, shape.trained_last) == (shape.body, shape.last)
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=EXPERTS))
    frozen = network_shape(adapted)
    # A [r · experts, in] and B [out, r · experts], of which a token uses a quarter
    lora = 2 * 2 * ((16 + 16) + (8 + 16))
    assert (frozen.trained_body, frozen.trained_last) == (lora, lora)


# ------------------------------------------- which family a config is of


def test_llada_moe_calls_itself_llada(tmp_path):
    path = write_checkpoint(tmp_path, "lladamoe", random_weights("lladamoe"))
    assert json.loads((path / "config.json").read_text())["model_type"] == "llada"
    assert type(AutoConfig.from_pretrained(path)) is type(LLaDAConfig.from_pretrained(path)) is LLaDAMoEConfig
    with pytest.raises(
        TypeError, match="LLaDAModelLM needs a LLaDAConfig, got a LLaDAMoEConfig: the checkpoint is of"
    ):
        LLaDAModelLM.from_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "lladamoe"}))
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "lladamoe"


def test_adapters_of_fused_layers_are_not_renamed(tmp_path):
    model = network("llada2_moe")
    model.save_pretrained(tmp_path / "base")
    assert LinearLayers(model).native_targets(["query_key_value"]) == ["k_proj", "q_proj", "v_proj"]
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"stores several layers of the native model as one \(.*query_key_value"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", str(tmp_path / "base"))


def test_weights_of_a_dense_network_are_refused(tmp_path):
    path = write_checkpoint(tmp_path, "sdar_moe", random_weights("sdar"))
    with pytest.raises(ValueError, match=r"does not have the weights of SDARMoeForCausalLM: it lacks .*experts"):
        AutoModelForCausalLM.from_pretrained(path)


def test_the_end_of_a_turn_is_read_from_the_tokenizer(tmp_path):
    special = ["<|endoftext|>", "<|role_end|>", "<|mask|>"]
    config = {"eos_token": special[0], "pad_token": special[0], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_tokenizer(tmp_path, special, config, tokenizer_json=True, vocabulary_files=False)
    path = write_checkpoint(tmp_path, "lladamoe", {}, vocab_size=300, eos_token_id=279, mask_token_id=281)
    config = AutoConfig.from_pretrained(path)
    assert (config.end_token_ids, config.num_tokens, config.mask_token_id) == ([279, 280], 282, 281)
    assert AutoConfig.from_pretrained(path, end_token_ids=[279]).end_token_ids == [279]
    (path / "tokenizer.json").unlink()
    assert AutoConfig.from_pretrained(path).end_token_ids is None


def test_published_ids_fill_in_what_the_config_leaves_out():
    for config_class in (LLaDAMoEConfig, LLaDA2MoeConfig):
        config = config_class(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
        assert (config.eos_token_id, config.mask_token_id, config.end_token_ids) == (156892, 156895, [156892])
