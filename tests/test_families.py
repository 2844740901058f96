"""A family is one file and one import: the toy family below is such a file, and works as the others do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers import MistralForCausalLM as StockMistral
from transformers.models.mistral import modeling_mistral as mistral
from trl.trainer.utils import create_model_from_path

import trl_diffusion.models
from trl_diffusion.adapters.coverage import lora_coverage
from trl_diffusion.adapters.targets import native_lora_config
from trl_diffusion.family import family_of
from trl_diffusion.models.config import DiffusionConfigMixin, Vocabulary
from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.families import FAMILIES, register
from trl_diffusion.models.layers import DiffusionAttention, Float32Rotary, LastLayer
from trl_diffusion.models.meta_model import meta_model, native_config
from trl_diffusion.models.published import PUBLISHED as CHECKPOINTS
from trl_diffusion.models.table import as_markdown, family_table

PUBLISHED = Vocabulary(size=40, num_tokens=37, end_token_ids=(34, 35), mask_token_id=36)


class ToyConfig(DiffusionConfigMixin, MistralConfig):
    model_type = "toy_dlm"
    published = PUBLISHED


class ToyRotaryEmbedding(Float32Rotary, mistral.MistralRotaryEmbedding):
    pass


class ToyAttention(DiffusionAttention, mistral.MistralAttention):
    pass


class MistralDecoderLayer(LastLayer, mistral.MistralDecoderLayer):
    pass


class ToyModel(DiffusionLM, StockMistral):
    config_class = ToyConfig
    rotary_class = ToyRotaryEmbedding
    attention_class = ToyAttention
    last_layer_class = MistralDecoderLayer


register(ToyConfig, ToyModel)


def toy_config(**settings) -> ToyConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": None}
    return ToyConfig(**{"vocab_size": 40, "eos_token_id": 34, **sizes, **heads, **settings})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toy")
    ToyModel(toy_config()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def test_its_published_vocabulary_is_known_by_its_size(model):
    family = family_of(model)
    assert (family.name, family.mask_token_id, family.num_tokens) == ("toy_dlm", 36, 37)
    assert family.end_token_ids == (34, 35)
    other = toy_config(vocab_size=50, mask_token_id=49)
    assert (other.mask_token_id, other.num_tokens, other.end_token_ids) == (49, 50, None)
    own = toy_config(mask_token_id=3, num_tokens=30, end_token_ids=[5])
    assert (own.mask_token_id, own.num_tokens, own.end_token_ids) == (3, 30, [5])


def test_auto_classes_and_trls_loader_load_it(checkpoint, model):
    assert type(model) is ToyModel
    assert type(create_model_from_path(checkpoint)) is ToyModel
    config = AutoConfig.from_pretrained(checkpoint)
    assert type(config) is type(native_config(checkpoint)) is ToyConfig
    assert config.rope_parameters["rope_type"] == "default" and config.is_causal is False
    with torch.no_grad():
        ids = torch.randint(0, 34, (2, 9), generator=torch.Generator().manual_seed(0))
        first = model(input_ids=ids).logits
        changed = model(input_ids=ids.index_fill(1, torch.tensor([8]), 36)).logits
    assert (first[:, 0] - changed[:, 0]).abs().max() > 1e-4  # attention is full: the last token reaches the first


def test_frequencies_that_would_stay_undefined_are_refused(model):
    fresh = ToyRotaryEmbedding(toy_config()).inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh)
    with pytest.raises(TypeError, match="must have RotaryEmbedding in its name, got ToyRotary"):
        type("ToyRotary", (Float32Rotary, mistral.MistralRotaryEmbedding), {})


def test_variants_that_no_family_computes_are_refused():
    with pytest.raises(ValueError, match="This toy_dlm variant has rope_scaling of type 'linear'"):
        toy_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="This toy_dlm variant has num_experts=4: its MLPs are mixtures of experts"):
        toy_config(num_experts=4)


def test_lora_knows_its_layers(checkpoint, model):
    layers = meta_model(checkpoint)
    assert type(layers) is ToyModel and all(weight.is_meta for weight in layers.parameters())
    config = native_lora_config(LoraConfig(r=2, target_modules=["q_proj", "mlp.down_proj"]), layers)
    adapted = get_peft_model(model, config)
    assert family_of(adapted) == family_of(model)
    counts = {row.name: row.adapted for row in lora_coverage(adapted) if row.adapted}
    assert counts == {"q_proj": 2, "down_proj": 2}
    with pytest.raises(ValueError, match="'attn_out' matches no linear layer of ToyModel"):
        native_lora_config(LoraConfig(target_modules=["attn_out"]), layers)


def test_it_samples_and_scores(model):
    prompts = torch.randint(0, 34, (3, 5), generator=torch.Generator().manual_seed(0))
    trajectory = model.generate(
        prompts,
        max_new_tokens=8,
        denoising_steps=4,
        block_length=4,
        do_sample=True,
        generator=torch.Generator().manual_seed(0),
        return_trajectory=True,
    )
    assert trajectory.completion_ids.shape == (3, 8) and int(trajectory.completion_ids.max()) < 36
    # the step that wrote last was shown everything else, so its log-probabilities can be computed again
    last = trajectory.unmask_step == 3
    canvas = trajectory.completion_ids.masked_fill(last, 36)
    positions = torch.arange(5, 13).repeat(3, 1).masked_fill(~last, -1)
    with torch.no_grad():
        scores = model(torch.cat([prompts, canvas], 1), positions=positions, targets=trajectory.completion_ids)
    torch.testing.assert_close(scores.log_probs[last], trajectory.logps[last], rtol=1e-5, atol=1e-5)


def test_messages_name_every_registered_family(tmp_path):
    stock = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(TypeError, match=r"supported families \(.*Dream, .*llada, .*sdar, .*toy_dlm"):
        family_of(stock)
    stock.config.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"Supported: .*Dream, .*llada, .*sdar, .*toy_dlm"):
        native_config(str(tmp_path))


def test_the_page_on_models_has_the_table_of_all_families():
    rows = family_table()
    assert {row.model_type for row in rows} == {known.model_type for known in FAMILIES} - {"toy_dlm"}
    assert sorted(name for row in rows for name in row.checkpoints) == sorted(CHECKPOINTS)
    page = (Path(__file__).parent.parent / "docs" / "pages" / "models.md").read_text()
    assert as_markdown(rows) in page  # python -m trl_diffusion.models.table
    dream = next(row for row in rows if row.model_type == "Dream")
    assert (dream.class_name, dream.stock_class, dream.logit_shift) == ("DreamModel", "Qwen2ForCausalLM", 1)


def test_the_package_exports_the_classes_of_its_families():
    own = [family for family in FAMILIES.items() if family[0] is not ToyConfig]
    exported = [known.__name__ for family in own for known in family]
    assert {"A2DQwen3Config", "DreamModel", "LLaDAConfig", "SDARForCausalLM"} <= set(exported)
    for name in trl_diffusion.models.__all__:
        assert getattr(trl_diffusion.models, name) is not None
    assert set(exported) <= set(trl_diffusion.models.__all__)
