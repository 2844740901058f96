"""Arguments and generation configs of `generate()`, in transformers' words, as settings of the sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.sampling.arguments import OPTIONS, GreedyArguments
from trl_diffusion.sampling.canvas import CanvasState
from trl_diffusion.sampling.config import SamplingConfig
from trl_diffusion.sampling.sampler import sample
from trl_diffusion.sampling.trajectory import Trajectory
from trl_diffusion.streams import row_generators

logger = logging.get_logger(__name__)

DEFAULT_LENGTH, DEFAULT_BLOCK = 256, 32

# Fields of transformers' `GenerationConfig` that `generate()` reads.
READ = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "num_return_sequences",
    "pad_token_id",
    "eos_token_id",
    "return_dict_in_generate",
)
# Options of the sampler for which transformers has no name.
OWN = tuple(name for name in OPTIONS if name not in READ)
# Fields that ask for nothing at these values, and at `None` and `False`.
NEUTRAL: dict[str, Any] = {
    "use_cache": True,  # the exact cache is used anyway, see `cache`
    "num_beams": 1,
    "num_beam_groups": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
}
# Fields that are facts about a checkpoint and no settings.
FACTS = ("bos_token_id", "decoder_start_token_id", "transformers_version")
# Advice for settings that are refused.
ADVICE = {
    "inputs": "prompts are `input_ids`",
    "past_key_values": "see `cache`",
    "streamer": "see `observer` of `trl_diffusion.sampling.sample`; tokens are not written from left to right",
    "min_p": "use top_k and top_p",
    "num_beams": "use num_return_sequences with do_sample=True",
    "stop_strings": "cut the decoded text, or pass ids as eos_token_id",
    "stopping_criteria": "cut the decoded text, or pass ids as eos_token_id",
    "output_scores": "return_trajectory=True records log-probabilities",
    "output_logits": "return_trajectory=True records log-probabilities",
}


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """Result of `generate(..., return_dict_in_generate=True)`.

    Args:
        sequences: long [B, P + L].
        trajectory: how the completions came to be; `None` where they were drawn with `top_p` alone.
    """

    sequences: torch.Tensor | None = None
    trajectory: Trajectory | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of one call of `generate()`, after arguments and generation configs are merged.

    Args:
        length: canvas positions L.
        temperature: 0 is greedy.
        top_k: 0 for all.
        top_p: 1 for all.
        copies: completions per prompt.
        pad_token_id: fills what follows a finished text.
        end_token_ids: ids that end a text in addition to those of the family.
        return_dict: return a `DiffusionGenerateOutput`.
        own: options of the sampler that were given, those of `OWN`.
    """

    length: int
    temperature: float
    top_k: int
    top_p: float
    copies: int
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    return_dict: bool
    own: dict[str, Any] = field(default_factory=dict)

    def sampling_config(self, attention_block: int | None, return_trajectory: bool) -> SamplingConfig:
        """Return the settings of the sampler.

        Args:
            attention_block: as in `DiffusionFamily`.
            return_trajectory: the trajectory is asked for, so that the support of its tokens is recorded.

        Raises:
            ValueError: if a setting is out of its range, or one rules out another.
        """
        canvas_length, steps, block = canvas_plan(
            self.length, self.own.get("block_length"), self.own.get("denoising_steps"), attention_block
        )
        # A dictionary with `top_p` alone comes without a trajectory instead of being refused, see `complete`.
        return GreedyArguments(**self.own).sampling_on(
            canvas_length,
            denoising_steps=steps,
            block_length=block,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            record_support=return_trajectory or (self.return_dict and self.top_k > 0),
        )


def read_settings(
    arguments: Mapping[str, Any],
    given: GenerationConfig | None,
    own: GenerationConfig,
    family: DiffusionFamily,
    prompt_length: int,
) -> GenerationSettings:
    """Merge arguments, generation configs and defaults.

    An argument comes first, then the generation config that was given, then the checkpoint's, then the default.

    Args:
        arguments: keyword arguments of `generate()`: fields of `GenerationConfig` and options of the sampler. `None`
            counts as not given.
        given: its argument `generation_config`.
        own: the model's `generation_config`.
        family: the model's facts.
        prompt_length: P, padding included, for `max_length`.

    Raises:
        TypeError: if the config is no `GenerationConfig`.
        ValueError: for settings that diffusion sampling does not have, or that contradict each other.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(given).__name__}.")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    own_options = {name: arguments.pop(name) for name in OWN if name in arguments}
    of_file = _fields(own)
    of_config = {} if given is None else _fields(given)
    _refuse(arguments)
    # A config that is a changed copy of the checkpoint's has the rest of its fields too, so only what differs counts.
    _refuse({name: value for name, value in of_config.items() if of_file.get(name) != value})
    _warn_of_unread(of_file)
    defaults = of_file | of_config
    merged = defaults | arguments
    if merged.get("num_return_sequences", 1) < 1:
        raise ValueError(f"num_return_sequences must be at least 1, got {merged['num_return_sequences']}.")
    return GenerationSettings(
        length=_length([arguments, of_config, of_file], prompt_length),
        temperature=_temperature(arguments, defaults),
        top_k=merged.get("top_k", 0),
        top_p=merged.get("top_p", 1.0),
        copies=merged.get("num_return_sequences", 1),
        pad_token_id=merged.get("pad_token_id", family.tail_token_id),
        end_token_ids=_end_ids(merged.get("eos_token_id", ()), family),
        return_dict=merged.get("return_dict_in_generate", False),
        own=own_options,
    )


def canvas_plan(
    length: int, block_length: int | None, denoising_steps: int | None, attention_block: int | None
) -> tuple[int, int, int]:
    """Plan blocks and steps for a canvas of any length.

    If the block length is not given, blocks have 32 positions, or as many as the attention's; a shorter canvas is one
    block. If the steps are not given, every step commits two tokens. If the steps are given and the block length is
    not, blocks are the largest up to 32 that divide canvas and steps evenly.

    Returns:
        (canvas length in whole blocks, denoising steps, block length).

    Raises:
        ValueError: if no block length divides canvas and steps evenly.
    """
    block = attention_block if block_length is None else block_length
    if block is None:
        block = min(length, DEFAULT_BLOCK) if denoising_steps is None else _even_block(length, denoising_steps)
    num_blocks = -(-length // max(block, 1))  # `SamplingConfig` refuses what is below 1
    steps = num_blocks * max(block // 2, 1) if denoising_steps is None else denoising_steps
    return num_blocks * block, steps, block


def _even_block(length: int, steps: int) -> int:
    blocks = [block for block in range(1, min(length, DEFAULT_BLOCK) + 1) if length % block == 0]
    for block in reversed(blocks):
        if steps % (length // block) == 0:
            return block
    num_blocks = length // blocks[-1]
    raise ValueError(
        f"denoising_steps={steps} cannot be shared evenly by the blocks of a canvas of {length} positions. Choose a "
        f"multiple of {num_blocks} (blocks of {blocks[-1]}), or give block_length too."
    )


def complete(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: GenerationSettings,
    config: SamplingConfig,
    generator: torch.Generator | None,
) -> DiffusionGenerateOutput:
    """Draw the completions of prompts [B, P], and put the pad id after the end of each text.

    Args:
        model: a native diffusion language model.
        input_ids: long [B, P], left-padded.
        attention_mask: long [B, P], 0 on padding.
        settings: from `read_settings`.
        config: the settings of the sampler; its canvas is the length in whole blocks.
        generator: source of the seed of the rows' streams; PyTorch's global generator if `None`.

    Raises:
        ValueError: if several completions of a prompt are asked for and all would be equal.
    """
    drawn = config.unmasking == "random" or config.draws_positions
    if settings.copies > 1 and config.temperature == 0 and not drawn:
        raise ValueError(
            f"num_return_sequences={settings.copies} greedy completions of one prompt would all be equal. Sample with "
            "do_sample=True, or leave num_return_sequences out."
        )
    input_ids = input_ids.repeat_interleave(settings.copies, 0)
    family, state = family_of(model), None
    # The sampler writes whole blocks; a canvas that is no multiple of them ends inside the last block, whose other
    # positions are cut from what the network sees.
    if settings.length < config.canvas_length:
        state = CanvasState.empty(len(input_ids), config.canvas_length, family.mask_token_id, input_ids.device)
        state.length.fill_(settings.length)
    # One draw from the caller's generator keys a private stream per row, so that rows do not depend on each other.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"))
    trajectory = sample(
        model,
        input_ids,
        attention_mask.repeat_interleave(settings.copies, 0),
        config,
        row_generators(seed, rows=range(len(input_ids))),
        state=state,
        end_token_ids=settings.end_token_ids,
    ).cut(settings.length)
    family = replace(family, end_token_ids=(*family.end_token_ids, *settings.end_token_ids))
    after = torch.arange(settings.length, device=input_ids.device)
    after = after >= family.effective_length(trajectory.completion_ids).unsqueeze(1)
    completions = trajectory.completion_ids.masked_fill(after, settings.pad_token_id)
    return DiffusionGenerateOutput(
        sequences=torch.cat([input_ids, completions], dim=1),
        trajectory=trajectory if config.record_support or not config.truncates else None,
    )


def _fields(config: GenerationConfig) -> dict[str, Any]:
    """Return the fields that a config sets."""
    return {name: value for name, value in config.to_diff_dict().items() if value is not None and name[0] != "_"}


def _not_read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that ask for something which diffusion sampling does not have."""
    return {
        name: value
        for name, value in settings.items()
        if name not in READ and name not in FACTS and value is not False and (name, value) not in NEUTRAL.items()
    }


def _refuse(settings: Mapping[str, Any]) -> None:
    if refused := _not_read(settings):
        names = "; ".join(f"{name} ({ADVICE[name]})" if name in ADVICE else name for name in refused)
        raise ValueError(
            f"generate() of a diffusion language model does not have these settings: {names}. Leave them out. It "
            f"has {', '.join((*READ, *OWN))}."
        )


def _warn_of_unread(of_file: Mapping[str, Any]) -> None:
    if unread := _not_read(of_file):
        logger.warning_once(  # type: ignore[attr-defined]  # transformers adds it to loggers
            f"The checkpoint's generation config has settings that diffusion sampling does not have, and that "
            f"generate() does not read: {unread}."
        )


def _length(layers: Sequence[Mapping[str, Any]], prompt_length: int) -> int:
    """Return the canvas length that the first of the layers gives."""
    arguments = layers[0]
    if "max_new_tokens" in arguments and "max_length" in arguments:
        raise ValueError(
            f"max_new_tokens={arguments['max_new_tokens']} and max_length={arguments['max_length']} both set the "
            "length of the canvas: give one of them."
        )
    for layer in layers:
        if "max_new_tokens" in layer:
            if (length := layer["max_new_tokens"]) < 1:
                raise ValueError(f"max_new_tokens must be at least 1, got {length}.")
            return length
        if "max_length" in layer:
            if (length := layer["max_length"] - prompt_length) < 1:
                raise ValueError(
                    f"max_length={layer['max_length']} counts the prompt, which has {prompt_length} tokens, so no "
                    "position is left to write. Raise it, or give max_new_tokens."
                )
            return length
    return DEFAULT_LENGTH


def _temperature(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> float:
    """Return the temperature, 0 for greedy.

    `do_sample` alone means temperature 1, as in transformers; a temperature alone means sampling.
    """
    do_sample, temperature = arguments.get("do_sample"), arguments.get("temperature")
    if do_sample is not None and temperature is not None and do_sample != (temperature > 0):
        raise ValueError(
            f"do_sample={do_sample} and temperature={temperature} contradict each other: greedy decoding is "
            "do_sample=False or temperature=0, sampling do_sample=True or a temperature above 0. Give one of them."
        )
    if temperature is not None:
        return temperature
    if do_sample is not None:
        return (defaults.get("temperature") or 1.0) if do_sample else 0.0
    if "do_sample" in defaults:
        return defaults.get("temperature", 1.0) if defaults["do_sample"] else 0.0
    return defaults.get("temperature", 0.0)


def _end_ids(given: Any, family: DiffusionFamily) -> tuple[int, ...]:
    ids = torch.as_tensor(given, dtype=torch.long).flatten().tolist()
    if outside := [token for token in ids if not 0 <= token < family.num_tokens or token == family.mask_token_id]:
        raise ValueError(
            f"eos_token_id holds {outside[0]}, an id that is never sampled: ids run from 0 to "
            f"{family.num_tokens - 1}, and {family.mask_token_id} is the mask. Leave it out; the family's own end "
            "ids end a text in any case."
        )
    return tuple(ids)
