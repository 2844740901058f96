"""The sizes of published checkpoints, for estimates where the Hub cannot be reached."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from trl_diffusion.models.a2d import A2DQwen2Config, A2DQwen3Config
from trl_diffusion.models.dream import DreamConfig
from trl_diffusion.models.fast_dllm import FastDLLMConfig
from trl_diffusion.models.llada import LLaDAConfig
from trl_diffusion.models.llada2 import LLaDA2MoeConfig
from trl_diffusion.models.llada_moe import LLaDAMoEConfig
from trl_diffusion.models.sdar import SDARConfig
from trl_diffusion.models.sdar_moe import SDARMoeConfig

_LLADA_8B: dict[str, Any] = {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "max_sequence_length": 4096,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "rope_theta": 500000.0,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "mask_token_id": 126336,
}
_DREAM_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "mask_token_id": 151666,
}
_SDAR_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151643,
    "block_size": 4,
}
# Qwen3-0.6B's config; the mask token is the next free id of its tokenizer, as A2D's training adds it.
_A2D_QWEN3: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "mask_token_id": 151669,
}
# Qwen2.5-Coder-0.5B's
_A2D_QWEN2: dict[str, Any] = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
    "mask_token_id": 151665,
}
_LLADA_MOE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "dense_intermediate_size": 8192,
    "expert_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 157184,
    "rope_theta": 50000.0,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "mask_token_id": 156895,
}
_LLADA2_MINI: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 157184,
    "rope_theta": 600000.0,
    "partial_rotary_factor": 0.5,
    "pad_token_id": 156892,
}
# The width of the only dense layer is that of Ling-flash-2.0, from which LLaDA2.0-flash was trained on.
_LLADA2_FLASH = _LLADA2_MINI | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
}
# Qwen3-30B-A3B's sizes
_SDAR_30B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151643,
    "block_size": 4,
}
# Qwen2.5-7B's and Qwen2.5-1.5B's sizes
_FAST_DLLM_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151645,
}
_FAST_DLLM_1_5B = _FAST_DLLM_7B | {
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
# Checkpoints on the Hub: the config class and the sizes of each.
PUBLISHED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "GSAI-ML/LLaDA-8B-Base": (LLaDAConfig, _LLADA_8B),
    "GSAI-ML/LLaDA-8B-Instruct": (LLaDAConfig, _LLADA_8B),
    "GSAI-ML/LLaDA-1.5": (LLaDAConfig, _LLADA_8B),
    "Dream-org/Dream-v0-Base-7B": (DreamConfig, _DREAM_7B),
    "Dream-org/Dream-v0-Instruct-7B": (DreamConfig, _DREAM_7B),
    "JetLM/SDAR-8B-Chat": (SDARConfig, _SDAR_8B),
    "JetLM/SDAR-30B-A3B-Chat": (SDARMoeConfig, _SDAR_30B),
    "inclusionAI/LLaDA-MoE-7B-A1B-Base": (LLaDAMoEConfig, _LLADA_MOE),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": (LLaDAMoEConfig, _LLADA_MOE),
    "inclusionAI/LLaDA2.0-mini": (LLaDA2MoeConfig, _LLADA2_MINI),
    "inclusionAI/LLaDA2.1-mini": (LLaDA2MoeConfig, _LLADA2_MINI),
    "inclusionAI/LLaDA2.0-flash": (LLaDA2MoeConfig, _LLADA2_FLASH),
    "inclusionAI/LLaDA2.1-flash": (LLaDA2MoeConfig, _LLADA2_FLASH),
    "Efficient-Large-Model/Fast_dLLM_v2_7B": (FastDLLMConfig, _FAST_DLLM_7B),
    "Efficient-Large-Model/Fast_dLLM_v2_1.5B": (FastDLLMConfig, _FAST_DLLM_1_5B),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": (A2DQwen3Config, _A2D_QWEN3 | {"block_size": 0}),
    "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1": (A2DQwen3Config, _A2D_QWEN3 | {"block_size": 32}),
    "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": (A2DQwen2Config, _A2D_QWEN2 | {"block_size": 0}),
    "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": (A2DQwen2Config, _A2D_QWEN2 | {"block_size": 32}),
}


def published_config(name: str) -> PreTrainedConfig:
    """Return the config of a published checkpoint, from the sizes above.

    Args:
        name: id on the Hub.

    Raises:
        ValueError: if its sizes do not come with this library.
    """
    if name not in PUBLISHED:
        raise ValueError(
            f"The config of {name} cannot be read, because the Hub cannot be reached, and its sizes do not come with "
            f"trl_diffusion as those of {', '.join(PUBLISHED)} do. Give a folder with its config.json, or connect to "
            "the Hub once, so that it is in the cache."
        )
    config_class, sizes = PUBLISHED[name]
    config = config_class.from_dict(dict(sizes))
    config.name_or_path = name
    return config
