"""Informed Masking (2609.25927): views mask positions whose token told the network little about its neighbours.

The rollout records for each token how far it shifted the network's confidence at its masked neighbours
(`Trajectory.confidence_shift`). A view then masks the tokens with small shifts more often, and shows those with large
ones, from which the others follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.papers import FromPaper
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.validation import at_least

_SMALLEST_RANGE = 1e-8  # shifts that are all equal give logits of 0


@dataclass(frozen=True)
class InformedMasking(FromPaper):
    """Logits by which positions are drawn into a mask, one after the other without replacement.

    A mask of a fixed size then is a random subset as before, but not a uniform one, so that an estimate of the ELBO on
    such masks estimates a re-weighted objective.

    Args:
        sharpness: d, the logit of the smallest shift in a region, where the largest has 0; 0 for uniform masks.
        window: how many positions away a neighbour may be.

    Raises:
        ValueError: if the sharpness is negative, or the window empty.
    """

    paper = "2609.25927"
    extends = True

    sharpness: float = 1.5
    window: int = 10

    def __post_init__(self) -> None:
        at_least("mask_sharpness", self.sharpness, 0)
        at_least("mask_window", self.window, 1)

    def logits(
        self, rollout: Rollout, positions: torch.Tensor | None = None, region: int | None = None
    ) -> torch.Tensor:
        """Return the logits of the positions of a rollout's completions.

        Args:
            rollout: whose sampler recorded confidence shifts.
            positions: bool [B, L], positions that masks may be drawn from; the whole canvas if not given.
            region: length of the regions that masks are drawn within, which divides L; L if not given.

        Returns:
            Float64 [B, 1, L], for all views.

        Raises:
            ValueError: if the shifts were not recorded.
        """
        shift = rollout.trajectory.confidence_shift
        if shift is None:
            raise ValueError(
                "Informed masking needs the confidence shifts of the rollout, and this trajectory has none. Draw it "
                f"with SamplingConfig(shift_window={self.window})."
            )
        shift = filled_shifts(shift, rollout.sampling.block_length)
        positions = torch.ones_like(shift, dtype=torch.bool) if positions is None else positions
        return mask_logits(shift, positions, region or shift.size(1), self.sharpness).unsqueeze(1)


def filled_shifts(shift: torch.Tensor, block_length: int) -> torch.Tensor:
    """Put the mean of a block in place of shifts that were not recorded, as the last step of a block leaves them.

    A block without any, such as one after the end of the text, takes the mean of the row.

    Args:
        shift: float [B, L], -1 for none.
        block_length: of the rollout.

    Returns:
        [B, L]; 0 in a row without any shift.
    """
    blocks = shift.unflatten(1, (-1, block_length))
    known = blocks >= 0
    total, count = (blocks * known).sum(-1, keepdim=True), known.sum(-1, keepdim=True)
    of_row = total.sum(1, keepdim=True) / count.sum(1, keepdim=True).clamp(min=1)
    of_block = torch.where(count > 0, total / count.clamp(min=1), of_row)
    return torch.where(known, blocks, of_block).flatten(1)


def mask_logits(shift: torch.Tensor, positions: torch.Tensor, region: int, sharpness: float) -> torch.Tensor:
    """Return d · (max m − m_i) / (max m − min m), the extremes taken over the positions of i's region.

    Args:
        shift: float [B, L], m.
        positions: bool [B, L], the positions that count; others get 0.
        region: length of a region, which divides L.
        sharpness: d.

    Returns:
        Float64 [B, L].
    """
    parts, inside = (values.unflatten(1, (-1, region)) for values in (shift.double(), positions))
    high = parts.masked_fill(~inside, -torch.inf).amax(-1, keepdim=True)
    low = parts.masked_fill(~inside, torch.inf).amin(-1, keepdim=True)
    scaled = (high - parts) / (high - low + _SMALLEST_RANGE)
    return sharpness * scaled.masked_fill(~inside, 0.0).flatten(1)
