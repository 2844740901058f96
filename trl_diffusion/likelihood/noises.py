"""Noise: how the masks of `MaskedViews` are drawn, and what the log-probabilities under them estimate.

The functions of `trl_diffusion.likelihood.plans` turn uniform noise into masks and draw nothing themselves; a noise
draws for them from the rollout's private streams. What depends on the prompt's padding is drawn last from a stream, so
that padding moves nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trl_diffusion.likelihood.base import ScoredViews
from trl_diffusion.likelihood.estimates import elbo_of_pairs, mean_of_targets, quadrature_elbo
from trl_diffusion.likelihood.informed import InformedMasking
from trl_diffusion.likelihood.plans import (
    NoisePlan,
    bernoulli,
    block_random,
    draw_taken,
    full_mask,
    gauss_legendre,
    opposed_subsets,
    prompt_noise,
    random_subsets,
    random_text,
    rounded_counts,
    split_at_steps,
    strata,
    stratified_counts,
    with_complements,
)
from trl_diffusion.papers import FromPaper
from trl_diffusion.sampling.rollout import Rollout, RowNoise
from trl_diffusion.streams import Purpose


class Noise(FromPaper):
    """Base of noises.

    Attributes:
        num_views: V, views per completion and inner update.
        partial: a view scores a part of the text.
        random_subsets: see `Likelihood`.
        samples: see `Likelihood`.
        independent_halves: see `Likelihood`.
        informed: how masks are biased, if they are; of noises that can be.
    """

    num_views: int
    partial: bool = True
    random_subsets: bool = True
    samples: int = 1
    independent_halves: bool = False
    informed: InformedMasking | None = None

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        """The views of one inner update."""
        raise NotImplementedError

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Estimate of log p(completion), [B] in nats, from log-probabilities [B, V, L]."""
        raise NotImplementedError

    def scored_share(self, length: int) -> float:
        """Share of a canvas that a view scores, on average, where the text fills it."""
        return 1.0


@dataclass
class FullMask(Noise):
    """The whole canvas masked, and each prompt token with a probability (d1, 2504.12216).

    Args:
        num_views: views, which differ in the prompt's masks alone.
        prompt_probability: of masking each token of the prompt.
    """

    paper = "2504.12216"

    num_views: int = 1
    prompt_probability: float = 0.0

    partial = False

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        batch, length = rollout.trajectory.completion_ids.shape
        masked = masked_prompt(rollout, rollout.view_noise(update), self.num_views, self.prompt_probability)
        return replace(full_mask(batch, self.num_views, length, device=rollout.device), prompt_masked=masked)

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Mean over views of Σ log p: the likelihood of tokens that do not see each other (mean field)."""
        return logps.sum(-1).mean(1)


@dataclass
class Bernoulli(Noise):
    """Positions masked independently, at a rate t ~ U(low, high) for each view.

    Args:
        num_views: views.
        low: smallest rate.
        high: largest rate.
        complements: every view is followed by its complement, so that a pair scores each position once; `num_views`
            must be even.
    """

    num_views: int
    low: float
    high: float
    complements: bool = False

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        noise = rollout.view_noise(update)
        length = rollout.trajectory.completion_ids.size(1)
        drawn = self.num_views // 2 if self.complements else self.num_views
        rates, positions = noise.uniform(drawn), noise.uniform(drawn, length)
        masks = bernoulli(rates, positions, self.low, self.high)
        return with_complements(masks) if self.complements else masks

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Mean over views of Σ log p / t: the ELBO, but for rates outside of [low, high]."""
        assert views.rates is not None
        return (logps.sum(-1) / views.rates.clamp(min=1e-6)).mean(1)

    def scored_share(self, length: int) -> float:
        return 0.5 if self.complements else (self.low + self.high) / 2


@dataclass
class SubsetPairs(Noise):
    """Random subsets of the canvas with their complements, whose ELBO estimate is unbiased (ESPO, 2512.03759).

    Args:
        pairs: V / 2.
        informed: bias of the masks. The second of a pair is then biased alike, and no complement.
    """

    paper = "2512.03759"

    pairs: int
    informed: InformedMasking | None = None

    def __post_init__(self) -> None:
        self.num_views, self.samples = 2 * self.pairs, self.pairs
        self.independent_halves = self.pairs % 2 == 0 and self.informed is None

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        length = rollout.trajectory.completion_ids.size(1)
        # The offset of a pair is shared by all processes: it spreads the sizes evenly over the global rows.
        shared = rollout.shared_noise(Purpose.VIEW_COUNTS, update, self.pairs).uniform()
        offsets = (shared * (length + 1)).long()
        counts = stratified_counts(offsets, rollout.global_rows, rollout.num_rows, length)
        noise = rollout.view_noise(update).uniform(self.pairs, length)
        if self.informed is None:
            return with_complements(random_subsets(counts, noise))
        return opposed_subsets(counts, noise, self.informed.logits(rollout))

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        return elbo_of_pairs(logps, views.targets)

    def scored_share(self, length: int) -> float:
        return 0.5  # a pair scores the canvas once


@dataclass
class QuadratureSubsets(Noise):
    """Random subsets of the canvas of fixed sizes, the times of a Gauss–Legendre rule (GDPO, 2510.08554).

    Most of the variance of an ELBO estimate comes from the size of its masks, so only the positions are random.

    Args:
        num_views: views, one at each time of the rule.
        prompt_probability: of masking each token of the prompt.
        informed: bias of the masks.
    """

    paper = "2510.08554"

    num_views: int
    prompt_probability: float = 0.0
    informed: InformedMasking | None = None

    def __post_init__(self) -> None:
        self.times, self.weights = gauss_legendre(self.num_views)

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        noise, views = rollout.view_noise(update), self.num_views
        length = rollout.trajectory.completion_ids.size(1)
        counts = rounded_counts(self.times.to(rollout.device), noise.uniform(views), length)
        logits = None if self.informed is None else self.informed.logits(rollout)
        plan = random_subsets(counts, noise.uniform(views, length), logits=logits)
        return replace(plan, prompt_masked=masked_prompt(rollout, noise, views, self.prompt_probability))

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """The rule applied to Σ log p / t: the ELBO, but for the error of the rule."""
        assert views.rates is not None
        return quadrature_elbo(logps, views.rates, self.weights)

    def scored_share(self, length: int) -> float:
        return (length + 1) / (2 * length)


@dataclass
class Strata(Noise):
    """A random partition of the canvas, of which each view masks one part (DACA-GRPO, 2605.16342).

    Args:
        num_views: parts; 1 masks everything.
    """

    num_views: int

    random_subsets = False

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        length = rollout.trajectory.completion_ids.size(1)
        return strata(rollout.view_noise(update).uniform(length), self.num_views)

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Sum over views of Σ log p: every token given the tokens of other parts, a pseudo-likelihood."""
        return logps.sum((1, 2))

    def scored_share(self, length: int) -> float:
        return 1 / self.num_views


@dataclass
class SplitAtSteps(Noise):
    """Two views for each drawn denoising step τ of the rollout, in which every token is scored once (DiFFPO).

    Tokens written before τ are scored on the masked canvas, all others on the canvas before τ.

    Args:
        num_views: two for each drawn step.
    """

    paper = "2510.02212"

    num_views: int = 2

    random_subsets = False

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        unmask_step = rollout.trajectory.unmask_step
        noise = rollout.view_noise(update).uniform(self.num_views // 2)
        return split_at_steps(unmask_step, draw_taken(noise, unmask_step, rollout.sampling.denoising_steps))

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """Mean over the drawn steps of Σ log p: a surrogate, which is no likelihood and bounds none."""
        return logps.sum((1, 2)) / (self.num_views // 2)

    def scored_share(self, length: int) -> float:
        return 0.5


@dataclass
class TextSubsets(Noise):
    """Random subsets of the text, or of one of its blocks in the making (SPG, 2510.09541).

    Args:
        num_views: views.
        block_length: length of the blocks; `None` for subsets of the whole text.
        prompt_probability: of masking each token of the prompt, and of the blocks before.
        all_masked: score every masked token, those of later blocks too, as the release does; else the subset alone.
        informed: bias of the subsets.
    """

    paper = "2510.09541"

    num_views: int
    block_length: int | None = None
    prompt_probability: float = 0.0
    all_masked: bool = False
    informed: InformedMasking | None = None

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        noise, views = rollout.view_noise(update), self.num_views
        completions = rollout.trajectory.completion_ids
        length = rollout.family.effective_length(completions)
        counts, positions = noise.uniform(views), noise.uniform(views, completions.size(1))
        logits = None if self.informed is None else self.informed.logits(rollout, rollout.text, self.block_length)
        if self.block_length is None:
            plan = random_text(counts, positions, length, logits)
        else:
            blocks = noise.uniform(views)
            plan = block_random(blocks, counts, positions, length, self.block_length, self.prompt_probability, logits)
        prompts = masked_prompt(rollout, noise, views, self.prompt_probability)
        return replace(plan, targets=plan.masked if self.all_masked else plan.targets, prompt_masked=prompts)

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """n · mean over views of the mean log p of their targets: the ELBO for subsets of the whole text."""
        return views.lengths * mean_of_targets(logps, views.targets).mean(1)

    def scored_share(self, length: int) -> float:
        block = self.block_length or length
        later = (length - block) / 2 if self.all_masked else 0.0  # blocks after the drawn one, on average
        return ((block + 1) / 2 + later) / length


def masked_prompt(rollout: Rollout, noise: RowNoise, views: int, probability: float) -> torch.Tensor:
    """Prompt tokens to mask, bool [B, V, P]. Draw them last from a stream: padding changes how much is taken."""
    return prompt_noise(noise.uniform(rollout.prompt_ids.size(1), views), probability, rollout.prompt_mask)
