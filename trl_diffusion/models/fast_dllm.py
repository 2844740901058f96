"""Fast-dLLM v2 (2509.26328) as a native class: `Qwen2ForCausalLM` with block-causal attention and shifted logits.

Weights have Qwen2's names. The logits at i - 1 predict the token at i, so the first token of a block is predicted from
the block before it, which is finished. It has the same probability at every denoising step of its block. The published
sampler therefore writes it first, as the most likely token, and divides a block into sub-blocks; the sampler here
writes it when the unmasking rule chooses it, and has no sub-blocks.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_diffusion.models.block_causal import BlockCausalConfigMixin, BlockCausalLM
from trl_diffusion.models.config import Vocabulary
from trl_diffusion.models.families import register
from trl_diffusion.models.qwen_layers import Qwen2DecoderLayer, Qwen2DiffusionAttention, Qwen2RotaryEmbedding

FAST_DLLM = Vocabulary(
    size=152064,
    num_tokens=151666,
    end_token_ids=(151643, 151645),  # <|endoftext|>, <|im_end|>
    mask_token_id=151665,  # |<MASK>|, added after the last token of Qwen2.5
)
SMALL_SIZE = 151936  # rows of the embedding of Fast_dLLM_v2_1.5B, with the same tokens


class FastDLLMConfig(BlockCausalConfigMixin, Qwen2Config):
    """Configuration of Fast-dLLM v2: `Qwen2Config` with the mask token and the block size.

    Args:
        mask_token_id: id of the mask token; `|<MASK>|` in the published vocabulary if not given.
        end_token_ids: ids that end a text; `<|endoftext|>` and `<|im_end|>` in the published vocabulary if not given,
            else `eos_token_id`.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        block_size: tokens per attention block; `bd_size` in the hub's `config.json`.
        block_origin: where the first block begins, `sequence` or `completion`.
        **kwargs: `Qwen2Config` arguments.

    Raises:
        ValueError: for a variant with sliding-window attention, scaled rotary embeddings or experts, or a block size
            below 1.
    """

    model_type = "Fast_dLLM_Qwen"

    block_size: int = 32

    @property
    def published(self) -> Vocabulary:  # type: ignore[override]  # two sizes have the same tokens
        return FAST_DLLM._replace(size=SMALL_SIZE) if self.vocab_size == SMALL_SIZE else FAST_DLLM

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        if self.use_sliding_window:
            raise ValueError(
                "This Fast-dLLM variant has use_sliding_window=True; trl_diffusion computes block-causal attention "
                "over the whole text only. Use a checkpoint of the Fast_dLLM_v2_7B architecture."
            )
        self.block_size = keys.pop("bd_size", self.block_size)
        super().read_hub_keys(keys)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the hub's `bd_size`, as `config.json` stores it."""
        output = super().to_dict()
        output["bd_size"] = output.pop("block_size", self.block_size)
        return output


class Fast_dLLM_QwenForCausalLM(BlockCausalLM, Qwen2ForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """Fast-dLLM v2 with its LM head.

    Raises:
        ValueError: if the attention implementation does not take block-causal masks.
    """

    config_class = FastDLLMConfig
    rotary_class = Qwen2RotaryEmbedding
    attention_class = Qwen2DiffusionAttention
    last_layer_class = Qwen2DecoderLayer
    logit_shift = 1  # trained from an autoregressive model: the logits at i - 1 predict the token at i


register(FastDLLMConfig, Fast_dLLM_QwenForCausalLM)
