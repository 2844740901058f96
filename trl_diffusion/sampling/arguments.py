"""The settings of the sampler as options: declared here once, for training, evaluation, analysis and `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.unmasking import RULES

_RULES_IN_WORDS = ", ".join(f"{name} ({rule.words})" for name, rule in RULES.items())


@dataclass
class SamplingArguments:
    """Options that say how completions are drawn; a config or a recipe's arguments inherit them.

    The length of the canvas is not among them, because every command has a name of its own for it. The meaning of each
    is described at `SamplingConfig`. A command with another default overrides the field by `with_default`.
    """

    denoising_steps: int = field(
        default=SamplingConfig.denoising_steps,
        metadata={"help": "Denoising steps in which the canvas is written, a multiple of its blocks."},
    )
    block_length: int = field(
        default=SamplingConfig.block_length,
        metadata={"help": "Positions per block; blocks are written from left to right."},
    )
    temperature: float = field(
        default=SamplingConfig.temperature, metadata={"help": "Sampling temperature; 0 is greedy."}
    )
    top_k: int = field(
        default=SamplingConfig.top_k, metadata={"help": "Number of most likely tokens to draw from; 0 for all."}
    )
    top_p: float = field(
        default=SamplingConfig.top_p,
        metadata={"help": "Probability mass to draw from; below 1 it needs top_k where trajectories are kept."},
    )
    unmasking: str = field(
        default=SamplingConfig.unmasking,
        metadata={"help": f"How the positions to commit are chosen: {_RULES_IN_WORDS}."},
    )
    confidence_threshold: float | None = field(
        default=SamplingConfig.confidence_threshold,
        metadata={
            "help": "Commit every position whose largest probability (unmasking=max_prob) or drawn token's "
            "(low_confidence) reaches this."
        },
    )
    entropy_bound: float | None = field(
        default=SamplingConfig.entropy_bound,
        metadata={"help": "Commit positions up to this much entropy, in nats; with unmasking=entropy."},
    )
    cache: str = field(
        default=SamplingConfig.cache,
        metadata={
            "help": "Keys and values to reuse between steps: auto (the exact one), none, prefix or dual "
            "(approximate), or block (exact, for block-causal attention)."
        },
    )
    cache_refresh: int = field(
        default=SamplingConfig.cache_refresh,
        metadata={"help": "Steps between two full forwards with cache=prefix or dual; 0 for one per block."},
    )
    fallback: str = field(
        default=SamplingConfig.fallback,
        metadata={"help": "What commits where nothing reaches the confidence_threshold: surest or leftmost."},
    )
    position_temperature: float = field(
        default=SamplingConfig.position_temperature,
        metadata={"help": "Temperature at which unmasking=plackett_luce draws positions."},
    )

    def sampling_on(self, canvas_length: int, **others: Any) -> SamplingConfig:
        """Return the checked settings for a canvas; the same settings give the same object.

        Args:
            canvas_length: L, positions to write.
            **others: fields of `SamplingConfig` that are no options, or that replace an option.

        Raises:
            ValueError: if a setting is out of its range, or one rules out another.
        """
        return _checked(canvas_length=canvas_length, **{name: vars(self)[name] for name in OPTIONS} | others)


# Names of the options, in their order.
OPTIONS = tuple(option.name for option in fields(SamplingArguments))


@lru_cache(maxsize=256, typed=True)
def _checked(**settings: Any) -> SamplingConfig:
    # A trainer asks for its settings at every micro-batch, and its config can be changed between two of them. So the
    # checks are remembered by the values and not by the config.
    return SamplingConfig(**settings)


def with_default(name: str, default: Any) -> Any:
    """Declare an option again with another default and the same help, in a subclass of `SamplingArguments`."""
    (declared,) = (option for option in fields(SamplingArguments) if option.name == name)
    return field(default=default, metadata=declared.metadata)


@dataclass
class GreedyArguments(SamplingArguments):
    """The options of evaluation: by default the most likely token, at the position where the network is surest."""

    temperature: float = with_default("temperature", 0.0)
    unmasking: str = with_default("unmasking", "max_prob")


def refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], owner: str) -> None:
    """Refuse keyword arguments that are no settings of the sampler.

    Raises:
        TypeError: naming them and what there is.
    """
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"{owner} has no setting {', '.join(unknown)}. Its decoding settings are {', '.join(known)}.")
