"""The base class of losses: pure functions from `LossInputs` to `LossOutputs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from trl_diffusion.likelihood.base import Likelihood, ScoredViews, describe
from trl_diffusion.papers import FromPaper


@dataclass(frozen=True)
class LossInputs:
    """A micro-batch of B completions, each in V views: one, unless the views of a completion are scored together.

    Log-probabilities are in nats, and 0 where a position is no target of its view.

    Args:
        logps: float32 [B, V, L] under the policy, with gradient.
        entropies: float32 [B, V, L].
        old: float32 [B, V, L] under the policy before the first update; `None` if the loss needs none.
        reference: float32 [B, V, L] under the reference model; `None` without a KL term.
        advantages: float32 [B, V], what the views' terms are multiplied by. Most methods give every view of a
            completion the completion's own.
        views: targets, weights, mask rates and lengths.
        estimate: the likelihood's estimate of log p(completion), [B], from log-probabilities [B, V, L].
        drawn: float32 [B, V, L] under the policy that wrote the completions, where that is not the old one (an
            approximate cache makes another of it); else `None`.
        importance: float32 [B, V, L], weights of tokens whose old log-probability is not the one they were drawn with;
            `None` where it is.
        token_weights: float32 [B, L], by which a credit multiplies the terms of tokens; `None` if it does not.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    old: torch.Tensor | None
    reference: torch.Tensor | None
    advantages: torch.Tensor
    views: ScoredViews
    estimate: Callable[[torch.Tensor, ScoredViews], torch.Tensor]
    drawn: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None

    def part(self, views: slice) -> LossInputs:
        """Some of the views."""

        def chosen(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values[:, views]

        return replace(
            self,
            logps=self.logps[:, views],
            entropies=self.entropies[:, views],
            old=chosen(self.old),
            reference=chosen(self.reference),
            advantages=self.advantages[:, views],
            views=self.views.part(views),
            drawn=chosen(self.drawn),
            importance=chosen(self.importance),
        )

    def combined(
        self, combine: Callable[[torch.Tensor, ScoredViews], torch.Tensor], targets: torch.Tensor
    ) -> LossInputs:
        """The same with one view, whose log-probabilities are a statistic over all.

        Args:
            combine: log-probabilities [B, V, L] → [B, 1, L], see `Likelihood.combine`.
            targets: bool [B, L], tokens that have the statistic.
        """

        def combine_if_given(logps: torch.Tensor | None) -> torch.Tensor | None:
            return None if logps is None else combine(logps, self.views)

        return replace(
            self,
            logps=combine(self.logps, self.views),
            entropies=self.entropies[:, :1],
            old=combine_if_given(self.old),
            reference=combine_if_given(self.reference),
            advantages=self.advantages[:, :1],
            views=replace(self.views, targets=targets.unsqueeze(1), weights=None, rates=None),
        )

    def log_likelihood(self, logps: torch.Tensor) -> torch.Tensor:
        """Estimate [B] of log p(completion) from `logps`, `old` or `reference`."""
        return self.estimate(logps, self.views)

    @property
    def completion_advantages(self) -> torch.Tensor:
        """[B], for losses of whole completions: the mean over the views."""
        first = self.advantages[:, 0]
        return first if self.advantages.size(1) == 1 else self.advantages.mean(1)


@dataclass(frozen=True)
class LossOutputs:
    """A loss and what is logged about it.

    Args:
        loss: float32 [B], one number per completion; the loss of an update is their mean over all completions.
        metrics: [B] by name; their means over all completions are logged.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Loss(FromPaper):
    """Base of losses.

    Attributes:
        scores_together: it needs all views of a completion at once. Else it is computed view by view, so that memory
            does not grow with their number, and the mean over the views is taken by accumulating gradients.
        needs_old: it compares with the policy before the first update.
        reads: fields of TRL's config that it reads; the others that concern TRL's own loss are refused if changed.
    """

    scores_together: bool = False
    needs_old: bool = False
    reads: ClassVar[tuple[str, ...]] = ()

    def needs_reference(self, args: Any) -> bool:
        """Return whether it compares with a reference model."""
        return False

    def check(self, likelihood: Likelihood, args: Any) -> None:
        """Refuse a likelihood, or settings, with which the loss would not be what it says.

        Raises:
            ValueError: with the reason.
        """

    def __call__(self, inputs: LossInputs) -> LossOutputs:
        raise NotImplementedError

    def require_estimate(self, likelihood: Likelihood) -> None:
        """For losses of whole completions.

        Raises:
            ValueError: if the likelihood gives no log-likelihood of a completion.
        """
        if not likelihood.estimates:
            raise ValueError(
                f"{type(self).__name__} needs the log-likelihood of a completion, and {describe(likelihood)} gives "
                "none: it averages over chosen steps. Draw steps with step_reduction='sum', or take ReplayViews or "
                "MaskedViews."
            )
