"""GRPO over denoising trajectories: a token's log-probability is the one at the denoising step that wrote it.

rollout     block by block; the trajectory is recorded
credit      TRL's advantages; a few denoising steps of each completion learn, drawn or selected
likelihood  the canvas before a drawn step, at the sampling temperature and support
loss        TRL's token-ratio losses
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl.trainer.utils import get_callable_name

from trl_diffusion.credit import SELECTORS, StepSelector
from trl_diffusion.credit.step_choice import ChosenSteps, DrawnSteps, SelectedSteps, StepChoice, named_selector
from trl_diffusion.credit.step_draws import INDEPENDENT_DRAWS, STEP_DRAWS, STEP_REDUCTIONS, STEP_SCOPES
from trl_diffusion.credit.step_selection import SIGNAL_AVERAGES
from trl_diffusion.likelihood import Likelihood, TrajectoryViews
from trl_diffusion.losses.token_ratio import SUMS_OF_TOKENS, check_token_level, check_weighted_kl
from trl_diffusion.runtime.run_facts import Facts
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.trainers.base.rollout_correction import RolloutCorrectionConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer
from trl_diffusion.validation import one_of


@dataclass
class TrajectoryGRPOConfig(RolloutCorrectionConfig, DiffusionGRPOConfig):
    """Configuration of `TrajectoryGRPOTrainer`.

    The defaults give GRPO as TRL defines it (`dapo` token mean, group-scaled rewards) over all denoising steps.

    Args:
        step_draws: without a `step_selector`: each completion's views are Monte-Carlo draws of its steps, `uniform`,
            or `entropy`: steps that committed uncertain tokens are drawn more often and weighted back (2510.04019).
            Or a rule chooses steps, each of which is taken once, or as many of them as there are views: `all`,
            `top_entropy` (those with the most entropy, 2601.15165, 2603.12554) or `forced` (those at which no position
            reached `confidence_threshold`, 2609.39859). The last two re-weight the objective: other steps never learn.
        step_share: share of a completion's steps that `step_draws="top_entropy"` chooses; as many steps as there are
            views if not given.
        step_scope: which steps may learn, `exact` or `paper`, see `trl_diffusion.credit.eligible_steps`.
        step_reduction: `sum` or `mean` over the steps of a completion. `sum` makes a loss what TRL computes over all
            tokens of the completion, for a `loss_type` that adds up tokens (`dr_grpo`, `dapo`, `cispo`, `luspo`).
        step_selector: choose the same `num_mc_samples` steps for all completions of a rollout by their signals, see
            `trl_diffusion.credit.step_selection` (ATPO, 2511.15208): `all`, `uniform`, `random`, `entropy`,
            `confidence_margin`, `roec`, `roec_cm`, `threshold` or `sampled`. The trainer also takes a function.
        step_threshold: τ of the selector `threshold`.
        signal_average: over which completions the signals are averaged: `batch`, `group` (each prompt its own steps)
            or `running` (over the rollouts so far as well).

    Raises:
        ValueError: if settings do not fit together.
    """

    step_draws: str = field(
        default="uniform",
        metadata={
            "help": "Denoising steps of each completion that learn: drawn from a distribution, uniform or entropy "
            "(weighted back); or chosen by a rule: all, top_entropy or forced."
        },
    )
    step_share: float | None = field(
        default=None, metadata={"help": "Share of the steps that step_draws=top_entropy chooses."}
    )
    step_scope: str = field(
        default="exact",
        metadata={
            "help": "Denoising steps that may learn: exact (every step of every block that was written up to "
            "the first end token) or paper (up to the last step that wrote text)."
        },
    )
    step_reduction: str = field(
        default="sum", metadata={"help": "Reduction over the denoising steps of a completion: sum or mean."}
    )
    step_selector: str | None = field(
        default=None,
        metadata={
            "help": "Selects the same num_mc_samples steps for all completions: all, uniform, random, entropy, "
            "confidence_margin, roec, roec_cm, threshold or sampled."
        },
    )
    step_threshold: float | None = field(
        default=None, metadata={"help": "Step selector threshold: steps whose score is mean + this · std or more."}
    )
    signal_average: str = field(
        default="batch", metadata={"help": "Signals of the step selector are averaged over: batch, group or running."}
    )

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "step_draws": STEP_DRAWS,
            "step_scope": STEP_SCOPES,
            "step_reduction": STEP_REDUCTIONS,
            "signal_average": SIGNAL_AVERAGES,
        }
        if self.step_selector is not None:
            choices["step_selector"] = (*SELECTORS, "threshold")
        for name, values in choices.items():
            one_of(name, getattr(self, name), values)
        check_token_level(self)
        self.check_rollout_correction(self.sampling_config())
        self._check_draws()
        self._check_selector()
        self._refuse_sums_of_means()
        self._refuse_biased_weights()
        if self.beta != 0.0 and self.weighted_views:
            check_weighted_kl(
                self,
                f"step_draws={self.step_draws!r}, step_reduction={self.step_reduction!r} and "
                f"step_selector={self.step_selector!r}",
            )

    @property
    def weighted_views(self) -> bool:
        """Views may have weights other than 1."""
        return (
            self.step_draws != "uniform"
            or self.step_reduction == "sum"
            or self.step_selector in ("threshold", "sampled")
        )

    def _check_draws(self) -> None:
        if self.step_share is not None and self.step_draws != "top_entropy":
            raise ValueError(
                f"step_share={self.step_share} belongs to step_draws='top_entropy'; got step_draws="
                f"{self.step_draws!r}. Leave it out, or set both."
            )
        if self.step_share is not None and not 0 < self.step_share <= 1:
            raise ValueError(f"step_share must lie in (0, 1], got {self.step_share}.")
        if self.step_draws == "forced" and self.confidence_threshold is None:
            raise ValueError(
                "step_draws='forced' takes the steps at which no position reaches the confidence_threshold, and there "
                "is none. Set confidence_threshold, or another step_draws."
            )

    def _check_selector(self) -> None:
        if (self.step_threshold is None) == (self.step_selector == "threshold"):
            raise ValueError(
                f"step_threshold ({self.step_threshold}) belongs to step_selector='threshold'; got "
                f"step_selector={self.step_selector!r}. Set both or neither."
            )
        if self.step_selector is None:
            return
        if self.step_selector == "all" and self.num_mc_samples != self.denoising_steps:
            raise ValueError(
                f"step_selector='all' needs num_mc_samples = denoising_steps ({self.denoising_steps}), got "
                f"{self.num_mc_samples}."
            )
        self.check_selected_steps()

    def check_selected_steps(self) -> None:
        """Refuse what does not fit steps that a selector chooses, be it one of the names or a function.

        Raises:
            ValueError: if it chooses more steps than there are, or Monte-Carlo draws are asked for as well.
        """
        if self.num_mc_samples > self.denoising_steps:
            raise ValueError(
                f"A step selector cannot choose num_mc_samples={self.num_mc_samples} of {self.denoising_steps} "
                "denoising steps. Lower num_mc_samples."
            )
        if self.step_draws != "uniform" or self.step_reduction != "mean":
            raise ValueError(
                "step_selector replaces the Monte-Carlo draws and its chosen steps are averaged: set "
                f"step_draws='uniform' and step_reduction='mean' with it; got step_draws={self.step_draws!r}, "
                f"step_reduction={self.step_reduction!r}."
            )

    def _refuse_sums_of_means(self) -> None:
        if self.step_reduction == "sum" and self.loss_type not in SUMS_OF_TOKENS:
            raise ValueError(
                f"step_reduction='sum' adds up a completion's steps so that the loss is TRL's over all its tokens. "
                f"loss_type={self.loss_type!r} divides each view by its own number of tokens, which would make it "
                "another loss. Set step_reduction='mean', or a loss_type among "
                f"{', '.join(SUMS_OF_TOKENS)}."
            )

    def _refuse_biased_weights(self) -> None:
        drawn = {f"step_draws={self.step_draws!r}": self.step_draws != "uniform"}
        drawn["step_selector='sampled'"] = self.step_selector == "sampled"
        for setting, is_set in drawn.items():
            if not is_set:
                continue
            biased = {
                "loss_type='bnpo'": self.loss_type == "bnpo",
                "top_entropy_quantile < 1": self.top_entropy_quantile < 1.0,
                "entropy_coef": self.entropy_coef != 0.0 or self.use_adaptive_entropy,
            }
            for name, uses in biased.items():
                if uses:
                    raise ValueError(
                        f"{name} takes a statistic over the tokens that happened to be drawn, which {setting} skews. "
                        "Set step_draws='uniform' without a sampled step_selector."
                    )


class TrajectoryGRPOTrainer(DiffusionGRPOTrainer):
    """GRPO over the likelihood of a completion's own denoising steps.

    Args:
        model: see `DiffusionGRPOTrainer`.
        reward_funcs: see `DiffusionGRPOTrainer`.
        args: a `TrajectoryGRPOConfig`.
        step_selector: a function that chooses steps, instead of one named in the config (set `step_selector=None`
            there); see `trl_diffusion.credit.StepSelector`.
        **kwargs: see `DiffusionGRPOTrainer`.

    Raises:
        ValueError: if a function and a name are given, or the config does not go with selected steps.
    """

    _tag_names = ["trl", "trl_diffusion", "trajectory-grpo"]
    _name = "TrajectoryGRPO"
    config_class = TrajectoryGRPOConfig
    args: TrajectoryGRPOConfig

    def __init__(
        self, model, reward_funcs=None, args=None, *others, step_selector: StepSelector | None = None, **kwargs
    ):
        if step_selector is not None:
            named = self.config_class if args is None else args
            if named.step_selector is not None:
                raise ValueError(
                    f"Both a step_selector function and step_selector={named.step_selector!r} in the config are "
                    "given. Set step_selector=None in the config, or leave the function out."
                )
            if args is not None:
                args.check_selected_steps()
        self._given_selector = step_selector
        super().__init__(model, reward_funcs, args, *others, **kwargs)

    def likelihood(self) -> Likelihood:
        args = self.args
        sampling = args.sampling_config()
        return TrajectoryViews(
            self._steps(),
            sampling,
            weighted=args.weighted_views,
            recompute=args.recomputes_old(sampling),
            cap=args.rollout_correction_cap,
        )

    def _steps(self) -> StepChoice:
        args, selector = self.args, self._given_selector
        if selector is None and args.step_selector is not None:
            selector = named_selector(args.step_selector, args.step_threshold)
        if selector is None and args.step_draws in INDEPENDENT_DRAWS:
            return DrawnSteps(args.num_mc_samples, args.step_draws, args.step_scope, args.step_reduction)
        if selector is None:
            return ChosenSteps(
                args.num_mc_samples, args.step_draws, args.step_scope, args.step_reduction, args.step_share
            )
        may_weigh = args.beta == 0.0 or args.weighted_views
        return SelectedSteps(args.num_mc_samples, selector, args.step_scope, args.signal_average, may_weigh)

    @property
    def last_selection(self) -> torch.Tensor | None:
        """Steps [sets, K] that a selector chose for the last training rollout, -1 for none."""
        likelihood = self.choices.likelihood
        steps = likelihood.steps if isinstance(likelihood, TrajectoryViews) else None
        return steps.last if isinstance(steps, SelectedSteps) else None

    def _collect_facts(self) -> Facts:
        facts, function = super()._collect_facts(), self._given_selector  # a named one is in the settings
        name = None if function is None else get_callable_name(function)
        return facts | {"run": facts["run"] | {"function that selects steps": name}}
