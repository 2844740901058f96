"""Scores the views of a rollout under the policy or the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from trl.models.utils import disable_gradient_checkpointing

from trl_diffusion.likelihood import Likelihood, Scores, Views, score_views, stack_views
from trl_diffusion.likelihood.base import Rows


@dataclass(frozen=True)
class ViewScorer:
    """Scores views as a run's precision and batch size have it.

    Args:
        accelerator: of the run.
        mask_token_id: of the model.
        sampling_temperature: of the rollout.
        batch_size: rows of a forward pass without gradient.
        checkpointing: `gradient_checkpointing_kwargs`, with which checkpointing is put back on.
    """

    accelerator: Accelerator
    mask_token_id: int
    sampling_temperature: float
    batch_size: int
    checkpointing: Any

    def score(self, model: Any, rows: Rows, views: Views, likelihood: Likelihood) -> Scores:
        """Log-probabilities and entropies [R, L] of the views' targets, in one forward pass of the wrapped model."""
        with self.accelerator.autocast():
            return score_views(
                model,
                rows["prompt_ids"],
                rows["prompt_mask"],
                rows["completion_ids"],
                views,
                self.sampling_temperature if likelihood.at_sampling_temperature else 1.0,
                rows.get("support"),
                rows.get("prompt_columns"),
            )

    def score_together(self, model: Any, rows: Rows, views: Sequence[Views], likelihood: Likelihood) -> Scores:
        """Scores [B, V, L] of several views of the same rows, in one forward pass of V · B rows."""
        count = len(views)
        if count > 1:
            names = ("prompt_ids", "prompt_mask", "completion_ids", "support", "prompt_columns")
            rows = {name: _repeat(rows[name], count) for name in names if name in rows}
        scores = self.score(model, rows, stack_views(views), likelihood)
        return Scores(*(values.unflatten(0, (count, -1)).transpose(0, 1) for values in scores))

    @torch.no_grad()
    def logps(
        self, model: Any, policy: Any, rows: Rows, likelihood: Likelihood, updates: Sequence[int]
    ) -> tuple[torch.Tensor, float]:
        """Log-probabilities [B, μ, V, L] of the targets of every view, 0 elsewhere; no dropout, no autograd.

        Args:
            model: the policy or the reference model.
            policy: the policy, whose gradient checkpointing is off meanwhile.
            rows: what the likelihood planned.
            likelihood: builds the views.
            updates: inner updates whose views are scored.

        Returns:
            The log-probabilities, and the forward units that they took on this process.
        """
        batch, length = rows["completion_ids"].shape
        logps = torch.zeros(batch, len(updates), likelihood.num_views, length, device=rows["completion_ids"].device)
        units, was_training = 0.0, model.training
        model.eval()
        try:
            with disable_gradient_checkpointing(policy, self.checkpointing):
                # Always every view: where weights are sharded, all processes must run the same number of forwards.
                for place, update in enumerate(updates):
                    for view in range(likelihood.num_views):
                        for start in range(0, batch, self.batch_size):
                            chosen = slice(start, start + self.batch_size)
                            part = {name: value[chosen] for name, value in rows.items() if value.dim() > 0}
                            views = likelihood.view(part, update, view, self.mask_token_id)
                            logps[chosen, place, view] = self.score(model, part, views, likelihood).logps
                            units += views.forward_units(part["prompt_ids"].size(1))
        finally:
            model.train(was_training)
        return logps, units


def _repeat(values: torch.Tensor, times: int) -> torch.Tensor:
    return values.repeat(times, *[1] * (values.dim() - 1))
