"""A2D: autoregressive models trained on as diffusion models, `a2d-qwen3` and `a2d-qwen2`.

These are the checkpoints of Tiny-A2D (https://github.com/ZHZisZZ/dllm): Qwen3-0.6B and Qwen2.5-Coder-0.5B, each as a
masked diffusion model (mdlm, full attention) and as a block diffusion model (bd3lm, blocks of 32). Weights have Qwen's
names and their embeddings are tied.

Both kinds have the same `config.json`, which names neither the block size nor the mask token. So the user says which
kind a checkpoint is, by `block_size`, and the mask token is that of the checkpoint's tokenizer. `save_pretrained`
writes both into `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from trl_diffusion.family import BLOCK_ORIGINS
from trl_diffusion.models.block_causal import check_block_attention
from trl_diffusion.models.config import DiffusionConfigMixin, Vocabulary
from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.families import register
from trl_diffusion.models.from_tokenizer import TokenizerFacts
from trl_diffusion.models.qwen_layers import (
    Qwen2DecoderLayer,
    Qwen2DiffusionAttention,
    Qwen2RotaryEmbedding,
    Qwen3DecoderLayer,
    Qwen3DiffusionAttention,
    Qwen3RotaryEmbedding,
)
from trl_diffusion.validation import at_least, one_of

# The mask token `<|mask|>` is added behind the last token of Qwen's vocabulary. Its id is read from the tokenizer.
A2D_QWEN3 = Vocabulary(
    size=151936,
    num_tokens=151670,
    end_token_ids=(151643, 151645),  # <|endoftext|>, <|im_end|>
)
A2D_QWEN2 = A2D_QWEN3._replace(num_tokens=151666)


@dataclass(kw_only=True, repr=False)
class A2DConfigMixin(TokenizerFacts, DiffusionConfigMixin):  # type: ignore[misc]  # sets its fields
    """Adds the blocks of attention to `DiffusionConfigMixin`; the mask token is read from the tokenizer.

    Args:
        block_size: tokens per attention block, 0 for full attention; the checkpoints' `config.json` leaves it out.
        block_origin: where the first block begins, see `DiffusionFamily`. bd3lm's sampler fills up the prompt's last
            block, so that blocks begin with the completion.
    """

    block_size: int | None = None
    block_origin: str = "completion"

    def read_hub_keys(self: Any, keys: dict[str, Any]) -> None:
        if self.use_sliding_window:
            raise ValueError(
                f"This {self.model_type} variant has use_sliding_window=True; trl_diffusion computes attention over "
                "the whole text only. Use a checkpoint of the Qwen3-0.6B-diffusion architecture."
            )
        if self.block_size is not None:
            at_least("block_size", self.block_size, 0)
        one_of("block_origin", self.block_origin, BLOCK_ORIGINS)


class A2DQwen3Config(A2DConfigMixin, Qwen3Config):  # type: ignore[misc]  # `from_pretrained`
    """Configuration of `a2d-qwen3`: `Qwen3Config` with the mask token and the block size.

    Args:
        block_size: tokens per attention block (32 for bd3lm), 0 for full attention (mdlm).
        block_origin: where the first block begins, `sequence` or `completion`.
        mask_token_id: id of the mask token; the tokenizer's if not given.
        end_token_ids: ids that end a text; `<|endoftext|>` and `<|im_end|>` in Qwen's vocabulary if not given, else
            `eos_token_id`.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        **kwargs: `Qwen3Config` arguments.

    Raises:
        ValueError: for a variant with sliding-window attention, scaled rotary embeddings or experts, or a block size
            below 0.
    """

    model_type = "a2d-qwen3"
    published = A2D_QWEN3


class A2DQwen2Config(A2DConfigMixin, Qwen2Config):  # type: ignore[misc]  # `from_pretrained`
    """Configuration of `a2d-qwen2`: `Qwen2Config` with the mask token and the block size, as `A2DQwen3Config`."""

    model_type = "a2d-qwen2"
    published = A2D_QWEN2


class A2DLM(DiffusionLM):
    """Mixin of both models: attention is full or block-causal as the config says.

    Raises:
        ValueError: if attention is block-causal and its implementation does not take such masks.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.block_origin = config.block_origin
        if config.block_size:
            check_block_attention(config.model_type, config._attn_implementation)

    @property
    def attention_block(self) -> int | None:  # type: ignore[override]  # read-only, from the config
        """Block size of attention, `None` for full attention.

        Raises:
            ValueError: if the config does not say.
        """
        size = self.config.block_size
        if size is None:
            raise ValueError(
                f"The config.json of this {self.config.model_type} checkpoint does not say what a token sees, and "
                "mdlm and bd3lm checkpoints look alike. Give block_size=0 for full attention (mdlm) or the size of "
                "the blocks (bd3lm: 32): as an argument of from_pretrained, in a trainer's "
                "model_init_kwargs, as a command's --block_size, or as a key of config.json."
            )
        return size or None


class A2DQwen3LMHeadModel(A2DLM, Qwen3ForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """Qwen3 as a diffusion model with its LM head, under the class name of the hub's code."""

    config_class = A2DQwen3Config
    rotary_class = Qwen3RotaryEmbedding
    attention_class = Qwen3DiffusionAttention
    last_layer_class = Qwen3DecoderLayer


class A2DQwen2LMHeadModel(A2DLM, Qwen2ForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """Qwen2 as a diffusion model with its LM head, under the class name of the hub's code."""

    config_class = A2DQwen2Config
    rotary_class = Qwen2RotaryEmbedding
    attention_class = Qwen2DiffusionAttention
    last_layer_class = Qwen2DecoderLayer


register(A2DQwen3Config, A2DQwen3LMHeadModel)
register(A2DQwen2Config, A2DQwen2LMHeadModel)
