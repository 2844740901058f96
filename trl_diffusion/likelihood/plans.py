"""Noise plans: the positions of a completion that its views mask, and those among them that are scored.

Every function is pure: the noise comes in as uniform numbers, drawn from the completion's private stream
(`trl_diffusion.likelihood.noises`). Plans compose: `with_complements`, `concatenate` and `NoisePlan.only` take plans
and return plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trl_diffusion.sampling.trajectory import taken_steps


@dataclass
class NoisePlan:
    """V noised views of each of B completions.

    Args:
        masked: bool [B, V, L], positions that are masked.
        targets: bool [B, V, L], the masked positions to score.
        rate: float32 [B, V], the share of positions meant to be masked: the rate of independent masks, or count ÷ L.
        prompt_masked: bool [B, V, P], tokens of the prompt that are masked; `None` for none.
    """

    masked: torch.Tensor
    targets: torch.Tensor
    rate: torch.Tensor
    prompt_masked: torch.Tensor | None = None

    def only(self, positions: torch.Tensor) -> NoisePlan:
        """Return the same views with targets among these positions (bool [B, L]) alone."""
        return replace(self, targets=self.targets & positions.unsqueeze(1))


def full_mask(batch: int, views: int, length: int, device: torch.device | str = "cpu") -> NoisePlan:
    """Mask the whole canvas and score every position (mean field, 2504.12216)."""
    masked = torch.ones(batch, views, length, dtype=torch.bool, device=device)
    return NoisePlan(masked, masked, torch.ones(batch, views, device=device))


def bernoulli(rate_noise: torch.Tensor, noise: torch.Tensor, low: float, high: float) -> NoisePlan:
    """Mask every position independently, at a rate t ~ U(low, high) drawn for each view.

    Args:
        rate_noise: uniform [B, V].
        noise: uniform [B, V, L].
        low: smallest rate.
        high: largest rate.
    """
    rate = low + (high - low) * rate_noise
    masked = noise < rate.unsqueeze(-1)
    return NoisePlan(masked, masked, rate.float())


def uniform_counts(noise: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return counts k ~ U{1..most} from uniform noise [B, V] and the largest counts [B, 1]; long [B, V]."""
    return (noise * most).long().clamp(max=most - 1) + 1


def stratified_counts(offsets: torch.Tensor, rows: torch.Tensor, num_rows: int, length: int) -> torch.Tensor:
    """Counts k ~ U{0..L}, spread evenly over the completions of all processes (ESPO, 2512.03759).

    Row j gets k0 + round(j (L + 1) / R) modulo L + 1: uniform for each row, with strata over the R rows.

    Args:
        offsets: long [V], k0 in 0..L, uniform; the same on every process.
        rows: long [B], global row of each completion.
        num_rows: R, completions of all processes.
        length: canvas length L.

    Returns:
        Long [B, V].
    """
    # halves up: `round` takes them to even numbers, which would fill every other stratum three times and the rest once
    step = (rows.double() * (length + 1) / num_rows + 0.5).floor().long()
    return (offsets + step.unsqueeze(1)) % (length + 1)


def gauss_legendre(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the times and the weights of a Gauss–Legendre rule on [0, 1], float64 [count] each.

    The rule integrates polynomials of degree up to 2 · count − 1 exactly.
    """
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def rounded_counts(times: torch.Tensor, noise: torch.Tensor, length: int) -> torch.Tensor:
    """Turn times into numbers of masked positions (GDPO, 2510.08554; the rounding is ours).

    t L + ½ is rounded up or down at random, so that its mean is kept. Times that lie symmetrically about ½ then have
    the mean count (L + 1) / 2, as the counts 1..L of the ELBO have. Rounding t L down instead would mask too little.

    Args:
        times: float [V] in [0, 1].
        noise: uniform [B, V].
        length: canvas length L.

    Returns:
        Long [B, V] in 1..L.
    """
    return (times * length + 0.5 + noise).floor().long().clamp(1, length)


def random_subsets(
    counts: torch.Tensor,
    noise: torch.Tensor,
    allowed: torch.Tensor | None = None,
    logits: torch.Tensor | None = None,
) -> NoisePlan:
    """Mask random subsets of given sizes.

    With `logits` the positions of a subset are drawn one after the other without replacement, each with a probability
    proportional to exp(logit) among those that are left. That is the order of logit + Gumbel noise.

    Args:
        counts: long [B, V], at most the number of allowed positions.
        noise: uniform [B, V, L].
        allowed: bool [B, V or 1, L], positions to choose from; all if not given.
        logits: float [B, V or 1, L]; uniform subsets if not given.
    """
    if logits is not None:
        # −(logit + Gumbel noise), of which the smallest are masked. It grows with the uniform noise, so equal logits
        # give the uniform subsets of the same noise. Exponentials in place of their logarithms would overflow.
        noise = (-torch.log1p(-noise)).log() - logits
    if allowed is not None:
        noise = noise.masked_fill(~allowed, torch.inf)
    rank = noise.argsort(-1).argsort(-1)
    masked = rank < counts.unsqueeze(-1)
    return NoisePlan(masked, masked, counts / noise.size(-1))


def with_complements(plan: NoisePlan) -> NoisePlan:
    """Follow every view by its complement, which masks what the view shows; V doubles."""
    masked = _in_pairs(plan.masked, ~plan.masked)
    return NoisePlan(masked, masked, _in_pairs(plan.rate, 1 - plan.rate))


def opposed_subsets(counts: torch.Tensor, noise: torch.Tensor, logits: torch.Tensor) -> NoisePlan:
    """Follow every biased subset by one of the size of its complement, drawn from the same law.

    The complement itself would be biased the other way: it masks what the logits keep visible. The second subset of a
    pair is drawn with the noise 1 − u instead. For equal logits it is the complement.

    Args:
        counts: long [B, V].
        noise: uniform [B, V, L], u.
        logits: float [B, V or 1, L], see `random_subsets`.

    Returns:
        A plan with 2 V views.
    """
    first = random_subsets(counts, noise, logits=logits)
    second = random_subsets(noise.size(-1) - counts, 1 - noise, logits=logits)
    masked = _in_pairs(first.masked, second.masked)
    return NoisePlan(masked, masked, _in_pairs(first.rate, 1 - first.rate))


def _in_pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Alternate the views of two tensors [B, V, …]: [B, 2 V, …]."""
    return torch.stack([first, second], dim=2).flatten(1, 2)


def strata(noise: torch.Tensor, views: int) -> NoisePlan:
    """Divide the positions into V random strata of about equal size, of which each view masks one (2605.16342).

    Every position is scored once, and next to all those that are in other strata.

    Args:
        noise: uniform [B, L].
        views: V, at most L.
    """
    length = noise.size(1)
    rank = noise.argsort(-1).argsort(-1)
    masked = (rank * views // length).unsqueeze(1) == torch.arange(views, device=noise.device).view(1, -1, 1)
    return NoisePlan(masked, masked, masked.float().mean(-1))


def prompt_noise(noise: torch.Tensor, probability: float, prompt_mask: torch.Tensor) -> torch.Tensor:
    """Choose tokens of the prompt to mask, each with the same probability (2504.12216).

    Args:
        noise: uniform [B, P, V], counted from the right end of the prompt, so that padding does not move it.
        probability: of each token.
        prompt_mask: [B, P], 0 on the padding, which is never masked.

    Returns:
        Bool [B, V, P].
    """
    return (noise.flip(1).transpose(1, 2) < probability) & prompt_mask.bool().unsqueeze(1)


def random_text(
    count_noise: torch.Tensor, noise: torch.Tensor, length: torch.Tensor, logits: torch.Tensor | None = None
) -> NoisePlan:
    """Mask k ~ U{1..n} of the n positions of the text, and all after it (SPG's `random`, 2510.09541).

    Args:
        count_noise: uniform [B, V].
        noise: uniform [B, V, L].
        length: long [B], n.
        logits: see `random_subsets`.
    """
    after = torch.arange(noise.size(-1), device=noise.device) >= length.view(-1, 1, 1)
    plan = random_subsets(uniform_counts(count_noise, length.unsqueeze(1)), noise, ~after, logits)
    return replace(plan, masked=plan.masked | after)


def block_random(
    block_noise: torch.Tensor,
    count_noise: torch.Tensor,
    noise: torch.Tensor,
    length: torch.Tensor,
    block_length: int,
    context_probability: float = 0.0,
    logits: torch.Tensor | None = None,
) -> NoisePlan:
    """Show one block of the text in the making (SPG, 2510.09541): earlier blocks shown, later ones masked.

    Of the block's positions up to the end of the text, k ~ U{1..size} are masked and scored. Positions of earlier
    blocks are masked too with `context_probability`, and not scored.

    Args:
        block_noise: uniform [B, V].
        count_noise: uniform [B, V].
        noise: uniform [B, V, L].
        length: long [B], n, at least 1.
        block_length: divides L.
        context_probability: of masking a position of an earlier block.
        logits: see `random_subsets`.
    """
    positions = torch.arange(noise.size(-1), device=noise.device)
    length = length.view(-1, 1)
    blocks = (length + block_length - 1) // block_length
    start = ((block_noise * blocks).long().clamp(max=blocks - 1) * block_length).unsqueeze(-1)
    end = (start + block_length).minimum(length.unsqueeze(-1))
    inside = (positions >= start) & (positions < end)
    counts = uniform_counts(count_noise, (end - start).squeeze(-1))
    plan = random_subsets(counts, noise, inside, logits)
    context = (positions < start) & (noise < context_probability)
    return replace(plan, masked=plan.masked | (positions >= end) | context)


def trajectory_groups(unmask_step: torch.Tensor, num_steps: int, shrink: int) -> NoisePlan:
    """Replay the trajectory (TraceRL, 2509.06949): the canvas before each group of steps, with its tokens as targets.

    Groups are of successive steps that the completion took. With parallel unmasking a block may end before its last
    step; the steps left out do not count, as in the release.

    Args:
        unmask_step: int [B, L], -1 where nothing was sampled.
        num_steps: S.
        shrink: steps per view.

    Returns:
        A plan with ⌈S / shrink⌉ views; those after a completion's last group have no targets.
    """
    views = -(-num_steps // shrink)
    first = (torch.arange(views, device=unmask_step.device) * shrink).view(1, -1, 1)
    number = taken_steps(unmask_step, num_steps).cumsum(1) - 1  # of each step among those that were taken
    step = number.gather(1, unmask_step.clamp(min=0).long()).masked_fill(unmask_step < 0, -1).unsqueeze(1)
    masked = (step >= first) | (step < 0)
    targets = (step >= first) & (step < first + shrink)
    return NoisePlan(masked, targets, masked.float().mean(-1))


def draw_taken(noise: torch.Tensor, unmask_step: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Draw denoising steps uniformly among those that a completion took.

    Args:
        noise: uniform [B, K].
        unmask_step: int [B, L], -1 where nothing was sampled.
        num_steps: S.

    Returns:
        Long [B, K]; S − 1 for a completion that took none.
    """
    taken = taken_steps(unmask_step, num_steps)
    number = (noise * taken.sum(1, keepdim=True)).long()
    return torch.searchsorted(taken.cumsum(1), number + 1).clamp(max=num_steps - 1)


def split_at_steps(unmask_step: torch.Tensor, steps: torch.Tensor) -> NoisePlan:
    """Score each token once for each step τ, in one of two views (DiFFPO, 2510.02212).

    The first view masks the whole canvas and scores the tokens that were written before τ. The second is the canvas
    before τ and scores all others, which are the tokens that are masked there.

    Args:
        unmask_step: int [B, L], -1 where nothing was sampled.
        steps: long [B, K], τ.

    Returns:
        A plan with 2 K views.
    """
    unmask_step, steps = unmask_step.unsqueeze(1), steps.unsqueeze(-1)
    written = (unmask_step >= 0) & (unmask_step < steps)
    masked = _in_pairs(torch.ones_like(written), ~written)
    return NoisePlan(masked, _in_pairs(written, ~written), masked.float().mean(-1))


def block_steps(unmask_step: torch.Tensor, steps_per_block: int, shrink: int) -> NoisePlan:
    """Replay all blocks at once, for block-causal attention (2509.06949, 2512.22234).

    View k masks, in every block, what the block's steps from k · shrink on wrote; the tokens of the first `shrink` of
    them are the targets. Next to the finished completion (see `Views`) this replays the same steps of all blocks at
    once, and with `shrink=1` each token is scored on the canvas that the sampler saw.

    Args:
        unmask_step: int [B, L], block · `steps_per_block` + step within it; -1 where nothing was sampled.
        steps_per_block: denoising steps of a block.
        shrink: steps per view.

    Returns:
        A plan with ⌈steps_per_block / shrink⌉ views.
    """
    within_block = torch.where(unmask_step < 0, -1, unmask_step % steps_per_block)
    return trajectory_groups(within_block, steps_per_block, shrink)


def concatenate(plans: Sequence[NoisePlan]) -> NoisePlan:
    """Join the views of several plans, one after the other; either all or none mask prompts."""
    prompts = [plan.prompt_masked for plan in plans if plan.prompt_masked is not None]
    return NoisePlan(
        torch.cat([plan.masked for plan in plans], 1),
        torch.cat([plan.targets for plan in plans], 1),
        torch.cat([plan.rate for plan in plans], 1),
        torch.cat(prompts, 1) if prompts else None,
    )
