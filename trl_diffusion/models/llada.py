"""LLaDA (2502.09992) as a native transformers class: `LlamaForCausalLM` with full attention.

The hub checkpoints (`GSAI-ML/LLaDA-8B-Instruct`, LLaDA-1.5 …) name their config keys and weights differently and ship
remote code that transformers 5 does not load. Keys and weights are translated on loading and translated back, bit for
bit, on saving.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.llama import modeling_llama as llama

from trl_diffusion.models.config import DiffusionConfigMixin, Vocabulary
from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.families import register
from trl_diffusion.models.layers import DiffusionAttention, Float32Rotary, LastLayer

# hub key → Llama key
CONFIG_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "embedding_size": "vocab_size",
    "init_std": "initializer_range",
}
# Hub keys that change the network, with the only value that this class computes.
REQUIRED_VALUES = {
    "alibi": False,
    "rope": True,
    "rope_full_precision": True,
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "activation_type": "silu",
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
    "rope_scaling": None,
}
LLADA_8B = Vocabulary(
    size=126464,
    num_tokens=126349,  # <|eot_id|> 126348 is the last id that has a token
    end_token_ids=(126081, 126348),  # <|endoftext|>, <|eot_id|>
)

_BLOCK = r"model\.transformer\.blocks\.(\d+)"
# (hub name, native name) of every weight. Hub names are regular expressions that match from the start of a name up to
# a dot or its end, so the rows serve modules (`…blocks.3.attn_out`) and weights (`…blocks.3.attn_out.weight`) alike.
_WEIGHT_NAMES = [
    (r"model\.transformer\.wte", "model.embed_tokens"),
    (r"model\.transformer\.ln_f", "model.norm"),
    (r"model\.transformer\.ff_out", "lm_head"),
    (rf"{_BLOCK}\.attn_norm", r"model.layers.\1.input_layernorm"),
    (rf"{_BLOCK}\.ff_norm", r"model.layers.\1.post_attention_layernorm"),
    (rf"{_BLOCK}\.q_proj", r"model.layers.\1.self_attn.q_proj"),
    (rf"{_BLOCK}\.k_proj", r"model.layers.\1.self_attn.k_proj"),
    (rf"{_BLOCK}\.v_proj", r"model.layers.\1.self_attn.v_proj"),
    (rf"{_BLOCK}\.attn_out", r"model.layers.\1.self_attn.o_proj"),
    (rf"{_BLOCK}\.ff_proj", r"model.layers.\1.mlp.gate_proj"),
    (rf"{_BLOCK}\.up_proj", r"model.layers.\1.mlp.up_proj"),
    (rf"{_BLOCK}\.ff_out", r"model.layers.\1.mlp.down_proj"),
]
# The inverse: (native name as a regular expression, hub name).
_HUB_NAMES = [
    (native.replace(".", r"\.").replace(r"\1", r"(\d+)"), hub.replace(r"\.", ".").replace(r"(\d+)", r"\1"))
    for hub, native in _WEIGHT_NAMES
]


def native_weight_name(name: str) -> str:
    """Return the native name of a LLaDA weight or module; native names are returned unchanged."""
    return _renamed(name, _WEIGHT_NAMES)


def hub_weight_name(name: str) -> str:
    """Return the hub's name of a LLaDA weight or module, given its native name."""
    return _renamed(name, _HUB_NAMES)


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, other in table:
        name, found = re.subn(rf"^{pattern}(?=\.|$)", other, name)
        if found:
            break
    return name


class LLaDAConfig(DiffusionConfigMixin, LlamaConfig):
    """Configuration of LLaDA: `LlamaConfig` read from and written with the hub's key names.

    Args:
        mask_token_id: id of the mask token.
        end_token_ids: ids that end a text; `eos_token_id` and, in LLaDA-8B's vocabulary, `<|eot_id|>` if not given.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        **kwargs: `LlamaConfig` arguments, or the hub's (`d_model`, `n_layers` …).

    Raises:
        ValueError: for a LLaDA variant that this class does not compute (alibi, biases, query-key norms,
            scaled rotary embeddings, experts …).
    """

    model_type = "llada"
    published = LLADA_8B

    vocab_size: int = LLADA_8B.size
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        for key, supported in REQUIRED_VALUES.items():
            given = keys.pop(key, None)
            if given is not None and given != supported:
                raise ValueError(
                    f"This LLaDA variant has {key}={given!r}; trl_diffusion computes only {key}={supported!r}. "
                    "Use a checkpoint of the LLaDA-8B architecture."
                )
        if "d_model" in keys and keys.get("mlp_hidden_size") is None:
            keys["mlp_hidden_size"] = keys.get("mlp_ratio", 4) * keys["d_model"]
        if keys.get("multi_query_attention"):
            keys["n_kv_heads"] = 1
        num_tokens = self.vocab_size  # the hub's `vocab_size` counts tokens, its `embedding_size` rows
        # Dataclass defaults are set already, so hub keys overwrite them. This comes before the stock class's
        # `__post_init__`, which derives `head_dim` from two of them.
        for hub, native in CONFIG_KEYS.items():
            if (value := keys.pop(hub, None)) is not None:
                setattr(self, native, value)
        # In LLaDA-8B's own config.json both count rows; its number of tokens is in `published`.
        if self.num_tokens is None and self.vocab_size != LLADA_8B.size:
            self.num_tokens = min(num_tokens, self.vocab_size)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Return a `LLaDAMoEConfig` for the config of LLaDA-MoE, whose `model_type` is `llada` too."""
        if config_dict.get("num_experts") and "expert_intermediate_size" in config_dict:
            from trl_diffusion.models.llada_moe import LLaDAMoEConfig  # imports more than most users of LLaDA need

            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the hub's keys (`d_model` …), as `config.json` stores it."""
        output = super().to_dict()
        for hub, native in CONFIG_KEYS.items():
            output[hub] = output.pop(native)
        output["vocab_size"] = output["embedding_size"]
        return {**REQUIRED_VALUES, **output}


class LLaDARotaryEmbedding(Float32Rotary, llama.LlamaRotaryEmbedding):
    """Llama's rotary embedding in float32 (LLaDA's `rope_full_precision`)."""


class LLaDAAttention(DiffusionAttention, llama.LlamaAttention):  # type: ignore[misc]  # adds `queries`
    """Llama's attention with the rotation in float32."""


class LlamaDecoderLayer(LastLayer, llama.LlamaDecoderLayer):  # type: ignore[misc]  # adds `read`
    """The last layer. It has the name of the stock class, by which FSDP and device maps recognise layers."""


class LLaDAModelLM(DiffusionLM, LlamaForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """LLaDA with its LM head, under the class name of the hub's remote code."""

    config_class = LLaDAConfig
    rotary_class = LLaDARotaryEmbedding
    attention_class = LLaDAAttention
    last_layer_class = LlamaDecoderLayer
    native_name = staticmethod(native_weight_name)
    hub_name = staticmethod(hub_weight_name)

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_rename_state_dict)


def _rename_state_dict(module, state_dict, prefix, *args) -> None:
    # transformers' Trainer resumes with a plain `load_state_dict(strict=False)`, which would silently load nothing
    # from a checkpoint with hub names.
    for name in [name for name in state_dict if name.startswith(prefix)]:
        native = prefix + native_weight_name(name[len(prefix) :])
        if native != name:
            state_dict[native] = state_dict.pop(name)


register_checkpoint_conversion_mapping(
    LLaDAModelLM.__name__, [WeightRenaming(hub, native) for hub, native in _WEIGHT_NAMES], overwrite=True
)
register(LLaDAConfig, LLaDAModelLM)
