"""What the recipes share: arguments, progress, and the report at the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback, Trainer
from trl import ModelConfig, TrlParser, get_quantization_config

from trl_diffusion.evaluation import AccuracyCallback
from trl_diffusion.models.embedded import EMBEDDED_MODEL

CONFIGS = Path(__file__).parent / "configs"
# Metrics worth a line while training; the rest is in the logs.
SHOWN = ("reward", "eval_accuracy", "completions/mean_length", "rollout/tokens_per_forward", "entropy", "step_time")


@dataclass
class EvaluationArguments:
    """How held-out accuracy is measured: greedy decoding, by default on the canvas of training."""

    eval_size: int = field(default=256, metadata={"help": "Held-out problems."})
    eval_every: int = field(default=0, metadata={"help": "Updates between measurements; 0 measures before and after."})
    eval_batch_size: int = field(default=64, metadata={"help": "Completions decoded together."})
    eval_canvas_length: int | None = field(default=None, metadata={"help": "Canvas length; training's if not given."})
    eval_block_length: int | None = field(default=None, metadata={"help": "Block length; training's if not given."})
    eval_denoising_steps: int | None = field(default=None, metadata={"help": "Steps; training's if not given."})

    def decoding(self, training) -> dict[str, int]:
        """Keyword arguments of `evaluate_accuracy`."""
        return {
            "canvas_length": self.eval_canvas_length or training.max_completion_length,
            "block_length": self.eval_block_length or training.block_length,
            "denoising_steps": self.eval_denoising_steps or training.denoising_steps,
            "batch_size": self.eval_batch_size,
        }


def parse(script_arguments: type, config: type, embedded: str):
    """Script, training and model arguments from the command line and `--config`.

    Without a config or a model, the embedded model and its config are used, and the console says so.

    Args:
        script_arguments: dataclass of the recipe's own arguments.
        config: the trainer's config class.
        embedded: config file of the embedded model, below `recipes/configs`.
    """
    arguments = sys.argv[1:]
    given = {argument.partition("=")[0] for argument in arguments}
    if not given & {"--config", "--model_name_or_path"}:
        arguments = ["--config", str(CONFIGS / embedded), *arguments]
        Console().print(
            f"No --config: running on the embedded model with recipes/configs/{embedded}. It is tiny and was trained "
            "on faulty solutions, so that there is something to repair. For a real run give --config, for example "
            f"recipes/configs/llada_8b/{Path(embedded).name}."
        )
    parser = TrlParser((script_arguments, config, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = EMBEDDED_MODEL
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(training_args.model_init_kwargs or {}),
    }
    return script_args, training_args, model_args, get_quantization_config(model_args)


class ShortProgress(ProgressCallback):
    """transformers' progress bar with one line per log instead of a dictionary of thirty entries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            shown = [f"{name} {logs[name]:.3g}" for name in SHOWN if logs.get(name) is not None]
            if shown:
                self.training_bar.write(f"update {state.global_step:>4}  " + "  ".join(shown))


def report(trainer: Trainer, accuracy: AccuracyCallback, seconds: float) -> None:
    """Print accuracy before and after, and save the curves of reward and accuracy as `curves.png`."""
    (_, before), (last, after) = accuracy.history[0], accuracy.history[-1]
    table = Table("", "held-out accuracy", "95 % interval", title=f"{trainer._name}, {last} updates, {seconds:.0f} s")
    for name, value in (("before", before), ("after", after)):
        interval = f"{100 * value.low:.1f} – {100 * value.high:.1f}"
        table.add_row(name, f"{100 * value.value:.1f} % of {value.total}", interval)
    table.add_row("gain", f"{100 * (after.value - before.value):+.1f} points", "")
    console = Console()
    console.print(table)

    rewards = [(entry["step"], entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*zip(*rewards, strict=True), marker=".")
    left.set(xlabel="update", ylabel="mean reward of the rollouts", title="Reward")
    steps, values = zip(*accuracy.history, strict=True)
    errors = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
    right.errorbar(steps, [100 * v.value for v in values], yerr=errors, marker="o", capsize=3)
    right.set(xlabel="update", ylabel="accuracy in %", ylim=(0, 100), title="Held-out accuracy (95 % interval)")
    path = Path(trainer.args.output_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    console.print(f"Curves: {path}")
