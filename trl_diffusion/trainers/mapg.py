"""Mask-aware policy gradients (2607.15200): the choice of positions is part of the policy.

rollout     block by block; positions are drawn one after the other in proportion to their largest probability, and
            then their tokens (ours; the paper takes the positions of the likeliest draws)
credit      A = leave-one-out: r − mean of the other completions
likelihood  the canvas before some of the denoising steps: log-probability of the positions drawn there plus that of
            their tokens. With `merged_steps` above 1 the paper's StepMerge: several steps as if they had been one
loss        clipped ratio (p / p_old)^(1/L) of the completion; no KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from trl_diffusion.credit import ChosenSteps, leave_one_out
from trl_diffusion.likelihood import Likelihood, TrajectoryViews
from trl_diffusion.losses import Loss, SequenceRatio
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import CompletionLossConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class MAPGConfig(CompletionLossConfig):
    """`CompletionLossConfig` with the defaults of mask-aware policy gradients (2607.15200).

    The paper's LoRA (r 128, alpha 64, on 4-bit weights) is passed as `peft_config`. The views of a completion are
    scored in one pass, whose memory grows with their number.

    The paper's StepMerge is `merged_steps=4` with `unmasking="low_confidence"`: 32 segments of 128 steps, of which
    `num_mc_samples` are drawn for each update.

    Args:
        merged_steps: denoising steps per view. 1 is exact; with more, tokens are scored as if the steps of a view had
            been taken at once, and the choice of positions does not count.

    Raises:
        ValueError: if `merged_steps` does not divide the steps of a block, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = SequenceRatio.reads

    merged_steps: int = field(default=1, metadata={"help": "Denoising steps per view; 1 is exact, more is StepMerge."})
    num_mc_samples: int = field(default=12, metadata={"help": "Views per completion and update, drawn from all."})
    num_generations: int | None = field(default=4, metadata={"help": "Completions per prompt, G."})
    num_iterations: int = field(default=12, metadata={"help": "Inner updates per rollout batch, μ."})
    unmasking: str = field(default="plackett_luce", metadata={"help": "How positions to commit are chosen."})
    epsilon: float = field(default=3e-4, metadata={"help": "Lower clip range of the ratio of a completion."})
    epsilon_high: float | None = field(default=4e-4, metadata={"help": "Upper clip range of the ratio."})
    beta: float = field(default=0.0, metadata={"help": "Coefficient of a quadratic KL estimate."})

    def __post_init__(self):
        super().__post_init__()
        sampling = self.sampling_config()
        steps = sampling.steps_per_block
        if self.merged_steps < 1 or steps % self.merged_steps:
            raise ValueError(
                f"merged_steps must divide the {steps} denoising steps of a block; got {self.merged_steps}."
            )
        if self.merged_steps > 1 and sampling.draws_positions:
            raise ValueError(
                f"With merged_steps={self.merged_steps} the choice of positions does not count, so they must not be "
                f"drawn from the policy: unmasking={self.unmasking!r}. Set unmasking='low_confidence' (the paper's) "
                "or another rule, or merged_steps=1."
            )
        views = self.denoising_steps // self.merged_steps
        if self.num_mc_samples > views:
            raise ValueError(
                f"There are {views} views of {self.merged_steps} of {self.denoising_steps} denoising steps, so "
                f"num_mc_samples is at most that; got {self.num_mc_samples}."
            )


class MAPGTrainer(DiffusionGRPOTrainer):
    """Mask-aware policy gradients, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = MAPGConfig
    args: MAPGConfig
    _tag_names = ["trl", "trl_diffusion", "mapg"]
    _name = "MAPG"
    _paper = {
        "title": "Mask-Aware Policy Gradients for Diffusion Language Models",
        "id": "2607.15200",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{raajesh2026mask,
                title        = {{Mask-Aware Policy Gradients for Diffusion Language Models}},
                author       = {Haran Raajesh and Kulin Shah and Adam Klivans and Philipp Kr\\"{a}henb\\"{u}hl},
                year         = 2026,
                eprint       = {arXiv:2607.15200},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return leave_one_out

    def likelihood(self) -> Likelihood:
        args, sampling = self.args, self.args.sampling_config()
        steps = ChosenSteps(args.num_mc_samples, "all")
        return TrajectoryViews(steps, sampling, recompute=sampling.approximate, merge=args.merged_steps)

    def loss(self) -> Loss:
        high = self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high
        return SequenceRatio(self.args.epsilon, high, self.args.beta)
