"""A checkpoint loads only if its weights are those of the network: otherwise an error names what differs."""

from __future__ import annotations

import sys

import pytest
import torch
from launching import free_port, run
from model_helpers import LLADA_CONFIG, NUM_TOKENS, random_weights, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.utils import create_model_from_path

from trl_diffusion.models import LLaDAModelLM

families = pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
loaders = pytest.mark.parametrize("loader", [AutoModelForCausalLM.from_pretrained, create_model_from_path])

# config.json of an LLaDA-MoE checkpoint that names the dense architecture's model type
MOE_KEYS = {"num_experts": 64, "num_experts_per_tok": 8, "expert_intermediate_size": 1024}


def checkpoint(folder, family, weights, **config):
    return write_checkpoint(folder, family, weights, num_tokens=NUM_TOKENS, **config)


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


@families
@loaders
def test_missing_weights_are_named(tmp_path, family, loader):
    lost = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    folder = checkpoint(tmp_path, family, without(random_weights(family), *lost, "model.norm.weight"))
    expected = r"it lacks 4: model\.layers\.\*\.mlp\.up_proj\.weight, model\.norm\.weight\. Use a checkpoint"
    with pytest.raises(ValueError, match=expected):
        loader(str(folder))


@families
@loaders
def test_unexpected_weights_are_named(tmp_path, family, loader):
    other = {"model.layers.1.self_attn.sinks": torch.zeros(4)}
    folder = write_extra(tmp_path, family, other)
    with pytest.raises(ValueError, match=r"it has in addition 1: model\.layers\.\*\.self_attn\.sinks\. Use"):
        loader(str(folder))


def write_extra(folder, family, extra):
    """A hub checkpoint with further weights."""
    checkpoint(folder, family, random_weights(family))
    file = folder / "model.safetensors"
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    return folder


@families
def test_weights_that_may_be_missing_or_there(tmp_path, family):
    """A tied head has no weight of its own, and old checkpoints store the rotary frequencies."""
    tied = {"weight_tying" if family == "llada" else "tie_word_embeddings": True}
    folder = checkpoint(tmp_path / "tied", family, random_weights(family, tied=True), **tied)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    AutoModelForCausalLM.from_pretrained(
        write_extra(tmp_path / "old", family, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )


@families
def test_a_head_of_another_size_is_the_callers_wish(tmp_path, family):
    folder = checkpoint(tmp_path, family, random_weights(family))
    config = AutoConfig.from_pretrained(folder, vocab_size=80)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    assert len(model.lm_head.weight) == 80
    resized = AutoModelForCausalLM.from_pretrained(folder)
    resized.resize_token_embeddings(80)
    resized.save_pretrained(tmp_path / "resized")
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path / "resized").lm_head.weight) == 80


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(tmp_path, bits):
    """The states of quantised weights are no unexpected weights; a missing weight is missed all the same."""
    pytest.importorskip("bitsandbytes")
    quantised = {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), "dtype": torch.float32}
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "whole")
    model = LLaDAModelLM.from_pretrained(tmp_path / "whole", **quantised)
    model.save_pretrained(tmp_path / "saved")
    ids = torch.tensor([[2, 3, 4]])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, model(ids).logits)

    weights = without(random_weights("llada"), "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(ValueError, match=r"it lacks 1: model\.layers\.\*\.self_attn\.q_proj\.weight"):
        LLaDAModelLM.from_pretrained(checkpoint(tmp_path / "less", "llada", weights), **quantised)


@pytest.mark.parametrize("key", MOE_KEYS)
def test_mixtures_of_experts_are_refused_by_their_config(tmp_path, key):
    folder = checkpoint(tmp_path, "llada", {}, **{key: MOE_KEYS[key]})
    with pytest.raises(ValueError, match=f"llada variant has {key}={MOE_KEYS[key]}: its MLPs are mixtures of experts"):
        AutoConfig.from_pretrained(folder)


def test_mixtures_of_experts_are_refused_by_their_weights(tmp_path):
    weights = random_weights("llada")
    for name in [name for name in weights if ".mlp." in name]:
        del weights[name]
    checkpoint(tmp_path, "llada", weights)
    with pytest.raises(ValueError, match=rf"it lacks {3 * LLADA_CONFIG['n_layers']}: .*mlp\.down_proj\.weight, "):
        AutoModelForCausalLM.from_pretrained(tmp_path)


ZERO_3 = """
import sys
import deepspeed
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
import trl_diffusion.models

deepspeed.init_distributed("gloo")
zero = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
for folder in sys.argv[1:]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        print("refused:", error)
    else:
        assert all(parameter.ds_tensor is not None for parameter in model.parameters())
        print("loaded:", folder)
"""


@pytest.mark.slow
def test_under_zero_3(tmp_path):
    """transformers' loader for ZeRO-3 does not look for unexpected weights."""
    pytest.importorskip("deepspeed")
    tied = {"weight_tying": True}
    lost = without(random_weights("dream"), "model.layers.0.mlp.up_proj.weight")
    whole = [
        checkpoint(tmp_path / "tied", "llada", random_weights("llada", tied=True), **tied),
        checkpoint(tmp_path / "sdar", "sdar", random_weights("sdar")),
        write_extra(tmp_path / "old", "dream", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    ]
    less = checkpoint(tmp_path / "less", "dream", lost)
    more = write_extra(tmp_path / "more", "llada", {"model.transformer.blocks.0.sinks": torch.zeros(4)})
    script = tmp_path / "load.py"
    script.write_text(ZERO_3)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port()), str(script)]
    status, output = run([*launcher, *map(str, [*whole, less, more])], tmp_path)
    assert status == 0, output
    for folder in whole:
        assert f"loaded: {folder}" in output
    for folder, fault in (
        (less, "it lacks 1: model.layers.*.mlp.up_proj.weight. Use"),
        (more, "it has in addition 1: model.transformer.blocks.*.sinks. Use"),
    ):
        assert any(f"refused: {folder} does not" in line and fault in line for line in output.splitlines()), output
