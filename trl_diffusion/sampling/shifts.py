"""Record how far each token shifts the network's confidence at its neighbours (Informed Masking, 2609.25927)."""

from __future__ import annotations

import torch

from trl_diffusion.sampling.active_blocks import ActiveBlocks
from trl_diffusion.sampling.config import SamplingConfig


class ShiftRecorder:
    """The confidence shifts of a batch, recorded from the logits that the sampler reads anyway.

    The confidence c_j of a masked position j is the largest probability there, at temperature 1 on the full
    vocabulary. The shift of a token that step s wrote at position i is

        m_i = Σ |c_j at step s + 1 − c_j at step s|

    over the positions j of its block that are still masked at step s + 1 and at most `shift_window` away. Tokens
    that one step wrote share the change. A token of the last step of its block has none: no later forward looks at
    that block.

    The state is the confidences of the active blocks at their last step, one number per position.

    Args:
        batch: B, rows.
        config: how completions are drawn.
        device: of the records.

    Attributes:
        shift: float32 [B, L], m_i; -1 where there is none.
    """

    def __init__(self, batch: int, config: SamplingConfig, device: torch.device):
        assert config.shift_window is not None
        self.window = min(config.shift_window, config.block_length - 1)
        self.shift = torch.full((batch, config.canvas_length), -1.0, device=device)
        self._confidence = torch.zeros(batch, config.block_length, device=device)
        self._waiting = torch.zeros(batch, config.block_length, dtype=torch.bool, device=device)

    def begin_block(self, rows: torch.Tensor) -> None:
        """Forget the tokens of the rows' previous blocks (rows long [R])."""
        self._waiting[rows] = False

    def observe(self, at: ActiveBlocks, offsets: torch.Tensor, is_masked: torch.Tensor, logits: torch.Tensor) -> None:
        """Read the confidences of a step, and record the shifts of the tokens that the step before wrote.

        Args:
            at: the rows and their blocks.
            offsets: long [R, m], positions within the block, all different.
            is_masked: bool [R, m], which of them are masked.
            logits: float32 [R, m, V].
        """
        top = (logits.amax(-1) - logits.logsumexp(-1)).exp()
        before = self._confidence[at.index]
        masked = torch.zeros_like(before, dtype=torch.bool).scatter(1, offsets, is_masked)
        confidence = torch.zeros_like(before).scatter(1, offsets, top)
        near = _window_sums((confidence - before).abs() * masked, self.window)
        where = (at.column, at.positions)
        self.shift[where] = near.where(self._waiting[at.index], self.shift[where])
        self._confidence[at.index] = confidence
        self._waiting[at.index] = False

    def wrote(self, rows: torch.Tensor, offsets: torch.Tensor) -> None:
        """Note the tokens whose shifts the next step will show, at rows and offsets that broadcast."""
        self._waiting[rows, offsets] = True


def _window_sums(values: torch.Tensor, window: int) -> torch.Tensor:
    """Sum values [R, n] over all positions at most `window` away."""
    # One sum per position in a fixed order: a difference of running sums would round differently on a GPU.
    return torch.nn.functional.pad(values, (window, window)).unfold(1, 2 * window + 1, 1).sum(-1)
