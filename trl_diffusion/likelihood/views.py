"""Noised views of completions: what the network is shown, and which tokens it is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Views:
    """One noised view per completion.

    Args:
        canvas: long [R, L], the completion with mask tokens where it is hidden.
        targets: bool [R, L], the hidden positions to score.
    """

    canvas: torch.Tensor
    targets: torch.Tensor


def trajectory_views(
    completion_ids: torch.Tensor, unmask_step: torch.Tensor, steps: torch.Tensor, mask_token_id: int
) -> Views:
    """The canvas just before a denoising step, and the tokens which that step committed.

    Positions that were never sampled (filled behind a finished text) were masks at every step, and are never targets.

    Args:
        completion_ids: long [R, L].
        unmask_step: int [R, L], the step that committed each position; -1 for none.
        steps: long [R], one step per completion.
        mask_token_id: the mask token.

    Returns:
        x_s and {i : u_i = s} for each row.
    """
    steps = steps.unsqueeze(1)
    hidden = (unmask_step >= steps) | (unmask_step < 0)
    return Views(canvas=completion_ids.masked_fill(hidden, mask_token_id), targets=unmask_step == steps)
