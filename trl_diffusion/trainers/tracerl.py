"""TraceRL (2509.06949) for full attention: the trajectory in groups of denoising steps, without its value model.

rollout     block by block
credit      A = (r − group mean) / population standard deviation, 0 where all rewards are equal
likelihood  one view per `shrink` successive steps: the canvas before the first of them, the tokens of all of them as
            targets, each token of the text once; at the sampling temperature and support
loss        clipped token ratio, mean over a view's tokens, mean over a completion's views; k3 to the old policy
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace

import torch

from trl_diffusion.credit import population_z_score
from trl_diffusion.likelihood import NoisePlan
from trl_diffusion.likelihood.noise_plans import trajectory_groups
from trl_diffusion.trainers.cost import CompletionCost
from trl_diffusion.trainers.noised_grpo import NoisedGRPOConfig, NoisedGRPOTrainer
from trl_diffusion.trainers.quiet import no_luspo_hint


@dataclass
class TraceRLConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` with TraceRL's objective (2509.06949). Its optimizer and rollout settings are d1's.

    `loss_type="luspo"` with token ratios sums over tokens; the weights that the views carry make it a mean.

    Args:
        shrink: denoising steps per view. With 1, old log-probabilities are those of the rollout; with more, they are
            recomputed on the views.
        num_mc_samples: derived: ⌈denoising_steps / shrink⌉ views cover the trajectory.

    Raises:
        ValueError: if `shrink` does not fit the steps, or settings do not fit together.
    """

    shrink: int = field(default=8, metadata={"help": "Denoising steps per view."})
    num_mc_samples: int = field(default=0, metadata={"help": "Views: leave at 0, ⌈denoising_steps / shrink⌉ is used."})
    num_iterations: int = field(default=1, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.01, metadata={"help": "Coefficient of the k3 KL to the old policy."})
    loss_type: str = field(default="luspo", metadata={"help": "TRL's loss type; luspo only."})

    def __post_init__(self):
        if not 1 <= self.shrink <= self.denoising_steps:
            raise ValueError(
                f"shrink must lie between 1 and denoising_steps={self.denoising_steps}; got {self.shrink}."
            )
        views = -(-self.denoising_steps // self.shrink)
        if self.num_mc_samples not in (0, views):
            raise ValueError(
                f"TraceRL's views cover the trajectory: denoising_steps={self.denoising_steps} with "
                f"shrink={self.shrink} makes {views}, got num_mc_samples={self.num_mc_samples}. Leave it out."
            )
        self.num_mc_samples = views
        super().__post_init__()
        self.require_token_ratios()
        for name, needed in (("loss_type", "luspo"), ("top_entropy_quantile", 1.0), ("sync_ref_model", False)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"TraceRL's means over views and its KL to the old policy need {name}={needed!r}; got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def weighted_views(self) -> bool:
        return True


class TraceRLTrainer(NoisedGRPOTrainer):
    """TraceRL, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = TraceRLConfig
    args: TraceRLConfig
    _tag_names = ["trl", "trl_diffusion", "tracerl"]
    _name = "TraceRL"
    _paper = {
        "title": "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models",
        "id": "2509.06949",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2025revolutionizing,
                title        = {{Revolutionizing Reinforcement Learning Framework for Diffusion Large Language
                                 Models}},
                author       = {Yinjie Wang and Ling Yang and Bowen Li and Ye Tian and Ke Shen and Mengdi Wang},
                year         = 2025,
                eprint       = {arXiv:2509.06949},
            }"""),
    }

    def __init__(self, *args, **kwargs):
        with no_luspo_hint():
            super().__init__(*args, **kwargs)

    @staticmethod
    def _needs_reference(args) -> bool:
        return False  # its KL compares with the policy that wrote the completions

    def _scored_share(self) -> float:
        return 1 / self._num_views()

    def completion_cost(self) -> CompletionCost:
        return replace(super().completion_cost(), old=0) if self.args.shrink == 1 else super().completion_cost()

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        return trajectory_groups(trajectory.unmask_step, self.args.denoising_steps, self.args.shrink)

    def _plan_views(self, mode, trajectory, rows, learns) -> dict[str, torch.Tensor]:
        plan = super()._plan_views(mode, trajectory, rows, learns)
        scored = plan["targets"].sum(-1)
        filled = (scored > 0).sum(-1, keepdim=True)
        # mean over a view's tokens, and over the views that have any, of a sum that the loss divides by all views
        plan["view_weights"] = self._num_views() / (filled * scored).clamp(min=1)
        if self.args.shrink == 1:
            plan["old_per_token_logps"] = trajectory.logps
        return plan | ({} if trajectory.support is None else {"support": trajectory.support})

    def _assign_credit(self, mode, rows) -> None:
        rows["advantages"] = self._over_groups(mode, rows["advantages"], population_z_score)

    def _compared_logps(self, rows, update, view) -> torch.Tensor | None:
        return self._old_logps(rows, update, view, self._view_of(rows, update, view)) if self.args.beta else None

    def _scoring_temperature(self) -> float:
        return self.temperature
