"""Methods with a loss of their own: one number per completion, from the log-probabilities of its views."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from trl_diffusion.likelihood import Scores
from trl_diffusion.trainers.base.masked import NoisedGRPOConfig, NoisedGRPOTrainer

# Fields of TRL's config that only its own loss reads.
_LOSS_FIELDS = (
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


@dataclass
class CompletionLossConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods with a loss of their own; fields of TRL's loss that it does not read are refused.

    Raises:
        ValueError: if such a field is changed, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        defaults = {field.name: field.default for field in fields(self)}
        for name in _LOSS_FIELDS:
            if name not in self.reads and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} would have no effect: the loss of {type(self).__name__} does not "
                    f"use it. Leave it at {defaults[name]!r}."
                )
        super().__post_init__()

    def require_plain_rewards(self) -> None:
        """For methods whose weights are a softmax of the rewards over a prompt's completions.

        Raises:
            ValueError: if the rewards are to be scaled before.
        """
        for name, plain in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{type(self).__name__} weighs a prompt's completions by the softmax of the rewards themselves: "
                    f"{name} must be {plain!r}; got {getattr(self, name)!r}. To change how much a reward counts, set "
                    "reward_weights (or DMPO's alpha)."
                )


class CompletionLossTrainer(NoisedGRPOTrainer):
    """Base of methods with a loss of their own, see the arguments of `DiffusionGRPOTrainer`.

    A subclass overrides `_completion_losses`. The loss of an update is its mean over all completions.
    """

    config_class = CompletionLossConfig
    _compares_with_old = False

    def _completion_losses(
        self, rows: dict[str, torch.Tensor], update: int, targets: torch.Tensor, logps: torch.Tensor
    ) -> torch.Tensor:
        """Loss of each completion.

        Args:
            rows: the micro-batch.
            update: index of the inner update.
            targets: bool [B, V, L]; V is 1 unless views are `joint`, and the results are averaged over the views.
            logps: [B, V, L] with gradient, 0 where a position is no target.

        Returns:
            [B].
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is.")

    def _view_loss(self, model, rows: dict[str, torch.Tensor], update: int, view: int) -> torch.Tensor:
        views = range(self._num_views()) if self.joint else range(view, view + 1)
        scores = self._score_views(model, rows, update, views)
        targets = rows["targets"][:, update, views.start : views.stop]
        if self._compares_with_old:
            self._log_log_ratio(scores.logps, rows["old_per_token_logps"][:, update, views.start : views.stop])
        losses = self._completion_losses(rows, update, targets, scores.logps)
        self._log_entropy(scores, targets)
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        return losses.mean() / (accumulation * self._passes())

    def _log_entropy(self, scores: Scores, targets: torch.Tensor) -> None:
        totals = torch.stack([(scores.entropies.detach() * targets).sum(), targets.sum().float()])
        total, count = self.accelerator.reduce(totals, reduction="sum").tolist()
        self._add_metric("entropy", total / max(count, 1))

    def _add_metric(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _mean_over_processes(self, values: torch.Tensor) -> float:
        return self.accelerator.gather(values.detach().float().mean()).mean().item()
