"""Layer overrides shared by all families; the weights stay those of the stock classes.

Rotary embeddings are computed in float32, attention keeps its keys and values in a `WindowCache`, and attention and
the last layer compute only the requested positions.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaModel, eager_attention_forward, rotate_half

from trl_diffusion.sampling.window_cache import WindowCache

# The keyword under which a network passes the cache to its layers; transformers 5.24 renamed it.
CACHE_KEYWORD = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Float32Rotary:
    """Keeps the frequencies, cosines and sines of a rotary embedding in float32 when the model is cast.

    `model.bfloat16()` casts buffers too, and bfloat16 frequencies make log-probabilities 3 to 10 times less exact.

    Raises:
        TypeError: for a subclass whose name has no `RotaryEmbedding` in it. Frequencies are not in a checkpoint:
            transformers computes them after loading for classes of this name, and leaves those of others what the
            memory happened to hold.
    """

    inv_freq: Any  # tensor [head size / 2]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "RotaryEmbedding" not in cls.__name__:
            raise TypeError(
                f"A rotary embedding must have RotaryEmbedding in its name, got {cls.__name__}: by this name "
                "transformers knows that its frequencies must be computed when a checkpoint is loaded, and without it "
                f"they would be left undefined. Call it {cls.__name__}RotaryEmbedding."
            )

    def _apply(self, fn, recurse: bool = True):
        # `_apply` moves and casts all buffers alike. A cast one is replaced by the float32 values from before, because
        # casting back would keep the rounding.
        exact = self.inv_freq
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = exact.to(device=self.inv_freq.device, dtype=torch.float32)
        return self

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        # The stock class reads device and dtype of its result from `x`, and nothing else.
        return super().forward(torch.empty(0, device=x.device, dtype=torch.float32), position_ids)  # type: ignore[misc]


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate states [R, heads, T, head size] in float32 by the angles of their columns, [R or 1, T, rotated size].

    Where fewer features are rotated than a head has, these are the first ones, and the others stay as they are.
    """
    exact, rest = states[..., : cos.size(-1)].float(), states[..., cos.size(-1) :]
    rotated = (exact * cos.unsqueeze(1) + rotate_half(exact) * sin.unsqueeze(1)).to(states.dtype)
    return torch.cat([rotated, rest], dim=-1) if rest.size(-1) else rotated


class DiffusionAttention:
    """Attention that rotates queries and keys in float32, and that can compute only the queries which are read."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: Any  # a probability
    training: bool
    config: Any
    rotate: Any = staticmethod(rotated)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask=None,
        queries: torch.Tensor | None = None,
        **kwargs: Any,
    ):
        """Compute the attention output and, where the implementation returns them, the weights.

        Args:
            hidden_states: [R, T, H].
            position_embeddings: cosines and sines of the columns, float32 [R or 1, T, head size].
            attention_mask: in the form that the implementation takes; with `queries`, [R or 1, 1, T, keys] or `None`.
            queries: long [R, K], the columns to compute; all of them if not given.
            **kwargs: for the implementation; and a `WindowCache` under transformers' keyword for caches.

        Returns:
            ([R, T, H] or, with `queries`, [R, K, H]; the weights or `None`).

        Raises:
            TypeError: for a cache of another kind, or one under another keyword.
        """
        kwargs.pop("read", None)  # for the last layer alone, but the stock network passes it to all
        cache = kwargs.pop(CACHE_KEYWORD, None)
        _require_window_cache(cache, kwargs)
        # Keys and values are needed of every column, queries only of those that are read.
        cos, sin = position_embeddings
        asked, query_cos, query_sin = hidden_states, cos, sin
        if queries is not None:
            asked, query_cos, query_sin = (take(states, queries) for states in (hidden_states, cos, sin))
            if attention_mask is not None:
                # [R or 1, 1, T, keys] → [R, 1, K, keys]: the rows of the queries that are computed
                attention_mask = take(attention_mask.squeeze(1), queries).unsqueeze(1)
        query, key = self._normalised(self._heads(self.q_proj, asked), self._heads(self.k_proj, hidden_states))
        query, key = self.rotate(query, query_cos, query_sin), self.rotate(key, cos, sin)
        value = self._heads(self.v_proj, hidden_states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*asked.shape[:2], -1).contiguous()), weights

    def _heads(self, projection, states: torch.Tensor) -> torch.Tensor:
        """Project states [R, T, H] and split the result into heads: [R, heads, T, head size]."""
        return projection(states).view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _normalised(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply the family's norms of queries and keys; the base has none."""
        return query, key


class NormedAttention(DiffusionAttention):
    """`DiffusionAttention` of networks that normalise every head of queries and keys (Qwen3, GLM-4-MoE)."""

    q_norm: Any
    k_norm: Any

    def _normalised(self, query, key):
        return self.q_norm(query), self.k_norm(key)


class LastLayer:
    """A decoder layer that computes only the columns which are read; of the others it needs keys and values alone.

    It has to be the last one, because every earlier layer is read by the next in full. It saves up to 1/N of the
    compute of an N-layer network.
    """

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def forward(self, hidden_states, attention_mask=None, read: torch.Tensor | None = None, **kwargs: Any):
        """Compute the layer for all columns or, with `read`, for those alone.

        Args:
            hidden_states: [R, T, H].
            attention_mask: in the form that the attention implementation takes.
            read: long [R, K], the columns to compute; all if not given.
            **kwargs: of the stock layer.

        Returns:
            Hidden states [R, T, H] or, with `read`, [R, K, H].
        """
        # Single queries cannot be chosen from the masks of flash and flex attention: everything is computed then.
        by_query = attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.dim() == 4)
        if read is None or not by_query:
            output = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
            return output if read is None else take(output, read)
        # From here on as in the stock layer, for the columns that are read; attention takes all as keys and values.
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, queries=read, **kwargs
        )
        hidden_states = take(hidden_states, read) + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the states [R, K, H] of columns (long [R, K]) out of all states [R or 1, T, H]."""
    index = columns.unsqueeze(-1).expand(-1, -1, states.size(-1))
    return states.expand(len(columns), -1, -1).gather(1, index)


def _require_window_cache(cache: Any, others: dict[str, Any]) -> None:
    """Raise if a cache is not a `WindowCache`, or if another argument is a cache, which would be ignored."""
    if cache is not None and not isinstance(cache, WindowCache):
        raise TypeError(
            f"The attention of a diffusion language model got {CACHE_KEYWORD}={type(cache).__name__}; it rewrites "
            "columns, and keeps their keys and values in a WindowCache only. Call the model with use_cache=False, or "
            "sample with `model.generate(…, cache=…)`."
        )
    for name, value in others.items():
        if isinstance(value, (WindowCache, Cache)):
            raise TypeError(
                f"The attention of a diffusion language model got a cache as {name!r} and expects it as "
                f"{CACHE_KEYWORD!r}: this release of transformers renamed it. Install one of the releases that "
                "pyproject.toml names."
            )
