"""Shared by the recipes: arguments, progress, and the report at the end."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProgressCallback, Trainer
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_diffusion.adapters.renaming import base_of, is_adapter
from trl_diffusion.evaluation import AccuracyCallback, ConfusionZoneCallback, evaluate_accuracy
from trl_diffusion.models.embedded import EMBEDDED_MODELS, embedded_arguments
from trl_diffusion.sampling import SamplingArguments, SamplingConfig
from trl_diffusion.sampling.arguments import OPTIONS, with_default
from trl_diffusion.trainers import DiffusionGRPOConfig, DiffusionGRPOTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
# Metrics worth a line while training; the rest is in the logs.
SHOWN = ("reward", "eval_accuracy", "completions/mean_length", "rollout/tokens_per_forward", "entropy", "step_time")


@dataclass
class RunArguments:
    """The data, how held-out accuracy is measured (greedy, by default on the canvas of training), and a dry run."""

    dataset_path: str = field(default="", metadata={"help": "The data."})

    eval_size: int = field(default=256, metadata={"help": "Held-out problems."})
    eval_every: int = field(default=0, metadata={"help": "Updates between measurements; 0 measures before and after."})
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

    dry_run: bool = field(
        default=False, metadata={"help": "Load everything, check it, print the start-up report and stop."}
    )

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


def parse(
    script_arguments: type,
    config: type,
    embedded: str,
    overrides: Sequence[str] = (),
):
    """Parse script, training and model arguments from the command line and `--config`.

    Without a config and for an embedded model, which is also the default, the config of the embedded models is used,
    and the console says so. An adapter as the model is trained further, with its own shape.

    Args:
        script_arguments: dataclass of the recipe's own arguments.
        config: the trainer's config class.
        embedded: config file of the embedded model, below `trl_diffusion/configs`.
        overrides: arguments for the embedded model that win over that file, and lose against the command line.
    """
    arguments = sys.argv[1:]
    block = "--block_length" if "block_length" in {field.name for field in fields(config)} else "--eval_block_length"
    defaults = ["--config", str(CONFIGS / embedded), *overrides]
    if (for_embedded := embedded_arguments(arguments, defaults, block)) is not None:
        arguments = for_embedded
        real = next(CONFIGS.glob(f"*_8b/{Path(embedded).name}"))
        Console().print(
            f"No --config: running on the embedded model with trl_diffusion/configs/{embedded}. It is tiny and was trained "
            "on faulty solutions, so that there is something to repair. For a real run give --config, for example "
            f"trl_diffusion/configs/{real.relative_to(CONFIGS)}."
        )
    parser = TrlParser((script_arguments, config, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    name = model_args.model_name_or_path or "embedded"
    model_args.model_name_or_path = EMBEDDED_MODELS.get(name, name)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(training_args.model_init_kwargs or {}),
    }
    return script_args, training_args, model_args, get_quantization_config(model_args)


def no_such(kind: str, name: str, choices: Iterable[str]) -> str:
    """Return an error message that lists the choices, and names the one that was probably meant."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    return f"there is no {kind} {name!r}{meant} Choose one of {', '.join(choices)}."


def load_tokenizer(model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; for an adapter its base's, as in evaluation."""
    name = str(model_args.model_name_or_path)
    return AutoTokenizer.from_pretrained((is_adapter(name) and base_of(name)) or name, padding_side="left")


def new_adapter(model_args: ModelConfig) -> PeftConfig | None:
    """Return the adapter that `--use_peft` asks for; none for a model that is an adapter, which is trained further."""
    name = str(model_args.model_name_or_path)
    if not is_adapter(name):
        return get_peft_config(model_args)
    print(f"{name} is an adapter of {base_of(name)}: it is trained further as it is, whatever `lora_*` settings say.")
    return None


def run(
    trainer_class: type[DiffusionGRPOTrainer],
    arguments: tuple,
    *,
    train_dataset,
    held_out,
    reward_funcs: list[Callable],
    is_correct: Callable[[str, dict[str, Any]], bool],
) -> None:
    """Train, with held-out accuracy before and after; save, report and push. A dry run ends before the first of these.

    Args:
        trainer_class: the method's trainer.
        arguments: what `parse` returned.
        train_dataset: rows to train on.
        held_out: rows to measure accuracy on.
        reward_funcs: as in TRL.
        is_correct: whether a completion is right, given its row.
    """
    start = time.perf_counter()
    script_args, training_args, model_args, quantization_config = arguments
    training_args.record_signals |= script_args.plot_every > 0
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=load_tokenizer(model_args),
        peft_config=new_adapter(model_args),
        quantization_config=quantization_config,
    )
    if script_args.dry_run:
        trainer.print_report()
        trainer.end()
        return
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShortProgress)
    accuracy = measure_accuracy(trainer, held_out, is_correct, script_args)
    if script_args.plot_every:
        trainer.add_callback(ConfusionZoneCallback(trainer, every=script_args.plot_every, success_threshold=1.0))
    train_and_save(trainer, arguments, lambda: report(trainer, accuracy, time.perf_counter() - start))


def measure_accuracy(trainer, held_out, is_correct: Callable[[str, dict[str, Any]], bool], script_args: RunArguments):
    """Let a trainer measure held-out accuracy; returns the callback that keeps what was measured."""
    measure = partial(
        evaluate_accuracy,
        tokenizer=trainer.processing_class,
        correct=is_correct,
        decoding=script_args.decoding(trainer.args),
        batch_size=script_args.eval_batch_size,
    )
    accuracy = AccuracyCallback(trainer, held_out, measure, every=script_args.eval_every)
    trainer.add_callback(accuracy)
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
    trainer.create_model_card(dataset_name=script_args.dataset_path)
    if trainer.accelerator.is_main_process:
        print_result()
        saved = "Adapter" if isinstance(trainer.model, PeftModel) else "Model"
        print(f"{saved} and model card: {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_path)
    trainer.end()


class ShortProgress(ProgressCallback):
    """transformers' progress bar with one line per log instead of a dictionary of thirty entries."""

    shown: tuple[str, ...] = SHOWN

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = [f"{name} {logs[name]:.3g}" for name in self.shown if logs.get(name) is not None]
            if shown:
                self.training_bar.write(f"update {state.global_step:>4}  " + "  ".join(shown))


def report(trainer: Trainer, accuracy: AccuracyCallback, seconds: float, curve: str = "reward") -> None:
    """Print accuracy before and after, and save the curves of reward (or loss) and accuracy as `curves.png`."""
    (_, before), (last, after) = accuracy.history[0], accuracy.history[-1]
    table = Table("", "held-out accuracy", "95 % interval", title=f"{trainer._name}, {last} updates, {seconds:.0f} s")
    for name, value in (("before", before), ("after", after)):
        interval = f"{100 * value.low:.1f} – {100 * value.high:.1f}"
        table.add_row(name, f"{100 * value.value:.1f} % of {value.total}", interval)
    table.add_row("gain", f"{100 * (after.value - before.value):+.1f} points", "")
    console = Console()
    console.print(table)

    logged = [(entry["step"], entry[curve]) for entry in trainer.state.log_history if curve in entry]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot([step for step, _ in logged], [value for _, value in logged], marker=".")
    labels = {"reward": "mean reward of the rollouts", "loss": "mean loss of the updates"}
    left.set(xlabel="update", ylabel=labels[curve], title=curve.capitalize())
    steps, values = zip(*accuracy.history, strict=True)
    errors = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
    right.errorbar(steps, [100 * v.value for v in values], yerr=errors, marker="o", capsize=3)
    right.set(xlabel="update", ylabel="accuracy in %", ylim=(0, 100), title="Held-out accuracy (95 % interval)")
    path = Path(trainer.args.output_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    console.print(f"Curves: {path}")
