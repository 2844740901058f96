r"""Find where a model hesitates while it denoises, and how well that predicts failure (ATPO).

The embedded model on synthetic word problems (half a minute on a CPU core):

    trl-diffusion analyze

LLaDA-8B on GSM8K:

    trl-diffusion analyze GSAI-ML/LLaDA-8B-Instruct --task gsm8k \
        --canvas_length 256 --block_length 32 --denoising_steps 128 --num_selected 8 --batch_size 8

Writes `confusion_zones.png` (curves of entropy, confidence margin and RoEC by outcome, with the
steps that ATPO's selector `roec_cm` would choose), `.parquet` (every completion at every step) and
`.json` (AUCs and settings). The signals and the selector are those of 2511.15208.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from trl_diffusion.cli.loading import LoadingArguments
from trl_diffusion.cli.parsing import Parser, model_first
from trl_diffusion.credit import SELECTORS, step_signals, taken_steps
from trl_diffusion.evaluation import merge_for_decoding
from trl_diffusion.evaluation.confusion_zones import (
    SIGNALS,
    confusion_zone_figure,
    failure_auc,
    failure_auc_by_step,
    missing_outcome,
    outcomes,
    signal_frame,
)
from trl_diffusion.evaluation.decoding import decode_completions
from trl_diffusion.models import family_of
from trl_diffusion.models.embedded import BLOCKS_AND_STEPS, embedded_arguments, names_model
from trl_diffusion.sampling import SamplingArguments, SamplingConfig, row_generators, sample
from trl_diffusion.sampling.arguments import with_default
from trl_diffusion.tasks import TASKS
from trl_diffusion.tokenization import encode_prompt, left_pad


def held_out(task: str, size: int, seed: int) -> Dataset:
    """Return held-out problems: generated ones where the task has a generator, or the first of its test split."""
    found = TASKS[task]
    return found.load("test", limit=size) if found.generate is None else found.generate("test", size, seed)


@dataclass
class AnalysisArguments(LoadingArguments, SamplingArguments):
    """The model, the problems, and how completions are drawn. The defaults are made for the embedded model."""

    task: str = field(default="word_problems", metadata={"help": f"One of {', '.join(TASKS)}.", "choices": [*TASKS]})
    num_completions: int = field(default=256, metadata={"help": "Completions, one per held-out problem."})
    batch_size: int = field(default=64, metadata={"help": "Completions sampled together."})
    canvas_length: int = field(default=32, metadata={"help": "Positions to write."})
    block_length: int = with_default("block_length", 8)
    denoising_steps: int = with_default("denoising_steps", 16)
    num_selected: int = field(default=4, metadata={"help": "Steps that the selector roec_cm would choose, K."})
    seed: int = field(default=0, metadata={"help": "Seed of problems and sampling noise."})
    output_dir: str = field(default="outputs/analyze_trajectories", metadata={"help": "Where the results go."})

    def __post_init__(self):
        if min(self.num_completions, self.batch_size, self.num_selected) < 1:
            raise ValueError(
                f"num_completions ({self.num_completions}), batch_size ({self.batch_size}) and num_selected "
                f"({self.num_selected}) must be at least 1."
            )
        self.sampling_config()

    def sampling_config(self) -> SamplingConfig:
        """Return how completions are drawn."""
        return self.sampling_on(self.canvas_length, record_signals=True)


def sample_signals(model, tokenizer, problems: Dataset, correct, args: AnalysisArguments) -> tuple[torch.Tensor, ...]:
    """Sample a completion per problem, each from a private random stream.

    Returns:
        (step_entropy [B, S], step_margin [B, S], the step after the last one [B], steps taken [B, S], success [B]).
    """
    parts = []
    with tqdm(total=len(problems), desc="Sampling", unit="completion") as bar:
        for start in range(0, len(problems), args.batch_size):
            rows = [problems[row] for row in range(start, min(start + args.batch_size, len(problems)))]
            prompts = [encode_prompt(row["prompt"], tokenizer) for row in rows]
            ids, mask = (part.to(model.device) for part in left_pad(prompts, family_of(model).tail_token_id))
            streams = row_generators(args.seed, rows=range(start, start + len(rows)))
            trajectory = sample(model, ids, mask, args.sampling_config(), streams)
            texts = decode_completions(trajectory.completion_ids, model, tokenizer)
            success = torch.tensor([correct(text, row) for text, row in zip(texts, rows, strict=True)])
            assert trajectory.step_entropy is not None and trajectory.step_margin is not None
            taken = taken_steps(trajectory.unmask_step, trajectory.step_entropy.size(1))
            signals = trajectory.step_entropy, trajectory.step_margin, trajectory.steps_taken, taken
            parts.append((*(values.cpu() for values in signals), success))
            bar.update(len(rows))
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def auc_table(frame: pd.DataFrame, title: str) -> Table:
    success = outcomes(frame)
    counts = f"{success.sum()} of {len(success)} completions succeeded. AUC 0.5 predicts nothing, 1 every failure."
    table = Table("mean over the steps of", "AUC for failure", "standard error", title=title, caption=counts)
    for signal, (auc, error) in failure_auc(frame).iterrows():
        table.add_row(signal, *("–" if math.isnan(value) else f"{value:.3f}" for value in (auc, error)))
    return table


def summary(frame: pd.DataFrame, args: AnalysisArguments, selected: list[int]) -> dict:
    """Return the content of the JSON file, with `None` for a number that is not defined."""
    success, by_step = outcomes(frame), failure_auc_by_step(frame)

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    auc = {
        signal: {name: number(value) for name, value in row.items()} for signal, row in failure_auc(frame).iterrows()
    }
    return {
        **asdict(args),
        "succeeded": int(success.sum()),
        "failed": int((~success).sum()),
        "auc": auc,
        "auc_by_step": {signal: [number(value) for value in by_step[signal]] for signal in SIGNALS},
        "completions_by_step": by_step["completions"].tolist(),
        "selected_steps": selected,
        "note": missing_outcome(frame),
    }


OPTIONS = {"task": "--task", "canvas": "--canvas_length", "unmasking": "--unmasking"} | BLOCKS_AND_STEPS
SHOWN = ("adapter", "task", "num_completions", "canvas_length", "block_length", "denoising_steps", "num_selected")


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, analyse and write figure, steps and summary.

    Args:
        arguments: of the command line, after `analyze`.
    """
    words = model_first(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        [AnalysisArguments], "trl-diffusion analyze", __doc__, {"Options used most": (*SHOWN, "output_dir")}
    )
    for_bundled = embedded_arguments(words, [], OPTIONS, "--adapter")
    (args,) = parser.parse(words if for_bundled is None else for_bundled)
    console = Console()
    if args.model_name_or_path is None and args.adapter is None:
        args.model_name_or_path = "embedded"
    if for_bundled is not None and not names_model(words):
        name = args.model_name_or_path
        console.print(f"No model given: analysing {name}. It is tiny and was trained on faulty solutions.")
    model, tokenizer = args.load("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    model, _ = merge_for_decoding(model, args.merge_adapter)
    problems = held_out(args.task, args.num_completions, args.seed)
    correct = TASKS[args.task].is_correct
    entropy, margin, steps, taken, success = sample_signals(model, tokenizer, problems, correct, args)

    steps_per_block = args.sampling_config().steps_per_block
    frame = signal_frame(entropy, margin, steps, success, steps_per_block, taken)
    signals = step_signals(entropy, margin, taken, steps_per_block)
    chosen = SELECTORS["roec_cm"](signals, args.num_selected, torch.zeros_like(signals.entropy)).steps
    selected = chosen[chosen >= 0].tolist()

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{args.task}, {args.unmasking} unmasking, temperature {args.temperature:g}"
    confusion_zone_figure(frame, steps_per_block, selected, title).savefig(folder / "confusion_zones.png")
    frame.to_parquet(folder / "confusion_zones.parquet")
    results = summary(frame, args, selected)
    (folder / "confusion_zones.json").write_text(json.dumps(results, indent=2) + "\n")

    console.print(auc_table(frame, title))
    if results["note"]:
        console.print(results["note"])
    console.print(f"Steps that roec_cm selects with K = {args.num_selected}: {', '.join(map(str, selected))}")
    console.print(f"Figure, steps and summary: {folder}/confusion_zones.png, .parquet, .json")


if __name__ == "__main__":
    main()
