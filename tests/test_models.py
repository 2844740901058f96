"""The model layer: hub checkpoints as native classes, scoring inside of `forward`, refusals, LoRA, tokenizers."""

import copy
import io
import json
import math
import pickle

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset
from model_helpers import (
    BLOCK_CAUSAL,
    EOS,
    HUB_CONFIGS,
    MASK,
    MIXTURES,
    NUM_TOKENS,
    SHIFTED,
    VOCABULARY,
    hub_names,
    random_weights,
    stock_mask,
    stock_model,
    write_checkpoint,
    write_tokenizer,
)
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Tokenizer,
    Trainer,
    TrainingArguments,
)
from trl.trainer.utils import create_model_from_path

from trl_diffusion.adapters.coverage import LoraCoverage, coverage_table, lora_coverage
from trl_diffusion.models import (
    A2DQwen2LMHeadModel,
    A2DQwen3LMHeadModel,
    DreamModel,
    Fast_dLLM_QwenForCausalLM,
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    LLaDAMoEModelLM,
    SDARForCausalLM,
    SDARMoeForCausalLM,
    family_of,
    score_targets,
)
from trl_diffusion.models.llada import native_weight_name
from trl_diffusion.models.scoring_head import ScoringHead

CLASSES = {
    "llada": LLaDAModelLM,
    "dream": DreamModel,
    "sdar": SDARForCausalLM,
    "a2d-qwen3": A2DQwen3LMHeadModel,
    "a2d-qwen2": A2DQwen2LMHeadModel,
    "lladamoe": LLaDAMoEModelLM,
    "sdar_moe": SDARMoeForCausalLM,
    "llada2_moe": LLaDA2MoeModelLM,
    "fast_dllm": Fast_dLLM_QwenForCausalLM,
}
CONFIGS = {family: model_class.config_class for family, model_class in CLASSES.items()}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
families = pytest.mark.parametrize("family", list(CLASSES))


@pytest.fixture
def load(tmp_path):
    """A function that writes a hub checkpoint and loads it; ids from `NUM_TOKENS` on have no token."""

    def load(family, weights=None, seed=0, loading=None, **config):
        weights = random_weights(family, seed=seed) if weights is None else weights
        config = {"num_tokens": NUM_TOKENS, **config}
        path = write_checkpoint(tmp_path / f"{family}_{seed}", family, weights, **config)
        return AutoModelForCausalLM.from_pretrained(path, **(loading or {})).eval()

    return load


@pytest.fixture
def ids():
    return torch.randint(0, MASK, (3, 11), generator=torch.Generator().manual_seed(1))


def left_padded(ids):
    """An attention mask that hides 0, 2 and 5 tokens on the left."""
    return (torch.arange(ids.size(1)) >= torch.tensor([[0], [2], [5]])).long()


def parameters(model):
    """The weights, and LLaDA2's biases of experts, which are not trained but belong to the checkpoint."""
    biases = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *biases)}


def all_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def reference_log_probs(model, ids, attention_mask, temperature=1.0):
    """[R, T, V]: all positions, the plain way; index i holds the distribution of the token at i."""
    logits = model(input_ids=ids, attention_mask=attention_mask).logits.float()
    if model.logit_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    never = [MASK, *range(NUM_TOKENS, VOCABULARY)]
    return (logits / temperature).index_fill(-1, torch.tensor(never), -torch.inf).log_softmax(-1)


def entropy_of(log_probs):
    return -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


# Checkpoints


@families
@pytest.mark.parametrize(
    "loader",
    [
        AutoModelForCausalLM.from_pretrained,
        lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True),
        lambda path: create_model_from_path(str(path)),
    ],
    ids=["auto", "auto_trusting_remote_code", "trl"],
)
def test_hub_checkpoint_loads_into_native_class(tmp_path, family, loader):
    # its auto_map names Python files that are not there, so remote code would fail
    weights = random_weights(family)
    model = loader(write_checkpoint(tmp_path, family, weights))
    assert type(model) is CLASSES[family]
    assert all_equal(parameters(model), weights)
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 3)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, 128)
    assert config.rope_parameters["rope_theta"] == HUB_CONFIGS[family]["rope_theta"]
    assert config.rms_norm_eps == HUB_CONFIGS[family]["rms_norm_eps"]
    assert (config.mask_token_id, config.eos_token_id) == (MASK, EOS)
    assert config.pad_token_id == HUB_CONFIGS[family].get("pad_token_id")
    assert config.bos_token_id == HUB_CONFIGS[family].get("bos_token_id")
    assert model.model.embed_tokens.padding_idx is None
    # sdpa and flash read this where there is no mask
    assert not any(layer.self_attn.is_causal for layer in model.model.layers)


@families
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits_equal_those_of_the_stock_class(load, ids, family, attention, padding):
    weights = random_weights(family)
    model = load(family, weights, loading={"attn_implementation": attention})
    stock = stock_model(family, attn_implementation=attention)
    stock.load_state_dict(weights)
    mask = {None: None, "left": left_padded(ids), "right": left_padded(ids).flip(1)}[padding]
    seen = (
        mask
        if mask is None and family not in BLOCK_CAUSAL
        else stock_mask(family, torch.ones_like(ids) if mask is None else mask)
    )
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert model.config._attn_implementation == stock.config._attn_implementation == attention
    assert logits.shape == (3, 11, VOCABULARY)
    assert logits.abs().max() > 1
    assert (logits - stock(input_ids=ids, attention_mask=seen).logits).abs().max() == 0.0


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3", "a2d-qwen2", "lladamoe"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_bidirectional(load, ids, family, attention, padded):
    model = load(family, loading={"attn_implementation": attention})
    mask = left_padded(ids) if padded else None
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % MASK
    before, after = (model(input_ids=x, attention_mask=mask).logits for x in (ids, changed))
    visible = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert (before - after).abs().amax(-1)[visible].min() > 1e-3


@families
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_changes_nothing(load, ids, family, attention):
    """Up to rounding: both passes round the products of three layers, and angles of up to 15 radians, differently."""
    model = load(family, loading={"attn_implementation": attention})
    plain = model(input_ids=ids).logits
    padded = torch.cat([torch.full((3, 4), EOS), ids], dim=1)
    mask = (torch.arange(15) >= 4).long().expand(3, -1)
    logits = model(input_ids=padded, attention_mask=mask).logits[:, 4:]
    # A product of n terms is off by about sqrt(n) roundings: 3 layers of 7 products of up to 48 terms, sqrt(21 · 48)
    # or 32 in all, and as many in the other pass. Measured over 8 seeds: 4 to 22.
    rounding = 64 * torch.finfo(torch.float32).eps * plain.abs().max()
    assert (logits - plain).abs().max() < rounding
    one_seen = mask.clone()
    one_seen[:, 3] = 1
    assert (model(input_ids=padded, attention_mask=one_seen).logits[:, 4:] - plain).abs().max() > 1000 * rounding
    positions = torch.tensor([[0, 3, 10]] * 3)
    targets = ids.gather(1, positions)
    scores = model(input_ids=ids, positions=positions, targets=targets)
    padded_scores = model(input_ids=padded, attention_mask=mask, positions=positions + 4, targets=targets)
    # with shifted logits the first token is predicted from the one before, which here is padding and there is none
    where = slice(1, None) if family in SHIFTED else slice(None)
    # a log-probability moves by at most twice what the logits move by
    assert (scores.log_probs - padded_scores.log_probs)[:, where].abs().max() < 2 * rounding


@families
@pytest.mark.parametrize("shards", [1, 4])
def test_save_pretrained_gives_back_the_hub_checkpoint(load, tmp_path, family, shards):
    weights = random_weights(family)
    model = load(family, weights)
    size = sum(value.numel() * 4 for value in weights.values())
    model.save_pretrained(tmp_path / "saved", max_shard_size=size // shards + 2000)
    files = list((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) >= shards and (len(files) > 1) == (shards > 1)
    saved = {name: value for file in files for name, value in load_file(file).items()}
    assert all_equal(saved, hub_names(family, weights))

    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    for key, value in HUB_CONFIGS[family].items():
        # torch_dtype is now called dtype; the attention implementation is a choice at loading
        if value is not None and key not in ("transformers_version", "torch_dtype", "attn_implementation"):
            assert config[key] == value, key
    assert config["num_tokens"] == NUM_TOKENS
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    known, reloaded = model.config.to_dict(), again.config.to_dict()
    assert known.pop("_name_or_path") != reloaded.pop("_name_or_path")
    assert known == reloaded
    assert all_equal(parameters(again), weights)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()


def test_llada_checkpoint_with_native_names_loads(tmp_path, load):
    # what a consolidated DeepSpeed checkpoint looks like
    weights = random_weights("llada")
    load("llada", weights).save_pretrained(tmp_path / "native", save_original_format=False)
    assert load_file(tmp_path / "native" / "model.safetensors").keys() == weights.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert all_equal(parameters(model), weights)


@families
def test_checkpoint_without_auto_map_loads_through_trl(tmp_path, family):
    # as a model made from a config has it; TRL reads config.auto_map of every class it does not find in transformers
    weights = random_weights(family)
    path = write_checkpoint(tmp_path / "hub", family, weights, drop=("auto_map",))
    model = create_model_from_path(str(path))
    assert type(model) is CLASSES[family] and all_equal(parameters(model), weights)
    model.save_pretrained(tmp_path / "saved")
    assert type(create_model_from_path(str(tmp_path / "saved"))) is CLASSES[family]


def test_native_weight_name_is_idempotent():
    weights = random_weights("llada")
    assert [native_weight_name(name) for name in hub_names("llada", weights)] == list(weights)
    assert [native_weight_name(name) for name in weights] == list(weights)


@families
def test_tied_embeddings(load, tmp_path, ids, family):
    weights = random_weights(family, tied=True)
    key = "weight_tying" if family == "llada" else "tie_word_embeddings"
    model = load(family, weights, **{key: True})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stock = stock_model(family, tied=True)
    stock.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    seen = stock_mask(family, torch.ones_like(ids))
    assert (model(input_ids=ids).logits - stock(input_ids=ids, attention_mask=seen).logits).abs().max() == 0.0

    model.save_pretrained(tmp_path / "saved")
    assert all_equal(load_file(tmp_path / "saved" / "model.safetensors"), hub_names(family, weights))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())[key] is True
    fresh = CLASSES[family](model.config)
    fresh.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert all_equal(parameters(fresh), parameters(model))


class ScoreTrainer(Trainer):
    """Maximises the log-probability of token 7 at every position."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        positions = torch.arange(ids.size(1)).expand_as(ids)
        return -model(input_ids=ids, positions=positions, targets=torch.full_like(ids, 7)).log_probs.mean()


def score_trainer(model, folder):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        save_steps=1,
        per_device_train_batch_size=3,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = Dataset.from_dict({"input_ids": torch.arange(33).view(3, 11).tolist()})
    return ScoreTrainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.slow
@families
def test_trainer_resumes_from_its_checkpoint(load, tmp_path, family):
    model = load(family)
    start = parameters(model)
    score_trainer(model, tmp_path / "run").train()
    trained = parameters(model)
    assert not any(torch.equal(start[name], trained[name]) for name, _ in model.named_parameters())
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all_equal(saved, hub_names(family, trained))

    fresh = load(family, seed=1)
    assert not any(torch.equal(trained[name], value) for name, value in fresh.named_parameters())
    # one step of one is done, so that training only loads
    score_trainer(fresh, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert all_equal(parameters(fresh), trained)


@pytest.mark.slow
@families
def test_trainer_resumes_from_shards(load, tmp_path, family):
    model, fresh = load(family), load(family, seed=1)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    score_trainer(fresh, tmp_path / "run")._load_from_checkpoint(str(tmp_path / "shards"))
    assert all_equal(parameters(fresh), parameters(model))


@families
def test_deepcopy_and_pickle(load, ids, family):
    model = load(family)
    expected = model(input_ids=ids).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is CLASSES[family]
        assert torch.equal(twin(input_ids=ids).logits, expected)
        assert family_of(twin) == family_of(model)
        # the copy owns its weights, and its hook renames for itself
        twin.load_state_dict(hub_names(family, random_weights(family, seed=1)))
        assert all_equal(parameters(twin), random_weights(family, seed=1))
        assert torch.equal(model(input_ids=ids).logits, expected)


# Configurations


@pytest.mark.parametrize(
    ("family", "published", "sizes", "facts"),
    [
        (
            "llada",
            {
                "d_model": 4096,
                "n_layers": 32,
                "n_heads": 32,
                "n_kv_heads": 32,
                "mlp_hidden_size": 12288,
                "max_sequence_length": 4096,
                "vocab_size": 126464,
                "embedding_size": 126464,
                "eos_token_id": 126081,
                "pad_token_id": 126081,
                "mask_token_id": 126336,
            },
            (8_015_581_184, 128),
            (126336, 126349, (126081, 126348), 126081, 0, None),
        ),
        (
            "dream",
            {
                "hidden_size": 3584,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "intermediate_size": 18944,
                "max_position_embeddings": 131072,
                "vocab_size": 152064,
                "bos_token_id": 151643,
                "eos_token_id": 151643,
                "pad_token_id": 151643,
                "mask_token_id": 151666,
            },
            (7_615_616_512, 128),
            (151666, 151667, (151643, 151645), 151643, 1, None),
        ),
        (
            "sdar",
            {
                "hidden_size": 4096,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 12288,
                "max_position_embeddings": 32768,
                "vocab_size": 151936,
                "eos_token_id": 151643,
                "mask_token_id": None,  # known from the vocabulary
            },
            (8_190_735_360, 128),
            (151669, 151670, (151643, 151645), 151643, 0, 4),
        ),
        (
            "a2d-qwen3",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "intermediate_size": 3072,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
                "eos_token_id": 151645,
                "mask_token_id": 151669,
                "block_size": 32,
            },
            (596_049_920, 128),
            (151669, 151670, (151643, 151645), 151643, 0, 32),
        ),
        (
            "a2d-qwen2",
            {
                "hidden_size": 896,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "intermediate_size": 4864,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
                "eos_token_id": 151645,
                "mask_token_id": 151665,
            },
            (494_032_768, 64),
            (151665, 151666, (151643, 151645), 151643, 0, None),
        ),
        (
            "fast_dllm",
            {
                "hidden_size": 3584,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "intermediate_size": 18944,
                "vocab_size": 152064,
                "eos_token_id": 151645,
                "mask_token_id": None,  # known from the vocabulary
                "bd_size": 32,
            },
            (7_615_616_512, 128),
            (151665, 151666, (151643, 151645), 151643, 1, 32),
        ),
        (
            "fast_dllm",
            {
                "hidden_size": 1536,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "intermediate_size": 8960,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
                "eos_token_id": 151645,
                "mask_token_id": None,
                "bd_size": 32,
            },
            (1_543_714_304, 128),
            (151665, 151666, (151643, 151645), 151643, 1, 32),
        ),
    ],
)
def test_published_sizes(family, published, sizes, facts):
    config = CONFIGS[family].from_dict({**HUB_CONFIGS[family], **published})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model) is CLASSES[family]
    # LLaDA's index.json states 16 031 162 368 bytes in bfloat16
    assert (model.num_parameters(), model.model.layers[0].self_attn.head_dim) == sizes
    known = model.family
    assert (
        known.mask_token_id,
        known.num_tokens,
        known.end_token_ids,
        known.tail_token_id,
        known.logit_shift,
        known.attention_block,
    ) == facts
    assert config.to_dict() == type(config).from_dict(config.to_dict()).to_dict()


@families
def test_config_without_hub_keys(tmp_path, ids, family):
    config = CONFIGS[family](
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=HUB_CONFIGS[family]["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": HUB_CONFIGS[family]["rope_theta"]},
        head_dim=16,  # twice the usual
        **({"block_size": 0} if family.startswith("a2d") else {}),
        **({"moe_intermediate_size": 16, "num_experts": 8} if family in MIXTURES else {}),
        mask_token_id=MASK,
        eos_token_id=[EOS, 56],
        end_token_ids=[EOS, 56, 58],
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is CLASSES[family]
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 32)
    assert model.model.rotary_emb.inv_freq.shape == (4 if family == "llada2_moe" else 8,)  # half of a head is rotated
    assert (model.family.end_token_ids, model.family.tail_token_id) == ((EOS, 56, 58), EOS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert again.family == model.family
    assert again.config.rope_parameters == config.rope_parameters
    assert AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1).num_hidden_layers == 1


def test_llada_config_fills_in_what_the_hub_leaves_out(tmp_path):
    def read(**keys):
        return AutoConfig.from_pretrained(write_checkpoint(tmp_path, "llada", {}, **keys))

    assert read(mlp_hidden_size=None).intermediate_size == 4 * 32
    assert read(n_kv_heads=None).num_key_value_heads == 4
    assert read(n_kv_heads=None, multi_query_attention=True).num_key_value_heads == 1
    assert read(multi_query_attention=True, drop=("n_kv_heads", "mlp_hidden_size")).to_dict()["n_kv_heads"] == 1
    assert read(drop=("n_kv_heads", "mlp_hidden_size")).to_dict()["mlp_hidden_size"] == 4 * 32
    assert read(bias_for_layer_norm=None).mask_token_id == MASK
    padded = read(vocab_size=61)
    assert (padded.vocab_size, padded.num_tokens) == (VOCABULARY, 61)
    assert (read(embedding_size=None).vocab_size, read().num_tokens) == (VOCABULARY, VOCABULARY)


# Precision


@families
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_keeps_exact_frequencies(load, ids, family, attention):
    theta = HUB_CONFIGS[family]["rope_theta"]
    size = 4 if family == "llada2_moe" else 8
    exact = 1 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    full = load(family, loading={"attn_implementation": attention})
    cast = copy.deepcopy(full).bfloat16()
    loaded = load(family, loading={"attn_implementation": attention, "dtype": torch.bfloat16})
    for model in (full, cast, loaded, cast.to(torch.bfloat16)):
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    logits = cast(input_ids=ids, attention_mask=left_padded(ids)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    if family != "llada2_moe":  # whose routers stay in float32 when it is loaded, and are rounded by a cast
        assert torch.equal(logits, loaded(input_ids=ids, attention_mask=left_padded(ids)).logits)
    output = cast(input_ids=ids, positions=ids.new_tensor([[1]] * 3), targets=ids[:, 1:2])
    assert output.log_probs.dtype == output.entropy.dtype == torch.float32
    # float32 again, the weights are rounded and the frequencies are not
    assert torch.equal(cast.float().model.rotary_emb.inv_freq, exact)


@families
def test_queries_and_keys_are_rotated_in_float32(load, family):
    model = load(family, loading={"dtype": torch.bfloat16})
    attention = model.model.layers[0].self_attn
    hidden = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(2)).bfloat16()

    theta = HUB_CONFIGS[family]["rope_theta"]
    size = 4 if family == "llada2_moe" else 8  # rotated features of the 8 of a head
    angles = torch.arange(40).float()[:, None] / theta ** (torch.arange(0, size, 2).float() / size)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def heads(projection, norm="none"):
        norm = getattr(attention, norm, torch.nn.Identity())
        return norm(projection(hidden).view(2, 40, -1, 8)).transpose(1, 2)

    def rotated(x, cos, sin):
        turned, rest = x[..., :size], x[..., size:]
        half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
        return torch.cat([turned * cos + half * sin, rest], -1)

    def by_hand(rotate):
        query, key = rotate(heads(attention.q_proj, "q_norm")), rotate(heads(attention.k_proj, "k_norm"))
        value = heads(attention.v_proj)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return attention.o_proj(output.transpose(1, 2).reshape(2, 40, 32))

    output, _ = attention(hidden, model.model.rotary_emb(hidden, torch.arange(40)[None]))
    assert torch.equal(output, by_hand(lambda x: rotated(x.float(), cos, sin).bfloat16()))
    assert not torch.equal(output, by_hand(lambda x: rotated(x, cos.bfloat16(), sin.bfloat16())))


# Training


@families
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(load, ids, family, use_reentrant):
    model = load(family).train()
    positions, targets = torch.tensor([[1, 4, -1]] * 3), ids[:, :3]

    def gradients():
        model.zero_grad()
        output = model(input_ids=ids, attention_mask=left_padded(ids), positions=positions, targets=targets)
        (output.log_probs.sum() + output.entropy.sum()).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    plain = gradients()
    recomputed = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: recomputed.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert all_equal(gradients(), plain)
    assert len(recomputed) == 2


@families
def test_rows_without_targets_reach_every_parameter(load, ids, family):
    # DDP waits for every parameter
    model = load(family)
    for support in (None, torch.full((3, 2, 4), -1)):
        model.zero_grad()
        none = torch.full((3, 2), -1)
        output = model(input_ids=ids, positions=none, targets=none, support=support)
        assert torch.equal(output.log_probs, torch.zeros(3, 2)) and torch.equal(output.entropy, torch.zeros(3, 2))
        (output.log_probs.sum() + output.entropy.sum()).backward()
        assert all(value.grad is not None and not value.grad.any() for value in model.parameters())


@families
def test_hooks_on_the_head_may_wrap_its_output(load, ids, family):
    # a full backward hook puts an autograd function around the output, which must not be changed in place then
    model = load(family)
    calls = []
    model.lm_head.register_full_backward_hook(lambda *_: calls.append(1))
    model(input_ids=ids, positions=ids[:, :1] * 0 + 2, targets=ids[:, :1]).log_probs.sum().backward()
    assert calls == [1]


@families
def test_output_survives_accelerate_mixed_precision(load, ids, family):
    model = load(family)
    inputs = {"input_ids": ids, "positions": ids.new_tensor([[2]] * 3), "targets": ids[:, 2:3]}
    wrapped = convert_outputs_to_fp32(model.forward)(**inputs)
    assert torch.equal(wrapped.log_probs, model(**inputs).log_probs)
    assert wrapped.logits is None


# LoRA


@families
def test_lora_adapts_every_linear_layer_but_the_head(load, ids, family, tmp_path):
    torch.manual_seed(0)
    base = load(family)
    plain = base(input_ids=ids).logits
    model = get_peft_model(
        base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    # layers whose MLPs are experts, which are no linear layers; LLaDA2 has a shared one in addition, which is an MLP
    mixtures, shared = (2 if family in MIXTURES else 0), 2 * (family == "llada2_moe")
    assert lora_coverage(model) == [
        *(
            LoraCoverage(name, count, count)
            for name in LINEAR
            for count in [3 + (shared - mixtures) * (name in LINEAR[4:])]
        ),
        LoraCoverage("lm_head", 0, 1),
        *(LoraCoverage(f"experts.{name}", 0, 2) for name in ("gate_up_proj", "down_proj") if mixtures),
    ]
    assert family_of(model) == base.family

    mask = left_padded(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    positions = torch.tensor([[6, 8, -1]] * 3)
    targets = ids[:, :3]
    output = model(**inputs, positions=positions, targets=targets)
    expected = reference_log_probs(base, ids, mask)[torch.arange(3)[:, None], positions, targets]
    torch.testing.assert_close(output.log_probs[:, :2], expected[:, :2], rtol=1e-6, atol=1e-6)
    assert (model(input_ids=ids).logits - plain).abs().max() > 0.1
    output.log_probs.sum().backward()
    assert all(
        value.grad.any() == ("lora_" in name) for name, value in model.named_parameters() if value.requires_grad
    )

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(family), tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs, positions=positions, targets=targets).log_probs, output.log_probs)
    with again.disable_adapter():
        assert torch.equal(again(input_ids=ids).logits, plain)


@families
def test_merged_adapter_is_a_hub_checkpoint(load, ids, family, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load(family), LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    expected = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved.keys() == hub_names(family, random_weights(family)).keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_lora_coverage_shows_what_a_wrong_recipe_misses(load):
    partial = get_peft_model(load("llada"), LoraConfig(target_modules=["q_proj", "v_proj", "attn_out"]))
    counts = {row.name: row.adapted for row in lora_coverage(partial)}
    assert counts == {**dict.fromkeys([*LINEAR, "lm_head"], 0), "q_proj": 3, "v_proj": 3}
    whole = get_peft_model(load("llada"), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert lora_coverage(whole)[-1] == LoraCoverage("lm_head", 1, 1)
    assert [row.name for row in lora_coverage(whole)] == [*LINEAR, "lm_head"]
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(coverage_table(lora_coverage(partial)))
    lines = console.export_text().splitlines()
    assert any("q_proj" in line and "3 of 3" in line for line in lines)
    assert any("o_proj" in line and "0 of 3" in line for line in lines)


@families
def test_a_resized_head_scores_in_chunks_too(load, ids, family):
    model = load(family)
    positions, targets = torch.tensor([[6, 8]] * 3), ids[:, :2]
    expected = reference_log_probs(model, ids, None)[torch.arange(3)[:, None], positions, targets]
    model.resize_token_embeddings(VOCABULARY + 5)  # ids without a token, which are never sampled
    assert type(model.lm_head) is ScoringHead
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    for scorer in (model, trained):
        output = scorer(input_ids=ids, positions=positions, targets=targets)
        torch.testing.assert_close(output.log_probs, expected, rtol=1e-6, atol=1e-6)


# Scoring


@families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_plain_log_softmax(load, ids, family, temperature):
    model = load(family)
    mask = left_padded(ids)
    positions = torch.tensor([[1, 10, -1, 5], [-1, -1, -1, -1], [9, 7, 6, 8]])
    targets = torch.randint(0, MASK, (3, 4), generator=torch.Generator().manual_seed(3))
    output = model(input_ids=ids, attention_mask=mask, positions=positions, targets=targets, temperature=temperature)
    reference = reference_log_probs(model, ids, mask, temperature)[torch.arange(3)[:, None], positions]
    given = positions >= 0
    expected = reference.gather(-1, targets[..., None])[..., 0].masked_fill(~given, 0.0)
    torch.testing.assert_close(output.log_probs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.entropy, entropy_of(reference).masked_fill(~given, 0.0), rtol=1e-6, atol=1e-6)
    assert not output.log_probs[~given].any() and not output.entropy[~given].any()
    assert output.logits is None


@families
def test_logits_at_positions(load, ids, family):
    model = load(family)
    positions = torch.tensor([[1, 10], [0, 3], [2, 5]])
    output = model(input_ids=ids, positions=positions)
    expected = reference_log_probs(model, ids, None)[torch.arange(3)[:, None], positions]
    assert output.log_probs is None and output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits.log_softmax(-1), expected, rtol=1e-6, atol=1e-6)
    probabilities = output.logits.softmax(-1)
    assert not probabilities[..., MASK].any() and not probabilities[..., NUM_TOKENS:].any()
    assert (output.logits == -torch.inf).sum(-1).eq(1 + VOCABULARY - NUM_TOKENS).all()


@families
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_last_layer_computes_only_what_is_read(load, ids, family, attention, padded):
    model = load(family, loading={"attn_implementation": attention})
    mask = left_padded(ids) if padded else None
    positions = torch.tensor([[5, 10, -1], [9, 3, 7], [6, 8, -1]])
    targets = torch.randint(0, MASK, (3, 3), generator=torch.Generator().manual_seed(3))
    columns = {}

    def record(name, value):
        columns[name] = value.size(1)

    for name, layer in (("first", model.model.layers[0]), ("last", model.model.layers[-1])):
        for part in ("q_proj", "k_proj", "o_proj"):
            getattr(layer.self_attn, part).register_forward_hook(
                lambda *values, key=f"{name} {part}": record(key, values[-1])
            )
        layer.mlp.register_forward_hook(lambda *values, key=f"{name} mlp": record(key, values[-1]))

    def gradients(log_probs):
        model.zero_grad()
        log_probs.sum().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    reference = reference_log_probs(model, ids, mask)[torch.arange(3)[:, None], positions].gather(
        -1, targets[..., None]
    )
    expected = gradients(reference.squeeze(-1)[positions >= 0])
    assert set(columns.values()) == {11}
    found = gradients(model(input_ids=ids, attention_mask=mask, positions=positions, targets=targets).log_probs)
    assert {name for name, count in columns.items() if count == 3} == {"last q_proj", "last o_proj", "last mlp"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert model(input_ids=ids, attention_mask=mask, positions=positions[:, :0]).logits.shape == (3, 0, VOCABULARY)


def test_masks_of_other_kernels_are_kept_whole(load, monkeypatch):
    """Flash attention has a mask without queries, flex attention an object: the last layer computes everything."""
    layer, hidden = load("llada").model.layers[-1], torch.randn(2, 7, 32)
    masks = []

    def attend(hidden_states, attention_mask, **kwargs):
        assert "queries" not in kwargs
        masks.append(attention_mask)
        return hidden_states.cumsum(1), None

    monkeypatch.setattr(layer.self_attn, "forward", attend)
    read = torch.tensor([[6, 0], [2, 2]])
    for mask in (torch.ones(2, 7), object()):
        everything = layer(hidden, attention_mask=mask)
        assert torch.equal(layer(hidden, attention_mask=mask, read=read), everything[torch.arange(2)[:, None], read])
        assert masks[-1] is mask


def test_dream_predicts_a_token_from_the_position_before(load, ids):
    model = load("dream")
    stock = stock_model("dream")
    stock.load_state_dict(random_weights("dream"))
    everywhere = stock(input_ids=ids).logits.index_fill(
        -1, torch.tensor([MASK, *range(NUM_TOKENS, VOCABULARY)]), -torch.inf
    )
    logits = model(input_ids=ids, positions=torch.tensor([[0, 1, 2, 10]] * 3)).logits
    # nothing comes before the first token: Dream's own code takes its own position
    torch.testing.assert_close(logits, everywhere[:, [0, 0, 1, 9]], rtol=1e-6, atol=1e-6)
    first = torch.zeros(3, 1, dtype=torch.long)
    scored = model(input_ids=ids, positions=first, targets=ids[:, :1]).log_probs
    expected = everywhere[:, 0].log_softmax(-1).gather(-1, ids[:, :1])
    torch.testing.assert_close(scored, expected, rtol=1e-6, atol=1e-6)


@families
def test_gradients_equal_those_of_plain_log_softmax(load, ids, family):
    model = load(family)
    positions = torch.tensor([[1, 10], [-1, 3], [2, 5]])
    targets = ids[:, :2]
    given = positions >= 0

    def gradients(log_probs, entropy):
        model.zero_grad()
        (log_probs[given].sum() + 0.3 * entropy[given].sum()).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters()}

    output = model(input_ids=ids, positions=positions, targets=targets)
    found = gradients(output.log_probs, output.entropy)
    reference = reference_log_probs(model, ids, None)[torch.arange(3)[:, None], positions]
    finite = reference.masked_fill(reference == -torch.inf, 0.0)
    entropy = -(reference.exp() * finite).sum(-1)
    expected = gradients(reference.gather(-1, targets[..., None])[..., 0], entropy)
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0 and (found[name] - value).abs().max() < 1e-5 * scale, name


@families
def test_support_restricts_and_renormalises(load, ids, family):
    model = load(family)
    positions = torch.tensor([[4, 6], [1, -1], [10, 2]])
    support = torch.tensor(
        [[[3, 8, 9, -1], [1, 2, 3, 4]], [[5, -1, -1, -1], [-1, -1, -1, -1]], [[30, 2, 59, 0], [7, 6, -1, -1]]],
        dtype=torch.int32,
    )
    targets = torch.tensor([[9, 5], [5, 0], [30, 7]])  # 5 is not in [1, 2, 3, 4]
    output = model(input_ids=ids, positions=positions, targets=targets, support=support, temperature=0.8)
    reference = reference_log_probs(model, ids, None, 0.8)

    def expected(row, slot):
        allowed = [i for i in support[row, slot].tolist() if i >= 0]
        inside = reference[row, positions[row, slot], allowed].log_softmax(-1)
        target = targets[row, slot].item()
        return inside[allowed.index(target)] if target in allowed else torch.tensor(-torch.inf), entropy_of(inside)

    for row, slot in [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]:
        log_prob, entropy = expected(row, slot)
        torch.testing.assert_close(output.log_probs[row, slot], log_prob, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.entropy[row, slot], entropy, rtol=1e-6, atol=1e-6)
    assert output.log_probs[0, 1] == -torch.inf
    assert output.log_probs[1, 0] == 0 and output.entropy[1, 0] == 0  # the only choice
    assert output.log_probs[1, 1] == 0 and output.entropy[1, 1] == 0  # no target
    finite = output.log_probs.masked_fill(output.log_probs == -torch.inf, 0.0)
    (finite.sum() + output.entropy.sum()).backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())
    assert model.lm_head.weight.grad[MASK].any().item() is False


def test_score_targets_by_hand():
    # probabilities 1/2, 1/4, 1/4 and two ids that are never sampled
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0, 0.0]]) * math.log(2)
    logits[:, 3:] = -torch.inf
    logits = logits.repeat(3, 1).requires_grad_()
    log_probs, entropy = score_targets(logits, torch.tensor([0, 2, 4]))
    torch.testing.assert_close(log_probs, -math.log(2) * torch.tensor([1.0, 2.0, torch.inf]), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.full((3,), 1.5 * math.log(2)), rtol=1e-6, atol=0)

    # at temperature 1/2 the ratios 2 : 1 : 1 become 4 : 1 : 1
    log_probs, entropy = score_targets(logits, torch.tensor([0, 2, 1]), temperature=0.5)
    torch.testing.assert_close(log_probs.exp(), torch.tensor([4.0, 1.0, 1.0]) / 6, rtol=1e-6, atol=0)
    expected = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6))
    torch.testing.assert_close(entropy, torch.full((3,), expected), rtol=1e-6, atol=0)

    # on {0, 2} the ratio is 2 : 1; id 1 is outside; {1} leaves no choice
    support = torch.tensor([[0, 2, -1], [2, 0, -1], [1, -1, -1]])
    log_probs, entropy = score_targets(logits, torch.tensor([0, 1, 1]), support=support)
    torch.testing.assert_close(log_probs.exp(), torch.tensor([2 / 3, 0.0, 1.0]), rtol=1e-6, atol=0)
    two_to_one = math.log(3) - 2 / 3 * math.log(2)
    torch.testing.assert_close(entropy, torch.tensor([two_to_one, two_to_one, 0.0]), rtol=1e-6, atol=1e-7)


def test_score_targets_has_finite_gradients():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0, 0.0], dtype=torch.float64)
    temperature = 0.5
    logits = (temperature * p.log()).requires_grad_()
    log_prob, entropy = score_targets(logits, torch.tensor(1), temperature)
    (gradient,) = torch.autograd.grad(log_prob, logits, retain_graph=True)
    torch.testing.assert_close(gradient, (torch.eye(5, dtype=torch.float64)[1] - p) / temperature, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(entropy, logits)
    by_hand = -torch.special.xlogy(p, p) / temperature - p * entropy.detach() / temperature
    torch.testing.assert_close(gradient, by_hand, rtol=1e-12, atol=1e-15)
    assert not gradient[3:].any()

    support = torch.tensor([0, 3, -1])  # id 3 is never sampled, so only id 0 is left
    for target in (0, 1, 3):
        log_prob, entropy = score_targets(logits, torch.tensor(target), temperature, support)
        assert log_prob == (0 if target == 0 else -torch.inf) and entropy == 0
        (gradient,) = torch.autograd.grad(log_prob + entropy, logits)
        assert gradient.isfinite().all()


def test_family_reads_texts(load):
    known = load("llada", end_token_ids=[EOS, 58]).family
    completions = torch.tensor([[1, 58, 2, EOS], [1, 2, 3, 4], [EOS, EOS, EOS, EOS]])
    assert known.is_end(completions).tolist() == [[False, True, False, True], [False] * 4, [True] * 4]
    assert known.effective_length(completions).tolist() == [2, 4, 1]


# Refusals


@families
def test_labels_are_refused(load, ids, family):
    with pytest.raises(ValueError, match="`labels=` is refused"):
        load(family)(input_ids=ids, labels=ids)


@families
@pytest.mark.parametrize("key", ["mask_token_id", "eos_token_id"])
def test_config_without_a_special_token_is_refused(load, family, key):
    model = load(family, **{key: None})
    with pytest.raises(ValueError, match=rf"has no `{key}`.*Set it in config\.json"):
        family_of(model)
    setattr(model.config, key, 3)
    assert family_of(model).num_tokens == NUM_TOKENS


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llada", {"alibi": True}, "alibi=True; trl_diffusion computes only alibi=False"),
        ("llada", {"rope": False}, "rope=False"),
        ("llada", {"rope_full_precision": False}, "rope_full_precision=False"),
        ("llada", {"include_bias": True}, "include_bias=True"),
        ("llada", {"include_qkv_bias": True}, "include_qkv_bias=True"),
        ("llada", {"block_type": "sequential"}, "block_type='sequential'"),
        ("llada", {"block_group_size": 2}, "block_group_size=2"),
        ("llada", {"layer_norm_type": "default"}, "layer_norm_type='default'"),
        ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine=False"),
        ("llada", {"activation_type": "swiglu"}, "activation_type='swiglu'"),
        ("llada", {"attention_layer_norm": True}, "attention_layer_norm=True"),
        ("llada", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling="),
        ("llada", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_scaling"),
        ("dream", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
        ("dream", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("dream", {"full_attn_mask": False}, "full_attn_mask=False"),
        ("sdar", {"use_sliding_window": True}, "This SDAR variant has use_sliding_window=True"),
        ("sdar", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ("sdar", {"block_size": 0}, "block_size must be at least 1, got 0"),
        ("a2d-qwen3", {"use_sliding_window": True}, "This a2d-qwen3 variant has use_sliding_window=True"),
        ("a2d-qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ("a2d-qwen2", {"block_size": -1}, "block_size must be at least 0, got -1"),
        ("lladamoe", {"qk_layernorm": False}, "This LLaDA-MoE variant has qk_layernorm=False"),
        ("lladamoe", {"shared_expert_intermediate_size": 16}, "has shared_expert_intermediate_size=16"),
        ("lladamoe", {"moe_router_score_function": "sigmoid"}, "has moe_router_score_function='sigmoid'"),
        ("lladamoe", {"moe_router_enable_expert_bias": True}, "has moe_router_enable_expert_bias=True"),
        ("lladamoe", {"partial_rotary_factor": 0.5}, "has partial_rotary_factor=0.5"),
        ("lladamoe", {"use_sliding_window": True}, "This LLaDA-MoE variant has use_sliding_window=True"),
        ("sdar_moe", {"shared_expert_intermediate_size": 16}, "This SDAR-MoE variant has .* or shared experts"),
        ("fast_dllm", {"use_sliding_window": True}, "This Fast-dLLM variant has use_sliding_window=True"),
        ("fast_dllm", {"bd_size": 0}, "block_size must be at least 1, got 0"),
        ("fast_dllm", {"block_origin": "prompt"}, "block_origin must be one of"),
        ("sdar_moe", {"use_sliding_window": True}, "This SDAR-MoE variant has use_sliding_window=True"),
        ("llada2_moe", {"score_function": "softmax"}, "This LLaDA2 variant has score_function='softmax'"),
        ("llada2_moe", {"moe_router_enable_expert_bias": False}, "has moe_router_enable_expert_bias=False"),
        ("llada2_moe", {"use_qkv_bias": True}, "has use_qkv_bias=True"),
        ("llada2_moe", {"use_bias": True}, "has use_bias=True"),
        ("llada2_moe", {"use_qk_norm": False}, "has use_qk_norm=False"),
        ("llada2_moe", {"num_nextn_predict_layers": 1}, "or further layers"),
        ("llada2_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ("llada2_moe", {"block_size": 0}, "block_size must be at least 1, got 0"),
        ("sdar", {"num_experts": 8}, "This sdar variant has num_experts=8: its MLPs are mixtures"),
        ("a2d-qwen3", {"num_experts": 8}, "This a2d-qwen3 variant has num_experts=8: its MLPs are mixtures"),
    ],
)
def test_unsupported_variant_is_refused(tmp_path, family, keys, message):
    write_checkpoint(tmp_path, family, {}, **keys)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


@families
def test_stock_class_is_refused(tmp_path, family):
    with pytest.raises(TypeError, match="ForCausalLM is not a diffusion language model known to trl_diffusion"):
        family_of(stock_model(family))
    stock_model(family).save_pretrained(tmp_path)
    model = create_model_from_path(str(tmp_path))
    with pytest.raises(TypeError, match="does not name a stock transformers class"):
        family_of(get_peft_model(model, LoraConfig(target_modules="all-linear")))


def test_stock_architectures_entry_is_caught_after_loading(tmp_path):
    # TRL's loader follows `architectures` and ends with an autoregressive model, silently
    weights = random_weights("dream")
    model = create_model_from_path(
        str(write_checkpoint(tmp_path, "dream", weights, architectures=["Qwen2ForCausalLM"]))
    )
    assert type(model).__name__ == "Qwen2ForCausalLM" and all_equal(parameters(model), weights)
    with pytest.raises(TypeError, match="Qwen2ForCausalLM is not a diffusion language model"):
        family_of(model)
    # which is not so without TRL
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is DreamModel


# Tokenizers

DREAM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
DREAM_TOKENIZER = {
    "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
    "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    "bos_token": "<|beginoftext|>",
    "chat_template": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "mask_token": "<|mask|>",
    "model_max_length": 131072,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "DreamTokenizer",
    "unk_token": None,
}
LLADA_TOKENS = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|mdm_mask|>", "<|eot_id|>"]
LLADA_TOKENIZER = {
    "bos_token": "<|startoftext|>",
    "chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}<|eot_id|>{% endfor %}",
    "cls_token": "[CLS]",
    "eos_token": "<|endoftext|>",
    "fast_tokenizer": True,
    "gmask_token": "[gMASK]",
    "merges_file": None,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "trust_remote_code": True,
    "vocab_file": None,
}
as_grpo_trainer = {"truncation_side": "left", "padding_side": "left", "trust_remote_code": False}


@pytest.mark.parametrize(
    ("tokenizer_json", "vocabulary_files"), [(False, True), (True, True), (True, False)], ids=["hub", "both", "json"]
)
def test_dream_tokenizer_loads(tmp_path, tokenizer_json, vocabulary_files):
    write_checkpoint(tmp_path, "dream", {})
    write_tokenizer(tmp_path, DREAM_TOKENS, DREAM_TOKENIZER, tokenizer_json, vocabulary_files)
    qwen = Qwen2Tokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>two plus  <|mask|> is 1234,\n\nisn't it<|im_end|>\n"
    for loader, arguments in [
        (AutoTokenizer, {}),
        (AutoTokenizer, {"trust_remote_code": True}),
        (AutoProcessor, as_grpo_trainer),
    ]:
        tokenizer = loader.from_pretrained(tmp_path, **arguments)
        assert tokenizer(text).input_ids == qwen(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.convert_ids_to_tokens(
            [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
        ) == ["<|beginoftext|>", "<|endoftext|>", "<|endoftext|>", "<|mask|>"]
        first = len(qwen) - len(DREAM_TOKENS)
        assert tokenizer.convert_tokens_to_ids(DREAM_TOKENS) == list(range(first, first + 5))
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "two"}], tokenize=False)
        assert chat == "<|im_start|>user\ntwo<|im_end|>\n"
    batch = tokenizer(["two", "two plus two"], padding=True)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
    assert [sum(row) for row in batch.attention_mask] == [1, 3] and batch.attention_mask[0] == [0, 0, 1]

    tokenizer.save_pretrained(tmp_path / "saved")
    write_checkpoint(tmp_path / "saved", "dream", {})
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text).input_ids == qwen(text).input_ids and again.mask_token == "<|mask|>"


def test_llada_tokenizer_loads(tmp_path):
    write_checkpoint(tmp_path, "llada", {})
    write_tokenizer(tmp_path, LLADA_TOKENS, LLADA_TOKENIZER, tokenizer_json=True, vocabulary_files=False)
    text = "two plus<|mdm_mask|> four<|eot_id|><|endoftext|>"
    for loader, arguments in [(AutoTokenizer, {}), (AutoProcessor, as_grpo_trainer)]:
        tokenizer = loader.from_pretrained(tmp_path, **arguments)
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == [
            "two", "Ġplus", "<|mdm_mask|>", "Ġfour", "<|eot_id|>", "<|endoftext|>",
        ]  # fmt: skip
        assert tokenizer.decode(ids) == text
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|endoftext|>",
        )
        assert tokenizer.mask_token is None  # hence the mask id comes from the config
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "left")
