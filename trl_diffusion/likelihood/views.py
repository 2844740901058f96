"""Noised views of completions: the canvas that the network reads, and the positions that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_diffusion.distribution import ordered_choice


@dataclass
class PositionChoice:
    """The positions that a denoising step could choose, and those that it drew among them; R steps.

    Args:
        open: bool [R, L], masked positions of the active block.
        ranks: int [R, L], how many positions the step chose before each of its targets.
        temperature: τ, see `SamplingConfig.position_temperature`.
    """

    open: torch.Tensor
    ranks: torch.Tensor
    temperature: float

    def log_probs(self, largest: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of choosing each target after those of lower rank, [R, L]; 0 elsewhere.

        Args:
            largest: float32 [R, L], log of the largest probability at the open positions.
            targets: bool [R, L], the positions that the step chose.
        """
        key = self.ranks.masked_fill(~targets, largest.size(1)).masked_fill(~self.open, largest.size(1) + 1)
        most = int(self.open.sum(1).max())
        order = key.argsort(dim=1, stable=True)[:, :most]
        chosen = ordered_choice(largest.gather(1, order) / self.temperature, self.open.gather(1, order))
        return torch.zeros_like(largest).scatter(1, order, chosen) * targets


@dataclass
class Views:
    """One noised view per completion.

    Args:
        canvas: long [R, L], the completion with mask tokens where it is masked.
        targets: bool [R, L], the masked positions to score.
        prompt_ids: long [R, P], the prompt if it is noised too; else `None`.
        context: long [R, L], the finished completion, shown next to the canvas; for block-causal attention, where each
            block of the canvas sees the finished blocks before it and none of the noised ones. Else `None`.
        choice: how the positions of the targets were drawn, whose log-probabilities are added to those of the tokens;
            `None` if they were not drawn, or do not count.
    """

    canvas: torch.Tensor
    targets: torch.Tensor
    prompt_ids: torch.Tensor | None = None
    context: torch.Tensor | None = None
    choice: PositionChoice | None = None

    def forward_units(self, prompt_length: int) -> float:
        """Count the forward passes of all rows, each by its columns as a share of prompt and canvas."""
        length = self.canvas.size(1)
        context = 0 if self.context is None else length
        return len(self.canvas) * (1 + context / (prompt_length + length))


def trajectory_views(
    completion_ids: torch.Tensor,
    unmask_step: torch.Tensor,
    steps: torch.Tensor,
    mask_token_id: int,
    given: torch.Tensor | None = None,
) -> Views:
    """Build the canvas just before a denoising step; the targets are the tokens which that step committed.

    Positions that were never sampled (filled after a finished text) were masks at every step, and are never targets.

    Args:
        completion_ids: long [R, L].
        unmask_step: int [R, L], the step that committed each position; -1 for none.
        steps: long [R], one step per completion; -1 for an empty view.
        mask_token_id: the mask token.
        given: bool [R, L], text that was on the canvas beforehand, and so is shown at every step; `None` for none.

    Returns:
        x_s and {i : u_i = s} for each row.
    """
    steps = steps.unsqueeze(1)
    masked = (unmask_step >= steps) | (unmask_step < 0)
    if given is not None:
        masked &= ~given
    return Views(
        canvas=completion_ids.masked_fill(masked, mask_token_id), targets=(unmask_step == steps) & (steps >= 0)
    )


def noised_views(
    completion_ids: torch.Tensor,
    masked: torch.Tensor,
    targets: torch.Tensor,
    mask_token_id: int,
    prompt_ids: torch.Tensor | None = None,
    prompt_masked: torch.Tensor | None = None,
    two_stream: bool = False,
) -> Views:
    """Build one view of a noise plan.

    Args:
        completion_ids: long [R, L].
        masked: bool [R, L], positions to mask.
        targets: bool [R, L], the tokens to score.
        mask_token_id: the mask token.
        prompt_ids: long [R, P]; needed with `prompt_masked`.
        prompt_masked: bool [R, P], prompt tokens to mask.
        two_stream: show the finished completion too, see `Views`.
    """
    prompt = None
    if prompt_masked is not None:
        assert prompt_ids is not None
        prompt = prompt_ids.masked_fill(prompt_masked, mask_token_id)
    canvas = completion_ids.masked_fill(masked, mask_token_id)
    return Views(canvas, targets, prompt, completion_ids if two_stream else None)


def stack_views(views: Sequence[Views]) -> Views:
    """Join views of the same rows to one batch: all rows of the first view, then those of the second …"""
    prompts = [view.prompt_ids for view in views if view.prompt_ids is not None]
    contexts = [view.context for view in views if view.context is not None]
    choices = [view.choice for view in views if view.choice is not None]
    return Views(
        torch.cat([view.canvas for view in views]),
        torch.cat([view.targets for view in views]),
        torch.cat(prompts) if prompts else None,
        torch.cat(contexts) if contexts else None,
        _stack_choices(choices) if choices else None,
    )


def _stack_choices(choices: Sequence[PositionChoice]) -> PositionChoice:
    """Join the choices of views that are joined to one batch."""
    return PositionChoice(
        torch.cat([choice.open for choice in choices]),
        torch.cat([choice.ranks for choice in choices]),
        choices[0].temperature,
    )
