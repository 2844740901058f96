"""Accuracy of a model on a task, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_diffusion.evaluation.decoding import decode_completions, encode_prompt, left_pad
from trl_diffusion.family import family_of
from trl_diffusion.sampling.positions import check_fits


@dataclass(frozen=True)
class Accuracy:
    """Share of completions that are right.

    Args:
        correct: number of right completions.
        total: number of completions.
        low: lower end of the 95 % Wilson interval; it takes completions as independent.
        high: upper end.
    """

    correct: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.correct / self.total

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] of {self.total}"


def wilson_interval(correct: float, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default; unlike the normal one it stays within [0, 1].

    Args:
        correct: number of successes. For scores between 0 and 1 their sum: such scores vary less than successes of the
            same mean, so the interval is then too wide rather than too narrow.
        total: number of independent trials.
        z: quantile of the normal distribution.

    Raises:
        ValueError: if the numbers are not those of a proportion.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"An interval needs 0 ≤ correct ≤ total and total > 0, got {correct} of {total}.")
    share = correct / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    # the share lies within, also where rounding says otherwise: at none or all
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def evaluate_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    correct: Callable[[str, dict[str, Any]], bool],
    *,
    canvas_length: int = 256,
    denoising_steps: int = 128,
    block_length: int = 32,
    batch_size: int = 32,
    temperature: float = 0.0,
    unmasking: str = "max_prob",
    completions_per_prompt: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Accuracy:
    """Decode a completion for every prompt and count the right ones.

    Greedy by default. The same arguments give the same completions: sampling draws from a generator of its own.

    Args:
        model: a diffusion language model, also behind PEFT.
        tokenizer: its tokenizer, with a chat template if prompts are conversational.
        dataset: column `prompt`, and what `correct` reads.
        correct: tells from the decoded completion (without special tokens) and its row whether it is right.
        canvas_length: positions to write.
        denoising_steps: network evaluations per canvas.
        block_length: positions per block.
        batch_size: completions decoded together.
        temperature: 0 is greedy.
        unmasking: see `trl_diffusion.sampling.SamplingConfig`.
        completions_per_prompt: more than one to measure sampling accuracy.
        seed: seed of sampling.
        progress: show a progress bar.

    Returns:
        The accuracy over all completions.

    Raises:
        ValueError: if the data set has no rows or no `prompt`.
    """
    if len(dataset) == 0 or "prompt" not in dataset.column_names:
        raise ValueError(
            f"evaluate_accuracy needs rows with a `prompt`; got {len(dataset)} rows with {dataset.column_names}."
        )
    prompts = [encode_prompt(prompt, tokenizer) for prompt in dataset["prompt"]]
    check_fits(model, max(map(len, prompts)), canvas_length, "the data set")
    # Prompts of similar length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    order = [row for row in order for _ in range(completions_per_prompt)]
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for start in tqdm(range(0, len(order), batch_size), desc="Evaluating", disable=not progress, leave=False):
        rows = order[start : start + batch_size]
        input_ids, attention_mask = left_pad([prompts[row] for row in rows], family_of(model).tail_token_id)
        output = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=canvas_length,
            denoising_steps=denoising_steps,
            block_length=block_length,
            temperature=temperature,
            top_k=0,  # whatever the checkpoint's generation_config.json says
            top_p=1.0,
            unmasking=unmasking,
            generator=generator,
        )
        texts = decode_completions(output[:, input_ids.size(1) :], model, tokenizer)
        right += sum(bool(correct(text, dataset[row])) for text, row in zip(texts, rows, strict=True))
    return Accuracy(right, len(order), *wilson_interval(right, len(order)))
