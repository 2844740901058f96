"""Measuring a model on tasks under several decodings, over processes; a run that was stopped can be continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_diffusion import __version__
from trl_diffusion.evaluation.decoding import Decoded, decode_batch, fixed_batches
from trl_diffusion.evaluation.results import Result, summarise
from trl_diffusion.evaluation.samples import Sample, SampleStore
from trl_diffusion.sampling import SamplingConfig, row_generators
from trl_diffusion.sampling.positions import check_fits
from trl_diffusion.tasks.task import Score
from trl_diffusion.tokenization import encode_prompt


@dataclass(frozen=True)
class Problems:
    """The rows of a task, ready to be decoded.

    Args:
        name: name for tables and file names.
        rows: column `prompt` and what `score` reads.
        score: names and scores in [0, 1] of a completion; the first is the headline.
        prompts: token ids of each row's prompt.
        origin: where the rows come from (source, split, prompt style …); kept with the results.
    """

    name: str
    rows: Dataset
    score: Score
    prompts: list[list[int]]
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def encode(
        cls,
        name: str,
        rows: Dataset,
        score: Score,
        tokenizer: PreTrainedTokenizerBase,
        origin: dict[str, Any] | None = None,
    ) -> Problems:
        """Encode the prompts of a data set.

        Raises:
            ValueError: if it has no rows or no column `prompt`.
        """
        if len(rows) == 0 or "prompt" not in rows.column_names:
            raise ValueError(
                f"An evaluation needs rows with a `prompt`; {name} has {len(rows)} rows with {rows.column_names}."
            )
        return cls(name, rows, score, [encode_prompt(prompt, tokenizer) for prompt in rows["prompt"]], origin or {})

    def reference(self, row: int) -> dict[str, Any]:
        """Return the columns of a row that `score` reads."""
        return {key: value for key, value in self.rows[row].items() if key not in ("prompt", "completion")}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all prompts and references, 16 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=8)
        for row, prompt in enumerate(self.prompts):
            digest.update(json.dumps([prompt, self.reference(row)], default=str).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Measurement:
    """One task under one decoding.

    Args:
        problems: the task's rows.
        decoding: how completions are decoded.
        model_facts: facts that identify the model; kept with the results.
        seed: seed of sampling. Every completion has its own random stream, keyed by seed and index.
        completions_per_prompt: more than one to measure sampling accuracy.
        batch_size: completions decoded together.
    """

    problems: Problems
    decoding: SamplingConfig
    model_facts: dict[str, Any]
    seed: int = 0
    completions_per_prompt: int = 1
    batch_size: int = 32

    def check_fits(self, model: PreTrainedModel) -> None:
        """Check that every prompt fits into the model's positions together with the canvas.

        Raises:
            ValueError: if one does not.
        """
        check_fits(model, max(map(len, self.problems.prompts)), self.decoding.canvas_length, self.problems.name)

    @property
    def name(self) -> str:
        return f"{self.problems.name}-canvas{self.decoding.canvas_length}-steps{self.decoding.denoising_steps}"

    @cached_property
    def batches(self) -> list[list[int]]:
        """Indices of completions (row · completions_per_prompt + number)."""
        lengths = [len(prompt) for prompt in self.problems.prompts for _ in range(self.completions_per_prompt)]
        return fixed_batches(lengths, self.batch_size)

    @property
    def decoding_facts(self) -> dict[str, Any]:
        """The settings of decoding that change a completion."""
        facts = asdict(self.decoding)
        for name in ("record_signals", "record_support", "shift_window"):  # what is recorded, not what is drawn
            del facts[name]
        return facts

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the samples depend on."""
        return {
            "task": self.problems.name,
            **self.problems.origin,
            "problems": len(self.problems.prompts),
            "fingerprint_of_problems": self.problems.fingerprint,
            "model": self.model_facts,
            "decoding": self.decoding_facts,
            "seed": self.seed,
            "completions_per_prompt": self.completions_per_prompt,
            "batch_size": self.batch_size,
            "versions": {
                "trl_diffusion": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def decode(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, indices: Sequence[int]
    ) -> list[Sample]:
        """Decode and score one batch."""
        prompts = [self.problems.prompts[index // self.completions_per_prompt] for index in indices]
        generators = row_generators(self.seed, rows=indices)
        completions = decode_batch(model, tokenizer, prompts, self.decoding, generators)
        return [
            self._sample(index, str(tokenizer.decode(prompt)), completion)
            for index, prompt, completion in zip(indices, prompts, completions, strict=True)
        ]

    def _sample(self, index: int, prompt: str, completion: Decoded) -> Sample:
        row = index // self.completions_per_prompt
        return {
            "index": index,
            "row": row,
            "prompt": prompt,
            "completion": completion.text,
            "scores": self.problems.score(completion.text, self.problems.rows[row]),
            "reference": self.problems.reference(row),
            "tokens": completion.tokens,
            "ended": completion.ended,
            "forwards": completion.forwards,
            "tokens_per_forward": completion.tokens / completion.forwards,
            "seed": self.seed,
            "decoding": self.decoding_facts,
        }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    measurements: Sequence[Measurement],
    output_dir: str | Path,
    state: PartialState,
    progress: bool = True,
) -> list[Result]:
    """Run measurements, over all processes, and write every sample.

    Whole batches are dealt to the processes, and each is on disk before the next is decoded. So the number of
    processes changes nothing, and a run that was stopped continues from there, with any number of processes. The
    samples of a measurement are in `<output_dir>/<its name>/samples.jsonl`.

    Args:
        model: a diffusion language model, possibly inside PEFT; every process holds all of it.
        tokenizer: its tokenizer.
        measurements: tasks and decodings; no two of the same name.
        output_dir: folder of the samples, those of an earlier run included.
        state: this process among the others.
        progress: show a progress bar.

    Returns:
        One result per measurement, in every process.

    Raises:
        ValueError: if a canvas does not fit, two measurements have one name, or a folder holds samples of other
            settings.
    """
    names = [measurement.name for measurement in measurements]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Every measurement needs another name; given more than once: {', '.join(doubled)}.")
    for measurement in measurements:
        measurement.check_fits(model)
    stores = [SampleStore(Path(output_dir) / m.name, m.settings, m.batches) for m in measurements]
    if state.is_main_process:
        for store in stores:
            store.prepare()
    state.wait_for_everyone()
    pending = [(which, number) for which, store in enumerate(stores) for number in store.pending()]
    state.wait_for_everyone()  # all have read what is pending before anyone writes

    total = sum(len(store.batches) for store in stores)
    if progress and state.is_main_process and len(pending) < total:
        tqdm.write(f"Continuing: {total - len(pending)} of {total} batches are on disk.")

    mine = pending[state.process_index :: state.num_processes]
    for which, number in _progress(mine, names, progress and state.is_local_main_process):
        samples = measurements[which].decode(model, tokenizer, measurements[which].batches[number])
        stores[which].append(state.process_index, samples)

    state.wait_for_everyone()
    if state.is_main_process:
        for store in stores:
            store.finish()
    state.wait_for_everyone()
    return [summarise(m.settings, store.read()) for m, store in zip(measurements, stores, strict=True)]


def _progress(mine: list[tuple[int, int]], names: list[str], shown: bool) -> Iterator[tuple[int, int]]:
    with tqdm(mine, unit="batch", disable=not shown) as bar:
        for which, number in bar:
            bar.set_description(names[which])
            yield which, number
