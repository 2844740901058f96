"""LoRA by all the names a layer has, and adapters that travel to the hub's original code and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from methods import PROMPTS, method_named, text_reward
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import ModelConfig, get_peft_config

from trl_diffusion.adapters.coverage import LoraCoverage, lora_coverage
from trl_diffusion.adapters.targets import native_lora_config
from trl_diffusion.evaluation import load_model
from trl_diffusion.models import DreamModel, LLaDAModelLM, SDARForCausalLM, export_adapter, import_adapter
from trl_diffusion.trainers.sft import SFTConfig, SFTTrainer

AGRPO = method_named("agrpo")
IDS = torch.tensor([[2, 3, 4, 4], [3, 3, 2, 4]])
families = pytest.mark.parametrize("family", [LLaDAModelLM, DreamModel, SDARForCausalLM])


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted_layers(model: PeftModel) -> dict[str, int]:
    return {row.name: row.adapted for row in lora_coverage(model) if row.adapted}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("family", "targets", "native"),
    [
        (LLaDAModelLM, ["q_proj", "o_proj"], ["o_proj", "q_proj"]),
        (LLaDAModelLM, ["attn_out", "ff_proj", "up_proj"], ["gate_proj", "o_proj", "up_proj"]),
        (LLaDAModelLM, "ff_out", ["down_proj"]),
        (LLaDAModelLM, ["blocks.1.ff_out"], ["model.layers.1.mlp.down_proj"]),
        (LLaDAModelLM, ["layers.1.mlp.down_proj", "v_proj"], ["model.layers.1.mlp.down_proj", "v_proj"]),
        (LLaDAModelLM, ["all-linear"], "all-linear"),
        (LLaDAModelLM, None, "all-linear"),
        (LLaDAModelLM, r".*\.1\.mlp\.\w+_proj", r".*\.1\.mlp\.\w+_proj"),
        (DreamModel, ["mlp.gate_proj", "q_proj"], ["gate_proj", "q_proj"]),
    ],
)
def test_native_and_hub_names_mean_the_same_layers(family, targets, native):
    config = LoraConfig(target_modules=targets)
    given = copy.deepcopy(config)
    resolved = native_lora_config(config, tiny_model(model_class=family))
    assert resolved.target_modules == native
    assert config == given
    get_peft_model(tiny_model(model_class=family), resolved)  # PEFT finds them


def test_ff_out_and_all_linear_are_never_the_head():
    for targets, count in (("ff_out", 1), ("all-linear", 7)):
        model = tiny_model()
        coverage = lora_coverage(get_peft_model(model, native_lora_config(LoraConfig(target_modules=targets), model)))
        assert coverage[-1] == LoraCoverage("lm_head", 0, 1)
        assert sum(row.adapted for row in coverage) == 2 * count


@pytest.mark.parametrize("targets", [["q_proj", "attn_output"], "attn_output", r".*attn_output", ["wte"]])
def test_a_name_that_matches_nothing_is_an_error_that_names_the_valid_ones(targets, tmp_path):
    with pytest.raises(ValueError, match="matches no linear layer of LLaDAModelLM") as error:
        AGRPO.make(tmp_path, peft_config=LoraConfig(target_modules=targets))
    for name in ("q_proj", "down_proj", "attn_out,", "ff_proj", "ff_out", "'all-linear'"):
        assert name in str(error.value)


def test_names_of_the_hub_are_no_names_of_dream():
    with pytest.raises(ValueError, match="matches no linear layer of DreamModel") as error:
        native_lora_config(LoraConfig(target_modules=["attn_out"]), tiny_model(model_class=DreamModel))
    assert "hub" not in str(error.value)


def test_all_linear_among_other_names_is_refused():
    with pytest.raises(ValueError, match="stands for itself"):
        native_lora_config(LoraConfig(target_modules=["all-linear", "q_proj"]), tiny_model())


def test_patterns_and_exclusions_take_hub_names():
    config = LoraConfig(
        target_modules=["attn_out", "ff_out"],
        exclude_modules=["blocks.0.ff_out"],
        rank_pattern={"attn_out": 3},
        alpha_pattern={r".*\.1\.mlp\..*": 5},
    )
    model = tiny_model()
    adapted = get_peft_model(model, native_lora_config(config, model))
    assert adapted_layers(adapted) == {"o_proj": 2, "down_proj": 1}
    layer = adapted.get_base_model().model.layers[1]
    assert layer.self_attn.o_proj.r == {"default": 3} and layer.mlp.down_proj.lora_alpha == {"default": 5}


def test_the_flag_of_the_recipes_takes_them(tmp_path):
    """TRL turns a list of one name into a string, which PEFT would read as a regular expression."""
    config = get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["ff_out"]))
    assert config.target_modules == "ff_out"
    trainer = AGRPO.make(tmp_path, peft_config=config)
    assert adapted_layers(trainer.model) == {"down_proj": 2}


def test_the_sft_trainer_takes_them(tmp_path):
    trainer = sft(tmp_path, peft_config=LoraConfig(target_modules=["attn_out"]))
    assert adapted_layers(trainer.model) == {"o_proj": 2}


def sft(folder: Path, model=None, peft_config=None, **settings) -> SFTTrainer:
    args = SFTConfig(str(folder), max_completion_length=8, use_cpu=True, bf16=False, report_to=[], **settings)
    data = Dataset.from_dict({"prompt": ["a b"], "completion": ["b a"]})
    model = model or tiny_model()
    return SFTTrainer(model, args, data, processing_class=tiny_tokenizer(), peft_config=peft_config)


# ---------------------------------------------------------------- adapters that travel


@pytest.fixture
def base(tmp_path) -> Path:
    """The four-word LLaDA in a folder, under the hub's names."""
    tiny_model(seed=3).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def random_adapter(base: Path, folder: Path, **lora) -> PeftModel:
    """An adapter that changes the model, saved as PEFT does."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=3, init_lora_weights=False, **lora)).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.slow
def test_an_adapter_folder_is_trained_further_on_its_own_base(base, tmp_path):
    given = random_adapter(base, tmp_path / "given", target_modules=["q_proj", "down_proj"])
    args = AGRPO.make(tmp_path / "run", max_steps=2, learning_rate=0.5, model_init_kwargs={"dtype": "float32"}).args
    trainer = AGRPO.trainer(str(tmp_path / "given"), text_reward, args, Dataset.from_dict({"prompt": PROMPTS}))
    assert torch.equal(logits_of(trainer.model), logits_of(given))
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {name for name in start if "lora_" in name} and len(moved) == 8
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base) and saved["r"] == 3
    again, _ = load_model(str(tmp_path / "run"))
    assert torch.equal(logits_of(again), logits_of(trainer.model))


def test_adapters_that_do_not_fit_their_base_are_refused_with_the_way_out(base, tmp_path):
    """PEFT loads what it finds layers for, and only warns of the rest: nothing of an adapter with the hub's names."""
    random_adapter(base, tmp_path / "native", target_modules=["o_proj", "q_proj"])
    export_adapter(tmp_path / "native", tmp_path / "hub")
    message = r"does not fit the weights of .*base.* an adapter of the hub's original code is renamed by trl_diffusion"
    for load in (load_model, lambda name: AGRPO.make(tmp_path, model=name)):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path / "hub"))
    rewrite(tmp_path / "native", base_model_name_or_path="/gone")
    with pytest.raises(ValueError, match=r"was trained on /gone, which cannot be loaded.*base_model_name_or_path"):
        AGRPO.make(tmp_path, model=str(tmp_path / "native"))


class HubModel(nn.Module):
    """The modules of a native model in a tree with the hub's names, as the remote code of LLaDA builds it."""

    def __init__(self, native: nn.Module):
        super().__init__()
        for name, module in native.named_modules():
            if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                *path, last = native.hub_name(name).split(".")
                parent: nn.Module = self
                for part in path:
                    if part not in dict(parent.named_children()):
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                parent.add_module(last, module)


def native_with_layers_of(hub: nn.Module, base: Path) -> nn.Module:
    """A native model that computes with the modules of a hub-named tree, adapters included."""
    native = AutoModelForCausalLM.from_pretrained(base)
    for name, module in list(native.named_modules()):
        if isinstance(module, nn.Linear):
            native.set_submodule(name, hub.get_submodule(native.hub_name(name)))
    return native


LORAS = {
    "all-linear": {"target_modules": "all-linear"},
    "some": {"target_modules": ["o_proj", "down_proj"]},
    "one block": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "patterns": {
        "target_modules": ["o_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.o_proj": 5},
        "alpha_pattern": {"o_proj": 1},
    },
    "DoRA": {"target_modules": ["v_proj", "down_proj"], "use_dora": True},
    "regular expression": {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
    "exclusions": {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.down_proj", "k_proj"]},
}


@pytest.mark.slow
def test_a_trained_adapter_loads_elsewhere_with_the_same_logits(base, tmp_path):
    trainer = AGRPO.trainer(
        str(base),
        text_reward,
        AGRPO.make(tmp_path / "run", max_steps=3, learning_rate=0.5).args,
        Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules=["attn_out", "ff_proj", "ff_out"]),
    )
    before = logits_of(trainer.model)
    trainer.train()
    trainer.save_model()
    after = logits_of(trainer.model)
    assert (after - before).abs().max() > 1e-3
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["down_proj", "gate_proj", "o_proj"]
    elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run")
    assert torch.equal(logits_of(elsewhere), after)
    merged = elsewhere.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), after, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")  # under the hub's names
    assert "model.transformer.blocks.0.attn_out.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_an_exported_adapter_gives_the_same_logits_on_the_hubs_model(lora, base, tmp_path):
    native = random_adapter(base, tmp_path / "native", **lora)
    export_adapter(tmp_path / "native", tmp_path / "hub")
    hub = PeftModel.from_pretrained(HubModel(AutoModelForCausalLM.from_pretrained(base)), tmp_path / "hub")

    exported, expected = load_file(tmp_path / "hub" / "adapter_model.safetensors"), get_peft_model_state_dict(hub)
    assert exported.keys() == expected.keys()  # neither a missing layer, nor one too many
    assert all(key.startswith("base_model.model.model.transformer.blocks.") for key in exported)
    assert all(torch.equal(exported[name], value) for name, value in expected.items())
    assert torch.equal(logits_of(native_with_layers_of(hub.get_base_model(), base)), logits_of(native))
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert (logits_of(native) - plain).abs().max() > 1e-2

    # merged into the weights of the hub's model, as a checkpoint of the hub
    (tmp_path / "merged").mkdir()
    save_file(hub.merge_and_unload().state_dict(), tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    (tmp_path / "merged" / "config.json").write_text((base / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(merged), logits_of(native.merge_and_unload()))


def test_the_last_name_ff_out_would_adapt_the_hubs_head(base):
    """Why exported configs name the blocks' `ff_out` in full."""
    hub = get_peft_model(
        HubModel(AutoModelForCausalLM.from_pretrained(base)), LoraConfig(target_modules=["ff_out", "attn_out"])
    )
    assert any("transformer.ff_out.lora_A" in name for name in get_peft_model_state_dict(hub))


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_an_adapter_comes_back_from_the_hubs_names_unchanged(lora, base, tmp_path):
    native = random_adapter(base, tmp_path / "native", **lora)
    import_adapter(export_adapter(tmp_path / "native", tmp_path / "hub"), tmp_path / "back")
    there, back = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("native", "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "back")
    assert torch.equal(logits_of(again), logits_of(native))


def test_an_adapter_trained_on_the_hubs_model_is_imported(base, tmp_path):
    """Its head too, which the name `ff_out` adapts there."""
    torch.manual_seed(1)
    native = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["ff_out", "attn_out"], init_lora_weights=False)
    hub = get_peft_model(HubModel(native), config).eval()
    hub.save_pretrained(tmp_path / "hub")
    with pytest.raises(ValueError, match="does not name the model it was trained on"):
        import_adapter(tmp_path / "hub", tmp_path / "native")
    import_adapter(tmp_path / "hub", tmp_path / "native", base=str(base))
    imported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "native")
    assert adapted_layers(imported) == {"o_proj": 2, "down_proj": 2, "lm_head": 1}
    assert torch.equal(logits_of(imported), logits_of(native_with_layers_of(hub.get_base_model(), base)))


def test_dreams_names_are_the_same_on_both_sides(tmp_path):
    tiny_model(seed=3, model_class=DreamModel).save_pretrained(tmp_path / "base")
    random_adapter(tmp_path / "base", tmp_path / "native", target_modules="all-linear")
    for change, folder in ((export_adapter, "hub"), (import_adapter, "back")):
        change(tmp_path / "native", tmp_path / folder)
        given, made = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("native", folder))
        assert given.keys() == made.keys() and all(torch.equal(given[name], made[name]) for name in given)


def rewrite(folder: Path, **config) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_what_cannot_be_renamed_is_refused(base, tmp_path):
    random_adapter(base, tmp_path / "native", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"do not belong to a linear layer of .* under the hub's names"):
        import_adapter(tmp_path / "native", tmp_path / "out")
    with pytest.raises(ValueError, match="give another folder"):
        export_adapter(tmp_path / "native", tmp_path / "native")
    random_adapter(base, tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"has modules_to_save=\['lm_head'\].*Merge the adapter"):
        export_adapter(tmp_path / "head", tmp_path / "out")
    rewrite(tmp_path / "head", modules_to_save=None)  # as if the config forgot to say so
    with pytest.raises(ValueError, match=r"1 do not belong .* the first is base_model\.model\.lm_head\.weight"):
        export_adapter(tmp_path / "head", tmp_path / "out")
    random_adapter(base, tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="do not belong to a linear layer"):
        export_adapter(tmp_path / "embedding", tmp_path / "out")
    other = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoHaConfig(target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match="of type LOHA; only LoRA"):
        export_adapter(tmp_path / "loha", tmp_path / "out")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(TypeError, match="model_type 'llama', which is not a diffusion language model"):
        export_adapter(tmp_path / "native", tmp_path / "out", base=str(tmp_path / "llama"))
    assert not (tmp_path / "out").exists()
