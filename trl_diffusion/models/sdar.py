"""SDAR (2510.06303) and TraDo (2509.06949) as a native transformers class: `Qwen3ForCausalLM` with block-causal
attention.

Weights have Qwen3's names. Blocks are counted from the start of the completion, as in TraceRL's training of TraDo.
SDAR's own sampler and DiRL's training count them from the start of the prompt, which is the same where the prompt
fills its last block.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from trl_diffusion.models.diffusion_lm import DiffusionLM, require_dense, require_plain_rope
from trl_diffusion.models.layers import DiffusionAttention, Float32Rotary, LastLayer

SDAR_VOCABULARY = 151936
SDAR_MASK_TOKEN = 151669  # <|MASK|>, the last id that has a token
SDAR_END_TOKENS = [151643, 151645]  # <|endoftext|>, <|im_end|>
ATTENTION = ("eager", "sdpa")  # implementations that take a mask of their own for every query


class SDARConfig(Qwen3Config):
    """Configuration of SDAR: `Qwen3Config` with the mask token and the block size.

    Args:
        mask_token_id: id of the mask token; `<|MASK|>` in SDAR's vocabulary if not given.
        end_token_ids: ids that end a text; `<|endoftext|>` and `<|im_end|>` in SDAR's vocabulary if not given, else
            `eos_token_id`.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        block_size: tokens per attention block.
        **kwargs: `Qwen3Config` arguments.

    Raises:
        ValueError: for a variant with sliding-window attention, scaled rotary embeddings or experts, or a block size
            below 1.
    """

    model_type = "sdar"

    mask_token_id: int | None = None
    end_token_ids: list[int] | None = None
    num_tokens: int | None = None
    block_size: int = 4
    is_causal: bool = False
    auto_map: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any):
        require_dense(self.model_type, kwargs)
        if self.use_sliding_window:
            raise ValueError(
                "This SDAR variant has use_sliding_window=True; trl_diffusion computes block-causal attention over "
                "the whole text only. Use a checkpoint of the SDAR-8B architecture."
            )
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}.")
        published = self.vocab_size == SDAR_VOCABULARY
        if self.mask_token_id is None and published:
            self.mask_token_id = SDAR_MASK_TOKEN
        if self.end_token_ids is None and published:
            self.end_token_ids = list(SDAR_END_TOKENS)
        if self.num_tokens is None:
            self.num_tokens = SDAR_MASK_TOKEN + 1 if published else self.vocab_size
        if kwargs.get("attn_implementation") == "flex_attention":  # what published configs name for their own code
            del kwargs["attn_implementation"]
        self.auto_map = self.auto_map or {}  # TRL's loader reads it from every config that it does not know
        super().__post_init__(**kwargs)
        require_plain_rope(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """transformers' `from_dict`, which puts arguments of `from_pretrained` among the keys of `config.json`."""
        _check_attention(kwargs.get("attn_implementation"))
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration with the hub's `rope_theta`, as `config.json` stores it."""
        output = super().to_dict()
        output["rope_theta"] = output.pop("rope_parameters")["rope_theta"]
        return output


def _check_attention(implementation: Any) -> None:
    if implementation is not None and implementation not in ATTENTION:
        raise ValueError(
            f"SDAR's block-causal attention runs with attn_implementation {' or '.join(map(repr, ATTENTION))}; "
            f"got {implementation!r}."
        )


class SDARRotaryEmbedding(Float32Rotary, qwen3.Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding in float32."""


class SDARAttention(DiffusionAttention, qwen3.Qwen3Attention):  # type: ignore[misc]  # adds `queries`
    """Qwen3's attention, with norms of queries and keys, and with the rotation in float32."""

    def _normalised(self, query, key):
        return self.q_norm(query), self.k_norm(key)


class Qwen3DecoderLayer(LastLayer, qwen3.Qwen3DecoderLayer):  # type: ignore[misc]  # adds `read`
    """The last layer, under the stock name: FSDP and device maps know layers by it."""


class SDARForCausalLM(DiffusionLM, Qwen3ForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """SDAR with its LM head, under the class name of the hub's remote code.

    Raises:
        ValueError: if the attention implementation does not take block-causal masks.
    """

    config_class = SDARConfig
    rotary_class = SDARRotaryEmbedding
    attention_class = SDARAttention
    last_layer_class = Qwen3DecoderLayer

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        _check_attention(config._attn_implementation)
        self.attention_block = config.block_size


AutoConfig.register(SDARConfig.model_type, SDARConfig, exist_ok=True)
AutoModelForCausalLM.register(SDARConfig, SDARForCausalLM, exist_ok=True)
