"""The base class of likelihoods: the noised views of a completion that give its log-probabilities.

The likelihood of a diffusion language model is intractable, so a method chooses views of the finished completion, in
which some tokens are masked, and takes the network's log-probabilities of masked tokens there. `plan` runs once per
rollout and stores what the views are made from, as tensors with a row per completion, because TRL shuffles and splits
rows. `view` builds one view of every row from them, the same whenever it is asked, so that the policy, the old policy
and the reference model see the same views.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from trl.trainer.utils import get_callable_name

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.likelihood.views import Views
from trl_diffusion.papers import FromPaper
from trl_diffusion.sampling.rollout import Rollout

Rows = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ScoredViews:
    """Facts about views that were scored, for losses and estimates.

    Args:
        targets: bool [B, V, L], the scored positions.
        lengths: long [B], n, tokens of each completion that may learn.
        weights: float32 [B, V], see `Likelihood.weighted`; `None` if all are 1.
        rates: float32 [B, V], share of the positions that a view masks; `None` where views mask no random subset.
        weighted: the weights of views with targets may differ from 1.
    """

    targets: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None = None
    rates: torch.Tensor | None = None
    weighted: bool = False

    def part(self, views: slice) -> ScoredViews:
        """Some of the views."""
        return replace(
            self,
            targets=self.targets[:, views],
            weights=None if self.weights is None else self.weights[:, views],
            rates=None if self.rates is None else self.rates[:, views],
        )


class Likelihood(FromPaper):
    """Base of likelihoods.

    Attributes:
        num_views: V, views per completion and inner update.
        scored_together: the views of a completion are scored in one forward pass, since `combine` needs them all.
        weighted: views have weights other than 1, in `view_weights`; the mean over views of weight · term is the
            method's sum or mean over what the views cover.
        partial: a view scores a part of a completion's tokens, so that it has no ratio of whole sequences.
        at_sampling_temperature: log-probabilities are taken at the temperature and support of the sampler, and not at
            temperature 1 on the full vocabulary.
        records_old: the rollout recorded the old log-probabilities on these views, so they cost no pass.
        importance_cap: largest weight of a token whose old log-probability is not the one it was drawn with; `None`
            if tokens are not weighted so.
        weighs_tokens: the method is not itself without these weights, so that only a loss that carries them will do.
        random_subsets: views mask random subsets of the text, so that bounds over subsets hold for them.
        samples: parts of equal size that the views consist of, one after the other, each with an estimate.
        independent_halves: the first and the second half of the views are two independent, unbiased ELBO estimates.
        estimates: `estimate` gives the log-likelihood of a completion.
        needs_signals: the rollout must record entropy and confidence margin of every denoising step.
        shift_window: the rollout must record confidence shifts within so many positions; `None` for none.
    """

    num_views: int
    scored_together: bool = False
    weighted: bool = False
    partial: bool = True
    at_sampling_temperature: bool = False
    records_old: bool = False
    importance_cap: float | None = None
    weighs_tokens: bool = False
    random_subsets: bool = False
    samples: int = 1
    independent_halves: bool = False
    estimates: bool = True
    needs_signals: bool = False
    shift_window: int | None = None

    def check_family(self, family: DiffusionFamily, name: str) -> None:
        """Refuse a model whose attention does not go with the views.

        Args:
            family: of the model.
            name: of the method, for the message.

        Raises:
            ValueError: if it does not.
        """

    def plan(self, rollout: Rollout) -> Rows:
        """Return what the views of every inner update are made from.

        Returns:
            Tensors with a row per completion: `completion_mask` long [B, L], the tokens that may learn, and whatever
            `view` needs; `view_weights` float32 [B, μ, V] if views are weighted; `old_per_token_logps` [B, L] if the
            rollout recorded the old log-probabilities (else they are scored on the views), with `prompt_columns` [B];
            `support` [B, L, C] at the sampler's support.
        """
        raise NotImplementedError

    def view(self, rows: Rows, update: int, view: int, mask_token_id: int) -> Views:
        """Build one view of every row; the same whenever it is asked for with the same arguments."""
        raise NotImplementedError

    def scored(self, rows: Rows, update: int, views: range, targets: torch.Tensor) -> ScoredViews:
        """Collect facts about some views of an inner update, whose targets are bool [B, V, L]."""
        chosen = slice(views.start, views.stop)
        return ScoredViews(
            targets,
            rows["completion_mask"].sum(1),
            rows["view_weights"][:, update, chosen] if "view_weights" in rows else None,
            rows["mask_rate"][:, update, chosen] if "mask_rate" in rows else None,
            self.weighted,
        )

    def combine(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """One statistic per token [B, 1, L] from the log-probabilities [B, V, L] of views scored together.

        Most methods score each view on its own, and their statistic is the log-probability itself.
        """
        return logps

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Estimate of log p(completion), [B] in nats, from the log-probabilities [B, V, L] of all views."""
        raise NotImplementedError

    # ---------------------------------------------------------------- checkpoints and cost

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def targets_per_view(self, length: int) -> float:
        """Positions of a canvas that a view scores, on average, where the text fills it; for estimates of cost."""
        return float(length)

    def extra_columns(self, length: int) -> float:
        """Columns of a forward pass in addition to prompt and canvas."""
        return 0.0

    def buffer_bytes(self, length: int, updates: int) -> float:
        """Bytes per completion that the plan keeps until the last inner update."""
        return 2.0 * length * updates * self.num_views


def refuse_block_attention(family: DiffusionFamily, name: str) -> None:
    """Refuse a block-causal model, for views of the whole canvas.

    Args:
        family: of the model.
        name: of the method, for the message.

    Raises:
        ValueError: if the model's attention is causal over blocks.
    """
    if family.attention_block is not None:
        raise ValueError(
            f"{name} noises the canvas as a whole, and {family.name} has block-causal attention: its blocks are "
            "written next to finished ones, which such views do not show. Use DiPO, TraceRL with "
            "block_causal=True, AGRPO or ATPO."
        )


def describe(value: Any) -> str:
    """Describe a choice of a method with its settings, for messages and checkpoints; functions by their names."""
    if not is_dataclass(value):
        return get_callable_name(value) if callable(value) else type(value).__name__
    settings = []
    for item in fields(value):
        setting = getattr(value, item.name)
        if item.init and setting is not None:
            plain = isinstance(setting, (bool, int, float, str))
            settings.append(f"{item.name}={setting!r}" if plain else f"{item.name}={describe(setting)}")
    return f"{type(value).__name__}({', '.join(settings)})"
