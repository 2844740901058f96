"""Elementwise work in single kernels equals the stock operations, in passes, gradients, rollouts and updates."""

from __future__ import annotations

import copy

import pytest
import torch
from methods import method_named
from peft import LoraConfig
from tiny import MASK, coded_prompts, tiny_mixture, tiny_model, tiny_sdar
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from trl_diffusion.models import DreamModel, LLaDAModelLM, fused
from trl_diffusion.models.fused import fuse_elementwise
from trl_diffusion.models.layers import rotated
from trl_diffusion.sampling import SamplingConfig, row_generators, sample

pytestmark = pytest.mark.slow

BUILD = {
    "llada": lambda: tiny_model(5, 10.0),
    "dream": lambda: tiny_model(5, 10.0, DreamModel),
    "sdar": lambda: tiny_sdar(5, 10.0),
    "lladamoe": lambda: tiny_mixture("lladamoe"),
    "llada2_moe": lambda: tiny_mixture("llada2_moe"),
}


@pytest.fixture
def eager(monkeypatch):
    """The functions run as they are, in the places of their kernels: compiling takes half a minute."""
    monkeypatch.setattr(fused, "compiled", lambda function: function)


def gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = torch.arange(ids.size(1)).expand_as(ids)
    model.zero_grad()
    model(input_ids=ids, positions=positions, targets=ids).log_probs.sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("family", BUILD)
def test_logits_and_gradients_are_those_of_the_stock_layers(family, eager):
    model = BUILD[family]()
    plain = copy.deepcopy(model)
    fuse_elementwise(model)
    ids = torch.randint(0, MASK, (3, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    found, expected = gradients(model, ids), gradients(plain, ids)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)
    names = {type(module).__name__ for module in model.modules()}
    assert names == {type(module).__name__ for module in plain.modules()}  # by which transformers and FSDP know them
    stock = [module for module in model.modules() if type(module) in (*fused.NORMS, *fused.MLPS)]
    assert not stock and all(layer.self_attn.rotate is rotated for layer in model.model.layers)


def test_a_norm_is_rounded_as_the_stock_class_rounds():
    states, norm = torch.randn(4, 16, dtype=torch.bfloat16), LlamaRMSNorm(16).bfloat16()
    nn.init.normal_(norm.weight)
    assert torch.equal(fused.rms_norm(states, norm.weight, norm.variance_epsilon), norm(states))


def test_a_gate_with_another_activation_stays_as_it_is(eager):
    model = tiny_model(hidden_act="gelu")
    fuse_elementwise(model)
    assert all(type(layer.mlp) is LlamaMLP for layer in model.model.layers)


def test_updates_with_an_adapter_are_those_without_fusing(tmp_path, eager):
    weights = []
    for fuse in (False, True):
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        trainer = method_named("agrpo").make(
            tmp_path / str(fuse), peft_config=lora, fuse_elementwise=fuse, beta=0.1, loss_type="dr_grpo", max_steps=2
        )
        trainer.train()
        weights.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
    assert any(isinstance(module, fused.FusedNorm) for module in trainer.model.modules())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-6, rtol=1e-5)


def test_a_separate_reference_is_fused_too(tmp_path, eager):
    trainer = method_named("espo").make(tmp_path, beta=0.1, fuse_elementwise=True)
    for model in (trainer.model, trainer.ref_model):
        assert any(isinstance(module, fused.FusedMLP) for module in model.modules())


def test_a_machine_without_compiler_says_so(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(fused, "compiled", fail)
    with pytest.raises(ValueError, match=r"torch\.compile failed there: no compiler was found\. Install Triton"):
        fuse_elementwise(tiny_model())


@pytest.mark.thorough
@pytest.mark.release
def test_the_kernels_give_the_same_completions_and_log_probabilities():
    """Passes of several shapes, with and without gradient, in one process."""
    model = tiny_model(5, 10.0, LLaDAModelLM).eval()
    plain = copy.deepcopy(model)
    fuse_elementwise(model)
    ids, mask = coded_prompts(16)
    for cache in ("none", "dual"):
        config = SamplingConfig(8, 4, 4, temperature=0.0, unmasking="max_prob", cache=cache)
        ours, theirs = (sample(m, ids, mask, config, row_generators(0, rows=range(16))) for m in (model, plain))
        assert torch.equal(ours.completion_ids, theirs.completion_ids)
        torch.testing.assert_close(ours.logps, theirs.logps, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(model, ids), gradients(plain, ids)
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-5 * value.abs().max(), name
    with torch.no_grad():
        exact = plain(input_ids=ids).logits
        # In bfloat16 both are rounded, neither more than the other.
        errors = [(m.bfloat16()(input_ids=ids).logits.float() - exact).abs().mean() for m in (model, plain)]
    assert 0 < errors[0] < 1.1 * errors[1]
