"""Scores the policy on a view of a micro-batch and collects what the loss compares with."""

from __future__ import annotations

from typing import Any

import torch

from trl_diffusion.likelihood import Likelihood
from trl_diffusion.likelihood.base import Rows
from trl_diffusion.losses import Loss, LossInputs
from trl_diffusion.runtime.scoring import ViewScorer


def collect_loss_inputs(
    model: Any, rows: Rows, update: int, views: range, likelihood: Likelihood, loss: Loss, scorer: ViewScorer
) -> tuple[LossInputs, float]:
    """Score views of a micro-batch, in one forward pass, and look up what was recorded of them.

    Args:
        model: the wrapped policy.
        rows: the micro-batch, see `Likelihood.plan`; with `view_advantages` [B, μ, V] if they differ between views,
            and `token_weights` [B, L] if tokens have weights.
        update: index of the inner update.
        views: one view, or all that are scored together.
        likelihood: of the method.
        loss: of the method.
        scorer: of the run.

    Returns:
        What the loss reads, and the forward units of the pass on this process.
    """
    shown = [likelihood.view(rows, update, view, scorer.mask_token_id) for view in views]
    scores = scorer.score_together(model, rows, shown, likelihood)
    facts = likelihood.scored(rows, update, views, torch.stack([view.targets for view in shown], 1))
    chosen = slice(views.start, views.stop)

    def recorded(name: str) -> torch.Tensor | None:
        """Log-probabilities [B, V, L] of the targets, from one number per token or one per token and view."""
        values = rows.get(name)
        if values is None:
            return None
        return (values.unsqueeze(1) if values.dim() == 2 else values[:, update, chosen]) * facts.targets

    old, drawn = recorded("old_per_token_logps") if loss.needs_old else None, recorded("rollout_logps")
    importance = None
    if likelihood.importance_cap is not None and old is not None and drawn is not None:
        importance = (old - drawn).exp().clamp(max=likelihood.importance_cap)
    advantages = rows["advantages"].unsqueeze(1).expand(-1, len(views))
    if "view_advantages" in rows:
        advantages = rows["view_advantages"][:, update, chosen]
    inputs = LossInputs(
        logps=scores.logps,
        entropies=scores.entropies,
        old=old,
        reference=recorded("ref_per_token_logps"),
        advantages=advantages,
        views=facts,
        estimate=likelihood.estimate,
        drawn=drawn,
        importance=importance,
        token_weights=rows.get("token_weights"),
    )
    if likelihood.scored_together and not loss.scores_together:
        inputs = inputs.combined(likelihood.combine, rows["completion_mask"].bool())
    return inputs, sum(view.forward_units(rows["prompt_ids"].size(1)) for view in shown)
