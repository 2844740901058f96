r"""Trains a model by any method on any task, from prompts to a trained model or adapter.

The bundled model on generated problems (one to three minutes on two CPU cores):

    accelerate launch recipes/train.py --method dmpo
    accelerate launch recipes/train.py --task sudoku --method espo

The same with the process reward of SAPO, Step-Aware Policy Optimization, from three continuations:

    accelerate launch recipes/train.py --task countdown --method diffu_grpo --num_rollouts 3

LLaDA-8B on GSM8K (for DiPO, SDAR-8B); the config names the method:

    accelerate launch --config_file trl_diffusion/accelerate_configs/zero2.yaml recipes/train.py \
        --config trl_diffusion/configs/llada_8b/gsm8k_dmpo.yaml

Everything in a config can be overridden on the command line, for example `--seed 1 --max_steps 20`.
`--method dmpo --help` shows every setting of a method.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from trl_diffusion.cli.common import CONFIGS, RecipeArguments, no_such, parse, run

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.tasks import EMBEDDED, TASKS, Task
from trl_diffusion.tasks.task import Reward
from trl_diffusion.trainers import METHODS

GENERATED_ROWS = 4000


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
            ValueError: if the data are problems of another task.
        """
        named, _, source = self.dataset_path.partition("=")
        if named not in TASKS:
            return TASKS[self.task or "gsm8k"], self.dataset_path or None
        # GSM8K and its generated stand-in, word problems, have the same rewards.
        if self.task is not None and TASKS[self.task].rewards != TASKS[named].rewards:
            raise ValueError(
                f"--dataset_path {self.dataset_path} gives problems of the task {named}, but --task is {self.task}. "
                "Leave out one of them."
            )
        return TASKS[named], source or None

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


def chosen(arguments: list[str], task: str | None = None, method: str | None = None) -> Namespace:
    """Return the `task`, `method` and `num_rollouts` that the command line names, or else the config file.

    The method decides which settings there are, and all three which config the bundled model gets, so they are read
    before the rest is parsed.

    Args:
        arguments: of the command line.
        task: the task if neither names one.
        method: the method if neither names one.

    Raises:
        SystemExit: for an unknown name, or without a method; without one, `--help` prints what this file is for.
    """
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--task", help=", ".join(TASKS))
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--num_rollouts", type=int, help="SAPO's continuations per probed completion")
    parser.add_argument("--config", help="YAML file with settings, which may name task and method")
    given, others = parser.parse_known_args(arguments)
    in_file = {} if given.config is None else yaml.safe_load(Path(given.config).read_text()) or {}
    defaults = {"task": task, "method": method, "num_rollouts": 0}
    for name, default in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, in_file.get(name, default))
    if given.method is None and {"-h", "--help"} & set(others):
        parser.print_help()
        parser.exit()
    if given.method is None:
        parser.error(f"no method was given: set --method, or `method` in the config, to one of {', '.join(METHODS)}.")
    for kind, name, choices in (("method", given.method, METHODS), ("task", given.task, TASKS)):
        if name is not None and name not in choices:
            parser.error(no_such(kind, name, choices))
    return given


def bundled_config(task: str | None, method: str, num_rollouts: int = 0) -> tuple[str, list[str]]:
    """Return the config of the bundled model for a task and a method, and arguments that adapt it.

    A pair without a file takes the method's settings from word problems, which are made for the same model and canvas.
    """
    if task in (None, "gsm8k", "word_problems"):
        own = f"gsm8k_{method}"
    else:
        own = f"{task}_sapo" if num_rollouts and method == "diffu_grpo" else f"{task}_{method}"
    if task is None or (CONFIGS / "embedded" / f"{own}.yaml").is_file():
        return f"embedded/{own}.yaml", []
    found = TASKS[task]
    adapted = ["--dataset_path", f"{task}={EMBEDDED}" if found.embedded else task, "--output_dir", f"outputs/{own}"]
    weights = ["1.0", *["0.1"] * (len(found.rewards) - 1)]
    return f"embedded/gsm8k_{method}.yaml", [*adapted, "--reward_weights", *weights]


def main(
    task: str | None = None,
    method: str | None = None,
    config: str | None = None,
    script_arguments: type[TrainArguments] = TrainArguments,
) -> None:
    """Train as the command line says.

    Args:
        task: the task if it names none.
        method: the method if it names none.
        config: name of the bundled model's config if it does not depend on them.
        script_arguments: dataclass of the arguments, with other defaults.
    """
    choice = chosen(sys.argv[1:], task, method)
    trainer = METHODS[choice.method]
    file, adapted = bundled_config(choice.task, choice.method, choice.num_rollouts)
    if config is not None:
        file, adapted = f"embedded/{config}.yaml", []
    arguments = parse(script_arguments, trainer.config_class, file, adapted)
    args, training_args = arguments[:2]
    args.task = choice.task
    found, source = args.data()
    size = args.dataset_size or (GENERATED_ROWS if found.is_generated(source) else None)
    rows, held_out = found.training_rows(source, size, args.eval_size, training_args.seed, args.prompt)
    args.dataset_path = args.dataset_path or found.hub_id or found.name  # the model card names it
    run(
        trainer,
        arguments,
        train_dataset=rows,
        held_out=held_out,
        reward_funcs=[args.step_aware(found.rewards[0]), *found.rewards[1:]],
        is_correct=found.is_correct,
    )


if __name__ == "__main__":
    main()
