"""SAPO, Step-Aware Policy Optimization, on Countdown: diffu-GRPO with a process reward.

The embedded model on generated problems (a few minutes on two CPU cores):

    accelerate launch recipes/countdown_sapo.py

LLaDA-8B on Countdown:

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml recipes/countdown_sapo.py \
        --config recipes/configs/llada_8b/countdown_sapo.yaml

`--num_rollouts 0` trains the baseline, plain diffu-GRPO. Everything in a config can be overridden on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from common import RecipeArguments, parse, run
from datasets import Dataset

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.tasks.countdown import (
    check_countdown,
    correctness_reward,
    format_reward,
    load_countdown,
    read_countdown,
)
from trl_diffusion.trainers import DiffuGRPOConfig, DiffuGRPOTrainer


@dataclass
class CountdownArguments(RecipeArguments):
    """What to train on, and SAPO's settings; see `trl_diffusion.credit.StepAwareReward`."""

    dataset_path: str = field(
        default="Jiayi-Pan/Countdown-Tasks-3to4",
        metadata={
            "help": "A Hub data set with `nums` and `target`, a local JSON-lines file, or `embedded` for generated "
            "problems. The last `eval_size` rows of a local file are held out."
        },
    )
    dataset_size: int = field(default=4000, metadata={"help": "Generated problems to draw."})
    num_rollouts: int = field(default=3, metadata={"help": "Continuations per probed completion, N; 0 for none."})
    num_mask_tokens: int = field(default=64, metadata={"help": "Masked positions that a state is continued on."})
    process_weight: float = field(default=1.0, metadata={"help": "Weight of the process reward, λ."})
    state_shared_by: str = field(default="group", metadata={"help": "States at one time per group or completion."})
    leave_one_out: bool = field(default=False, metadata={"help": "Leave the completion out of its group's rate."})
    form: str = field(default="additive", metadata={"help": "additive or mean_normalised."})


def load(args: CountdownArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows."""
    if args.dataset_path == "embedded":
        # The held-out problems do not change with the seed, so that runs can be compared.
        return load_countdown("train", args.dataset_size, seed), load_countdown("test", args.eval_size, 0)
    if args.dataset_path.endswith((".jsonl", ".json")):
        rows = read_countdown(args.dataset_path)
        if len(rows) <= args.eval_size:
            raise ValueError(
                f"{args.dataset_path} has {len(rows)} rows, of which --eval_size {args.eval_size} are held out, so "
                "nothing is left to train on. Lower --eval_size."
            )
        cut = len(rows) - args.eval_size
        return rows.select(range(cut)), rows.select(range(cut, len(rows)))
    return read_countdown(args.dataset_path, "train"), read_countdown(args.dataset_path, "test", limit=args.eval_size)


def step_aware(args: CountdownArguments) -> Callable:
    """The correctness reward with SAPO's process reward, or alone."""
    if args.num_rollouts == 0:
        return correctness_reward
    return StepAwareReward(
        correctness_reward,
        success_threshold=1.0,
        num_rollouts=args.num_rollouts,
        num_mask_tokens=args.num_mask_tokens,
        weight=args.process_weight,
        state_shared_by=args.state_shared_by,
        leave_one_out=args.leave_one_out,
        form=args.form,
    )


def main() -> None:
    arguments = parse(CountdownArguments, DiffuGRPOConfig, "embedded/countdown_sapo.yaml")
    args, training_args = arguments[:2]
    rows, held_out = load(args, training_args.seed)
    run(
        DiffuGRPOTrainer,
        arguments,
        train_dataset=rows,
        held_out=held_out,
        reward_funcs=[step_aware(args), format_reward],
        is_correct=lambda text, row: check_countdown(text, row["numbers"], row["target"]),
    )


if __name__ == "__main__":
    main()
