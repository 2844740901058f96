"""Shared by the commands that train: arguments, progress, and the report at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import ProgressCallback
from trl import ModelConfig, get_quantization_config

from trl_diffusion.cli.dry_run import DryRunArguments, dry_run, planned
from trl_diffusion.cli.loading import load_tokenizer, new_adapter
from trl_diffusion.cli.names import CONFIGS, check_model_name
from trl_diffusion.cli.parsing import Parser, read_yaml
from trl_diffusion.evaluation import AccuracyCallback, ConfusionZoneCallback, evaluate_accuracy
from trl_diffusion.evaluation.training_report import accuracy_section, accuracy_table, save_curves
from trl_diffusion.models.embedded import EMBEDDED_MODELS, embedded_arguments
from trl_diffusion.runtime.forecast import Evaluation
from trl_diffusion.runtime.text import plural
from trl_diffusion.sampling import SamplingArguments, SamplingConfig
from trl_diffusion.sampling.arguments import OPTIONS, with_default
from trl_diffusion.trainers import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_diffusion.trainers.held_out_samples import HeldOutSamples

# Metrics worth a line while training; the rest is in the logs.
SHOWN = ("reward", "eval_accuracy", "completions/mean_length", "rollout/tokens_per_forward", "entropy", "step_time")

# What the short help of a training command shows.
USED_MOST = (
    "task",
    "dataset_path",
    "dataset_size",
    "model_name_or_path",
    "output_dir",
    "use_peft",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "num_generations",
    "max_completion_length",
    "block_length",
    "denoising_steps",
    "temperature",
    "num_rollouts",
    "eval_every",
    "seed",
    "dry_run",
    "resume_from_checkpoint",
)


@dataclass
class RunArguments(DryRunArguments):
    """The data, how held-out accuracy is measured (greedy, by default on the canvas of training), and a dry run."""

    dataset_path: str = field(default="", metadata={"help": "The data."})

    eval_size: int = field(default=256, metadata={"help": "Held-out problems."})
    eval_every: int = field(default=0, metadata={"help": "Updates between measurements; 0 measures before and after."})
    eval_size_between: int = field(
        default=0, metadata={"help": "Held-out problems, the first ones, for measurements in between; 0 for all."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Completions decoded together."})
    eval_canvas_length: int | None = field(default=None, metadata={"help": "Canvas length; training's if not given."})
    eval_block_length: int | None = field(default=None, metadata={"help": "Block length; training's if not given."})
    eval_denoising_steps: int | None = field(default=None, metadata={"help": "Steps; training's if not given."})
    eval_temperature: float = with_default("temperature", 0.0)
    eval_top_k: int = with_default("top_k", 0)
    eval_top_p: float = with_default("top_p", 1.0)
    eval_unmasking: str = with_default("unmasking", "max_prob")
    eval_confidence_threshold: float | None = with_default("confidence_threshold", None)
    eval_entropy_bound: float | None = with_default("entropy_bound", None)
    eval_cache: str = with_default("cache", "auto")
    eval_cache_refresh: int = with_default("cache_refresh", 0)
    eval_fallback: str = with_default("fallback", "surest")
    eval_position_temperature: float = with_default("position_temperature", 0.5)

    @property
    def data_name(self) -> str:
        """Name of the data for people, in the model card and the report of a dry run."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its data are called.")

    def evaluation(self, training: Any, problems: int) -> Evaluation | None:
        """Return how held-out accuracy is measured; `None` where it is not.

        Args:
            training: the trainer's config.
            problems: held-out problems that there are.
        """
        between = min(self.eval_size_between or problems, problems)
        return Evaluation(problems, self.eval_every, between, self.decoding(training))

    def decoding(self, training: Any) -> SamplingConfig:
        """Return how held-out problems are decoded, given the trainer's config."""
        raise NotImplementedError(f"{type(self).__name__} does not say how held-out problems are decoded.")

    def decoding_on(self, canvas_length: int, block_length: int, denoising_steps: int) -> SamplingConfig:
        """Return how held-out problems are decoded, with the other `eval_…` options.

        Args:
            canvas_length: positions to write; rounded up to whole blocks.
            block_length: positions per block.
            denoising_steps: steps per canvas.
        """
        options = {name: vars(self)[f"eval_{name}"] for name in OPTIONS}
        options |= {"block_length": block_length, "denoising_steps": denoising_steps}
        canvas_length = -(-canvas_length // block_length) * block_length
        return SamplingArguments(**options).sampling_on(canvas_length, record_support=False)


@dataclass
class RecipeArguments(RunArguments):
    """Arguments of every recipe for reinforcement learning."""

    plot_every: int = field(
        default=0,
        metadata={
            "help": "Updates between plots of the rollouts' confusion zones; 0 for none. Records their signals."
        },
    )

    def decoding(self, training: DiffusionGRPOConfig) -> SamplingConfig:
        """Return how held-out problems are decoded: by default greedily, on the canvas of training."""
        return self.decoding_on(
            self.eval_canvas_length or training.max_completion_length,
            self.eval_block_length or training.block_length,
            self.eval_denoising_steps or training.denoising_steps,
        )


@dataclass(frozen=True)
class Choice:
    """What a training command trains: its parser's dataclasses, and the settings of the bundled model.

    Args:
        script: dataclass of the command's own arguments.
        config: the trainer's config class.
        bundled: config of the bundled model, below `trl_diffusion/configs`.
        adapted: arguments for the bundled model that win over that file, and lose against the command line.
        model: the bundled model that is trained where none is named.
        command: the words that start the command, for messages and help.
        description: the text at the top of the help.
        own: options of the short help in addition to those of every training command.
    """

    script: type
    config: type
    bundled: str
    adapted: Sequence[str] = ()
    model: str = "embedded"
    command: str = "trl-diffusion train"
    description: str = ""
    own: Sequence[str] = ()

    def parser(self) -> Parser:
        """Return the parser of all arguments."""
        known = {name for each in (self.script, self.config, ModelConfig) for name in _names(each)}
        shown = {
            "Options used most": [name for name in USED_MOST if name in known],
            "Settings of the method": self.own,
        }
        parser = Parser((self.script, self.config, ModelConfig), self.command, self.description, shown)
        if issubclass(self.config, DiffusionGRPOConfig):
            # TRL's defaults are to log no completions and, if they are logged, to print all of them.
            parser.set_defaults(log_completions=True, num_completions_to_print=1)
        return parser


def _names(config: type) -> list[str]:
    return [field.name for field in fields(config)]


def parse(choice: Choice, arguments: Sequence[str]) -> tuple:
    """Parse script, training and model arguments from the command line and `--config`.

    Without a config and for a bundled model, which is also the default, the config of the bundled models is used, and
    the console says so. An adapter as the model is trained further, with its own shape.

    Args:
        choice: what is trained.
        arguments: of the command line.
    """
    parser = choice.parser()
    config = CONFIGS / choice.bundled
    options = {"task": "--dataset_path", "canvas": "--max_completion_length"}
    for name in ("block_length", "denoising_steps"):  # SFT has them for evaluation only, as methods that derive them
        options[name] = f"--{name}" if name in read_yaml(config) else f"--eval_{name}"
    if "unmasking" in _names(choice.config):
        options["unmasking"] = "--unmasking"
    adapted = [*choice.adapted, *arguments]
    for_bundled = embedded_arguments(adapted, ["--config", str(config)], options, default=choice.model)
    words = arguments if for_bundled is None else for_bundled
    with planned(words) as launch:
        parsed = parser.parse(words)
    if for_bundled is not None:
        print(
            f"No --config: training the bundled model with {choice.bundled}. It is tiny and was trained on faulty "
            "solutions, so that there is something to repair."
        )
        for real in CONFIGS.glob(f"*_8b/{config.name}"):
            print(f"For a real run give --config, for example {real.relative_to(CONFIGS).with_suffix('')}.")
    script_args, training_args, model_args = parsed
    script_args.launch = launch
    name = model_args.model_name_or_path or "embedded"
    check_model_name(name)
    model_args.model_name_or_path = EMBEDDED_MODELS.get(name, name)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(training_args.model_init_kwargs or {}),
    }
    return script_args, training_args, model_args, get_quantization_config(model_args)


def run(
    trainer_class: type[DiffusionGRPOTrainer],
    arguments: tuple,
    *,
    load_rows: Callable[[], tuple[Dataset, Dataset]],
    columns: Mapping[str, Any],
    reward_funcs: list[Callable],
    is_correct: Callable[[str, dict[str, Any]], bool],
) -> None:
    """Train, with held-out accuracy before and after; save, report and push. A dry run reports on it instead.

    Args:
        trainer_class: the method's trainer.
        arguments: what `parse` returned.
        load_rows: reads the rows to train on and those to measure accuracy on.
        columns: those of the rows that rewards read.
        reward_funcs: as in TRL.
        is_correct: whether a completion is right, given its row.
    """
    start = time.perf_counter()
    script_args, training_args, model_args, quantization_config = arguments
    training_args.record_signals |= script_args.plot_every > 0
    if script_args.dry_run:
        training_args.log_completions = False  # TRL would make a folder for them
        needed = training_args.generation_batch_size // training_args.num_generations
        dry_run(trainer_class, arguments, load_rows, columns, needed, reward_funcs=reward_funcs)
        return
    train_dataset, held_out = load_rows()
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=load_tokenizer(model_args),
        peft_config=new_adapter(model_args),
        quantization_config=quantization_config,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShortProgress)
    accuracy = measure_accuracy(trainer, held_out, is_correct, script_args)
    if script_args.plot_every:
        trainer.add_callback(ConfusionZoneCallback(trainer, every=script_args.plot_every, success_threshold=1.0))
    train_and_save(trainer, arguments, lambda: report(trainer, accuracy, time.perf_counter() - start))


def measure_accuracy(
    trainer,
    held_out,
    is_correct: Callable[[str, dict[str, Any]], bool],
    script_args: RunArguments,
    curve: str = "reward",
) -> AccuracyCallback:
    """Let a trainer measure held-out accuracy, and put it into the model card.

    Args:
        trainer: any trainer of this library.
        held_out: rows to measure on.
        is_correct: whether a completion is right, given its row.
        script_args: say when and how.
        curve: what the picture in the card shows besides accuracy, see `report`.

    Returns:
        The callback that keeps what was measured.
    """
    measure = partial(
        evaluate_accuracy,
        tokenizer=trainer.processing_class,
        correct=is_correct,
        decoding=script_args.decoding(trainer.args),
        batch_size=script_args.eval_batch_size,
    )
    samples = HeldOutSamples(trainer.args.output_dir)
    between = script_args.eval_size_between or None
    accuracy = AccuracyCallback(trainer, held_out, measure, script_args.eval_every, samples, between)
    trainer.add_callback(accuracy)
    decoding, folder = script_args.decoding(trainer.args), trainer.args.output_dir
    trainer.add_to_card(lambda: accuracy_section(accuracy.history, decoding, folder, curve))
    return accuracy


def train_and_save(trainer, arguments: tuple, print_result: Callable[[], None]) -> None:
    """Train, or resume; save with a model card, report and push.

    Args:
        trainer: any trainer of this library.
        arguments: what `parse` returned.
        print_result: called on the first process when the model is saved.
    """
    script_args, training_args = arguments[:2]
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print_result()
    trainer.create_model_card(dataset_name=script_args.data_name)  # with the curves that were just saved
    if trainer.accelerator.is_main_process:
        saved = "Adapter" if isinstance(trainer.model, PeftModel) else "Model"
        print(f"{saved} and model card: {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.data_name)
    trainer.end()


class ShortProgress(ProgressCallback):
    """transformers' progress bar with one line per log instead of a dictionary of thirty entries."""

    shown: tuple[str, ...] = SHOWN

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = [f"{name} {logs[name]:.3g}" for name in self.shown if logs.get(name) is not None]
            if shown:
                self.training_bar.write(f"update {state.global_step:>4}  " + "  ".join(shown))


def report(trainer: Any, accuracy: AccuracyCallback, seconds: float, curve: str = "reward") -> None:
    """Print accuracy and held-out samples before and after, and save the curves of reward (or loss) and accuracy."""
    console = Console()
    title = f"{trainer._name}, {plural(accuracy.history[-1][0], 'update')}, {seconds:.0f} s"
    console.print(accuracy_table(accuracy.history, title))
    if accuracy.samples is not None:
        console.print(accuracy.samples.table())
    path = save_curves(trainer.args.output_dir, trainer.state.log_history, accuracy.history, curve)
    console.print(f"Curves: {path}")
