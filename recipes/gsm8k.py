r"""Any method on GSM8K, from prompts to a trained model or adapter.

The embedded model on synthetic word problems (one to three minutes on two CPU cores):

    accelerate launch recipes/gsm8k.py --method dmpo

LLaDA-8B on GSM8K (for DiPO, SDAR-8B); the config names the method:

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml recipes/gsm8k.py \
        --config recipes/configs/llada_8b/gsm8k_dmpo.yaml

Everything in a config can be overridden on the command line, for example `--seed 1 --max_steps 20`.
`--method dmpo --help` shows every setting of a method.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from common import RecipeArguments, parse, run
from datasets import Dataset

from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward, load_gsm8k
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import METHODS, DiffusionGRPOConfig, DiffusionGRPOTrainer


@dataclass
class GSM8KArguments(RecipeArguments):
    """What to train on."""

    dataset_path: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "A Hub data set with GSM8K's columns, a local JSON-lines file, or `word_problems` for the "
            "embedded model's synthetic problems. The last `eval_size` rows of a local file are held out."
        },
    )
    dataset_size: int = field(default=4000, metadata={"help": "Synthetic word problems to draw."})


@dataclass
class MethodArguments(GSM8KArguments):
    """What to train on, and by which method."""

    method: str | None = field(default=None, metadata={"help": f"The method: {', '.join(METHODS)}."})


def load(args: GSM8KArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows."""
    if args.dataset_path == "word_problems":
        # The held-out problems do not change with the seed, so that runs can be compared.
        return load_word_problems("train", args.dataset_size, seed), load_word_problems("test", args.eval_size, 0)
    if args.dataset_path.endswith((".jsonl", ".json")):
        rows = load_gsm8k(args.dataset_path)
        if len(rows) <= args.eval_size:
            raise ValueError(
                f"{args.dataset_path} has {len(rows)} rows, of which --eval_size {args.eval_size} are held out, so "
                "nothing is left to train on. Lower --eval_size."
            )
        cut = len(rows) - args.eval_size
        return rows.select(range(cut)), rows.select(range(cut, len(rows)))
    return load_gsm8k(args.dataset_path, "train"), load_gsm8k(args.dataset_path, "test", limit=args.eval_size)


def is_correct(text: str, row: dict) -> bool:
    return correctness_reward([text], answer=[row["answer"]]) == [1.0]


def train(
    trainer: type[DiffusionGRPOTrainer],
    config: type[DiffusionGRPOConfig],
    embedded: str,
    script_arguments: type[GSM8KArguments] = GSM8KArguments,
) -> None:
    """Train with a method.

    Args:
        trainer: the method's trainer.
        config: its config.
        embedded: config file of the embedded model, below `recipes/configs`.
        script_arguments: dataclass of the recipe's own arguments.
    """
    arguments = parse(script_arguments, config, embedded)
    script_args, training_args = arguments[:2]
    rows, held_out = load(script_args, training_args.seed)
    run(
        trainer,
        arguments,
        train_dataset=rows,
        held_out=held_out,
        reward_funcs=[correctness_reward, format_reward],
        is_correct=is_correct,
    )


def chosen_method(arguments: list[str]) -> str:
    """The method that the command line names, or else the config file.

    It decides which settings there are, so it is read before they are parsed.

    Raises:
        SystemExit: without a method or with an unknown one; without one, `--help` prints what this file is for.
    """
    parser = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--config", help="YAML file with settings, which may name the method")
    given, others = parser.parse_known_args(arguments)
    name = given.method
    if name is None and given.config is not None:
        name = (yaml.safe_load(Path(given.config).read_text()) or {}).get("method")
    if name is None and {"-h", "--help"} & set(others):
        parser.print_help()
        parser.exit()
    if name not in METHODS:
        problem = "no method was given" if name is None else f"there is no method {name!r}"
        parser.error(f"{problem}: set --method, or `method` in the config, to one of {', '.join(METHODS)}.")
    return name


def main() -> None:
    name = chosen_method(sys.argv[1:])
    train(METHODS[name], METHODS[name].config_class, f"embedded/gsm8k_{name}.yaml", MethodArguments)


if __name__ == "__main__":
    main()
