"""SAPO on Countdown: `recipes/train.py --task countdown --method diffu_grpo --num_rollouts 3`.

`--num_rollouts 0` trains the baseline, plain diffu-GRPO, with the same settings.
"""

from dataclasses import dataclass, field

from trl_diffusion.cli.train import TrainArguments, main


@dataclass
class SAPOArguments(TrainArguments):
    num_rollouts: int = field(
        default=3, metadata={"help": "Continuations per probed completion, N; 0 for no process reward."}
    )


if __name__ == "__main__":
    main("countdown", "diffu_grpo", "countdown_sapo", SAPOArguments)
