"""Held-out accuracy of a model on a task, in memory: what training measures before, during and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_diffusion.evaluation.measurement import Measurement, Problems
from trl_diffusion.evaluation.results import summarise
from trl_diffusion.evaluation.samples import Sample
from trl_diffusion.evaluation.statistics import Estimate
from trl_diffusion.sampling import SamplingConfig


def evaluate_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    correct: Callable[[str, dict[str, Any]], bool],
    *,
    decoding: SamplingConfig,
    batch_size: int = 32,
    completions_per_prompt: int = 1,
    seed: int = 0,
    progress: bool = True,
    on_sample: Callable[[Sample], None] | None = None,
) -> Estimate:
    """Decode a completion for every prompt and count the right ones.

    Every completion has a private random stream, keyed by seed, row and number, as in `measure`. So the batch size
    changes no completion, except that it can decide a tie between two tokens by the rounding of floating-point sums.

    Args:
        model: a diffusion language model, possibly inside PEFT.
        tokenizer: its tokenizer, with a chat template if prompts are conversational.
        dataset: column `prompt`, and what `correct` reads.
        correct: returns true if a decoded completion (without special tokens) is right, given its row.
        decoding: how completions are decoded; the checkpoint's generation config is not read.
        batch_size: completions decoded together.
        completions_per_prompt: more than one to measure sampling accuracy.
        seed: seed of sampling.
        progress: show a progress bar.
        on_sample: called with every completion and its row, see `Measurement.decode`; for example to keep some.

    Returns:
        The accuracy over all completions. Its interval counts prompts.

    Raises:
        ValueError: if the data set has no rows or no `prompt`, or a prompt and the canvas do not fit into the model's
            positions.
    """
    problems = Problems.encode(
        "the data set", dataset, lambda text, row: {"accuracy": float(bool(correct(text, row)))}, tokenizer
    )
    measurement = Measurement(problems, decoding, {}, seed, completions_per_prompt, batch_size)
    measurement.check_fits(model)
    batches = tqdm(measurement.batches, desc="Evaluating", disable=not progress, leave=False)
    samples = [sample for batch in batches for sample in measurement.decode(model, tokenizer, batch)]
    if on_sample is not None:
        for sample in samples:
            on_sample(sample)
    return summarise({}, samples).scores["accuracy"]
