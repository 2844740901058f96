"""Evaluation of a model or an adapter: tasks × canvas lengths × denoising steps, every sample on disk.

The embedded model on all tasks that work offline (a minute or two on two CPU cores):

    python recipes/evaluate.py

An adapter, on eight GPUs:

    accelerate launch --config_file trl_diffusion/accelerate_configs/multi_gpu.yaml recipes/evaluate.py \
        --config trl_diffusion/configs/llada_8b/evaluate.yaml --adapter outputs/llada_8b_gsm8k_agrpo

A run that was stopped continues when the same command is given again, with any number of processes. Everything in a
config can be overridden on the command line.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from rich.console import Console
from trl import TrlParser

from trl_diffusion.evaluation import (
    Measurement,
    Problems,
    console_table,
    join_processes,
    load_model,
    measure,
    weights_checksum,
    write_results,
)
from trl_diffusion.models.embedded import EMBEDDED_MODEL, embedded_arguments
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.sampling.arguments import GreedyArguments
from trl_diffusion.tasks import TASKS, Task

EMBEDDED_CONFIG = Path(__file__).parents[1] / "configs" / "embedded" / "evaluate.yaml"


@dataclass
class EvaluateArguments(GreedyArguments):
    """The model, the tasks, and how they are decoded."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model on the Hub or folder, or `embedded_sdar`; the embedded one if there is no model or adapter."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "PEFT adapter; its own base is loaded if none is given."}
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Accept an adapter whose config names another base, because it has moved."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Type of the weights; `auto` for the checkpoint's."})
    attn_implementation: str | None = field(default=None, metadata={"help": "As in transformers."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU although there is a GPU."})

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

    canvas_lengths: list[int] = field(default_factory=lambda: [256], metadata={"help": "Positions to write."})
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

    def decodings(self) -> list[SamplingConfig]:
        """Return the settings for every canvas length with every number of steps.

        Raises:
            ValueError: if a number of steps cannot be spread over the blocks of a canvas.
        """
        return [
            self.sampling_on(canvas, denoising_steps=steps, record_support=False)
            for canvas in self.canvas_lengths
            for steps in self.denoising_steps or [canvas // 2]
        ]


def parse(arguments: list[str]) -> tuple[EvaluateArguments, bool]:
    """Parse the arguments; the second value is true if no model was given and the embedded one is evaluated."""
    config = ["--config", str(EMBEDDED_CONFIG)]
    for_embedded = embedded_arguments(arguments, config, "--block_length", "--adapter")
    arguments = arguments if for_embedded is None else for_embedded
    (args,) = TrlParser((EvaluateArguments,)).parse_args_and_config(arguments)
    by_default = args.model_name_or_path is None and args.adapter is None
    if by_default:
        args.model_name_or_path = EMBEDDED_MODEL
    return args, by_default


def scorer(task: Task, protocols: list[str]):
    """Return one score function for all protocols; the names of d1's scores begin with `d1`."""
    if unknown := set(protocols) - {"own", "d1"}:
        raise ValueError(f"Protocols are 'own' and 'd1', got {sorted(unknown)}.")
    if "d1" in protocols and task.score_d1 is None:
        raise ValueError(f"d1 has no protocol for {task.name}; evaluate it without `d1` in --protocols.")

    def score(text: str, row: dict) -> dict[str, float]:
        scores = task.score(text, row) if "own" in protocols else {}
        if "d1" in protocols:
            scores = scores | {f"d1 {name}": value for name, value in task.score_d1(text, row).items()}
        return scores

    return score


def requested(args: EvaluateArguments) -> list[tuple[Task, str | None]]:
    """Return the tasks, each with the source of its rows."""
    tasks = []
    for specification in args.tasks or [f"{name}=embedded" for name, task in TASKS.items() if task.embedded]:
        name, _, source = specification.partition("=")
        if name not in TASKS:
            raise ValueError(f"Unknown task {name!r}; there are {', '.join(TASKS)}.")
        if args.prompt not in TASKS[name].prompts:
            raise ValueError(f"{name} has the prompts {', '.join(TASKS[name].prompts)}; got {args.prompt!r}.")
        tasks.append((TASKS[name], source or None))
    return tasks


def origin(args: EvaluateArguments, source: str | None) -> dict:
    kept = {key: vars(args)[key] for key in ("split", "prompt", "limit", "protocols")}
    return {"source": source or "default", **kept}


def main() -> None:
    args, by_default = parse(sys.argv[1:])
    # Everything that needs no model is checked and loaded first.
    decodings, tasks = args.decodings(), requested(args)
    scores = [scorer(task, args.protocols) for task, _ in tasks]
    state = join_processes(args.use_cpu)
    if by_default and state.is_main_process:
        print("No model given: evaluating the embedded one. It is tiny and was trained on faulty solutions.")
    with state.main_process_first():  # one process downloads, the others find it in the cache
        rows = [task.load(args.split, source=source, limit=args.limit, prompt=args.prompt) for task, source in tasks]
    model, tokenizer = load_model(
        args.model_name_or_path,
        args.adapter,
        revision=args.model_revision,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        device=state.device,
        allow_other_base=args.allow_other_base,
    )
    problems = [
        Problems.encode(task.name, data, score, tokenizer, origin(args, source))
        for (task, source), data, score in zip(tasks, rows, scores, strict=True)
    ]
    model_facts = {
        "model": args.model_name_or_path,
        "revision": args.model_revision,
        "adapter": args.adapter,
        "dtype": str(model.dtype),
        "device": state.device.type,
        "weights": weights_checksum(model),
    }
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
