"""Partly denoised canvases, from which sampling can start instead of from all masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.family import DiffusionFamily


@dataclass
class CanvasState:
    """Partly denoised canvases of B prompts.

    Args:
        canvas: long [B, L], the mask token where nothing is written yet.
        length: long [B], positions of the canvas that exist; the network does not see those after them.
        begin: long [B], positions before the first one of the completion, which hold the end of the prompt (see
            `BlockGrid`); `None` for none.
    """

    canvas: torch.Tensor
    length: torch.Tensor
    begin: torch.Tensor | None = None

    @classmethod
    def empty(cls, batch: int, canvas_length: int, mask_token_id: int, device: torch.device) -> CanvasState:
        """Return canvases that are all masked, where a rollout starts."""
        canvas = torch.full((batch, canvas_length), mask_token_id, device=device)
        return cls(canvas, torch.full((batch,), canvas_length, device=device))

    def check_shape(self, batch: int, canvas_length: int) -> None:
        """Check that there is a canvas of `canvas_length` positions for each of `batch` prompts.

        Raises:
            ValueError: if not.
        """
        if self.canvas.shape != (batch, canvas_length) or self.length.shape != (batch,):
            raise ValueError(
                f"sample() needs a state of shape {(batch, canvas_length)} (prompts, canvas length) with as many "
                f"lengths as prompts; got {tuple(self.canvas.shape)} with lengths {tuple(self.length.shape)}."
            )

    def rows(self, rows: torch.Tensor) -> CanvasState:
        """Return the canvases of some rows, long [R]."""
        return CanvasState(self.canvas[rows], self.length[rows], None if self.begin is None else self.begin[rows])

    def next_block(self, family: DiffusionFamily, block_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the first block with a masked position, where sampling continues.

        A text is finished if an earlier block holds an end token, or if nothing is masked.

        Returns:
            (the block, long [B]; true if the text is unfinished, bool [B]).
        """
        positions = torch.arange(self.canvas.size(1), device=self.canvas.device)
        masked = self._masked(family)
        block = masked.int().argmax(1) // block_length
        before = positions < (block * block_length).unsqueeze(1)
        ended = (family.is_end(self.canvas) & before & self.of_completion(positions)).any(1)
        return block, masked.any(1) & ~ended

    def of_completion(self, positions: torch.Tensor) -> torch.Tensor:
        """Return which positions (long [L] or [B, n]) are the completion's, bool [B, L] or [B, n] that broadcasts."""
        if self.begin is None:
            return torch.ones_like(positions, dtype=torch.bool)
        return positions >= self.begin.unsqueeze(1)

    def num_masked(self, family: DiffusionFamily, block_length: int) -> torch.Tensor:
        """Count the masked positions of every block, long [B, blocks]."""
        return self._masked(family).unflatten(1, (-1, block_length)).sum(2)

    def _masked(self, family: DiffusionFamily) -> torch.Tensor:
        """Return which positions are masked, bool [B, L]."""
        positions = torch.arange(self.canvas.size(1), device=self.canvas.device)
        return (self.canvas == family.mask_token_id) & (positions < self.length.unsqueeze(1))
