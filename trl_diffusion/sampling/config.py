"""Settings of the sampler, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.unmasking import RULES
from trl_diffusion.validation import at_least, one_of

CACHES = ("auto", "none", "prefix", "dual", "block")
FALLBACKS = ("surest", "leftmost")

_COMPILE_ADVICE = (
    "Set cache='dual', which is approximate, for full attention, or 'block' for block-causal attention; or leave "
    "rollout_compile out."
)


@dataclass(frozen=True)
class SamplingConfig:
    """Settings that say how completions are drawn.

    Args:
        canvas_length: L, positions to write.
        denoising_steps: S, split evenly over the blocks. Every step of a block commits the same number of tokens; if
            the block length is not a multiple of its steps, the first steps commit one more.
        block_length: positions per block; blocks are written from left to right.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of tokens to draw from; 0 for all.
        top_p: probability mass to draw from; below 1 it needs `top_k`, so that the recorded support stays small, or
            `record_support=False`.
        unmasking: which masked positions of the block are committed at a step. `random`: uniformly;
            `max_prob`, `entropy`, `margin`: where the network's distribution (temperature 1, full vocabulary) has the
            largest top probability, the lowest entropy, the largest gap between its two largest probabilities. The
            token is drawn after its position is chosen, so the recorded log-probability is that of the policy.
            `plackett_luce`: one after the other, in proportion to the largest probability to the power of
            1 / `position_temperature`; the trajectory records the log-probability of this choice.
            `low_confidence` is LLaDA's rule: draw a token everywhere and commit those with the largest probability.
            It is biased: committed tokens are mostly modes, and the recorded log-probability is not the policy's.
        record_signals: also record `step_entropy`, `step_margin` and `settled_step`; needs the LM head at every masked
            position of the block, which `random` does not.
        record_support: record the ids that each token could be drawn from. Turn it off only where completions are all
            that is kept: without them a trajectory drawn with `top_k` or `top_p` cannot be scored again.
        confidence_threshold: commit every position whose largest probability (temperature 1, full vocabulary) reaches
            this, and at least as many as the schedule demands; needs `unmasking="max_prob"`, or `low_confidence`,
            which looks at the probability of the drawn token instead. A block then ends as soon as it is written, and
            `denoising_steps` is the most that is taken; with as many steps as positions, the schedule demands one
            token a step (2505.22618).
        entropy_bound: commit the positions of lowest entropy as long as the entropies of all but the largest add up
            to at most this, in nats, and at least as many as the schedule demands; needs `unmasking="entropy"`
            (2505.24857).
        cache: keys and values to reuse between steps. `auto` chooses the exact one: `block` for block-causal attention
            and `none` for full attention. `prefix` and `dual` (2505.22618) are approximate caches for full attention.
            The first step of a block computes all columns; later steps compute the columns from the start of the block
            to the end of the canvas (`prefix`) or those of the block alone (`dual`).
        cache_refresh: with `prefix` and `dual`, compute all columns again every `cache_refresh` steps of a block; 0
            computes them at the first step only.
        shift_window: record how far each token shifts the confidence at masked positions of its block that are at
            most so far away, see `Trajectory.confidence_shift`; `None` records none. It costs no forward, but the LM
            head then runs at every masked position of the block.
        fallback: with `confidence_threshold`, the positions that commit where fewer reach it than the schedule
            demands: the `surest` of the others, or the `leftmost` (2609.39859).
        position_temperature: τ of `plackett_luce`, > 0. The smaller, the nearer to `max_prob`.
        rollout_compile: compute the denoising steps between full forwards by a compiled network; equal to rounding.
            It needs a cache under which these steps compute a block: `dual`, or `block` with block-causal attention.

    Raises:
        ValueError: if a setting is out of its range, or one rules out another.
    """

    canvas_length: int = 256
    denoising_steps: int = 128
    block_length: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    unmasking: str = "random"
    record_signals: bool = False
    record_support: bool = True
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    cache: str = "auto"
    cache_refresh: int = 0
    shift_window: int | None = None
    fallback: str = "surest"
    position_temperature: float = 0.5
    rollout_compile: bool = False

    def __post_init__(self) -> None:
        if min(self.canvas_length, self.denoising_steps, self.block_length) < 1:
            raise ValueError(
                f"canvas_length ({self.canvas_length}), denoising_steps ({self.denoising_steps}) and block_length "
                f"({self.block_length}) must be at least 1."
            )
        if self.canvas_length % self.block_length:
            raise ValueError(
                f"block_length ({self.block_length}) must divide the canvas length ({self.canvas_length}); choose "
                f"a canvas of {-(-self.canvas_length // self.block_length) * self.block_length} or another block."
            )
        if self.denoising_steps % self.num_blocks or self.denoising_steps > self.canvas_length:
            raise ValueError(
                f"denoising_steps ({self.denoising_steps}) must be a multiple of the number of blocks "
                f"({self.num_blocks} = {self.canvas_length} / {self.block_length}) and at most the canvas length "
                f"({self.canvas_length}), so that every step of every block commits at least one token."
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}; it must be finite too.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 keeps every token), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.truncates and self.top_k == 0 and self.record_support:
            raise ValueError(
                f"top_p={self.top_p} needs top_k > 0, so that the recorded support stays small; the AGRPO paper uses "
                "top_k=150 with top_p=0.99. Where completions are all that is kept, set record_support=False."
            )
        if self.shift_window is not None:
            at_least("shift_window", self.shift_window, 1)
        one_of("unmasking", self.unmasking, RULES)
        if not 0 < self.position_temperature < math.inf:
            raise ValueError(f"position_temperature must be positive and finite, got {self.position_temperature}.")
        if self.position_temperature != SamplingConfig.position_temperature and not self.draws_positions:
            raise ValueError(
                f"position_temperature={self.position_temperature} would have no effect: unmasking="
                f"{self.unmasking!r} does not draw positions. Set unmasking='plackett_luce', or leave it out."
            )
        self._check_parallel()
        self._check_cache()

    def _check_parallel(self) -> None:
        bounds = dict.fromkeys(rule.parallel for rule in RULES.values() if rule.parallel is not None)
        given = [name for name in bounds if vars(self)[name] is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two rules for the same thing: set one.")
        for name in given:
            rules = [repr(rule) for rule in RULES if RULES[rule].parallel == name]
            if repr(self.unmasking) not in rules:
                raise ValueError(
                    f"{name} commits positions in the order of unmasking={' or '.join(rules)}; got {self.unmasking!r}."
                )
        one_of("fallback", self.fallback, FALLBACKS)
        if self.fallback == "leftmost" and self.confidence_threshold is None:
            raise ValueError(
                "fallback='leftmost' says which position commits where none reaches the confidence_threshold, and "
                "there is none. Set confidence_threshold, or leave fallback out."
            )
        if self.confidence_threshold is not None and not 0 < self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold must lie in (0, 1], got {self.confidence_threshold}.")
        if self.entropy_bound is not None and not self.entropy_bound >= 0:
            raise ValueError(f"entropy_bound must be at least 0 nats, got {self.entropy_bound}.")

    def _check_cache(self) -> None:
        one_of("cache", self.cache, CACHES)
        if self.cache_refresh < 0:
            raise ValueError(f"cache_refresh must be at least 0 steps (0 for never), got {self.cache_refresh}.")
        if self.cache_refresh and not self.approximate:
            raise ValueError(
                f"cache_refresh={self.cache_refresh} renews an approximate cache; with cache={self.cache!r} there is "
                "none. Set cache to 'prefix' or 'dual', or leave cache_refresh at 0."
            )
        if self.rollout_compile and self.cache in ("none", "prefix"):
            computed = "all columns" if self.cache == "none" else "ever fewer columns"
            raise ValueError(
                "rollout_compile=True compiles steps that compute a block, and with "
                f"cache={self.cache!r} they compute {computed}. {_COMPILE_ADVICE}"
            )
        if self.rollout_compile and self.approximate and 1 in (self.cache_refresh, self.steps_per_block):
            every = "cache_refresh=1" if self.cache_refresh == 1 else "one step per block"
            raise ValueError(
                f"rollout_compile=True would compile nothing: with {every}, every step computes all columns. Raise "
                "cache_refresh or denoising_steps, or leave rollout_compile out."
            )
        if self.cache_refresh >= self.steps_per_block:
            raise ValueError(
                f"cache_refresh={self.cache_refresh} never comes due: a block has {self.steps_per_block} steps, and "
                "the first of them renews the cache anyway. Lower it, or leave it at 0."
            )

    def check_family(self, family: DiffusionFamily) -> None:
        """Check that completions of a family can be drawn with these settings.

        Raises:
            ValueError: if the family's attention does not allow the cache or the block length.
        """
        block = family.attention_block
        if block is None and self.cache == "block":
            raise ValueError(
                f"cache='block' needs block-causal attention, and {family.name} attends to the whole canvas. Set "
                "cache='none', or one of the approximate caches 'prefix' and 'dual'."
            )
        if self.rollout_compile and self.cache_for(family) == "none":
            raise ValueError(
                f"rollout_compile=True compiles steps that compute a block, and {family.name} attends to the whole "
                f"canvas, so that with cache={self.cache!r} they compute all columns. {_COMPILE_ADVICE}"
            )
        if block is not None and self.approximate:
            raise ValueError(
                f"{family.name} has block-causal attention, where keys and values are reused exactly: set "
                f"cache='auto' in place of {self.cache!r}."
            )
        if block is not None and self.block_length != block:
            raise ValueError(
                f"{family.name} writes blocks of {block} tokens, those of its attention; got block_length="
                f"{self.block_length}. Set block_length={block}."
            )

    def on_grid(self, family: DiffusionFamily) -> SamplingConfig:
        """Return the settings of the grid of blocks on which a family's completions lie.

        Where blocks are counted from the start of the sequence, a completion can begin inside a block and so end
        inside another. The grid has a block more then, and these settings count the steps of a trajectory.
        """
        if family.longest_prompt_tail == 0:
            return self
        return replace(
            self,
            canvas_length=self.canvas_length + self.block_length,
            denoising_steps=self.denoising_steps + self.steps_per_block,
        )

    def check_bounds(self, bounds: torch.Tensor | None, batch: int) -> None:
        """Check that rows can have bounds of their own.

        Args:
            bounds: float [B], or `None`.
            batch: B.

        Raises:
            ValueError: if there is not one for each row, one is negative, or there is no `entropy_bound` to replace.
        """
        if bounds is None:
            return
        if self.entropy_bound is None:
            raise ValueError("A bound for each row takes the place of entropy_bound, which is not set: set it.")
        if bounds.shape != (batch,) or not (bounds >= 0).all():
            raise ValueError(
                f"bounds must be {batch} numbers of at least 0 nats, one for each prompt; got shape "
                f"{tuple(bounds.shape)} and values {bounds.flatten()[:4].tolist()}."
            )

    def cache_for(self, family: DiffusionFamily) -> str:
        """Return the cache that a family's rollouts use: `none`, `prefix`, `dual` or `block`."""
        if self.cache != "auto":
            return self.cache
        return "none" if family.attention_block is None else "block"

    @property
    def approximate(self) -> bool:
        """True if some keys and values are older than the canvas that the tokens are drawn from."""
        return self.cache in ("prefix", "dual")

    @property
    def truncates(self) -> bool:
        """True if tokens are drawn from a part of the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def parallel_bound(self) -> float | None:
        """The setting by which the network decides how many tokens a step commits; `None` if the schedule does."""
        return self.entropy_bound if self.confidence_threshold is None else self.confidence_threshold

    @property
    def parallel(self) -> bool:
        """True if the network decides how many tokens a step commits."""
        return self.parallel_bound is not None

    @property
    def draws_positions(self) -> bool:
        """True if positions are drawn with a probability that depends on the network."""
        return RULES[self.unmasking].draws_positions

    @property
    def reads_every_mask(self) -> bool:
        """True if a step needs the logits of every masked position of the block, not of those alone it commits."""
        return self.record_signals or self.shift_window is not None or RULES[self.unmasking].reads_logits

    @property
    def num_blocks(self) -> int:
        """Blocks of the canvas."""
        return self.canvas_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Denoising steps of each block."""
        return self.denoising_steps // self.num_blocks

    def commits(self) -> list[int]:
        """Return the least number of tokens that each step of a block commits; they sum to the block length."""
        share, extra = divmod(self.block_length, self.steps_per_block)
        return [share + (step < extra) for step in range(self.steps_per_block)]
