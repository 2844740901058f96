"""StepRS-GRPO (2610.00661): advantages whose appetite for risk changes while a text is written.

rollout     block by block, random order
credit      (exp(β r) / group mean of exp(β r) − 1) / β, with β from 1 on the empty canvas to 0 on the finished one
likelihood  the canvas before a drawn step
loss        clipped token ratio, mean over the text's tokens; no KL

The paper changes the advantages of a trainer and leaves all else; of the paper only the abstract was known when this
was written, so the transformation, its schedule and the trainer here are ours.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit import StepwiseRisk
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer


@dataclass
class StepRSConfig(TrajectoryGRPOConfig):
    """`TrajectoryGRPOConfig` with risk coefficients (2610.00661).

    `credit=StepwiseRisk(first, last)` gives them to any other trainer.

    Args:
        first_risk: β at the empty canvas. Above 0, rare successes count more than frequent ones.
        last_risk: β at the finished canvas; linear between the two in the share of the canvas that is written.
    """

    first_risk: float = field(default=1.0, metadata={"help": "Risk coefficient where nothing is written yet."})
    last_risk: float = field(default=0.0, metadata={"help": "Risk coefficient where all but the last is written."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are centred on the group mean only."})


class StepRSTrainer(TrajectoryGRPOTrainer):
    """StepRS-GRPO, see the arguments of `TrajectoryGRPOTrainer`."""

    config_class = StepRSConfig
    args: StepRSConfig
    _tag_names = ["trl", "trl_diffusion", "step-rs"]
    _name = "StepRS-GRPO"
    _paper = {
        "title": "Exploring More, Reasoning Better: Stepwise Risk-Sensitive GRPO for Diffusion Language Models",
        "id": "2610.00661",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yu2026exploring,
                title        = {{Exploring More, Reasoning Better: Stepwise Risk-Sensitive GRPO for Diffusion Language
                                 Models}},
                author       = {Yue Yu and Bowen Zuo and David Crandall and Yinglun Zhu and Dongruo Zhou},
                year         = 2026,
                eprint       = {arXiv:2610.00661},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return StepwiseRisk(self.args.first_risk, self.args.last_risk)
