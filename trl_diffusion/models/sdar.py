"""SDAR (2510.06303) and TraDo (2509.06949) as a native transformers class: `Qwen3ForCausalLM` with block-causal
attention.

Weights have Qwen3's names. Blocks are counted from the start of the sequence, as SDAR's own sampler and DiRL's
training count them: a completion begins in the block that the end of its prompt does not fill. TraceRL's training of
TraDo counts from the start of the completion; `block_origin="completion"` computes that.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_diffusion.models.block_causal import BlockCausalConfigMixin, BlockCausalLM
from trl_diffusion.models.config import Vocabulary
from trl_diffusion.models.families import register
from trl_diffusion.models.qwen_layers import Qwen3DecoderLayer, Qwen3DiffusionAttention, Qwen3RotaryEmbedding

SDAR = Vocabulary(
    size=151936,
    num_tokens=151670,
    end_token_ids=(151643, 151645),  # <|endoftext|>, <|im_end|>
    mask_token_id=151669,  # <|MASK|>, the last id that has a token
)


class SDARConfig(BlockCausalConfigMixin, Qwen3Config):
    """Configuration of SDAR: `Qwen3Config` with the mask token and the block size.

    Args:
        mask_token_id: id of the mask token; `<|MASK|>` in SDAR's vocabulary if not given.
        end_token_ids: ids that end a text; `<|endoftext|>` and `<|im_end|>` in SDAR's vocabulary if not given, else
            `eos_token_id`.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        block_size: tokens per attention block.
        block_origin: where the first block begins, `sequence` or `completion`.
        **kwargs: `Qwen3Config` arguments.

    Raises:
        ValueError: for a variant with sliding-window attention, scaled rotary embeddings or experts, or a block size
            below 1.
    """

    model_type = "sdar"
    published = SDAR

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        if self.use_sliding_window:
            raise ValueError(
                "This SDAR variant has use_sliding_window=True; trl_diffusion computes block-causal attention over "
                "the whole text only. Use a checkpoint of the SDAR-8B architecture."
            )
        super().read_hub_keys(keys)


class SDARForCausalLM(BlockCausalLM, Qwen3ForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """SDAR with its LM head, under the class name of the hub's remote code.

    Raises:
        ValueError: if the attention implementation does not take block-causal masks.
    """

    config_class = SDARConfig
    rotary_class = Qwen3RotaryEmbedding
    attention_class = Qwen3DiffusionAttention
    last_layer_class = Qwen3DecoderLayer


register(SDARConfig, SDARForCausalLM)
