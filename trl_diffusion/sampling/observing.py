"""The tokens of each denoising step, handed to an observer as soon as they are committed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Commits(NamedTuple):
    """The N tokens that one denoising step puts on the canvases of a batch.

    Args:
        rows: long [N], the row of the batch that each token belongs to.
        positions: long [N], its position on the canvas.
        steps: int [N], its denoising step in 0..S-1. Rows may be at different blocks, so steps can differ.
        tokens: long [N], its id.
        logps: float32 [N], its log-probability, as in `Trajectory`.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    steps: torch.Tensor
    tokens: torch.Tensor
    logps: torch.Tensor


# Called after each denoising step that commits a token, before the next begins. It must not change what it is given.
Observer = Callable[[Commits], None]
