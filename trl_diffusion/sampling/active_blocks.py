"""The rows that one denoising step writes, as the host and as the device know them."""

from __future__ import annotations

import numpy as np
import torch


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to a device, without waiting for what runs there."""
    # The array is ordinary memory, which the driver has read when the call returns; the copy is for the CPU, where
    # the tensor would share memory with an array that may change.
    return torch.from_numpy(values.copy()).to(device, non_blocking=True)


class ActiveBlocks:
    """R rows of a batch at their active blocks.

    Reading a number off a GPU stops the host until everything before it has run. So what follows from the start of a
    rollout is kept in arrays on the host, and made into tensors once for all steps that write the same rows.

    Args:
        rows: long [R], the rows.
        blocks: long [R], the active block of each.
        length: long [R], positions of their canvases that exist.
        noise: float64 [B, blocks, draws, block], uniform noise for every block, on the device of the rollout.

    Attributes:
        index: long tensor [R], the rows.
        column: long tensor [R, 1], the rows.
        block: the active block, an int where all rows are at the same one, else a long tensor [R, 1].
        first: the first position of the active block, likewise.
        end: int, the position after the last active block.
        positions: long tensor [R or 1, block], positions of the active blocks.
    """

    def __init__(self, rows: np.ndarray, blocks: np.ndarray, length: np.ndarray, noise: torch.Tensor):
        self.rows, self.blocks = rows, blocks
        block_length, device = noise.size(3), noise.device
        self.index = to_device(rows, device)
        self.column = self.index.unsqueeze(1)
        self.block: int | torch.Tensor = to_device(blocks, device).unsqueeze(1)
        if len(rows) == 0 or (blocks == blocks[0]).all():
            self.block = int(blocks[0]) if len(rows) else 0
        self.first = self.block * block_length
        self.end = (int(blocks.max(initial=0)) + 1) * block_length
        self.positions = self.first + torch.arange(block_length, device=device).unsqueeze(0)
        exists = blocks[:, None] * block_length + np.arange(block_length) < length[:, None]
        self._exists = None if exists.all() else to_device(exists, device)
        self._local = torch.arange(len(rows), device=device).unsqueeze(1)
        self._noise = noise[self.column, self.block].squeeze(1)

    def __len__(self) -> int:
        return len(self.rows)

    def are(self, rows: np.ndarray, blocks: np.ndarray) -> bool:
        """Return whether these are the given rows at the given blocks."""
        return np.array_equal(self.rows, rows) and np.array_equal(self.blocks, blocks)

    def masked(self, canvas: torch.Tensor, mask_token_id: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the masked positions of the active blocks.

        Args:
            canvas: long [B, L].
            mask_token_id: the mask token.
            most: m, the most masked positions that one of the blocks has.

        Returns:
            (offsets in the block, long [R, m]; is_masked bool [R, m], which of them are masked). The masked positions
            come first and from left to right.
        """
        masked = canvas[self.column, self.positions] == mask_token_id
        if self._exists is not None:
            masked &= self._exists
        # A stable sort keeps the order from left to right.
        is_masked, order = masked.sort(dim=1, descending=True, stable=True)
        return order[:, :most], is_masked[:, :most]

    def uniform(self, draw: int, offsets: torch.Tensor) -> torch.Tensor:
        """Return the noise of one of the draws at offsets in the block, [R, n]."""
        return self._noise[:, draw].gather(1, offsets)

    def take(self, values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return values[r, slots[r, j]] for values [R, m, …] and slots [R, n]."""
        return values[self._local, slots]
