"""Block-causal attention: every token sees its own block and those before it."""

from __future__ import annotations

import torch


def block_causal_bias(
    attention_mask: torch.Tensor,
    block_size: int,
    dtype: torch.dtype,
    start: int | torch.Tensor = 0,
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
        start: a column at which a block begins, of all rows or long [R] of each; blocks are counted from there in
            both directions.
        first_query: the queries are the columns from here on.
        noisy_copy: length of the noised copy, 0 for none.

    Returns:
        Tensor [R, 1, K - first_query, K], 0 where a key is seen and the smallest number of `dtype` elsewhere.
    """
    columns = torch.arange(attention_mask.size(1), device=attention_mask.device)
    noised = columns >= attention_mask.size(1) - noisy_copy
    begin = start.unsqueeze(1) if isinstance(start, torch.Tensor) else start
    block = (columns - noisy_copy * noised - begin).div(block_size, rounding_mode="floor")  # [K] or [R, K]
    query, query_noised = block[..., first_query:, None], noised[first_query:, None]
    key = block[..., None, :]
    own = (key == query) & (noised == query_noised)
    earlier = (key < query) & ~noised
    seen = own | earlier if block.dim() == 1 else (own | earlier).unsqueeze(1)
    # Every token sees itself, padding too: a softmax over nothing is NaN wherever a cast turns the smallest number of
    # the dtype into -inf, and the NaN would reach other rows through the gradient.
    itself = columns == columns[first_query:, None]
    hidden = ~(seen & attention_mask[:, None, None, :].bool() | itself)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def sees_all(block_size: int, start: int, first: int, visible: int) -> bool:
    """Return whether queries from column `first` on see all of the `visible` columns; `start` begins a block."""
    return (first - start) // block_size == (visible - 1 - start) // block_size


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


def copied_tail(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, noisy_copy: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """Extend a noised copy to the left by the tokens that its first block may hold in addition.

    Where blocks are counted from the start of the sequence, the first tokens of a completion share their block with
    the last ones of the prompt. These see the noised tokens next to the noised block, and the clean ones next to the
    clean block, so both streams need them. A copy of more tokens than a row's first block holds is never read.

    Args:
        input_ids: [R, T], prompt, clean tokens and their noised copy.
        attention_mask: [R, T] or `None`.
        noisy_copy: length of the copy, which holds no token of the prompt.
        block_size: tokens per block.

    Returns:
        (ids [R, T + tail], mask, the tail's length).
    """
    prompt, end = input_ids.size(1) - 2 * noisy_copy, input_ids.size(1) - noisy_copy
    tail = min(block_size - 1, prompt)

    def extended(columns: torch.Tensor) -> torch.Tensor:
        return torch.cat([columns[:, :end], columns[:, prompt - tail : prompt], columns[:, end:]], dim=1)

    return extended(input_ids), None if attention_mask is None else extended(attention_mask), tail
