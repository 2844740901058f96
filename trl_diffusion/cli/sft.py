r"""Masked supervised fine-tuning as in d1 (2504.12216), from rows to a trained model or adapter.

The bundled model on right solutions of word problems (about a minute on two CPU cores):

    trl-diffusion train sft

LLaDA-8B on GSM8K, on eight GPUs:

    trl-diffusion train sft --config llada_8b/sft --accelerate_config multi_gpu

Rows of any kind that have the columns `prompt` and `completion`:

    trl-diffusion train sft --dataset_path rows.jsonl

On a task, held-out accuracy is measured before and after; on other rows, their held-out loss.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from transformers import ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from trl_diffusion.cli.common import (
    Choice,
    RunArguments,
    ShortProgress,
    measure_accuracy,
    parse,
    report,
    train_and_save,
)
from trl_diffusion.cli.dry_run import dry_run
from trl_diffusion.cli.loading import load_tokenizer, new_adapter
from trl_diffusion.cli.names import suggesting
from trl_diffusion.evaluation.training_report import loss_section
from trl_diffusion.runtime.forecast import Evaluation
from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.rows import hold_out, is_file, read_rows
from trl_diffusion.trainers import SFTConfig, SFTTrainer


@dataclass
class SFTArguments(RunArguments):
    """What to train on, and how held-out accuracy is measured."""

    dataset_path: str = field(
        default="gsm8k",
        metadata={
            "help": "A task with worked solutions: NAME for its own data set, NAME=SOURCE for a local file or another "
            "data set on the Hub, NAME=embedded for generated problems; the NAMEs are "
            f"{', '.join(TASKS)}. Or any data set on the Hub or JSON-lines file with `prompt` and `completion`."
        },
    )
    dataset_size: int | None = field(
        default=None,
        metadata={"help": "Rows to train on: the first ones, or how many to generate. All there are if not given."},
    )
    prompt: str = field(default="plain", metadata={"help": "Name of the task's prompt, see `evaluate.py`."})
    eval_block_length: int | None = field(
        default=None, metadata={"help": "Block length; 32, or a shorter canvas, if not given."}
    )
    eval_denoising_steps: int | None = field(
        default=None, metadata={"help": "Steps; half as many as positions if not given."}
    )

    def decoding(self, training: SFTConfig) -> SamplingConfig:
        """Return how held-out problems are decoded: by default greedily, on the canvas of training."""
        canvas = self.eval_canvas_length or training.max_completion_length
        return self.decoding_on(
            canvas, self.eval_block_length or min(32, canvas), self.eval_denoising_steps or canvas // 2
        )

    def evaluation(self, training: SFTConfig, problems: int) -> Evaluation | None:
        return None if self.task is None else super().evaluation(training, problems)

    @property
    def data_name(self) -> str:
        if self.task is not None:
            return TASKS[self.task].data_name(self.dataset_path.partition("=")[2] or None)
        return Path(self.dataset_path).name if is_file(self.dataset_path) else self.dataset_path

    @property
    def task(self) -> str | None:
        """Name of the task that is trained on, if it is one."""
        name = self.dataset_path.partition("=")[0]
        return name if name in TASKS else None


class LossProgress(ShortProgress):
    """The recipes' progress bar, with what there is to see of supervised training."""

    shown = ("loss", "eval_loss", "eval_accuracy", "grad_norm")


def load(args: SFTArguments) -> tuple[Dataset, Dataset]:
    """Return training and held-out rows; the last `eval_size` rows of what has no test split are held out."""
    if args.task is not None:
        source = args.dataset_path.partition("=")[2] or None
        return TASKS[args.task].training_rows(source, args.dataset_size, args.eval_size, prompt=args.prompt)
    rows = Dataset.from_list(read_rows(args.dataset_path, ("prompt", "completion"), "SFT"))
    train, held_out = hold_out(rows, args.eval_size, args.dataset_path)
    return train.select(range(min(len(train), args.dataset_size or len(train)))), held_out


def report_loss(trainer: SFTTrainer, seconds: float) -> None:
    """Print the first and the last held-out loss of the run."""
    losses = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    (first, before), (last, after) = losses[0], losses[-1]
    Console().print(
        f"{trainer._name}, {trainer.state.global_step} updates, {seconds:.0f} s. Held-out loss, in nats per position: "
        f"{before:.3f} after {first} updates, {after:.3f} after {last}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        arguments: of the command line, after `train sft`.
    """
    start = time.perf_counter()
    choice = Choice(
        SFTArguments,
        SFTConfig,
        "embedded/sft.yaml",
        command="trl-diffusion train sft",
        description=__doc__,
        own=("num_train_epochs", "min_noise_level", "eval_block_length", "eval_denoising_steps"),
    )
    parsed = parse(choice, sys.argv[1:] if arguments is None else arguments)
    script_args, training_args, model_args, quantization_config = parsed
    if script_args.task is None:
        training_args.eval_on_start = True
        if training_args.eval_strategy == IntervalStrategy.NO:
            training_args.eval_strategy = IntervalStrategy.EPOCH
    load_rows = suggesting(script_args.dataset_path, TASKS)(partial(load, script_args))
    if script_args.dry_run:
        needed = training_args.train_batch_size * script_args.launch.processes
        dry_run(SFTTrainer, parsed, load_rows, {}, needed, evaluates=True)
        return
    rows, held_out = load_rows()
    trainer = SFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=load_tokenizer(model_args),
        peft_config=new_adapter(model_args),
        quantization_config=quantization_config,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossProgress)
    if script_args.task is None:
        trainer.add_to_card(lambda: loss_section(trainer.state.log_history))
        train_and_save(trainer, parsed, lambda: report_loss(trainer, time.perf_counter() - start))
        return
    accuracy = measure_accuracy(trainer, held_out, TASKS[script_args.task].is_correct, script_args, "loss")
    train_and_save(trainer, parsed, lambda: report(trainer, accuracy, time.perf_counter() - start, "loss"))


if __name__ == "__main__":
    main()
