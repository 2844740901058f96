"""The overridden layers of Qwen2, Qwen3 and Qwen3-MoE, on which several families stand."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from trl_diffusion.models.experts import Float32Router
from trl_diffusion.models.layers import DiffusionAttention, Float32Rotary, LastLayer, NormedAttention

# Rotary embeddings and last layers have the names of the stock classes: transformers computes the frequencies of what
# is called a RotaryEmbedding after loading, and FSDP and device maps recognise layers by their names.


class Qwen2RotaryEmbedding(Float32Rotary, qwen2.Qwen2RotaryEmbedding):
    """Qwen2's rotary embedding in float32."""


class Qwen2DiffusionAttention(DiffusionAttention, qwen2.Qwen2Attention):  # type: ignore[misc]  # adds `queries`
    """Qwen2's attention with the rotation in float32."""


class Qwen2DecoderLayer(LastLayer, qwen2.Qwen2DecoderLayer):  # type: ignore[misc]  # adds `read`
    """Qwen2's last layer."""


class Qwen3RotaryEmbedding(Float32Rotary, qwen3.Qwen3RotaryEmbedding):
    """Qwen3's rotary embedding in float32."""


class Qwen3DiffusionAttention(NormedAttention, qwen3.Qwen3Attention):  # type: ignore[misc]  # adds `queries`
    """Qwen3's attention with the rotation in float32."""


class Qwen3DecoderLayer(LastLayer, qwen3.Qwen3DecoderLayer):  # type: ignore[misc]  # adds `read`
    """Qwen3's last layer."""


class Qwen3MoeRotaryEmbedding(Float32Rotary, qwen3_moe.Qwen3MoeRotaryEmbedding):
    """Qwen3-MoE's rotary embedding in float32."""


class Qwen3MoeDiffusionAttention(NormedAttention, qwen3_moe.Qwen3MoeAttention):  # type: ignore[misc]  # adds `queries`
    """Qwen3-MoE's attention with the rotation in float32."""


class Qwen3MoeRouter(Float32Router, qwen3_moe.Qwen3MoeTopKRouter):
    """Qwen3-MoE's router in float32."""


class Qwen3MoeDecoderLayer(LastLayer, qwen3_moe.Qwen3MoeDecoderLayer):  # type: ignore[misc]  # adds `read`
    """Qwen3-MoE's last layer."""
