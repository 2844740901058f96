"""Dream (2508.15487) as a native transformers class: `Qwen2ForCausalLM` with full attention and shifted logits.

Weight names are those of the hub (`Dream-org/Dream-v0-Instruct-7B`), so nothing is renamed.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from trl_diffusion.models.config import DiffusionConfigMixin, Vocabulary
from trl_diffusion.models.diffusion_lm import DiffusionLM
from trl_diffusion.models.families import register
from trl_diffusion.models.qwen_layers import Qwen2DecoderLayer, Qwen2DiffusionAttention, Qwen2RotaryEmbedding

DREAM_7B = Vocabulary(
    size=152064,
    num_tokens=151667,  # <|mask|> 151666 is the last id that has a token
    end_token_ids=(151643, 151645),  # <|endoftext|>, <|im_end|>
)


class DreamConfig(DiffusionConfigMixin, Qwen2Config):
    """Configuration of Dream: `Qwen2Config` with the mask token.

    Args:
        mask_token_id: id of the mask token.
        end_token_ids: ids that end a text; `eos_token_id` and, in Dream-7B's vocabulary, `<|im_end|>` if not given.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        **kwargs: `Qwen2Config` arguments.

    Raises:
        ValueError: for a variant with sliding-window attention, without full attention, with scaled rotary
            embeddings or with experts.
    """

    model_type = "Dream"
    published = DREAM_7B

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        if self.use_sliding_window or not keys.get("full_attn_mask", True):
            raise ValueError(
                "This Dream variant has use_sliding_window=True or full_attn_mask=False; trl_diffusion computes "
                "full attention only. Use a checkpoint of the Dream-7B architecture."
            )


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's tokenizer under the name that checkpoints ask for; it gives the same ids as Dream's remote code."""


class DreamModel(DiffusionLM, Qwen2ForCausalLM):  # type: ignore[misc]  # `generate` samples by diffusion
    """Dream with its LM head, under the class name of the hub's remote code."""

    config_class = DreamConfig
    rotary_class = Qwen2RotaryEmbedding
    attention_class = Qwen2DiffusionAttention
    last_layer_class = Qwen2DecoderLayer
    logit_shift = 1  # trained from an autoregressive model: the logits at i - 1 predict the token at i


register(DreamConfig, DreamModel)
# Registered by name: after AutoTokenizer.register(DreamConfig, …), trust_remote_code=True would load the remote code.
REGISTERED_TOKENIZER_CLASSES[DreamTokenizer.__name__] = DreamTokenizer
