"""SDAR (2510.06303) and TraDo (2509.06949) as a native transformers class: `Qwen3ForCausalLM` with block-causal
attention.

Weights have Qwen3's names. Blocks are counted from the start of the completion, as in TraceRL's training of TraDo.
SDAR's own sampler and DiRL's training count them from the start of the prompt, which is the same where the prompt
fills its last block.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from trl_diffusion.models.config import DiffusionConfigMixin, Vocabulary
from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.families import register
from trl_diffusion.models.layers import DiffusionAttention, Float32Rotary, LastLayer
from trl_diffusion.validation import at_least

SDAR = Vocabulary(
    size=151936,
    num_tokens=151670,
    end_token_ids=(151643, 151645),  # <|endoftext|>, <|im_end|>
    mask_token_id=151669,  # <|MASK|>, the last id that has a token
)
ATTENTION = ("eager", "sdpa")  # implementations that take a mask of their own for every query


class SDARConfig(DiffusionConfigMixin, Qwen3Config):
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
    published = SDAR

    block_size: int = 4

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        if self.use_sliding_window:
            raise ValueError(
                "This SDAR variant has use_sliding_window=True; trl_diffusion computes block-causal attention over "
                "the whole text only. Use a checkpoint of the SDAR-8B architecture."
            )
        at_least("block_size", self.block_size, 1)
        if keys.get("attn_implementation") == "flex_attention":  # published configs name it for their own code
            del keys["attn_implementation"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Check the attention asked of `from_pretrained`, which from here on looks like a key of `config.json`."""
        _check_attention(kwargs.get("attn_implementation"))
        return super().from_dict(config_dict, **kwargs)


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
    """The last layer. It has the name of the stock class, by which FSDP and device maps recognise layers."""


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


register(SDARConfig, SDARForCausalLM)
