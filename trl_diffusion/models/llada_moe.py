"""LLaDA-MoE (2509.24389) as a native transformers class: `Qwen3MoeForCausalLM` with full attention.

The hub checkpoints (`inclusionAI/LLaDA-MoE-7B-A1B-Instruct`) have some config keys of their own, and `"llada"` as
their `model_type`, like LLaDA-8B; `LLaDAConfig` recognises them by their experts. Weights have Qwen3-MoE's names.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from trl_diffusion.models.config import DiffusionConfigMixin, Vocabulary
from trl_diffusion.models.experts import MixtureLM
from trl_diffusion.models.families import register
from trl_diffusion.models.from_tokenizer import TokenizerFacts
from trl_diffusion.models.qwen_layers import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeDiffusionAttention,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeRouter,
)

LLADA_MOE = Vocabulary(
    size=157184,
    num_tokens=157184,  # the tokenizer's number where there is one
    end_token_ids=(156892,),  # <|endoftext|>
    mask_token_id=156895,  # <|mask|>
)
# hub key → Qwen3-MoE key
CONFIG_KEYS = {"expert_intermediate_size": "moe_intermediate_size", "dense_intermediate_size": "intermediate_size"}
# Hub keys that change the network, with the only value that this class computes.
REQUIRED_VALUES = {
    "qk_layernorm": True,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "routed_scaling_factor": 1.0,
    "partial_rotary_factor": 1.0,
    "shared_expert_intermediate_size": None,
}


class LLaDAMoEConfig(TokenizerFacts, DiffusionConfigMixin, Qwen3MoeConfig):  # type: ignore[misc]  # `from_pretrained`
    """Configuration of LLaDA-MoE: `Qwen3MoeConfig` read from and written with the hub's key names.

    Args:
        mask_token_id: id of the mask token.
        end_token_ids: ids that end a text; `<|endoftext|>` and, if the checkpoint's tokenizer has it, `<|role_end|>`
            if not given.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        hub_model_type: `model_type` in `config.json`.
        **kwargs: `Qwen3MoeConfig` arguments, or the hub's (`expert_intermediate_size` …).

    Raises:
        ValueError: for a variant that this class does not compute (shared experts, other routers, no query-key norms,
            partly rotated heads …).
    """

    model_type = "lladamoe"
    published = LLADA_MOE
    has_experts = True
    turn_end = "<|role_end|>"

    vocab_size: int = LLADA_MOE.size
    rms_norm_eps: float = 1e-5
    hub_model_type: str = "llada"
    head_dim: int | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Make the config; the hub writes null for `norm_topk_prob`, which its code takes as false."""
        given = {key: value for key, value in config_dict.items() if key != "norm_topk_prob" or value is not None}
        return super().from_dict(given, **kwargs)

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        for key, supported in REQUIRED_VALUES.items():
            given = keys.pop(key, None)
            if given is not None and given != supported:
                raise ValueError(
                    f"This LLaDA-MoE variant has {key}={given!r}; trl_diffusion computes only {key}={supported!r}. "
                    "Use a checkpoint of the LLaDA-MoE-7B-A1B architecture."
                )
        if self.use_sliding_window:
            raise ValueError(
                "This LLaDA-MoE variant has use_sliding_window=True; trl_diffusion computes attention over the whole "
                "text only. Use a checkpoint of the LLaDA-MoE-7B-A1B architecture."
            )
        self.hub_model_type = keys.pop("model_type", self.hub_model_type)
        for hub, native in CONFIG_KEYS.items():
            if (value := keys.pop(hub, None)) is not None:
                setattr(self, native, value)
        layers = keys.pop("moe_layer_freq", None)
        if layers is not None:
            layers = layers if isinstance(layers, list) else [layers] * self.num_hidden_layers
            self.mlp_only_layers = [layer for layer, sparse in enumerate(layers) if not sparse]
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the hub's keys, as `config.json` stores it."""
        output = super().to_dict()
        for hub, native in CONFIG_KEYS.items():
            output[hub] = output.pop(native)
        dense = output.pop("mlp_only_layers")
        output["moe_layer_freq"] = [int(layer not in dense) for layer in range(self.num_hidden_layers)]
        output["model_type"] = output.pop("hub_model_type")
        output["num_experts"] = output.pop("num_local_experts", self.num_experts)
        return {**REQUIRED_VALUES, **output}


class LLaDAMoEModelLM(MixtureLM, Qwen3MoeForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """LLaDA-MoE with its LM head, under the class name of the hub's remote code."""

    config_class = LLaDAMoEConfig
    rotary_class = Qwen3MoeRotaryEmbedding
    attention_class = Qwen3MoeDiffusionAttention
    last_layer_class = Qwen3MoeDecoderLayer
    mixture_class = qwen3_moe.Qwen3MoeSparseMoeBlock
    router_class = Qwen3MoeRouter


register_checkpoint_conversion_mapping(
    LLaDAMoEModelLM.__name__, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)
register(LLaDAMoEConfig, LLaDAMoEModelLM)
