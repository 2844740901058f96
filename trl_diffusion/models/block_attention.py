"""Block-causal attention: every token sees its own block and those before it."""

from __future__ import annotations

import torch


def block_causal_bias(
    attention_mask: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    canvas_start: int = 0,
    first_query: int = 0,
    noisy_copy: int = 0,
) -> torch.Tensor:
    """Return what is added to attention scores so that tokens see their own block and earlier ones.

    With `noisy_copy` the sequence ends with a second, noised copy of its last columns. A noised token sees the clean
    tokens of earlier blocks and the noised ones of its own; no clean token sees a noised one. So a single forward pass
    shows every block what it saw while it was sampled, when all earlier blocks were finished (2503.09573, 2509.06949).

    Args:
        attention_mask: [R, K], 0 on padding; all columns that are visible.
        block_size: tokens per block.
        dtype: of the result.
        canvas_start: a column at which a block begins; blocks are counted from there in both directions.
        first_query: the queries are the columns from here on.
        noisy_copy: length of the noised copy, 0 for none.

    Returns:
        Tensor [R, 1, K - first_query, K], 0 where a key is seen and the smallest number of `dtype` elsewhere.
    """
    columns = torch.arange(attention_mask.size(1), device=attention_mask.device)
    noised = columns >= attention_mask.size(1) - noisy_copy
    block = (columns - noisy_copy * noised - canvas_start).div(block_size, rounding_mode="floor")
    query, query_noised = block[first_query:, None], noised[first_query:, None]
    own = (block == query) & (noised == query_noised)
    earlier = (block < query) & ~noised
    # Every token sees itself, padding too: a softmax over nothing is NaN wherever a cast turns the smallest number of
    # the dtype into -inf, and the NaN would reach other rows through the gradient.
    itself = columns == columns[first_query:, None]
    hidden = ~((own | earlier) & attention_mask[:, None, None, :].bool() | itself)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def position_ids(input_ids: torch.Tensor, first: int, noisy_copy: int) -> torch.Tensor:
    """Return the position ids of tokens that begin at a column; a noised copy has those of the clean tokens it copies.

    Args:
        input_ids: [R, T].
        first: the column of the first token.
        noisy_copy: length of the noised copy at the end, 0 for none.

    Returns:
        Long [1, T].
    """
    columns = torch.arange(first, first + input_ids.size(1), device=input_ids.device)
    columns[input_ids.size(1) - noisy_copy :] -= noisy_copy
    return columns.unsqueeze(0)
