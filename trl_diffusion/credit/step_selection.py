"""Select the denoising steps that are trained (ATPO, 2511.15208).

Only the paper's abstract is public. It says that steps are selected by entropy, confidence margin and rate of entropy
change (RoEC), averaged over the batch; every formula here is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_diffusion.credit.step_draws import StepWeights, spread_over
from trl_diffusion.distribution import cumulative_shares

SIGNAL_AVERAGES = ("batch", "group", "running")

# Weight of the earlier signals in a running average.
_RUNNING_DECAY = 0.9
# A standard deviation below this share of the largest value is rounding noise of equal values.
_EQUAL = 1e-6


@dataclass
class StepSignals:
    """Signals of every denoising step that selectors read, averaged over each of A sets of completions.

    Sums run over the completions that are still unfinished at a step. They are divided by the number of all
    completions, so that steps which few completions reach count little.

    Args:
        entropy: float64 [A, S], H, mean entropy in nats where a token could be committed.
        confidence_margin: float64 [A, S], C, mean of 1 − (p1 − p2) there: large where the network is undecided.
        roec: float64 [A, S], |H_s − H_{s−1}|; 0 at the first step of a block, where it is not defined.
        candidates: bool [A, S], steps that some completion took; selectors choose among them.
        steps_per_block: denoising steps per block.
    """

    entropy: torch.Tensor
    confidence_margin: torch.Tensor
    roec: torch.Tensor
    candidates: torch.Tensor
    steps_per_block: int

    @property
    def num_candidates(self) -> torch.Tensor:
        """Number of candidates, long [A]."""
        return self.candidates.sum(1)

    @property
    def block_starts(self) -> torch.Tensor:
        """Bool [S], the first step of every block."""
        return torch.arange(self.entropy.size(1), device=self.entropy.device) % self.steps_per_block == 0

    def blend(self, earlier: StepSignals | None) -> StepSignals:
        """Return the exponential running average with earlier signals; the candidates stay the current ones."""
        if earlier is None:
            return self
        old, new = _RUNNING_DECAY, 1 - _RUNNING_DECAY
        return StepSignals(
            entropy=old * earlier.entropy + new * self.entropy,
            confidence_margin=old * earlier.confidence_margin + new * self.confidence_margin,
            roec=old * earlier.roec + new * self.roec,
            candidates=self.candidates,
            steps_per_block=self.steps_per_block,
        )


def step_signals(
    step_entropy: torch.Tensor, step_margin: torch.Tensor, taken: torch.Tensor, steps_per_block: int, sets: int = 1
) -> StepSignals:
    """Average the signals of completions.

    Args:
        step_entropy: float [B, S], mean entropy at each step, see `Trajectory.step_entropy`.
        step_margin: float [B, S], mean p1 − p2.
        taken: bool [B, S], the steps each completion took, see `taken_steps`.
        steps_per_block: denoising steps per block.
        sets: A, number of averages; each is over B/A neighbouring completions.
    """
    steps = torch.arange(step_entropy.size(1), device=step_entropy.device)
    entropy = step_entropy.double()
    change = torch.nn.functional.pad((entropy[:, 1:] - entropy[:, :-1]).abs(), (1, 0))
    # Between blocks the entropy is that of other positions, so its change there says nothing about a step.
    change = change.masked_fill(steps % steps_per_block == 0, 0.0)

    def average(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~taken, 0.0).view(sets, -1, len(steps)).mean(1)

    return StepSignals(
        entropy=average(entropy),
        confidence_margin=average(1.0 - step_margin.double()),
        roec=average(change),
        candidates=taken.view(sets, -1, len(steps)).any(1),
        steps_per_block=steps_per_block,
    )


@dataclass
class StepSelection:
    """Denoising steps chosen for A sets of completions.

    Args:
        steps: long [A, K], -1 where fewer than K were chosen.
        probabilities: float64 [A, K], the probability q with which each was drawn, if they were drawn with
            replacement; else `None`.
        mean_over_chosen: divide by the number of chosen steps instead of K.
    """

    steps: torch.Tensor
    probabilities: torch.Tensor | None = None
    mean_over_chosen: bool = False


# (signals, K, noise float64 [A, S] in [0, 1)) -> StepSelection. The noise is keyed by rollout, update and set, never
# by process, so that all processes choose the same steps.
StepSelector = Callable[[StepSignals, int, torch.Tensor], StepSelection]


def select_all(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select every candidate; `count` is the number of all steps."""
    return _top(torch.zeros_like(signals.entropy), signals, count)


def select_uniform(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select steps at equal distances from a random start, so that every candidate is equally likely.

    With a fixed start and a distance of whole blocks they would be the same step of every block, and the other steps
    would never be trained.
    """
    return StepSelection(spread_over(signals.candidates, count, noise[:, :1]))


def select_random(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select distinct steps drawn uniformly."""
    return _top(noise, signals, count)


def select_entropy(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select the steps with the highest entropy."""
    return _top(signals.entropy, signals, count)


def select_confidence_margin(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select the steps with the smallest gap between the two largest probabilities."""
    return _top(signals.confidence_margin, signals, count)


def select_roec(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select the steps with the largest change of entropy; the first step of a block ranks as an average one."""
    return _top(_z_roec(signals), signals, count)


def select_roec_cm(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Select by ATPO's hybrid score: the steps with the highest mean z-score of RoEC and confidence margin."""
    return _top(hybrid_score(signals), signals, count)


@dataclass(frozen=True)
class Threshold:
    """Selects the steps whose hybrid score is at least mean + τ · std over the candidates, at most K.

    The loss takes the mean over the selected steps, however many there are.

    Args:
        tau: τ.
    """

    tau: float

    def __call__(self, signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
        scores = hybrid_score(signals)
        mean, std = _mean_and_std(scores, signals.candidates)
        above = scores >= mean + self.tau * std
        top = _top(scores.masked_fill(~above, -torch.inf), signals, count).steps
        chosen = above.gather(1, top.clamp(min=0)) & (top >= 0)
        return StepSelection(top.masked_fill(~chosen, -1), mean_over_chosen=True)


def select_sampled(signals: StepSignals, count: int, noise: torch.Tensor) -> StepSelection:
    """Draw K steps with replacement from the softmax of the hybrid score.

    `selected_draws` divides by their probabilities, so that the mean over a completion's steps is estimated without
    bias.
    """
    probabilities = hybrid_score(signals).masked_fill(~signals.candidates, -torch.inf).softmax(1)
    cumulative = cumulative_shares(probabilities)
    points = (noise[:, :count] * cumulative[:, -1:]).clamp(max=1.0 - 2.0**-50)
    last = (signals.candidates * torch.arange(probabilities.size(1), device=points.device)).amax(1, keepdim=True)
    steps = torch.searchsorted(cumulative, points, right=True).minimum(last)
    return StepSelection(steps, probabilities.gather(1, steps))


SELECTORS: dict[str, StepSelector] = {
    "all": select_all,
    "uniform": select_uniform,
    "random": select_random,
    "entropy": select_entropy,
    "confidence_margin": select_confidence_margin,
    "roec": select_roec,
    "roec_cm": select_roec_cm,
    "sampled": select_sampled,
}


def hybrid_score(signals: StepSignals) -> torch.Tensor:
    """Return ½ z(RoEC) + ½ z(C), float64 [A, S]."""
    return 0.5 * _z_roec(signals) + 0.5 * _z(signals.confidence_margin, signals.candidates)


def selected_draws(selection: StepSelection, row_set: torch.Tensor, eligible: torch.Tensor) -> StepWeights:
    """Turn a selection for sets into steps and weights of single completions.

    A step that a completion did not take, or took after its end, becomes an empty view of weight 0. Steps drawn with
    replacement weigh (1/T)/q, where T is the number of the completion's steps. Chosen steps weigh 1, or K/chosen if
    the mean is over those chosen.

    Args:
        selection: for A sets.
        row_set: long [B], the set of each completion.
        eligible: bool [B, S], the T steps of each completion that may be trained.

    Returns:
        Steps [B, K], -1 for an empty view, and weights [B, K].
    """
    steps = selection.steps[row_set]
    there = (steps >= 0) & eligible.gather(1, steps.clamp(min=0))
    weights = torch.ones_like(steps, dtype=torch.float64)
    if selection.probabilities is not None:
        weights = 1.0 / (eligible.sum(1, keepdim=True) * selection.probabilities[row_set])
    elif selection.mean_over_chosen:
        chosen = (selection.steps >= 0).sum(1, keepdim=True).clamp(min=1)
        weights = weights * (steps.size(1) / chosen)[row_set]
    return StepWeights(steps.masked_fill(~there, -1), weights.masked_fill(~there, 0.0).float())


def _top(scores: torch.Tensor, signals: StepSignals, count: int) -> StepSelection:
    """Select the `count` highest-scoring candidates, sorted by step; ties go to the earlier step; padded with -1."""
    order = scores.masked_fill(~signals.candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = signals.candidates.gather(1, order)
    none = scores.size(1)  # sorts after every step
    steps = order.masked_fill(~chosen, none).sort(1).values
    steps = torch.nn.functional.pad(steps, (0, count - steps.size(1)), value=none)
    return StepSelection(steps.masked_fill(steps == none, -1))


def _z(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return z-scores over the valid steps (population standard deviation); 0 elsewhere, and if all are equal."""
    mean, std = _mean_and_std(values, valid)
    return ((values - mean) / std).masked_fill(~valid | (std == 0), 0.0)


def _z_roec(signals: StepSignals) -> torch.Tensor:
    return _z(signals.roec, signals.candidates & ~signals.block_starts)


def _mean_and_std(values: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation over the valid steps, [A, 1] each; one that is only rounding is 0."""
    count = valid.sum(1, keepdim=True).clamp(min=1)
    mean = values.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
    deviation = (values - mean).masked_fill(~valid, 0.0)
    std = (deviation.square().sum(1, keepdim=True) / count).sqrt()
    largest = values.abs().masked_fill(~valid, 0.0).amax(1, keepdim=True)
    return mean, std.masked_fill(std <= _EQUAL * largest, 0.0)
