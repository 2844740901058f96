r"""Measure a model or an adapter: tasks × canvas lengths × denoising steps, every sample on disk.

The bundled model on all tasks that work offline (a minute or two on two CPU cores), and a model
that was trained from it:

    trl-diffusion evaluate
    trl-diffusion evaluate outputs/gsm8k_agrpo --tasks word_problems=embedded

An adapter of LLaDA-8B, on eight GPUs:

    trl-diffusion evaluate --config llada_8b/evaluate --accelerate_config multi_gpu \
        --adapter outputs/llada_8b_gsm8k_agrpo

A run that was stopped continues when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from rich.console import Console

from trl_diffusion.cli.loading import LoadingArguments
from trl_diffusion.cli.names import CONFIGS, check_model_name
from trl_diffusion.cli.parsing import Parser, model_first
from trl_diffusion.evaluation import (
    Measurement,
    Problems,
    console_table,
    join_processes,
    measure,
    merge_for_decoding,
    weights_checksum,
    write_results,
)
from trl_diffusion.family import family_of
from trl_diffusion.models.embedded import (
    BLOCKS_AND_STEPS,
    EMBEDDED_MODEL,
    EMBEDDED_MODELS,
    embedded_arguments,
    names_model,
)
from trl_diffusion.runtime.recorded_decoding import recorded_decoding
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.arguments import GreedyArguments
from trl_diffusion.tasks import TASKS, Task
from trl_diffusion.validation import one_of

SHOWN = (
    "adapter",
    "tasks",
    "split",
    "limit",
    "prompt",
    "protocols",
    "canvas_lengths",
    "denoising_steps",
    "block_length",
    "temperature",
    "completions_per_prompt",
    "batch_size",
    "dtype",
    "seed",
    "output_dir",
)
LONGEST_CANVAS, LONGEST_BLOCK = 256, 32  # where nothing is given and nothing recorded


@dataclass
class EvaluateArguments(LoadingArguments, GreedyArguments):
    """The model, the tasks, and how they are decoded."""

    allow_other_base: bool = field(
        default=False, metadata={"help": "Accept an adapter whose config names another base, because it has moved."}
    )

    tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME for the task's own data set, NAME=FILE for a local file or another data set on the Hub, "
            "NAME=embedded for problems generated offline. All embedded ones if not given."
        },
    )
    split: str = field(default="test", metadata={"help": "Split of the data."})
    prompt: str = field(default="plain", metadata={"help": "Name of the prompt, for example `plain` or `d1`."})
    limit: int | None = field(default=None, metadata={"help": "Keep the first rows of every task only."})
    protocols: list[str] = field(
        default_factory=lambda: ["own"],
        metadata={"help": "How answers are read: `own`, `d1` (the parsers of 2504.12216), or both."},
    )

    canvas_lengths: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Positions to write. If not given, the canvas that the model or adapter was trained on, or up to "
            f"{LONGEST_CANVAS}, as the model has positions."
        },
    )
    block_length: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": f"Positions per block. If not given, as in training, or up to {LONGEST_BLOCK}."},
    )
    # A list, where other commands have one number: every canvas is decoded with each.
    denoising_steps: list[int] = field(  # type: ignore[assignment]
        default_factory=list, metadata={"help": "Steps per canvas; half of each canvas length if not given."}
    )
    completions_per_prompt: int = field(default=1, metadata={"help": "Completions of every prompt."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})

    batch_size: int = field(default=32, metadata={"help": "Completions decoded together."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where samples and summary go."})

    def __post_init__(self) -> None:
        for name in ("limit", "completions_per_prompt", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def decodings(self, canvas_length: int, block_length: int, denoising_steps: int) -> list[SamplingConfig]:
        """Return the settings for every canvas length with every number of steps.

        Args:
            canvas_length: positions to write if no canvas is given.
            block_length: positions per block if not given.
            denoising_steps: steps on this canvas if neither canvas nor steps are given.

        Raises:
            ValueError: if a number of steps cannot be spread over the blocks of a canvas.
        """
        steps_on = {canvas: self.denoising_steps or [canvas // 2] for canvas in self.canvas_lengths}
        steps_on = steps_on or {canvas_length: self.denoising_steps or [denoising_steps]}
        block = self.block_length or block_length
        return [
            self.sampling_on(canvas, block_length=block, denoising_steps=steps, record_support=False)
            for canvas, all_steps in steps_on.items()
            for steps in all_steps
        ]

    @property
    def trained(self) -> dict[str, int] | None:
        """The canvas that the model or the adapter was trained on, where it is recorded; see `recorded_decoding`."""
        name = self.adapter or self.model_name_or_path
        return recorded_decoding(EMBEDDED_MODELS.get(str(name), str(name)))


def canvas_that_fits(positions: int, longest_prompt: int, attention_block: int | None) -> dict[str, int]:
    """Return canvas, block and steps for a model of which no training is recorded.

    Args:
        positions: that the model has.
        longest_prompt: tokens of the longest prompt.
        attention_block: as in `DiffusionFamily`.

    Raises:
        ValueError: if the prompt leaves no room.
    """
    room = min(LONGEST_CANVAS, positions - longest_prompt)
    if room < 1:
        raise ValueError(f"the longest prompt has {longest_prompt} tokens, and the model {positions} positions.")
    block = attention_block or min(LONGEST_BLOCK, 2 ** (room.bit_length() - 1))
    canvas = max(room // block, 1) * block
    return {"canvas_length": canvas, "block_length": block, "denoising_steps": max(canvas // 2, 1)}


def parse(arguments: Sequence[str]) -> tuple[EvaluateArguments, bool]:
    """Parse the arguments; the second value is true if no model was given and the bundled one is evaluated."""
    words = model_first(arguments)
    config = ["--config", str(CONFIGS / "embedded" / "evaluate.yaml")]
    options = {"task": "--tasks", "canvas": "--canvas_lengths"} | BLOCKS_AND_STEPS
    for_bundled = embedded_arguments(words, config, options, "--adapter")
    parser = Parser([EvaluateArguments], "trl-diffusion evaluate", __doc__, {"Options used most": SHOWN})
    (args,) = parser.parse(words if for_bundled is None else for_bundled)
    if args.model_name_or_path is None and args.adapter is None:
        args.model_name_or_path = EMBEDDED_MODEL
    elif args.model_name_or_path is not None:
        check_model_name(args.model_name_or_path)
    return args, for_bundled is not None and not names_model(words)


def scorer(task: Task, protocols: list[str]):
    """Return one score function for all protocols; the names of d1's scores begin with `d1`."""
    for protocol in protocols:
        one_of("protocols", protocol, ("own", "d1"))
    score_d1 = task.score_d1
    if "d1" in protocols and score_d1 is None:
        raise ValueError(f"d1 has no protocol for {task.name}; evaluate it without `d1` in --protocols.")

    def score(text: str, row: dict) -> dict[str, float]:
        scores = task.score(text, row) if "own" in protocols else {}
        if "d1" in protocols:
            assert score_d1 is not None
            scores = scores | {f"d1 {name}": value for name, value in score_d1(text, row).items()}
        return scores

    return score


def requested(args: EvaluateArguments) -> list[tuple[Task, str | None]]:
    """Return the tasks, each with the source of its rows."""
    tasks = []
    for specification in args.tasks or [f"{name}=embedded" for name, task in TASKS.items() if task.embedded]:
        name, _, source = specification.partition("=")
        one_of("tasks", name, TASKS)
        one_of(f"prompt (of {name})", args.prompt, TASKS[name].prompts)
        tasks.append((TASKS[name], source or None))
    return tasks


def origin(args: EvaluateArguments, source: str | None) -> dict:
    kept = {key: vars(args)[key] for key in ("split", "prompt", "limit", "protocols")}
    return {"source": source or "default", **kept}


def _room(model: Any, problems: Sequence[Problems]) -> dict[str, int]:
    longest = max(len(prompt) for each in problems for prompt in each.prompts)
    return canvas_that_fits(model.config.max_position_embeddings, longest, family_of(model).attention_block)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says.

    Args:
        arguments: of the command line, after `evaluate`.
    """
    args, by_default = parse(sys.argv[1:] if arguments is None else arguments)
    # Everything that needs no model is checked and loaded first.
    tasks, trained = requested(args), args.trained
    if args.canvas_lengths and args.block_length is not None:
        args.decodings(0, 0, 0)
    scores = [scorer(task, args.protocols) for task, _ in tasks]
    state = join_processes(args.use_cpu)
    if by_default and state.is_main_process:
        print("No model given: evaluating the bundled one. It is tiny and was trained on faulty solutions.")
    with state.main_process_first():  # one process downloads, the others find it in the cache
        rows = [task.load(args.split, source=source, limit=args.limit, prompt=args.prompt) for task, source in tasks]
    model, tokenizer = args.load(state.device, args.allow_other_base)
    problems = [
        Problems.encode(task.name, data, score, tokenizer, origin(args, source))
        for (task, source), data, score in zip(tasks, rows, scores, strict=True)
    ]
    decodings = args.decodings(**(trained or _room(model, problems)))
    model_facts = {
        "model": args.model_name_or_path,
        "revision": args.model_revision,
        "adapter": args.adapter,
        "dtype": str(model.dtype),
        "device": state.device.type,
        "weights": weights_checksum(model),
    }
    model, merged = merge_for_decoding(model, args.merge_adapter)
    if merged is not None:  # the numbers of a merged adapter differ by rounding
        model_facts["adapter_merged"] = merged
        if state.is_main_process:
            print(f"Adapter merged into its base: {merged}.")
    measurements = [
        Measurement(each, decoding, model_facts, args.seed, args.completions_per_prompt, args.batch_size)
        for each, decoding in product(problems, decodings)
    ]
    results = measure(model, tokenizer, measurements, args.output_dir, state)
    if state.is_main_process:
        write_results(results, args.output_dir)
        # Where there is no terminal, rich would squeeze the table into 80 columns.
        Console(width=None if sys.stdout.isatty() else 160).print(console_table(results))
        print(f"Samples, summary.json, summary.md and accuracy.png: {args.output_dir}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
