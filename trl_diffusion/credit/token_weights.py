"""Weights of single tokens: how much was still to be decided when each was written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.credit.group_credit import Credit
from trl_diffusion.sampling.rollout import Rollout


class TokenCredit(Credit):
    """Credit that also weighs the tokens of a completion; for losses of token ratios."""

    def token_weights(self, rollout: Rollout) -> torch.Tensor:
        """Return float32 [B, L], by which the terms of tokens are multiplied; with mean 1 over a text."""
        raise NotImplementedError


@dataclass
class ProgressWeights(TokenCredit):
    """Tokens that the network came to expect late count more (DACA-GRPO, 2605.16342; the formula is ours).

    A token's weight is (floor + d) ÷ its mean over the text. d is the share of the denoising steps that its position
    waited for, in its block, at which another token was the likeliest there: 0 for one that was expected from the
    start, 1 for one that never was.

    Args:
        floor: weight of tokens that were expected from the start, before it is divided by the mean; above 0.
    """

    floor: float = 0.5

    needs_signals = True

    def token_weights(self, rollout: Rollout) -> torch.Tensor:
        trajectory = rollout.trajectory
        assert trajectory.settled_step is not None
        block_start = trajectory.unmask_step - trajectory.unmask_step % rollout.sampling.steps_per_block
        open_for = trajectory.unmask_step - block_start + 1
        late = (trajectory.settled_step - block_start) / open_for
        text = rollout.text & (trajectory.unmask_step >= 0)
        weights = (self.floor + late) * text
        mean = weights.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1)
        return (weights / mean.clamp(min=1e-9)).float()
