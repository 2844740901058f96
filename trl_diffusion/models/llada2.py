"""LLaDA2.0 and LLaDA2.1 (mini, flash) as a native class: `Glm4MoeForCausalLM` with block-causal attention.

The hub checkpoints (`inclusionAI/LLaDA2.0-mini` …) name config keys and weights differently and store queries, keys
and values in one matrix. Keys and weights are translated on loading and translated back, bit for bit, on saving.

LLaDA2.1 has the same network. Its own sampler also rewrites tokens that are written already, which the trajectories
here do not have: it is trained and sampled with the sampler that only unmasks.

Router weights and biases of experts are float32 also where the rest is loaded in bfloat16, and are saved so.
`model.bfloat16()` rounds them; load with `dtype="bfloat16"` instead.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe

from trl_diffusion.models.block_causal import BlockCausalConfigMixin, BlockCausalLM
from trl_diffusion.models.experts import MixtureLM, merged_name
from trl_diffusion.models.families import register
from trl_diffusion.models.from_tokenizer import TokenizerFacts
from trl_diffusion.models.layers import Float32Rotary, LastLayer, NormedAttention
from trl_diffusion.models.llada_moe import LLADA_MOE  # the vocabulary is the same

# hub key → GLM-4-MoE key
CONFIG_KEYS = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
# Hub keys that change the network, with the only value that this class computes.
REQUIRED_VALUES = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_head": False,
    "norm_softmax": False,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}
# (hub name, native name) of what has another name, as regular expressions of endings of modules' names
_NAMES = [
    (r"model\.word_embeddings", "model.embed_tokens"),
    (r"\.attention\.dense", ".self_attn.o_proj"),
    (r"\.attention\.query_layernorm", ".self_attn.q_norm"),
    (r"\.attention\.key_layernorm", ".self_attn.k_norm"),
    (r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
]
_FUSED = ".attention.query_key_value"
_PARTS = [f".self_attn.{part}_proj" for part in "qkv"]


def native_weight_name(name: str) -> str:
    """Return the native name of a weight or module of LLaDA2, the queries' for the matrix of all three."""
    for hub, native in _NAMES:
        name = re.sub(rf"{hub}(?=\.|$)", native, name)
    return merged_name(name.replace(_FUSED, _PARTS[0]))


def hub_weight_name(name: str) -> str:
    """Return the hub's name of a linear layer; queries, keys and values are one there."""
    for part in _PARTS:
        name = name.replace(part, _FUSED)
    for hub, native in _NAMES:
        name = re.sub(rf"{re.escape(native)}(?=\.|$)", hub.replace("\\", ""), name)
    return name


class LLaDA2MoeConfig(TokenizerFacts, BlockCausalConfigMixin, Glm4MoeConfig):  # type: ignore[misc]  # `from_pretrained`
    """Configuration of LLaDA2: `Glm4MoeConfig` read from and written with the hub's key names.

    Args:
        mask_token_id: id of the mask token.
        end_token_ids: ids that end a text; `<|endoftext|>` and, if the checkpoint's tokenizer has it, `<|role_end|>`
            if not given.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        block_size: tokens per attention block; the hub leaves it out.
        block_origin: where the first block begins, `sequence` or `completion`.
        **kwargs: `Glm4MoeConfig` arguments, or the hub's (`num_experts` …).

    Raises:
        ValueError: for a variant that this class does not compute (biases, other routers, dropout …), or a block
            size below 1.
    """

    model_type = "llada2_moe"
    published = LLADA_MOE
    has_experts = True
    turn_end = "<|role_end|>"

    vocab_size: int = LLADA_MOE.size
    rms_norm_eps: float = 1e-6
    block_size: int = 32
    use_qk_norm: bool = True
    routed_scaling_factor: float = 2.5
    num_mtp_layers: int = 0
    head_dim: int | None = None

    @property
    def shared_width(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        for key, supported in REQUIRED_VALUES.items():
            given = keys.pop(key, None)
            if given is not None and given != supported:
                raise ValueError(
                    f"This LLaDA2 variant has {key}={given!r}; trl_diffusion computes only {key}={supported!r}. Use a "
                    "checkpoint of the LLaDA2.0-mini architecture."
                )
        if not self.use_qk_norm or self.num_mtp_layers or keys.get("num_nextn_predict_layers"):
            raise ValueError(
                "This LLaDA2 variant has use_qk_norm=False or further layers (num_nextn_predict_layers), which "
                "trl_diffusion does not compute. Use a checkpoint of the LLaDA2.0-mini architecture."
            )
        for hub, native in CONFIG_KEYS.items():
            if (value := keys.pop(hub, None)) is not None:
                setattr(self, native, value)
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().read_hub_keys(keys)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the hub's keys, as `config.json` stores it."""
        rope: Any = self.rope_parameters
        output = super().to_dict()
        for hub, native in CONFIG_KEYS.items():
            output[hub] = output.pop(native)
        return {**REQUIRED_VALUES, **output, "partial_rotary_factor": rope["partial_rotary_factor"]}


class LLaDA2RotaryEmbedding(Float32Rotary, glm4_moe.Glm4MoeRotaryEmbedding):
    """GLM-4-MoE's rotary embedding in float32; it rotates a part of every head."""


class LLaDA2Attention(NormedAttention, glm4_moe.Glm4MoeAttention):  # type: ignore[misc]  # adds `queries`
    """GLM-4-MoE's attention, with the rotation in float32."""


class LLaDA2Router(glm4_moe.Glm4MoeTopkRouter):
    """GLM-4-MoE's router, which computes in float32, under autocast too."""

    def forward(self, hidden_states: torch.Tensor):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states)


class Glm4MoeDecoderLayer(LastLayer, glm4_moe.Glm4MoeDecoderLayer):  # type: ignore[misc]  # adds `read`
    """The last layer. It has the name of the stock class, by which FSDP and device maps recognise layers."""


class LLaDA2MoeModelLM(BlockCausalLM, MixtureLM, Glm4MoeForCausalLM):  # type: ignore[misc]  # samples by diffusion
    """LLaDA2 with its LM head, under the class name of the hub's remote code.

    Raises:
        ValueError: if the attention implementation does not take block-causal masks.
    """

    config_class = LLaDA2MoeConfig
    rotary_class = LLaDA2RotaryEmbedding
    attention_class = LLaDA2Attention
    last_layer_class = Glm4MoeDecoderLayer
    mixture_class = glm4_moe.Glm4MoeMoE
    router_class = LLaDA2Router
    native_name = staticmethod(native_weight_name)
    hub_name = staticmethod(hub_weight_name)
    _keys_to_ignore_on_load_unexpected: list[str] = []  # the stock class ignores layers of GLM's own checkpoints

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_rename_state_dict)


def _sizes(config: LLaDA2MoeConfig) -> list[int]:
    """Return the rows of the matrices of queries, keys and values."""
    assert config.head_dim is not None
    return [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]


class _SplitFused(Split):
    """`Split` by the sizes of the config; under ZeRO-3 the parameters that it would ask are empty while loading."""

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):  # type: ignore[override]
        ((fused,),) = input_dict.values()
        parts = fused.split(_sizes(model.config))
        return {target: part.contiguous() for target, part in zip(target_patterns, parts, strict=True)}


def _rename_state_dict(module, state_dict, prefix, *args) -> None:
    """Turn hub names into native ones where transformers' Trainer resumes with a plain `load_state_dict`."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        if _FUSED in name:
            names = [name.replace(_FUSED, part) for part in _PARTS]
            state_dict.update(zip(names, state_dict.pop(name).split(_sizes(module.config)), strict=True))
        elif (native := prefix + native_weight_name(name[len(prefix) :])) != name:
            state_dict[native] = state_dict.pop(name)


register_checkpoint_conversion_mapping(
    LLaDA2MoeModelLM.__name__,
    [
        *(WeightRenaming(hub, native) for hub, native in _NAMES),
        WeightConverter(f"{_FUSED}.weight", [f"{part}.weight" for part in _PARTS], operations=[_SplitFused()]),
        *get_checkpoint_conversion_mapping("glm4_moe"),
    ],
    overwrite=True,
)
register(LLaDA2MoeConfig, LLaDA2MoeModelLM)
