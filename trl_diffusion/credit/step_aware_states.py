"""Partly denoised states of finished rollouts, from which Step-Aware PO (2510.01544) continues completions.

The paper appends a fixed number of masks to the tokens committed by a random time; it does not say to which exactly,
so the three kinds of states here are our reading:

- `block`: the blocks finished by then, and masks on the rollout's own block grid.
- `keep`: the whole canvas as it was before a denoising step.
- `prefix`: the tokens committed without a gap from the left at that step (none, if the first position was still
  masked), and masks. The rollout does not pass through this state within a block, so its continuations do not follow
  the rollout's distribution.
"""

from __future__ import annotations

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling import CanvasState, Trajectory

STATES = ("block", "keep", "prefix")


def probe_points(
    trajectory: Trajectory,
    family: DiffusionFamily,
    kind: str,
    block_length: int,
    fraction: torch.Tensor,
    prompt_tail: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how far along each rollout its state is taken: a number of blocks (`block`) or of denoising steps.

    A point lies strictly between the empty canvas and the end of the completion, as near to the fraction as possible.
    It is 0 for a completion that has no such point.

    Args:
        trajectory: of B completions.
        family: for the end set.
        kind: one of `STATES`.
        block_length: positions per block.
        fraction: float [B] in [0, 1], of the completion's length (`block`) or of its steps.
        prompt_tail: long [B], tokens of the prompt in the first block (`DiffusionFamily.prompt_tail`), or `None`.

    Returns:
        Long [B].
    """
    if kind == "block":
        length = family.effective_length(trajectory.completion_ids)
        tail = torch.zeros_like(length) if prompt_tail is None else prompt_tail
        last = (tail + length + block_length - 1) // block_length - 1
        point = ((tail + fraction * length) / block_length).round().long()
    else:
        last = trajectory.steps_taken - 1
        point = (fraction * trajectory.steps_taken).floor().long()
    return point.clamp(min=1).minimum(last)


def probe_state(
    trajectory: Trajectory,
    family: DiffusionFamily,
    kind: str,
    block_length: int,
    points: torch.Tensor,
    masks: int,
    prompt_tail: torch.Tensor | None = None,
) -> CanvasState:
    """Return the state of each rollout at a point.

    Args:
        trajectory: of B completions.
        family: for the mask token.
        kind: one of `STATES`.
        block_length: positions per block.
        points: long [B], see `probe_points`.
        masks: masked positions to append, as far as there is room; `keep` has those of the rollout.
        prompt_tail: long [B], tokens of the prompt in the first block (`DiffusionFamily.prompt_tail`), or `None`.
    """
    ids, points = trajectory.completion_ids, points.unsqueeze(1)
    canvas_length = ids.size(1)
    positions = torch.arange(canvas_length, device=ids.device)
    hidden = (trajectory.unmask_step >= points) | (trajectory.unmask_step < 0)  # -1: never sampled
    if kind == "keep":
        return CanvasState(ids.masked_fill(hidden, family.mask_token_id), torch.full_like(ids[:, 0], canvas_length))
    # Positions before the first masked one: after it the running maximum of `hidden` is 1.
    without_gap = hidden.cummax(1).values.logical_not().sum(1, keepdim=True)
    in_blocks = points * block_length - (0 if prompt_tail is None else prompt_tail.unsqueeze(1))
    written = in_blocks.clamp(min=0) if kind == "block" else without_gap
    length = (written.squeeze(1) + masks).clamp(max=canvas_length)
    return CanvasState(ids.masked_fill(positions >= written, family.mask_token_id), length)


def settled(state: CanvasState, family: DiffusionFamily) -> torch.Tensor:
    """Return, bool [B], where no position before the first end token is masked: no continuation changes the text."""
    masked = state.canvas == family.mask_token_id
    masked &= torch.arange(masked.size(1), device=masked.device) < state.length.unsqueeze(1)
    before_end = family.is_end(state.canvas).int().cummax(1).values == 0
    return ~(masked & before_end).any(1)
