"""Decoding in fixed batches, so that neither the number of processes nor a restart changes a completion.

The shape of a batch decides in which order floating-point sums are formed, and that can decide a tie between two
tokens. So batches are made from the prompts alone, and whole batches are dealt to processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_diffusion.family import family_of
from trl_diffusion.sampling import SamplingConfig, sample
from trl_diffusion.tokenization import left_pad


@dataclass(frozen=True)
class Decoded:
    """A completion and its cost.

    Args:
        text: without special tokens, up to the first end id.
        tokens: up to and including the first end id.
        forwards: denoising steps that this row took part in, one network evaluation each.
        ended: true if there is an end id; if not, the canvas was too short.
    """

    text: str
    tokens: int
    forwards: int
    ended: bool


def fixed_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group indices of similar length into batches, so that little is padded; they depend on the lengths alone.

    Raises:
        ValueError: if `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    generators: Sequence[np.random.Generator],
) -> list[Decoded]:
    """Complete prompts, all in one batch.

    Args:
        model: a diffusion language model, possibly inside PEFT.
        tokenizer: its tokenizer.
        prompts: token ids, not empty.
        config: how to decode.
        generators: one random stream per prompt.

    Returns:
        One completion per prompt.
    """
    input_ids, attention_mask = left_pad(prompts, family_of(model).tail_token_id)
    trajectory = sample(model, input_ids.to(model.device), attention_mask.to(model.device), config, generators)
    completions = trajectory.completion_ids
    return [
        Decoded(text, tokens, forwards, ended)
        for text, tokens, forwards, ended in zip(
            decode_completions(completions, model, tokenizer),
            family_of(model).effective_length(completions).tolist(),
            trajectory.row_forwards.tolist(),
            family_of(model).is_end(completions).any(1).tolist(),
            strict=True,
        )
    ]


def decode_completions(
    completion_ids: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Decode canvases [B, L] to texts, each cut before its first end id."""
    lengths = family_of(model).effective_length(completion_ids).tolist()
    return [
        str(tokenizer.decode(ids[:length], skip_special_tokens=True))
        for ids, length in zip(completion_ids, lengths, strict=True)
    ]
