"""Estimate what a completion that fills its canvas costs, from the settings alone."""

from __future__ import annotations

from trl_diffusion.family import DiffusionFamily
from trl_diffusion.sampling.config import SamplingConfig


def completion_units(
    config: SamplingConfig, prompt_length: float, attention_block: int | None, group: int = 1
) -> float:
    """Forwards for one completion, each counted by the share of the columns of prompt and canvas that it computes.

    Args:
        config: how completions are drawn.
        prompt_length: P, in tokens.
        attention_block: as in `DiffusionFamily`.
        group: completions that are drawn together from the same prompt; under an exact cache they share its pass.
    """
    columns, block, steps = prompt_length + config.canvas_length, config.block_length, config.steps_per_block
    ends = [prompt_length + block * (i + 1) for i in range(config.num_blocks)]
    if attention_block is not None and config.cache == "none":
        return steps * sum(ends) / columns
    if attention_block is not None:
        # The prompt once for the group, every block at each of its steps, and once more when it is finished; nothing
        # follows the last block, so that one is not written.
        return (prompt_length / group + (steps + 1) * config.canvas_length - block) / columns
    if not config.approximate:
        return config.denoising_steps
    full = _full_forwards(config)
    windows = [block if config.cache == "dual" else columns - end + block for end in ends]
    return full * config.num_blocks + (steps - full) * sum(windows) / columns


def prompt_share(config: SamplingConfig, family: DiffusionFamily) -> float:
    """Share of a rollout's forwards that compute the columns of the prompt."""
    cache = config.cache_for(family)
    if cache == "block":
        return 1 / (config.denoising_steps + 1)
    return 1.0 if cache == "none" else _full_forwards(config) / config.steps_per_block


def head_positions(config: SamplingConfig) -> int:
    """Positions at which the LM head runs for one completion."""
    if not config.reads_every_mask:
        return config.canvas_length
    commits = config.commits()
    return config.num_blocks * sum(sum(commits[step:]) for step in range(len(commits)))


def _full_forwards(config: SamplingConfig) -> int:
    """Steps of a block that compute all columns under an approximate cache."""
    return -(-config.steps_per_block // config.cache_refresh) if config.cache_refresh else 1
