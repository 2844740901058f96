"""Token ratios: TRL's own loss, given log-probabilities of noised views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trl_diffusion.likelihood.base import Likelihood, describe
from trl_diffusion.losses.base import Loss, LossInputs
from trl_diffusion.validation import one_of

# Loss types whose per-token terms are summed and divided by something the view does not change.
SUMS_OF_TOKENS = ("dr_grpo", "dapo", "cispo", "luspo")
COMPARED = ("reference", "old")


@dataclass
class TokenRatio(Loss):
    """The clipped ratio of every token (or what TRL's `loss_type` makes of it), and TRL's KL term.

    It is TRL's loss: this class says what TRL's reads, and the trainer calls it with that.

    Args:
        kl_to: what the KL term compares with, the `reference` model or the `old` policy.
        sum_kl: sum the KL over a view's targets where the views' weights make a mean of the policy term, as TraceRL's
            release does.
    """

    kl_to: str = "reference"
    sum_kl: bool = False

    needs_old = True

    def needs_reference(self, args: Any) -> bool:
        return args.beta != 0.0 and self.kl_to == "reference"

    def check(self, likelihood: Likelihood, args: Any) -> None:
        one_of("kl_to", self.kl_to, COMPARED)
        if likelihood.partial and not likelihood.scored_together:
            check_token_level(args)
        if likelihood.weighted and args.beta != 0.0:
            check_weighted_kl(args, describe(likelihood))

    def trl_inputs(self, inputs: LossInputs, args: Any) -> dict[str, torch.Tensor]:
        """Return the inputs of TRL's loss, but for prompts and completions.

        A view's weight multiplies its terms, and TRL has no argument for that. Where there is no KL term, it is folded
        into the advantages, to which the policy term is proportional. With a KL term it goes into `tool_mask`, with
        which TRL multiplies the mask of the tokens: right for losses that sum over tokens, the only ones let through.

        Args:
            inputs: with one view per completion.
            args: the trainer's config.
        """
        targets, old = inputs.views.targets[:, 0], inputs.old
        assert old is not None
        mask = targets.long()
        advantages = inputs.advantages[:, 0].unsqueeze(1).expand_as(mask)
        compared = None
        if args.beta != 0.0:
            compared = inputs.reference if self.kl_to == "reference" else old
        weights = None if inputs.views.weights is None else inputs.views.weights[:, 0].unsqueeze(1).expand_as(mask)
        found = {"completion_mask": mask, "old_per_token_logps": old[:, 0]}
        if compared is not None:
            found["ref_per_token_logps"] = compared[:, 0]
        if weights is not None and self.sum_kl:
            count = targets.sum(1, keepdim=True).clamp(min=1)
            advantages, weights = advantages / count, weights * count
        if weights is not None and compared is not None and inputs.views.weighted:
            found["tool_mask"] = weights
        elif weights is not None:
            advantages = advantages * weights
        if inputs.importance is not None and args.loss_type == "vespo":
            found["importance_sampling_ratio"] = inputs.importance[:, 0]  # vespo weights sequences with it
        elif inputs.importance is not None:  # in TRL's other losses a token's policy term is proportional to A
            advantages = advantages * inputs.importance[:, 0]
        if inputs.token_weights is not None:
            advantages = advantages * inputs.token_weights
        return found | {"advantages": advantages}


def check_token_level(args: Any) -> None:
    """Refuse ratios of whole sequences where a view scores a part of the tokens.

    Raises:
        ValueError: if `importance_sampling_level` or `loss_type` ask for them.
    """
    of_tokens = {"importance_sampling_level": args.importance_sampling_level == "token"}
    of_tokens["loss_type"] = args.loss_type != "vespo"  # its weights are functions of the sequence's ratio
    for name, fits in of_tokens.items():
        if not fits:
            raise ValueError(
                f"{type(args).__name__} scores a part of the tokens per view, which has no sequence-level ratio; "
                f"got {name}={getattr(args, name)!r}. Set importance_sampling_level='token' and a loss_type other "
                "than 'vespo', or use ESPO, whose ratio is that of sequences."
            )


def check_weighted_kl(args: Any, weighted_by: str) -> None:
    """Refuse loss types with which the KL term could not carry the views' weights.

    Args:
        args: with a `beta` that is not 0.
        weighted_by: what weighs the views, for the message.

    Raises:
        ValueError: if there is no exact way.
    """
    if args.loss_type not in SUMS_OF_TOKENS or args.top_entropy_quantile < 1.0:
        raise ValueError(
            f"With beta={args.beta}, the KL term must carry the weights of {weighted_by}. That is exact only for "
            f"loss_type in {', '.join(SUMS_OF_TOKENS)} with top_entropy_quantile=1; got "
            f"loss_type={args.loss_type!r}, top_entropy_quantile={args.top_entropy_quantile}. Change these, choose "
            "views without weights (step_draws='uniform' with step_reduction='mean', or another step_selector), or "
            "set beta=0."
        )
