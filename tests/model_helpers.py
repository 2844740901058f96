"""Tiny checkpoints as the hub has them: its config keys, weight names and tokenizer files, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY, NUM_TOKENS, MASK, EOS = 64, 60, 57, 55

# config.json of GSAI-ML/LLaDA-8B-Instruct with other sizes
LLADA_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": VOCABULARY,
    "eos_token_id": EOS,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "max_sequence_length": 128,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 3,
    "pad_token_id": EOS,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": VOCABULARY,
    "weight_tying": False,
}

# config.json of Dream-org/Dream-v0-Instruct-7B with other sizes
DREAM_CONFIG = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "full_attn_mask": True,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 128,
    "max_window_layers": 3,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": EOS,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
# generation_config.json of Dream-org/Dream-v0-Instruct-7B
DREAM_GENERATION_CONFIG = {
    "_from_model_config": True,
    "alg": "origin",
    "alg_temp": None,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "eps": 0.001,
    "mask_token_id": None,
    "output_history": False,
    "pad_token_id": EOS,
    "steps": 512,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "transformers_version": "4.46.2",
}
# config.json of JetLM/SDAR-1.7B-Chat with other sizes
SDAR_CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_implementation": "flex_attention",
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "block_size": 4,
    "bos_token_id": EOS,
    "debug": False,
    "eos_token_id": EOS,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 128,
    "max_window_layers": 3,
    "micro_forward": False,
    "model_type": "sdar",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "skip_checkpoint": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_deepep": False,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
# config.json of dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1 with other sizes, and with the keys that it leaves out
# (`block_size`, `mask_token_id`); its embeddings are tied
A2D_QWEN3_CONFIG = {
    "architectures": ["A2DQwen3LMHeadModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "modeling_qwen3.A2DQwen3Config",
        "AutoModel": "modeling_qwen3.A2DQwen3Model",
        "AutoModelForMaskedLM": "modeling_qwen3.A2DQwen3LMHeadModel",
    },
    "block_size": 0,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 128,
    "max_window_layers": 3,
    "model_type": "a2d-qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.57.0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
A2D_QWEN2_CONFIG = {
    **{key: value for key, value in A2D_QWEN3_CONFIG.items() if key not in ("attention_bias", "head_dim")},
    "architectures": ["A2DQwen2LMHeadModel"],
    "auto_map": {
        "AutoConfig": "modeling_qwen2.A2DQwen2Config",
        "AutoModel": "modeling_qwen2.A2DQwen2Model",
        "AutoModelForMaskedLM": "modeling_qwen2.A2DQwen2LMHeadModel",
    },
    "model_type": "a2d-qwen2",
}
# config.json of inclusionAI/LLaDA-MoE-7B-A1B-Instruct with other sizes; its first layer is dense here
LLADA_MOE_CONFIG = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_lladamoe.LLaDAConfig",
        "AutoModel": "modeling_lladamoe.LLaDAMoEModel",
        "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
    },
    "dense_intermediate_size": 48,
    "eos_token_id": EOS,
    "expert_intermediate_size": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "mask_token_id": MASK,
    "max_position_embeddings": 128,
    "model_type": "llada",
    "moe_layer_freq": [0, 1, 1],
    "moe_router_enable_expert_bias": None,
    "moe_router_score_function": None,
    "norm_topk_prob": None,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "pad_token_id": EOS,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_aux_loss_coef": 0.01,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.53.2",
    "use_cache": False,
    "vocab_size": VOCABULARY,
}
# config.json of JetLM/SDAR-30B-A3B-Chat with other sizes; its first layer is dense here
SDAR_MOE_CONFIG = {
    **{key: value for key, value in SDAR_CONFIG.items() if not key.startswith(("ep_", "fuse_", "micro_", "skip_"))},
    "architectures": ["SDARMoeForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sdar_moe.SDARMoeConfig",
        "AutoModel": "modeling_sdar_moe.SDARMoeModel",
        "AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM",
    },
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# config.json of inclusionAI/LLaDA2.0-mini with other sizes, and with the keys that it leaves out (`block_size`,
# `eos_token_id`, `mask_token_id`)
LLADA2_CONFIG = {
    "architectures": ["LLaDA2MoeModelLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "block_size": 4,
    "embedding_dropout": 0.0,
    "eos_token_id": EOS,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": MASK,
    "max_position_embeddings": 128,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 16,
    "moe_router_enable_expert_bias": True,
    "n_group": 4,
    "norm_head": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": EOS,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "float32",
    "transformers_version": "4.57.1",
    "use_bias": False,
    "use_cache": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "vocab_size": VOCABULARY,
}
# config.json of Efficient-Large-Model/Fast_dLLM_v2_7B with other sizes, and with the mask token that it leaves out
FAST_DLLM_CONFIG = {
    **{key: value for key, value in DREAM_CONFIG.items() if key not in ("full_attn_mask", "mask_token_id")},
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
        "AutoModel": "modeling.Fast_dLLM_QwenModel",
        "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
    },
    "bd_size": 4,
    "mask_token_id": MASK,
    "model_type": "Fast_dLLM_Qwen",
}
MIXTURES = ("lladamoe", "sdar_moe", "llada2_moe")
BLOCK_CAUSAL = ("sdar", "sdar_moe", "llada2_moe", "fast_dllm")
SHIFTED = ("dream", "fast_dllm")
HUB_CONFIGS = {
    "llada": LLADA_CONFIG,
    "dream": DREAM_CONFIG,
    "sdar": SDAR_CONFIG,
    "a2d-qwen3": A2D_QWEN3_CONFIG,
    "a2d-qwen2": A2D_QWEN2_CONFIG,
    "lladamoe": LLADA_MOE_CONFIG,
    "sdar_moe": SDAR_MOE_CONFIG,
    "llada2_moe": LLADA2_CONFIG,
    "fast_dllm": FAST_DLLM_CONFIG,
}

# hub → stock, written independently of trl_diffusion.models.llada
LLADA_TO_LLAMA = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def stock_model(family: str, tied: bool = False, **kwargs) -> PreTrainedModel:
    """The stock transformers model with the sizes of the hub config, made bidirectional as MODELS.md describes."""
    hub = HUB_CONFIGS[family]
    config_class, model_class = {
        "llada": (LlamaConfig, LlamaForCausalLM),
        "dream": (Qwen2Config, Qwen2ForCausalLM),
        "sdar": (Qwen3Config, Qwen3ForCausalLM),
        "a2d-qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "a2d-qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "lladamoe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "sdar_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "llada2_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
        "fast_dllm": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    rope = {"rope_type": "default", "rope_theta": hub["rope_theta"]}
    if family == "llada2_moe":
        rope["partial_rotary_factor"] = 0.5
        kwargs = {
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            **kwargs,
        }
    elif family in MIXTURES:
        kwargs = {
            "moe_intermediate_size": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "norm_topk_prob": family != "lladamoe",
            **kwargs,
        }
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=hub["rms_norm_eps"],
        rope_parameters=rope,
        tie_word_embeddings=tied,
        **kwargs,
    )
    config.is_causal = False
    return model_class(config).eval()


def stock_mask(family: str, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mask with which the stock model sees what the family sees; for blocks, which begin with the first
    token that is shown, it is additive."""
    if family not in BLOCK_CAUSAL:
        return attention_mask
    columns = attention_mask.size(1)
    bias = torch.full((attention_mask.size(0), 1, columns, columns), torch.finfo(torch.float32).min)
    for row, query, key in attention_mask.new_ones(bias[:, 0].shape).nonzero().tolist():
        start = int(attention_mask[row].argmax())
        if (attention_mask[row, key] and key < start + ((query - start) // 4 + 1) * 4) or key == query:
            bias[row, 0, query, key] = 0.0
    return bias


def random_weights(family: str, tied: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under their stock names, large enough for attention to matter."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return 1 + 0.1 * values if "norm" in name else 0.25 * values

    weights = {name: draw(name, value.shape) for name, value in stock_model(family, tied).state_dict().items()}
    if tied:
        del weights["lm_head.weight"]
    return weights


def hub_names(family: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names that they have on the hub."""
    if family == "llada2_moe":
        weights = llada2_names(weights)
    if family in MIXTURES:
        return {hub: part for name, value in weights.items() for hub, part in single_experts(name, value).items()}
    if family != "llada":
        return weights
    names = {
        "model.embed_tokens.weight": "model.transformer.wte.weight",
        "model.norm.weight": "model.transformer.ln_f.weight",
        "lm_head.weight": "model.transformer.ff_out.weight",
    }
    for layer in range(LLADA_CONFIG["n_layers"]):
        for hub, llama in LLADA_TO_LLAMA.items():
            names[f"model.layers.{layer}.{llama}.weight"] = f"model.transformer.blocks.{layer}.{hub}.weight"
    return {names[name]: value for name, value in weights.items()}


def llada2_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of LLaDA2 under the hub's names, apart from experts; queries, keys and values are one matrix there."""
    names = {
        "model.embed_tokens": "model.word_embeddings",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }
    renamed = {}
    for name, value in weights.items():
        if "self_attn.q_proj" in name:
            parts = [value, *(weights[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))]
            renamed[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif "self_attn.k_proj" not in name and "self_attn.v_proj" not in name:
            for native, hub in names.items():
                name = name.replace(native, hub)
            renamed[name] = value
    return renamed


def single_experts(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of single experts, by their names on the hub, of a merged weight; of any other just itself."""
    module, _, key = name.rpartition(".")
    if not module.endswith("mlp.experts"):
        return {name: value}
    parts = {"down_proj": value} if key == "down_proj" else {"gate_proj": value[:, :16], "up_proj": value[:, 16:]}
    return {
        f"{module}.{number}.{part}.weight": weight.contiguous()
        for part, weights in parts.items()
        for number, weight in enumerate(weights)
    }


def write_checkpoint(
    folder: Path, family: str, weights: dict[str, torch.Tensor], drop: tuple[str, ...] = (), **config
) -> Path:
    """Write a checkpoint like the hub's: `config` overrides keys of its config.json, `drop` removes some."""
    hub_config = {**HUB_CONFIGS[family], **config}
    for key in drop:
        del hub_config[key]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub_config))
    if family == "dream":
        (folder / "generation_config.json").write_text(json.dumps(DREAM_GENERATION_CONFIG))
    save_file(hub_names(family, weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(
    folder: Path, special_tokens: list[str], config: dict, tokenizer_json: bool, vocabulary_files: bool
) -> None:
    """Write a byte-level BPE tokenizer with the given special tokens and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["two plus two is four, three plus four is seven"] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    if vocabulary_files:
        tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(special_tokens)
    if tokenizer_json:
        tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(first + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(special_tokens)
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, **config}))
