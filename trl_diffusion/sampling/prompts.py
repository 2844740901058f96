"""Checks of a batch of prompts that the sampler would otherwise cut or misread."""

from __future__ import annotations

import torch


def checked_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Check prompts of any integer type with a mask of any type, and return them as the sampler needs them.

    Args:
        input_ids: [B, P], left-padded; B may be 0.
        attention_mask: [B, P], 0 on padding and 1 elsewhere; all ones if `None`.

    Returns:
        (ids long [B, P]; mask long [B, P]; the B prompts' lengths).

    Raises:
        ValueError: if the shapes differ, the mask has other values, or a prompt is empty, not padded on the left
            alone, or has a hole.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"Prompts must be token ids of shape [prompts, tokens]; got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}. For one prompt pass input_ids[None]."
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of the prompts, {tuple(input_ids.shape)}; got "
            f"{tuple(attention_mask.shape)}."
        )
    mask = attention_mask.long()
    if not ((attention_mask == mask) & (mask >= 0) & (mask <= 1)).all():
        raise ValueError("attention_mask must hold 0 (padding) and 1 (prompt) only; got other values.")
    if len(mask) and (mask.size(1) == 0 or not mask[:, -1].all()):
        raise ValueError(
            "sample() needs left-padded, non-empty prompts: the last column of attention_mask must be 1 in every row."
        )
    holes = (mask[:, 1:] < mask[:, :-1]).any(1)
    if holes.any():
        raise ValueError(
            f"attention_mask has a hole in row {int(holes.int().argmax())}: a 0 follows a 1. Prompts are padded on "
            "the left alone, so every row must be zeros, then ones. Take unseen tokens out of the prompt."
        )
    return input_ids.long(), mask, mask.sum(1).tolist()
