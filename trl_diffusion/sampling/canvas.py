"""Partly denoised canvases: where sampling can start instead of from all masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.family import DiffusionFamily


@dataclass
class CanvasState:
    """Partly denoised canvases of B prompts.

    Args:
        canvas: long [B, L], the mask token where nothing is written yet.
        length: long [B], positions of the canvas that exist; the network does not see those behind.
    """

    canvas: torch.Tensor
    length: torch.Tensor

    @classmethod
    def empty(cls, batch: int, canvas_length: int, mask_token_id: int, device: torch.device) -> CanvasState:
        """All masked, where a rollout starts."""
        canvas = torch.full((batch, canvas_length), mask_token_id, device=device)
        return cls(canvas, torch.full((batch,), canvas_length, device=device))

    def next_block(self, family: DiffusionFamily, block_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where sampling goes on: the first block with a masked position, and whether the text is still unfinished.

        A text is finished if a block before holds an end token, or if nothing is masked.

        Returns:
            (long [B], bool [B]).
        """
        positions = torch.arange(self.canvas.size(1), device=self.canvas.device)
        masked = (self.canvas == family.mask_token_id) & (positions < self.length.unsqueeze(1))
        block = masked.int().argmax(1) // block_length
        before = positions < (block * block_length).unsqueeze(1)
        ended = (family.is_end(self.canvas) & before).any(1)
        return block, masked.any(1) & ~ended

    def repeat(self, times: int) -> CanvasState:
        """Every row `times` times, one after the other."""
        return CanvasState(self.canvas.repeat_interleave(times, 0), self.length.repeat_interleave(times, 0))
