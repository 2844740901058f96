"""Advantages of single views: a completion's outcome counts differently for different parts of its making.

Everything here is a function of whole prompt groups, as in `trl_diffusion.credit.group_credit`. A group has N prompts
with G completions each, and a completion V views in each of μ updates. NaN stands for a completion without a reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_diffusion.credit.group_credit import Credit


@dataclass(frozen=True)
class GroupViews:
    """The values that the advantages of views may depend on.

    Args:
        advantages: float [N, G], those of the completions.
        shown: float [N, G, μ, V], share of the canvas that a view shows: 0 at the first denoising step.
        rewards: float [N, G], the weighted sum of all reward functions.
        fills: float [N, G, μ, V], the same for the text that the network writes greedily in one step from the view's
            canvas, NaN for an empty view or without a reward; `None` unless the credit asks for it.
    """

    advantages: torch.Tensor
    shown: torch.Tensor
    rewards: torch.Tensor
    fills: torch.Tensor | None = None


class ViewCredit(Credit):
    """Credit that also gives every view an advantage.

    Attributes:
        needs_fills: it reads the rewards of greedily filled views, which cost a pass and a reward each.
    """

    needs_fills: bool = False

    def of_views(self, group: GroupViews) -> torch.Tensor:
        """Return the advantages [N, G, μ, V]; what stands at a completion without a reward is not read."""
        raise NotImplementedError


@dataclass
class StepwiseRisk(ViewCredit):
    """Risk-sensitive advantages whose coefficient β changes while a text is written (StepRS, 2610.00661).

    A_β = (exp(β r) / mean over the group of exp(β r) − 1) / β, which is r − mean for β = 0. Above 0 it gives rare
    successes more weight than frequent ones. For rewards of 0 and 1 it is a multiple of r − mean:
    (e^β − 1) / (β (1 + p (e^β − 1))) times that, where p is the success rate of the group.

    The form of the transformation and the schedule, linear in the share of the canvas that a view shows, are ours.

    Args:
        first: β where a view shows nothing.
        last: β where it shows everything.
    """

    first: float
    last: float

    def of_views(self, group: GroupViews) -> torch.Tensor:
        beta = (self.first + (self.last - self.first) * group.shown.double()).unsqueeze(-1)
        own = group.advantages.double()[:, :, None, None]
        others = group.advantages.double()[:, None, None, None, :]
        ratio = (beta.squeeze(-1) * own).exp() / (beta * others).exp().nanmean(-1)
        small = beta.squeeze(-1).abs() < 1e-6
        centred = own - others.nanmean(-1)
        return torch.where(small, centred, (ratio - 1) / beta.squeeze(-1).masked_fill(small, 1.0)).float()


@dataclass
class FillAdvantages(ViewCredit):
    """Advantages by what was still missing at a view (EGSPO-SA, 2603.12554): A + λ (Δ − mean of Δ over the group).

    Δ is the completion's reward minus that of the text which the network writes greedily in one step from the view's
    canvas: what the denoising steps from there on gained over giving up.

    Args:
        weight: λ.
    """

    weight: float

    needs_fills = True

    def of_views(self, group: GroupViews) -> torch.Tensor:
        assert group.fills is not None
        advantages = group.advantages[:, :, None, None]
        gained = group.rewards[:, :, None, None] - group.fills
        centred = gained - gained.nanmean(1, keepdim=True)
        return advantages + self.weight * centred.nan_to_num(nan=0.0)
