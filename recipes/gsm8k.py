"""What the GSM8K recipes share: arguments, data and rewards."""

from __future__ import annotations

from dataclasses import dataclass, field

from common import RecipeArguments, parse, run
from datasets import Dataset

from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward, load_gsm8k
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import DiffusionGRPOConfig, DiffusionGRPOTrainer


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


def train(trainer: type[DiffusionGRPOTrainer], config: type[DiffusionGRPOConfig], embedded: str) -> None:
    """Train with a method.

    Args:
        trainer: the method's trainer.
        config: its config.
        embedded: config file of the embedded model, below `recipes/configs`.
    """
    arguments = parse(GSM8KArguments, config, embedded)
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
