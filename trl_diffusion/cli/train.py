r"""Train a model by any method on any task, from prompts to a trained model or adapter.

The bundled model on generated problems (one to three minutes on two CPU cores):

    trl-diffusion train agrpo
    trl-diffusion train espo --task sudoku

With the process reward of SAPO, Step-Aware Policy Optimization, from three continuations:

    trl-diffusion train diffu_grpo --task countdown --num_rollouts 3

LLaDA-8B on GSM8K, on eight GPUs; first its cost and memory, which needs none:

    trl-diffusion train agrpo --config llada_8b/gsm8k_agrpo --dry_run
    trl-diffusion train agrpo --config llada_8b/gsm8k_agrpo --accelerate_config zero2

Supervised fine-tuning: `trl-diffusion train sft`.
"""

from __future__ import annotations

import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Any

from datasets import Dataset

from trl_diffusion.cli import sft
from trl_diffusion.cli.common import USED_MOST, Choice, RecipeArguments, parse, run
from trl_diffusion.cli.names import CONFIGS, suggesting
from trl_diffusion.cli.parsing import read_yaml, with_config_path
from trl_diffusion.credit import StepAwareReward
from trl_diffusion.models.embedded import MODEL_OF_TASK
from trl_diffusion.tasks import EMBEDDED, TASKS, Task
from trl_diffusion.tasks.task import Reward
from trl_diffusion.trainers import METHODS, DiffusionGRPOConfig
from trl_diffusion.validation import one_of

GENERATED_ROWS = 4000
NUMBERS = ("int", "uint", "float")  # how the names of such types begin


@dataclass
class TrainArguments(RecipeArguments):
    """Task, method and data, and SAPO's settings; see `trl_diffusion.credit.StepAwareReward`."""

    task: str | None = field(default=None, metadata={"help": f"{', '.join(TASKS)}; gsm8k if not given."})
    method: str | None = field(default=None, metadata={"help": f"{', '.join(METHODS)}."})
    dataset_path: str = field(
        default="",
        metadata={
            "help": "A local JSON-lines or CSV file in the task's format, a data set on the Hub, or `embedded` for "
            "generated problems; the task's own data if not given. NAME or NAME=SOURCE for the task NAME. The last "
            "`eval_size` rows of a local file are held out."
        },
    )
    dataset_size: int | None = field(
        default=None,
        metadata={"help": f"Rows to train on: the first ones, or how many to generate. All, or {GENERATED_ROWS}."},
    )
    curriculum: str | None = field(
        default=None,
        metadata={
            "help": "Train on rows in the order of this column of numbers, smallest first, for example `difficulty`, "
            "and do not shuffle them. Choose --dataset_size so that the run reaches the last rows."
        },
    )
    prompt: str = field(default="plain", metadata={"help": "Name of the task's prompt, see `evaluate.py`."})
    num_rollouts: int = field(
        default=0, metadata={"help": "SAPO's continuations per probed completion, N; 0 for no process reward."}
    )
    num_mask_tokens: int = field(default=64, metadata={"help": "Masked positions that a state is continued on."})
    process_weight: float = field(default=1.0, metadata={"help": "Weight of the process reward, λ."})
    state_shared_by: str = field(default="group", metadata={"help": "States at one time per group or completion."})
    leave_one_out: bool = field(default=False, metadata={"help": "Leave the completion out of its group's rate."})
    form: str = field(default="additive", metadata={"help": "additive or mean_normalised."})

    def data(self) -> tuple[Task, str | None]:
        """Return the task and the source of its rows, see `Task.load`.

        Raises:
            ValueError: if the data are problems of another task, or of none that there is.
        """
        named, equals, source = self.dataset_path.partition("=")
        if equals:
            one_of("the task of --dataset_path NAME=SOURCE", named, TASKS)
        if named not in TASKS:
            return TASKS[self.task or "gsm8k"], self.dataset_path or None
        # GSM8K and its generated stand-in, word problems, have the same rewards.
        if self.task is not None and TASKS[self.task].rewards != TASKS[named].rewards:
            raise ValueError(
                f"--dataset_path {self.dataset_path} gives problems of the task {named}, but --task is {self.task}. "
                "Leave out one of them."
            )
        return TASKS[named], source or None

    @property
    def data_name(self) -> str:
        task, source = self.data()
        return task.data_name(source)

    def step_aware(self, reward: Reward) -> Reward | StepAwareReward:
        """Return the reward with SAPO's process reward, or alone. Every task's first reward is 1 for success."""
        if self.num_rollouts == 0:
            return reward
        return StepAwareReward(
            reward,
            success_threshold=1.0,
            num_rollouts=self.num_rollouts,
            num_mask_tokens=self.num_mask_tokens,
            weight=self.process_weight,
            state_shared_by=self.state_shared_by,
            leave_one_out=self.leave_one_out,
            form=self.form,
        )


def by_difficulty(load_rows: Callable[[], tuple[Dataset, Dataset]], column: str) -> tuple[Dataset, Dataset]:
    """Return training rows in the order of a column, and the held-out rows as they are.

    Args:
        load_rows: returns both.
        column: with numbers; the smallest come first, equal ones in their order.

    Raises:
        ValueError: if there is no such column, or if it has no numbers.
    """
    rows, held_out = load_rows()
    numbers = [name for name, kind in rows.features.items() if str(getattr(kind, "dtype", "")).startswith(NUMBERS)]
    if not numbers:
        raise ValueError(
            f"--curriculum {column}: the data have no column of numbers, only {', '.join(rows.features)}."
        )
    one_of("curriculum (a column of numbers)", column, numbers)
    return rows.sort(column), held_out


def chosen(arguments: Sequence[str]) -> Namespace:
    """Return the `task`, `method` and `num_rollouts` that the command line names, or else the config file.

    The method decides which settings there are, and all three which config the bundled model gets, so they are read
    before the rest is parsed.

    Args:
        arguments: of the command line; the first one may be the method.

    Returns:
        These, with the `others`, the arguments without the method.

    Raises:
        ValueError: for an unknown name, without a method, and for a method that is not the config's.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--task", "--method", "--config"):
        parser.add_argument(option)
    parser.add_argument("--num_rollouts", type=int)
    words, method = list(arguments), None
    if words and not words[0].startswith("-"):
        method, *words = words
    given, _ = parser.parse_known_args(with_config_path(words))
    in_file = {} if given.config is None else read_yaml(given.config)
    places = {"METHOD": method, "--method": given.method, str(given.config): in_file.get("method")}
    named = {place: name for place, name in places.items() if name is not None}
    methods = {*named.values()}
    if len(methods) > 1:
        words_ = " and ".join(f"{name} in {place}" for place, name in named.items())
        raise ValueError(f"the method is {words_}. Give one of them.")
    if not methods:
        raise ValueError(f"no method was given: trl-diffusion train METHOD, with one of {', '.join(METHODS)}, or sft.")
    for name, default in {"task": None, "num_rollouts": 0}.items():
        if getattr(given, name) is None:
            setattr(given, name, in_file.get(name, default))
    (given.method,) = methods
    one_of("method", given.method, METHODS)
    if given.task is not None:
        one_of("task", given.task, TASKS)
    given.others = words
    return given


def bundled_config(task: str | None, method: str, num_rollouts: int = 0) -> tuple[str, list[str]]:
    """Return the config of the bundled model for a task and a method, and arguments that adapt it.

    A pair without a file takes the method's settings from word problems, which are made for the same model and canvas.
    """
    if task in (None, "gsm8k", "word_problems"):
        own = f"gsm8k_{method}"
    elif (task, method) == ("countdown", "diffu_grpo"):
        return "embedded/countdown_sapo.yaml", ["--num_rollouts", str(num_rollouts)]
    else:
        own = f"{task}_{method}"
    if task is None or (CONFIGS / "embedded" / f"{own}.yaml").is_file():
        return f"embedded/{own}.yaml", []
    found = TASKS[task]
    adapted = ["--dataset_path", f"{task}={EMBEDDED}" if found.embedded else task, "--output_dir", f"outputs/{own}"]
    weights = ["1.0", *["0.1"] * (len(found.rewards) - 1)]
    return f"embedded/gsm8k_{method}.yaml", [*adapted, "--reward_weights", *weights]


def own_settings(config: type) -> list[str]:
    """Return the settings that a method adds to those that all methods have, or gives its paper's defaults."""
    common = {field.name: field.default for field in fields(DiffusionGRPOConfig)}
    return [
        field.name
        for field in fields(config)
        if common.get(field.name, MISSING) != field.default and field.name not in USED_MOST
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Args:
        arguments: of the command line, after `train`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["sft"]:
        sft.main(words[1:])
        return
    if {"-h", "--help"} & {*words} and (words[0].startswith("-") and "--method" not in words):
        methods = textwrap.fill(f"Methods: {', '.join([*METHODS, 'sft'])}.", 98)
        print(f"{__doc__}\n{methods}\n\n`trl-diffusion train METHOD --help` has the options.")
        return
    chosen_ = chosen(words)
    trainer = METHODS[chosen_.method]
    file, adapted = bundled_config(chosen_.task, chosen_.method, chosen_.num_rollouts)
    config: Any = trainer.config_class
    command = f"trl-diffusion train {chosen_.method}"
    summary = f"{command}: {trainer._name}" + (f" ({trainer._paper['id']})" if trainer._paper else "")
    model = MODEL_OF_TASK.get(str(chosen_.task), "embedded")
    choice = Choice(TrainArguments, config, file, adapted, model, command, summary, own_settings(config))
    parsed = parse(choice, chosen_.others)
    args, training_args = parsed[:2]
    args.task = chosen_.task
    found, source = args.data()
    size = args.dataset_size or (GENERATED_ROWS if found.is_generated(source) else None)
    load_rows = partial(found.training_rows, source, size, args.eval_size, training_args.seed, args.prompt)
    if args.curriculum is not None:
        load_rows, training_args.shuffle_dataset = partial(by_difficulty, load_rows, args.curriculum), False
    load_rows = suggesting(args.dataset_path, TASKS)(load_rows)
    run(
        trainer,
        parsed,
        load_rows=load_rows,
        columns=found.columns,
        reward_funcs=[args.step_aware(found.rewards[0]), *found.rewards[1:]],
        is_correct=found.is_correct,
    )


if __name__ == "__main__":
    main()
