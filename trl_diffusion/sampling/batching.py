"""Grouping of prompts that are padded to one length."""

from __future__ import annotations

from itertools import groupby

# Fixed cost of a forward in token equivalents: below a few hundred tokens it is bound by reading the weights.
_FORWARD_TOKENS = 256


def prompt_buckets(lengths: list[int], canvas_length: int, prompt_share: float = 1.0) -> list[list[int]]:
    """Split rows by prompt length, so that little padding is computed and batches stay large.

    Args:
        lengths: tokens of each row's prompt.
        canvas_length: L, which every row adds.
        prompt_share: share of the forwards that compute the prompts; the others gain nothing from shorter prompts.

    Returns:
        Lists of row indices in ascending order, those of the longest prompts first. They minimise the tokens of one
        forward over prompts and canvases of every bucket, where each forward counts as 256 tokens more.
    """
    forward_tokens = _FORWARD_TOKENS / prompt_share
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    same = [list(rows) for _, rows in groupby(order, key=lambda row: lengths[row])]
    # Dynamic programme over the distinct lengths, in descending order; an optimal bucket never skips a length.
    # best[i]: cost of the first i lengths, and the index at which the last of their buckets begins.
    best: list[tuple[float, int]] = [(0, 0)]
    for end in range(1, len(same) + 1):
        costs, rows = [], 0
        for start in range(end - 1, -1, -1):
            rows += len(same[start])
            width = lengths[same[start][0]] + canvas_length
            costs.append((best[start][0] + rows * width + forward_tokens, start))
        best.append(min(costs))
    buckets, end = [], len(same)
    while end:
        start = best[end][1]
        buckets.append(sorted(row for rows in same[start:end] for row in rows))
        end = start
    return buckets[::-1]
