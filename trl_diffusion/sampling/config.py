"""How completions are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trl_diffusion.family import DiffusionFamily

UNMASKING = ("random", "max_prob", "entropy", "margin", "low_confidence")
CACHES = ("auto", "none", "prefix", "dual", "block")


@dataclass(frozen=True)
class SamplingConfig:
    """How completions are drawn.

    Args:
        canvas_length: L, positions to write.
        denoising_steps: S, split evenly over the blocks; each step commits the same share of its block (the first
            steps one more where it does not divide).
        block_length: positions per block; blocks are written from left to right.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: number of tokens to draw from; 0 for all.
        top_p: probability mass to draw from; below 1 it needs `top_k`, so that the recorded support stays small, or
            `record_support=False`.
        unmasking: which masked positions of the block are committed at a step. `random`: uniformly;
            `max_prob`, `entropy`, `margin`: where the network's distribution (temperature 1, full vocabulary) has the
            largest top probability, the lowest entropy, the largest gap between its two largest probabilities. The
            token is drawn after its position is chosen, so the recorded log-probability is that of the policy.
            `low_confidence` is LLaDA's rule: draw a token everywhere and commit those with the largest probability.
            It is biased: committed tokens are mostly modes, and the recorded log-probability is not the policy's.
        record_signals: also record `step_entropy` and `step_margin`; needs the LM head at every masked position of
            the block, which `random` does not.
        record_support: record the ids that each token could be drawn from. Turn it off only where completions are all
            that is kept: without them a trajectory drawn with `top_k` or `top_p` cannot be scored again.
        confidence_threshold: commit every position whose largest probability (temperature 1, full vocabulary) reaches
            this, and at least the share of the step; needs `unmasking="max_prob"`. A block then ends as soon as it is
            written, and `denoising_steps` is the most that is taken; with as many steps as positions, the share is
            one token (2505.22618).
        entropy_bound: commit the positions of lowest entropy as long as the entropies of all but the largest add up
            to at most this, in nats, and at least the share of the step; needs `unmasking="entropy"` (2505.24857).
        cache: keys and values to reuse between steps. `auto`: what is exact, `block` for block-causal attention and
            `none` for full attention. `prefix` and `dual` (2505.22618) are approximate, for full attention: all
            columns are computed at the first step of a block, then those from the block on (`prefix`) or those of the
            block alone (`dual`).
        cache_refresh: with `prefix` and `dual`, compute all columns again every so many steps of a block; 0 for the
            first step only.

    Raises:
        ValueError: if the settings do not fit together.
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
        if self.unmasking not in UNMASKING:
            raise ValueError(f"unmasking must be one of {', '.join(UNMASKING)}; got {self.unmasking!r}.")
        self._check_parallel()
        self._check_cache()

    def _check_parallel(self) -> None:
        rules = {"confidence_threshold": "max_prob", "entropy_bound": "entropy"}
        given = [name for name in rules if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError("confidence_threshold and entropy_bound are two rules for the same thing: set one.")
        for name in given:
            if self.unmasking != rules[name]:
                raise ValueError(
                    f"{name} commits positions in the order of unmasking={rules[name]!r}; got {self.unmasking!r}."
                )
        if self.confidence_threshold is not None and not 0 < self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold must lie in (0, 1], got {self.confidence_threshold}.")
        if self.entropy_bound is not None and not self.entropy_bound >= 0:
            raise ValueError(f"entropy_bound must be at least 0 nats, got {self.entropy_bound}.")

    def _check_cache(self) -> None:
        if self.cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}; got {self.cache!r}.")
        if self.cache_refresh < 0:
            raise ValueError(f"cache_refresh must be at least 0 steps (0 for never), got {self.cache_refresh}.")
        if self.cache_refresh and not self.approximate:
            raise ValueError(
                f"cache_refresh={self.cache_refresh} renews an approximate cache; with cache={self.cache!r} there is "
                "none. Set cache to 'prefix' or 'dual', or leave cache_refresh at 0."
            )
        if self.cache_refresh >= self.steps_per_block:
            raise ValueError(
                f"cache_refresh={self.cache_refresh} never comes due: a block has {self.steps_per_block} steps, and "
                "the first of them renews the cache anyway. Lower it, or leave it at 0."
            )

    def check_family(self, family: DiffusionFamily) -> None:
        """Whether completions of a family can be drawn so.

        Raises:
            ValueError: if the cache or the block length does not go with its attention.
        """
        block = family.attention_block
        if block is None and self.cache == "block":
            raise ValueError(
                f"cache='block' needs block-causal attention, and {family.name} attends to the whole canvas. Set "
                "cache='none', or one of the approximate caches 'prefix' and 'dual'."
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

    def cache_for(self, family: DiffusionFamily) -> str:
        """What is reused with a family: `none`, `prefix`, `dual` or `block`."""
        if self.cache != "auto":
            return self.cache
        return "none" if family.attention_block is None else "block"

    @property
    def approximate(self) -> bool:
        """Whether tokens are drawn with keys and values that are not those of the canvas before the step."""
        return self.cache in ("prefix", "dual")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a part of the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    @property
    def parallel(self) -> bool:
        """Whether the network says how many tokens a step commits."""
        return self.confidence_threshold is not None or self.entropy_bound is not None

    @property
    def num_blocks(self) -> int:
        return self.canvas_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        return self.denoising_steps // self.num_blocks

    def commits(self) -> list[int]:
        """Tokens committed at each step of a block, at least; sums to the block length."""
        share, extra = divmod(self.block_length, self.steps_per_block)
        return [share + (step < extra) for step in range(self.steps_per_block)]

    def forward_units(self, prompt_length: float, attention_block: int | None, group: int = 1) -> float:
        """Passes for one completion that fills its canvas in all steps, each by the share of columns that it computes.

        Args:
            prompt_length: P.
            attention_block: as in `DiffusionFamily`.
            group: completions that are drawn together from the same prompt.
        """
        columns, block, steps = prompt_length + self.canvas_length, self.block_length, self.steps_per_block
        ends = [prompt_length + block * (i + 1) for i in range(self.num_blocks)]
        if attention_block is not None and self.cache == "none":
            return steps * sum(ends) / columns
        if attention_block is not None:  # the prompt, every block at each of its steps, and once more when finished
            return (prompt_length / group + (steps + 1) * self.canvas_length - block) / columns
        if not self.approximate:
            return self.denoising_steps
        full = self._full_passes()
        windows = [block if self.cache == "dual" else columns - end + block for end in ends]
        return full * self.num_blocks + (steps - full) * sum(windows) / columns

    def prompt_share(self, family: DiffusionFamily) -> float:
        """Share of a rollout's passes that compute the prompt's columns."""
        cache = self.cache_for(family)
        if cache == "block":
            return 1 / (self.denoising_steps + 1)
        return 1.0 if cache == "none" else self._full_passes() / self.steps_per_block

    def _full_passes(self) -> int:
        """Steps of a block that compute all columns, with an approximate cache."""
        return -(-self.steps_per_block // self.cache_refresh) if self.cache_refresh else 1

    def head_positions(self) -> int:
        """Positions at which the LM head runs for one completion that fills its canvas."""
        if self.unmasking == "random" and not self.record_signals:
            return self.canvas_length
        commits = self.commits()
        return self.num_blocks * sum(sum(commits[step:]) for step in range(len(commits)))
