"""Choices of the denoising steps that learn: drawn or chosen for each completion, or selected for all alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trl_diffusion.credit.step_draws import (
    StepWeights,
    chosen_draws,
    draw_steps,
    eligible_steps,
    entropy_of_steps,
    largest,
    step_probabilities,
)
from trl_diffusion.credit.step_selection import (
    SELECTORS,
    StepSelector,
    StepSignals,
    Threshold,
    selected_draws,
    step_signals,
)
from trl_diffusion.papers import FromPaper
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.sampling.trajectory import taken_steps
from trl_diffusion.streams import Purpose


@dataclass(frozen=True)
class EligibleSteps:
    """Denoising steps that may learn.

    Args:
        count: long [B], N; the steps 0..N-1 may learn.
        taken: bool [B, S], steps that committed a token.
    """

    count: torch.Tensor
    taken: torch.Tensor

    @classmethod
    def of(cls, rollout: Rollout, scope: str) -> EligibleSteps:
        """The eligible steps of a rollout; for `scope` see `eligible_steps`."""
        trajectory, sampling = rollout.trajectory, rollout.sampling
        count = eligible_steps(
            trajectory.completion_ids,
            trajectory.unmask_step,
            rollout.family,
            scope,
            sampling.block_length,
            sampling.steps_per_block,
            rollout.prompt_tail,
        )
        return cls(count, taken_steps(trajectory.unmask_step, sampling.denoising_steps))

    @property
    def mask(self) -> torch.Tensor:
        """Bool [B, S]."""
        steps = torch.arange(self.taken.size(1), device=self.taken.device)
        return self.taken & (steps < self.count.unsqueeze(1))


class StepChoice(FromPaper):
    """Chooses the denoising steps that learn in each inner update.

    Attributes:
        count: steps per completion and update.
        scope: which steps may learn, see `eligible_steps`.
        sums: whether the weighted mean over the chosen steps estimates the sum over a completion's steps, so that log
            p of its trajectory can be estimated.
        needs_signals: the rollout must record entropy and confidence margin of every step.
    """

    count: int
    scope: str
    sums: bool = False
    needs_signals: bool = False

    def choose(self, rollout: Rollout, eligible: EligibleSteps) -> list[StepWeights]:
        """Return steps and weights [B, count] for every inner update of the rollout."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""


@dataclass
class DrawnSteps(StepChoice):
    """Monte-Carlo draws of each completion's own steps (AGRPO, 2510.04019).

    Args:
        count: M, draws per completion and update.
        draws: `uniform` or `entropy`, see `step_probabilities`.
        scope: see `eligible_steps`.
        reduction: `mean` or `sum` over the eligible steps, see `draw_steps`.
    """

    paper = "2510.04019"

    count: int
    draws: str = "uniform"
    scope: str = "exact"
    reduction: str = "sum"

    def __post_init__(self) -> None:
        self.sums = self.reduction == "sum"

    def choose(self, rollout: Rollout, eligible: EligibleSteps) -> list[StepWeights]:
        trajectory = rollout.trajectory
        probabilities = step_probabilities(trajectory.entropies, trajectory.unmask_step, eligible.mask, self.draws)
        return [
            draw_steps(probabilities, rollout.view_noise(update).uniform(self.count), self.reduction)
            for update in rollout.updates
        ]


@dataclass
class ChosenSteps(StepChoice):
    """The steps that a rule chooses for each completion, each of them once.

    If the rule chooses more steps than there are views, an even share of them is drawn anew for every update.

    Args:
        count: M, views per completion and update.
        rule: `all` the eligible steps; `top_entropy`, those that committed the largest entropy; `forced`, those at
            which no position reached the confidence threshold, see `Trajectory.forced`. Steps that the last two leave
            out never learn, so they re-weight the objective.
        scope: see `eligible_steps`.
        reduction: `mean` or `sum` over the chosen steps, see `chosen_draws`.
        share: of the steps, for `top_entropy`; as many as there are views if not given.
    """

    count: int
    rule: str
    scope: str = "exact"
    reduction: str = "sum"
    share: float | None = None

    def __post_init__(self) -> None:
        self.sums = self.reduction == "sum" and self.rule == "all"

    def choose(self, rollout: Rollout, eligible: EligibleSteps) -> list[StepWeights]:
        chosen = self._chosen(rollout, eligible.mask)
        return [
            chosen_draws(chosen, self.count, rollout.view_noise(update).uniform(1), self.reduction)
            for update in rollout.updates
        ]

    def _chosen(self, rollout: Rollout, eligible: torch.Tensor) -> torch.Tensor:
        trajectory = rollout.trajectory
        if self.rule == "top_entropy":
            entropy = entropy_of_steps(trajectory.entropies, trajectory.unmask_step, eligible.size(1))
            return largest(entropy, eligible, self.count if self.share is None else self.share)
        if self.rule == "forced":
            assert trajectory.forced is not None
            return eligible & trajectory.forced
        return eligible


@dataclass
class SelectedSteps(StepChoice):
    """The same steps for all completions, or all of a prompt, by their averaged signals (ATPO, 2511.15208).

    Args:
        count: K, steps to select.
        selector: chooses them; see `trl_diffusion.credit.StepSelector`.
        scope: see `eligible_steps`.
        average: over which completions signals are averaged: `batch`, `group` or `running`.
        may_weigh: whether the selector may weigh its steps; not where a KL term would lose the weights.
        last: the steps it chose last while training, long [sets, K].
    """

    paper = "2511.15208"
    extends = True

    count: int
    selector: StepSelector
    scope: str = "exact"
    average: str = "batch"
    may_weigh: bool = True
    last: torch.Tensor | None = field(default=None, init=False)
    running: StepSignals | None = field(default=None, init=False)

    needs_signals = True

    def choose(self, rollout: Rollout, eligible: EligibleSteps) -> list[StepWeights]:
        signals = self._signals(rollout, eligible.taken)
        return [self._select(rollout, signals, eligible.mask, update) for update in rollout.updates]

    def _signals(self, rollout: Rollout, taken: torch.Tensor) -> StepSignals:
        """Signals averaged over the completions of all processes."""
        trajectory = rollout.trajectory
        assert trajectory.step_entropy is not None and trajectory.step_margin is not None
        entropy, margin, taken = map(rollout.gather, (trajectory.step_entropy, trajectory.step_margin, taken))
        sets = len(taken) // rollout.group_size if self.average == "group" else 1
        signals = step_signals(entropy, margin, taken, rollout.sampling.steps_per_block, sets)
        if self.average == "running":
            signals = signals.blend(self.running)
            if rollout.mode == "train":
                self.running = signals
        return signals

    def _select(self, rollout: Rollout, signals: StepSignals, eligible: torch.Tensor, update: int) -> StepWeights:
        sets, steps = signals.entropy.shape
        # Keyed by set and never by process, so that all processes choose the same steps.
        noise = rollout.shared_noise(Purpose.SELECTION, update, sets).uniform(steps)
        selection = self.selector(signals, self.count, noise)
        if (selection.probabilities is not None or selection.mean_over_chosen) and not self.may_weigh:
            raise ValueError(
                "This step_selector weighs its steps, and with beta > 0 the KL term would lose the weights. "
                "Set beta=0, or name the selector in the config ('threshold', 'sampled')."
            )
        if rollout.mode == "train":
            self.last = selection.steps
        rows = rollout.global_rows
        return selected_draws(selection, torch.zeros_like(rows) if sets == 1 else rows // rollout.group_size, eligible)

    def state(self) -> dict[str, Any]:
        signals = {} if self.running is None else {"running_signals": asdict(self.running)}
        return {"last_selection": self.last} | signals

    def load_state(self, state: dict[str, Any]) -> None:
        self.last = state["last_selection"]
        if "running_signals" in state:
            self.running = StepSignals(**state["running_signals"])


def named_selector(name: str, threshold: float | None) -> StepSelector:
    """The selector of a name; `threshold` needs τ."""
    if name == "threshold":
        assert threshold is not None
        return Threshold(threshold)
    return SELECTORS[name]
