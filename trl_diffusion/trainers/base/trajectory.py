"""GRPO over denoising trajectories: a token's log-probability is the one at the denoising step that wrote it.

rollout     block by block; the trajectory is recorded
credit      TRL's advantages; a few denoising steps of each completion learn, drawn or selected
likelihood  the canvas before a drawn step, at the sampling temperature and support
loss        TRL's token-ratio losses
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from trl.trainer.utils import get_callable_name

from trl_diffusion.credit import (
    SELECTORS,
    StepDraws,
    StepSelector,
    StepSignals,
    Threshold,
    draw_steps,
    eligible_steps,
    selected_draws,
    step_probabilities,
    step_signals,
    taken_steps,
)
from trl_diffusion.credit.step_draws import STEP_DRAWS, STEP_REDUCTIONS, STEP_SCOPES
from trl_diffusion.credit.step_selection import SIGNAL_AVERAGES
from trl_diffusion.likelihood import Views, trajectory_views
from trl_diffusion.runtime.run import CompletionCost
from trl_diffusion.runtime.run_facts import Facts
from trl_diffusion.sampling import Trajectory, row_generators
from trl_diffusion.streams import Purpose, uniforms
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.trainers.base.rollout_correction import RolloutCorrectionConfig, log_mismatch
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer

# Loss types whose per-token terms are summed and divided by something the view does not change.
_KEEP_FLOAT_MASK = ("dr_grpo", "dapo", "cispo", "luspo")


@dataclass
class TrajectoryGRPOConfig(RolloutCorrectionConfig, DiffusionGRPOConfig):
    """Configuration of `TrajectoryGRPOTrainer`.

    The defaults give GRPO as TRL defines it (`dapo` token mean, group-scaled rewards) over all denoising steps.

    Args:
        step_draws: without a `step_selector`: each completion's views are Monte-Carlo draws of its steps, `uniform`,
            or `entropy`: steps that committed uncertain tokens are drawn more often and weighted back (2510.04019).
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
        metadata={"help": "Distribution of the drawn denoising steps: uniform or entropy (weighted back)."},
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
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}.")
        self.require_token_ratios()
        self.check_rollout_correction(self.sampling_config())
        self._check_selector()
        self._refuse_sums_of_means()
        self._refuse_biased_weights()
        self._refuse_unweighted_kl()

    @property
    def weighted_views(self) -> bool:
        return (
            self.step_draws == "entropy"
            or self.step_reduction == "sum"
            or self.step_selector in ("threshold", "sampled")
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
        if self.step_reduction == "sum" and self.loss_type not in _KEEP_FLOAT_MASK:
            raise ValueError(
                f"step_reduction='sum' adds up a completion's steps so that the loss is TRL's over all its tokens. "
                f"loss_type={self.loss_type!r} divides each view by its own number of tokens, which would make it "
                "another loss. Set step_reduction='mean', or a loss_type among "
                f"{', '.join(_KEEP_FLOAT_MASK)}."
            )

    def _refuse_biased_weights(self) -> None:
        drawn = {"step_draws='entropy'": self.step_draws == "entropy"}
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

    def _refuse_unweighted_kl(self) -> None:
        if (
            self.beta != 0.0
            and self.weighted_views
            and (self.loss_type not in _KEEP_FLOAT_MASK or self.top_entropy_quantile < 1.0)
        ):
            raise ValueError(
                f"With beta={self.beta}, the KL term must carry the weights of step_draws={self.step_draws!r}, "
                f"step_reduction={self.step_reduction!r} and step_selector={self.step_selector!r}. That is exact only "
                f"for loss_type in {', '.join(_KEEP_FLOAT_MASK)} with top_entropy_quantile=1; got "
                f"loss_type={self.loss_type!r}, top_entropy_quantile={self.top_entropy_quantile}. Change these, set "
                "step_draws='uniform' with step_reduction='mean' or another step_selector, or set beta=0."
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
        super().__init__(model, reward_funcs, args, *others, **kwargs)
        self.step_selector = step_selector or self._named_selector()
        self._running_signals: StepSignals | None = None
        self.last_selection: torch.Tensor | None = None
        if self.step_selector is not None:
            self.args.record_signals = True

    def _named_selector(self) -> StepSelector | None:
        name = self.args.step_selector
        if name == "threshold":
            assert self.args.step_threshold is not None
            return Threshold(self.args.step_threshold)
        return None if name is None else SELECTORS[name]

    def _plan_views(self, mode, trajectory, rows, learns) -> dict[str, torch.Tensor]:
        args, config = self.args, self.args.sampling_config()
        num_eligible = eligible_steps(
            trajectory.completion_ids,
            trajectory.unmask_step,
            self.family,
            args.step_scope,
            config.block_length,
            config.steps_per_block,
        )
        taken = taken_steps(trajectory.unmask_step, args.denoising_steps)
        eligible = taken & (torch.arange(args.denoising_steps, device=taken.device) < num_eligible.unsqueeze(1))
        signals = self._signals(mode, trajectory, taken) if self.step_selector is not None else None
        updates = [
            self._draw_steps(trajectory, eligible, mode, update, rows["global_row"])
            if signals is None
            else self._select_steps(signals, eligible, mode, update, rows["global_row"])
            for update in range(self._inner_updates(mode))
        ]
        text = (trajectory.unmask_step >= 0) & (trajectory.unmask_step < num_eligible.unsqueeze(1))
        plan = {
            "completion_mask": (text & learns.unsqueeze(1)).long(),
            "unmask_step": trajectory.unmask_step,
            "rollout_logps" if self._recomputes() else "old_per_token_logps": trajectory.logps,
            "view_steps": torch.stack([draws.steps for draws in updates], dim=1),
            "view_weights": torch.stack([draws.weights for draws in updates], dim=1),
        }
        if trajectory.support is not None:
            plan["support"] = trajectory.support
        if trajectory.prompt_columns is not None and not self._recomputes():
            plan["prompt_columns"] = trajectory.prompt_columns
        return plan

    def _draw_steps(
        self, trajectory: Trajectory, eligible: torch.Tensor, mode: str, update: int, rows: torch.Tensor
    ) -> StepDraws:
        """Monte-Carlo draws of the steps that learn in one inner update, [B, M]."""
        generators = row_generators(
            self.args.seed, self._views_purpose(mode), self._rollouts[mode], update, rows=rows.tolist()
        )
        probabilities = step_probabilities(
            trajectory.entropies, trajectory.unmask_step, eligible, self.args.step_draws
        )
        noise = uniforms(generators, self.args.num_mc_samples).to(probabilities.device)
        return draw_steps(probabilities, noise, self.args.step_reduction)

    def _signals(self, mode: str, trajectory: Trajectory, taken: torch.Tensor) -> StepSignals:
        """Signals averaged over the completions of all processes."""
        assert trajectory.step_entropy is not None and trajectory.step_margin is not None
        entropy, margin, taken = self.accelerator.gather((trajectory.step_entropy, trajectory.step_margin, taken))
        sets = len(taken) // self.group_size(mode) if self.args.signal_average == "group" else 1
        signals = step_signals(entropy, margin, taken, self.args.sampling_config().steps_per_block, sets)
        if self.args.signal_average == "running":
            signals = signals.blend(self._running_signals)
            if mode == "train":
                self._running_signals = signals
        return signals

    def _select_steps(
        self, signals: StepSignals, eligible: torch.Tensor, mode: str, update: int, rows: torch.Tensor
    ) -> StepDraws:
        """Selected steps of one inner update, [B, K], the same for all completions of a set."""
        assert self.step_selector is not None
        sets, steps = signals.entropy.shape
        key = (Purpose.SELECTION, self._views_purpose(mode), self._rollouts[mode], update)
        noise = uniforms(row_generators(self.args.seed, *key, rows=range(sets)), steps).to(rows.device)
        selection = self.step_selector(signals, self.args.num_mc_samples, noise)
        weighted = selection.probabilities is not None or selection.mean_over_chosen
        if weighted and self.beta != 0.0 and not self.args.weighted_views:
            raise ValueError(
                f"This step_selector weighs its steps, and with beta={self.beta} the KL term would lose the weights. "
                "Set beta=0, or name the selector in the config ('threshold', 'sampled')."
            )
        if mode == "train":
            self.last_selection = selection.steps
        row_set = torch.zeros_like(rows) if sets == 1 else rows // self.group_size(mode)
        return selected_draws(selection, row_set, eligible)

    def _views_purpose(self, mode: str) -> int:
        return Purpose.TRAIN_VIEWS if mode == "train" else Purpose.EVAL_VIEWS

    def _view_of(self, rows: dict[str, torch.Tensor], update: int, view: int) -> Views:
        steps = rows["view_steps"][:, update, view]
        views = trajectory_views(rows["completion_ids"], rows["unmask_step"], steps, self.family.mask_token_id)
        views.targets &= rows["completion_mask"].bool()
        return views

    def _scoring_temperature(self) -> float:
        return self.temperature

    def _recomputes(self) -> bool:
        """Whether old log-probabilities are scored on the views, and not the rollout's."""
        return self.args.recomputes_old(self.args.sampling_config())

    def _importance(self, rows, logps, old, targets) -> torch.Tensor | None:
        if not (self.args.sampling_config().approximate or self._recomputes()):
            return None
        rollout = rows["rollout_logps"] * targets if self._recomputes() else old
        if self._on_policy():
            log_mismatch(self, logps, rollout, targets)
        return (old - rollout).exp().clamp(max=self.args.rollout_correction_cap) if self._recomputes() else None

    def completion_cost(self) -> CompletionCost:
        # An exact rollout recorded the old log-probabilities, and a view scores what its step committed.
        length, steps, args = self.args.max_completion_length, self.args.denoising_steps, self.args
        views = self.num_iterations * args.num_mc_samples
        return replace(
            super().completion_cost(),
            old=views if self._recomputes() else 0,
            targets=length / steps,
            buffer_bytes=4.0 * length * (2 + args.top_k) + 12.0 * views,
        )

    def _collect_facts(self) -> Facts:
        facts = super()._collect_facts()
        function = None if self.args.step_selector is not None else self.step_selector  # else it is in the settings
        name = None if function is None else get_callable_name(function)
        return facts | {"run": facts["run"] | {"function that selects steps": name}}

    def _extra_state(self) -> dict[str, Any]:
        signals = {} if self._running_signals is None else {"running_signals": asdict(self._running_signals)}
        return super()._extra_state() | {"last_selection": self.last_selection} | signals

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        super()._load_extra_state(state)
        self.last_selection = send_to_device(state["last_selection"], self.accelerator.device)
        if "running_signals" in state:
            signals = send_to_device(state["running_signals"], self.accelerator.device)
            self._running_signals = StepSignals(**signals)
