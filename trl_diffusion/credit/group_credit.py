"""Credit: from the rewards of whole prompt groups to the number that multiplies each completion's loss.

Everything here is a function of [N, G] tensors, N prompts with G completions each. The groups are gathered from all
processes before they come here, so a group may span processes. NaN stands for a completion without a reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from trl_diffusion.papers import FromPaper


@dataclass(frozen=True)
class GroupValues:
    """The values that a prompt's weights may depend on; float [N, G] each.

    Args:
        advantages: after a process reward (SAPO) was added; NaN for a completion without a reward.
        lengths: tokens of each completion that may learn.
        current: estimated log-likelihoods under the policy that wrote the completions; `None` if the credit asks for
            none.
        reference: the same under the reference model, or `None`.
        now: the same under the policy before the update to come; `None` before the first update of a rollout.
        estimated_tokens: tokens of each completion that these log-likelihoods are of, or `None`.
    """

    advantages: torch.Tensor
    lengths: torch.Tensor
    current: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    now: torch.Tensor | None = None
    estimated_tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class GroupWeights:
    """Weights by which the loss multiplies completions.

    Args:
        values: [N, G]; completions without a reward get 0 whatever stands here.
        metrics: by the name they are logged under.
    """

    values: torch.Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Credit(FromPaper):
    """From rewards to the weights of completions, in two stages, between which a process reward (SAPO) is added.

    Attributes:
        estimates: views (a `Likelihood`) on which `weigh` needs the completions' log-likelihoods estimated, under the
            policy that wrote them; `None` if it needs none.
        needs_reference: it needs them under the reference model too.
        refreshes: `weigh` is asked again before each later update of a rollout, with estimates under the policy of
            that moment (`GroupValues.now`).
        only_scored: completions without a reward take no part in the loss, not even in terms without an advantage.
        needs_signals: the rollout must record the signals of every denoising step.
    """

    estimates: Any = None
    needs_reference: bool = False
    refreshes: bool = False
    only_scored: bool = False
    needs_signals: bool = False

    def centre(self, advantages: torch.Tensor) -> torch.Tensor:
        """Return the method's own advantages [N, G], from TRL's (rewards less the group's mean, perhaps scaled).

        What centres or scales the rewards of a group belongs here: a process reward joins afterwards.
        """
        return advantages

    def weigh(self, group: GroupValues) -> GroupWeights:
        """Return the weights of the completions in the loss, from the advantages with the process reward."""
        return GroupWeights(group.advantages)


GroupFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class GroupCredit(Credit):
    """Credit from functions of advantages [N, G] alone.

    Args:
        centring: see `Credit.centre`; `None` keeps TRL's advantages.
        weighing: see `Credit.weigh`; `None` keeps the advantages.
    """

    centring: GroupFunction | None = None
    weighing: GroupFunction | None = None

    def centre(self, advantages: torch.Tensor) -> torch.Tensor:
        return advantages if self.centring is None else self.centring(advantages)

    def weigh(self, group: GroupValues) -> GroupWeights:
        return GroupWeights(group.advantages if self.weighing is None else self.weighing(group.advantages))
