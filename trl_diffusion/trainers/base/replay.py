"""Methods that train on all denoising steps of the rollout, several per view: TraceRL and DiPO.

The views are the canvas before every `shrink`-th step, and their targets what the next `shrink` steps wrote. With
block-causal attention, where a block never sees those behind it, one view replays the same steps of all blocks, each
beside the finished ones before it; so a trajectory takes as many passes as a block has steps, not as the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from trl_diffusion.credit import population_z_score
from trl_diffusion.likelihood import NoisePlan
from trl_diffusion.likelihood.plans import block_steps, trajectory_groups
from trl_diffusion.runtime.run import CompletionCost
from trl_diffusion.trainers.base.masked import NoisedGRPOConfig, NoisedGRPOTrainer


@dataclass
class ReplayConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods that replay the rollout.

    Args:
        shrink: denoising steps per view. With 1, old log-probabilities are those of the rollout; with more, they are
            recomputed on the views, as they are after a rollout under an approximate cache.
        num_mc_samples: derived: ⌈steps / shrink⌉ views cover all steps, or those of a block for block-causal models.

    Raises:
        ValueError: if `shrink` does not fit the steps, or settings do not fit together.
    """

    shrink: int = field(default=1, metadata={"help": "Denoising steps per view."})
    num_mc_samples: int = field(
        default=0, metadata={"help": "Views: leave at 0, the number that covers the denoising steps is used."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio."})

    def __post_init__(self):
        steps, named = self.denoising_steps, f"denoising_steps={self.denoising_steps}"
        if self.views_beside_completion:
            steps = self.sampling_config().steps_per_block
            named = f"the {steps} denoising steps of a block"
        if not 1 <= self.shrink <= steps:
            raise ValueError(f"shrink must lie between 1 and {named}; got {self.shrink}.")
        views = -(-steps // self.shrink)
        if self.num_mc_samples not in (0, views):
            raise ValueError(
                f"The views of {type(self).__name__} replay the trajectory: {named} with shrink={self.shrink} makes "
                f"{views}, got num_mc_samples={self.num_mc_samples}. Leave it out."
            )
        self.num_mc_samples = views
        super().__post_init__()
        self.require_token_ratios()

    @property
    def weighted_views(self) -> bool:
        return True


class ReplayTrainer(NoisedGRPOTrainer):
    """Base of methods that replay the rollout, see the arguments of `DiffusionGRPOTrainer`.

    A subclass overrides `_view_weights`.
    """

    config_class = ReplayConfig
    args: ReplayConfig

    def _view_weights(self, scored: torch.Tensor) -> torch.Tensor:
        """Weights [B, μ, V] of the views' sums over their targets, which the loss divides by V.

        Args:
            scored: long [B, μ, V], targets of each view.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how its views are averaged.")

    def _rollout_is_old(self) -> bool:
        """Whether the rollout's log-probabilities are those of the network on the views."""
        return self.args.shrink == 1 and not self.args.sampling_config().approximate

    def _scored_share(self) -> float:
        return 1 / self._num_views()

    def completion_cost(self) -> CompletionCost:
        return replace(super().completion_cost(), old=0) if self._rollout_is_old() else super().completion_cost()

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        shrink = self.args.shrink
        if self.args.views_beside_completion:
            return block_steps(trajectory.unmask_step, self.args.sampling_config().steps_per_block, shrink)
        return trajectory_groups(trajectory.unmask_step, self.args.denoising_steps, shrink)

    def _plan_views(self, mode, trajectory, rows, learns) -> dict[str, torch.Tensor]:
        plan = super()._plan_views(mode, trajectory, rows, learns)
        plan["view_weights"] = self._view_weights(plan["targets"].sum(-1))
        if self._rollout_is_old():
            plan["old_per_token_logps"] = trajectory.logps
            plan |= {} if trajectory.prompt_columns is None else {"prompt_columns": trajectory.prompt_columns}
        return plan | ({} if trajectory.support is None else {"support": trajectory.support})

    def _group_advantages(self, advantages) -> torch.Tensor:
        return population_z_score(advantages)

    def _scoring_temperature(self) -> float:
        return self.temperature
