"""Records since when the network has expected the tokens that it came to write."""

from __future__ import annotations

import torch


class LikeliestTokens:
    """The likeliest token of every position when it was last looked at, and the step since when it has been.

    Args:
        canvas: long [B, L].
    """

    def __init__(self, canvas: torch.Tensor):
        self.tokens = torch.full_like(canvas, -1)
        self.since = torch.full_like(canvas, -1, dtype=torch.int32)

    def note(
        self,
        where: tuple[torch.Tensor, torch.Tensor],
        is_masked: torch.Tensor,
        step: int | torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """Note the likeliest tokens of a denoising step at masked positions.

        Args:
            where: rows long [R, 1] and positions long [R, m], all different.
            is_masked: bool [R, m], which of them are masked; nothing is noted at the others.
            step: the step, or int32 [R, 1] with one for each row.
            tokens: long [R, m].
        """
        before, since = self.tokens[where], self.since[where]
        # `same` is where the step is not to be noted.
        same = (tokens == before) | ~is_masked
        self.since[where] = since.where(same, step)
        self.tokens[where] = tokens.where(is_masked, before)

    def settled_step(self, canvas: torch.Tensor, unmask_step: torch.Tensor) -> torch.Tensor:
        """Return `Trajectory.settled_step` of a written canvas [B, L]."""
        settled = torch.where(self.tokens == canvas, self.since, unmask_step + 1)
        return settled.masked_fill(unmask_step < 0, -1)
