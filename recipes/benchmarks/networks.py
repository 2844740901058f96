"""Networks with random weights in the shapes that are timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from trl_diffusion.models import LLaDAModelLM, SDARForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of a network; its MLP is three times as wide as the hidden states, as in LLaDA-8B and SDAR-8B.

    Args:
        vocabulary: rows of embedding and LM head.
        hidden: width.
        layers: number of layers.
        heads: attention heads.
        key_heads: heads of keys and values.
        dtype: of the weights.
        block_causal: SDAR's attention and layers instead of LLaDA's.
    """

    vocabulary: int
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_heads: int = 8
    dtype: torch.dtype = torch.float32
    block_causal: bool = False


SHAPES = {
    "head-heavy": Shape(126464),
    "backbone-heavy": Shape(8192),
    "tiny": Shape(512, hidden=32, layers=1, heads=2, key_heads=2),  # to try the scripts
    "tiny-sdar": Shape(512, hidden=32, layers=1, heads=2, key_heads=2, block_causal=True),
    "llada-8b": Shape(126464, hidden=4096, layers=32, heads=32, key_heads=32, dtype=torch.bfloat16),
    "sdar-8b": Shape(151936, hidden=4096, layers=36, heads=32, key_heads=8, dtype=torch.bfloat16, block_causal=True),
}


def make_network(
    shape: Shape, device: torch.device, block: int, seed: int = 0, mask_token_id: int | None = None
) -> PreTrainedModel:
    """A network that never ends a text: its end token is one of the ids that are never sampled.

    Args:
        shape: its sizes.
        device: where its weights are made.
        block: positions per block, for block-causal attention.
        seed: of the weights.
        mask_token_id: the last id but one if not given.
    """
    end, mask = shape.vocabulary - 1, shape.vocabulary - 2
    model_class: Any = SDARForCausalLM if shape.block_causal else LLaDAModelLM
    own = {"block_size": block, "block_origin": "completion"} if shape.block_causal else {}
    config = model_class.config_class(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.hidden // shape.heads,
        mask_token_id=mask if mask_token_id is None else mask_token_id,
        eos_token_id=end,
        pad_token_id=end,
        end_token_ids=[end],
        num_tokens=mask,
        # large enough that what is drawn depends on the context
        initializer_range=shape.hidden**-0.5,
        **own,
    )
    torch.manual_seed(seed)
    with device:
        return model_class._from_config(config, dtype=shape.dtype)


def lora() -> LoraConfig:
    """AGRPO's: rank 64 on all linear layers but the head."""
    return LoraConfig(r=64, lora_alpha=64, target_modules="all-linear")
