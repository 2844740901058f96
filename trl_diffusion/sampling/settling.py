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

    def note(self, rows: torch.Tensor, positions: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor) -> None:
        """Note the likeliest tokens [N] at N (row, position) pairs, each at a denoising step."""
        same = tokens == self.tokens[rows, positions]
        self.since[rows, positions] = torch.where(same, self.since[rows, positions], steps.int())
        self.tokens[rows, positions] = tokens

    def settled_step(self, canvas: torch.Tensor, unmask_step: torch.Tensor) -> torch.Tensor:
        """Return `Trajectory.settled_step` of a written canvas [B, L]."""
        settled = torch.where(self.tokens == canvas, self.since, unmask_step + 1)
        return settled.masked_fill(unmask_step < 0, -1)
