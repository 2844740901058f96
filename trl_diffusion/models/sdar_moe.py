"""SDAR-MoE (2510.06303, SDAR-30B-A3B) as a native class: `Qwen3MoeForCausalLM` with block-causal attention.

Weights have Qwen3-MoE's names. Blocks are counted as in SDAR.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from trl_diffusion.models.block_causal import BlockCausalConfigMixin, BlockCausalLM
from trl_diffusion.models.experts import MixtureLM
from trl_diffusion.models.families import register
from trl_diffusion.models.qwen_layers import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeDiffusionAttention,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeRouter,
)
from trl_diffusion.models.sdar import SDAR


class SDARMoeConfig(BlockCausalConfigMixin, Qwen3MoeConfig):
    """Configuration of SDAR-MoE: `Qwen3MoeConfig` with the mask token and the block size.

    Args:
        mask_token_id: id of the mask token; `<|MASK|>` in SDAR's vocabulary if not given.
        end_token_ids: ids that end a text; `<|endoftext|>` and `<|im_end|>` in SDAR's vocabulary if not given, else
            `eos_token_id`.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        block_size: tokens per attention block.
        block_origin: where the first block begins, `sequence` or `completion`.
        **kwargs: `Qwen3MoeConfig` arguments.

    Raises:
        ValueError: for a variant with sliding-window attention, scaled rotary embeddings or shared experts, or a
            block size below 1.
    """

    model_type = "sdar_moe"
    published = SDAR
    has_experts = True

    head_dim: int | None = None

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        if self.use_sliding_window or keys.get("shared_expert_intermediate_size"):
            raise ValueError(
                "This SDAR-MoE variant has use_sliding_window=True or shared experts; trl_diffusion computes "
                "block-causal attention over the whole text and routed experts only. Use a checkpoint of the "
                "SDAR-30B-A3B architecture."
            )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().read_hub_keys(keys)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration with the hub's `num_experts`, as `config.json` stores it."""
        output = super().to_dict()
        output["num_experts"] = output.pop("num_local_experts", self.num_experts)
        return output


class SDARMoeForCausalLM(BlockCausalLM, MixtureLM, Qwen3MoeForCausalLM):  # type: ignore[misc]  # as in `SDARForCausalLM`
    """SDAR-MoE with its LM head, under the class name of the hub's remote code.

    Raises:
        ValueError: if the attention implementation does not take block-causal masks.
    """

    config_class = SDARMoeConfig
    rotary_class = Qwen3MoeRotaryEmbedding
    attention_class = Qwen3MoeDiffusionAttention
    last_layer_class = Qwen3MoeDecoderLayer
    mixture_class = qwen3_moe.Qwen3MoeSparseMoeBlock
    router_class = Qwen3MoeRouter


register_checkpoint_conversion_mapping(
    SDARMoeForCausalLM.__name__, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)
register(SDARMoeConfig, SDARMoeForCausalLM)
