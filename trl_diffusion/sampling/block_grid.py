"""Prompts and canvases on the grid of attention blocks, for blocks that are counted from the start of the sequence.

There a completion begins inside a block whose first tokens are the last ones of its prompt, as in SDAR's own sampler.
Prompts of different lengths begin at different places of their blocks. So the sampler moves those last tokens from the
prompt onto the canvas, as text that is written already: then the blocks of all rows lie in the same columns, and
everything that it does block by block stays as it is. The trajectory is moved back before anybody sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.canvas import CanvasState
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class BlockGrid:
    """Prompts and canvases of B rows; where blocks begin with the completion they are those that were given.

    Args:
        config: of the canvases; they are one block longer if completions can begin inside a block.
        input_ids: long [B, W], left-padded prompts; with moved tokens they are whole blocks, possibly none.
        attention_mask: long [B, W].
        lengths: tokens of each prompt.
        state: the canvases.
        moved: long [B], tokens of each prompt on its canvas.
    """

    config: SamplingConfig
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: list[int]
    state: CanvasState
    moved: torch.Tensor

    @classmethod
    def of(
        cls,
        family: DiffusionFamily,
        config: SamplingConfig,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        lengths: list[int],
        state: CanvasState,
    ) -> BlockGrid:
        """Lay out prompts (long [B, P], left-padded, `lengths` tokens) and canvases [B, L]."""
        grid = config.on_grid(family)
        tokens = torch.tensor(lengths, dtype=torch.long, device=input_ids.device)
        moved = family.prompt_tail(tokens)
        if grid is config:
            return cls(config, input_ids, attention_mask, lengths, state, moved)
        kept = [length - tail for length, tail in zip(lengths, moved.tolist(), strict=True)]
        width = max(kept, default=0)
        masks = state.canvas.new_full((len(tokens), config.block_length), family.mask_token_id)
        row = torch.cat([input_ids, state.canvas, masks], dim=1)
        # The canvas of a row begins `moved` columns before the end of the prompts, and its prompt ends there.
        begin = (input_ids.size(1) - moved).unsqueeze(1)
        before = begin + torch.arange(-width, 0, device=row.device)
        shown = before >= begin - (tokens - moved).unsqueeze(1)
        canvas = row.gather(1, begin + torch.arange(grid.canvas_length, device=row.device))
        return cls(
            grid,
            row.gather(1, before.clamp(min=0)),
            shown.long(),
            kept,
            CanvasState(canvas, state.length + moved, moved),
            moved,
        )

    def completions(self, trajectory: Trajectory, length: int) -> Trajectory:
        """Move what was recorded on the grid back to the completions, of `length` positions."""
        if self.config.canvas_length == length:
            return trajectory
        positions = self.moved.unsqueeze(1) + torch.arange(length, device=self.moved.device)
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        found: dict[str, Any] = {name: value[rows, positions] for name, value in trajectory.of_positions().items()}
        assert trajectory.prompt_columns is not None
        return replace(trajectory, **found, prompt_columns=trajectory.prompt_columns + self.moved)
