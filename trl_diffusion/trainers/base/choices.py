"""The choices of a method: credit, likelihood and loss. (The fourth, the rollout, is settings.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from trl_diffusion.credit.group_credit import Credit, GroupCredit
from trl_diffusion.credit.token_weights import TokenCredit
from trl_diffusion.likelihood.base import Likelihood, describe
from trl_diffusion.losses import Loss, TokenRatio

# What a method or a user gives as credit: a `Credit`, or a function of advantages [N, G].
CreditChoice = Credit | Callable[[torch.Tensor], torch.Tensor]

# Fields of TRL's config that only its own loss reads.
LOSS_FIELDS = (
    "beta",
    "delta",
    "entropy_coef",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "loss_type",
    "off_policy_mask_threshold",
    "sync_ref_model",
    "top_entropy_quantile",
    "use_adaptive_entropy",
    "use_bias_correction_kl",
)


@dataclass(frozen=True)
class Choices:
    """Credit, likelihood and loss of a run.

    Args:
        credit: rewards of a prompt's completions → their weights.
        likelihood: completions → noised views → log-probabilities.
        loss: log-probabilities and weights → loss and metrics.
    """

    credit: Credit
    likelihood: Likelihood
    loss: Loss

    @classmethod
    def of(cls, credit: CreditChoice, likelihood: Likelihood, loss: Loss, args: Any) -> Choices:
        """Check that the choices go together.

        Raises:
            TypeError: if one is of another kind.
            ValueError: if they do not, with the reason.
        """
        if not isinstance(credit, Credit):
            if not callable(credit):
                raise TypeError(f"credit must be a Credit or a function of [N, G], got {type(credit).__name__}.")
            credit = GroupCredit(credit)
        for name, value, kind in (("likelihood", likelihood, Likelihood), ("loss", loss, Loss)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}.")
        loss.check(likelihood, args)
        if isinstance(credit, TokenCredit) and not (isinstance(loss, TokenRatio) and args.loss_type != "vespo"):
            named = f"TokenRatio with loss_type={args.loss_type!r}" if isinstance(loss, TokenRatio) else describe(loss)
            raise ValueError(
                f"{describe(credit)} weighs single tokens, which needs a loss that is a sum over tokens: TokenRatio "
                f"with a loss_type other than 'vespo'. Got {named}."
            )
        if likelihood.weighs_tokens and not isinstance(loss, TokenRatio):
            raise ValueError(
                f"{describe(likelihood)} weighs single tokens, which needs the loss TokenRatio; got {describe(loss)}. "
                "Set cap=None for no weights."
            )
        return cls(credit, likelihood, loss)

    @property
    def scored_together(self) -> bool:
        """The views of a completion are scored in one forward pass."""
        return self.likelihood.scored_together or self.loss.scores_together

    def num_backwards(self) -> int:
        """Forward and backward passes per completion and update."""
        return 1 if self.scored_together else self.likelihood.num_views

    def facts(self) -> dict[str, str]:
        """The choices with their settings, for checkpoints."""
        return {field.name: describe(getattr(self, field.name)) for field in fields(self)}


def refuse_unread(args: Any, reads: tuple[str, ...], loss_name: str) -> None:
    """Refuse changed fields of TRL's loss that the loss in use does not read.

    Args:
        args: the config.
        reads: those that it does read.
        loss_name: for the message.

    Raises:
        ValueError: if such a field is changed.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name in LOSS_FIELDS:
        if name not in reads and getattr(args, name) != defaults[name]:
            raise ValueError(
                f"{name}={getattr(args, name)!r} would have no effect: the loss of {loss_name} does not use it. "
                f"Leave it at {defaults[name]!r}."
            )


def check_composition(args: Any, likelihood: Likelihood | None, loss: Loss | None) -> None:
    """Check settings against a likelihood or loss that was handed to a trainer.

    `num_mc_samples` becomes the likelihood's number of views where it was left at its default.

    Raises:
        ValueError: if a setting would be ignored.
    """
    if likelihood is not None and args.num_mc_samples != likelihood.num_views:
        default = next(field.default for field in fields(args) if field.name == "num_mc_samples")
        if args.num_mc_samples != default:
            raise ValueError(
                f"num_mc_samples={args.num_mc_samples}, but the likelihood that was given has {likelihood.num_views} "
                "views per completion and update. Leave num_mc_samples out."
            )
        args.num_mc_samples = likelihood.num_views
    if loss is not None and not isinstance(loss, TokenRatio):
        refuse_unread(args, (), type(loss).__name__)
