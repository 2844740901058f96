"""What is recorded of a rollout while its canvases are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from trl_diffusion.sampling.active_blocks import ActiveBlocks, to_device
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.drawing import ScoredTokens
from trl_diffusion.sampling.observing import Commits, Observer
from trl_diffusion.sampling.settling import LikeliestTokens
from trl_diffusion.sampling.shifts import ShiftRecorder
from trl_diffusion.sampling.unmasking import Choice, step_signals


class Recorder:
    """The canvases of B rows, and what their trajectory says about them.

    Args:
        config: how completions are drawn.
        canvas: long [B, L]; tokens are written into it.
        observer: is called with the tokens of each step.
    """

    def __init__(self, config: SamplingConfig, canvas: torch.Tensor, observer: Observer | None):
        self.config, self.canvas, self.observer = config, canvas, observer
        (batch, length), device = canvas.shape, canvas.device
        self.row_forwards = np.zeros(batch, dtype=np.int64)
        self.unmask_step = torch.full((batch, length), -1, dtype=torch.int32, device=device)
        self.logps = torch.zeros(batch, length, device=device)
        self.entropies = torch.zeros(batch, length, device=device)
        self.support: torch.Tensor | None = None
        if config.record_support and config.truncates:
            self.support = torch.full((batch, length, config.top_k), -1, dtype=torch.int32, device=device)
        self.step_entropy: torch.Tensor | None = None
        self.step_margin: torch.Tensor | None = None
        self.position_logps: torch.Tensor | None = None
        self.position_ranks: torch.Tensor | None = None
        if config.draws_positions:
            self.position_logps = torch.zeros(batch, length, device=device)
            self.position_ranks = torch.zeros(batch, length, dtype=torch.int32, device=device)
        self.forced = np.zeros((batch, config.denoising_steps), dtype=bool) if config.parallel else None
        self.likeliest: LikeliestTokens | None = None
        if config.record_signals:
            self.likeliest = LikeliestTokens(canvas)
            self.step_entropy = torch.zeros(batch, config.denoising_steps, device=device)
            self.step_margin = torch.zeros(batch, config.denoising_steps, device=device)
        self.shifts = None if config.shift_window is None else ShiftRecorder(batch, config, device)

    def see(
        self, at: ActiveBlocks, step: int, offsets: torch.Tensor, is_masked: torch.Tensor, logits: torch.Tensor | None
    ) -> None:
        """Record what the network expects at the candidates of a step, before it commits any.

        Args:
            at: the rows and their blocks.
            step: of the block.
            offsets: long [R, m], positions within the block.
            is_masked: bool [R, m], which of them are masked.
            logits: float32 [R, m, V]; `None` if nothing is recorded of them.
        """
        self.row_forwards[at.rows] += 1
        if self.shifts is not None:
            assert logits is not None
            self.shifts.observe(at, offsets, is_masked, logits)
        if self.step_entropy is not None and self.step_margin is not None and self.likeliest is not None:
            assert logits is not None
            steps = self._steps(at, step)
            entropies, margins = step_signals(logits, is_masked)
            self.step_entropy[at.column, steps] = entropies.unsqueeze(1)
            self.step_margin[at.column, steps] = margins.unsqueeze(1)
            where = (at.column, offsets + at.first)
            self.likeliest.note(where, is_masked, steps, logits.argmax(-1))

    def commit(self, at: ActiveBlocks, step: int, chosen: torch.Tensor, choice: Choice, drawn: ScoredTokens) -> None:
        """Write the tokens that the choice commits of those drawn at offsets `chosen` [R, n], and record them."""
        committed = _committed(choice.counts, chosen)
        offsets, rows = committed(chosen), committed(at.column.expand_as(chosen))
        where = (rows, committed(chosen + at.first))
        tokens, logps = committed(drawn.tokens), committed(drawn.logps)
        self.canvas[where] = tokens
        self.unmask_step[where] = committed(torch.zeros_like(chosen, dtype=torch.int32) + self._steps(at, step))
        self.logps[where] = logps
        self.entropies[where] = committed(drawn.entropies)
        if self.shifts is not None:
            self.shifts.wrote(rows, offsets)
        if self.support is not None and drawn.support is not None:
            self.support[where] = committed(drawn.support)
        if choice.logps is not None and self.position_logps is not None and self.position_ranks is not None:
            self.position_logps[where] = committed(choice.logps)
            ranks = torch.arange(chosen.size(1), dtype=torch.int32, device=chosen.device)
            self.position_ranks[where] = committed(ranks.expand_as(chosen))
        if self.forced is not None and choice.forced is not None:
            self.forced[at.rows, at.blocks * self.config.steps_per_block + step] = choice.forced
        if self.observer is not None:
            self.observer(Commits(*(value.flatten() for value in (*where, self.unmask_step[where], tokens, logps))))

    def _steps(self, at: ActiveBlocks, step: int) -> int | torch.Tensor:
        """Return the step of the rollout that a step of the active blocks is: one for all, or int32 [R, 1]."""
        steps = at.block * self.config.steps_per_block + step
        return steps if isinstance(steps, int) else steps.int()


def _committed(counts: np.ndarray, chosen: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that takes the first `counts` [R] of n values of each row, [R, n, …] → [N, …].

    Where every row commits all n, there is nothing to take and the values stay as they are.
    """
    taken = np.arange(chosen.size(1)) < counts[:, None]
    if taken.all():
        return lambda values: values
    row, slot = (to_device(indices, chosen.device) for indices in taken.nonzero())
    return lambda values: values[row, slot]
