"""GDPO, Group Diffusion Policy Optimization (2510.08554): ratios of whole completions at fixed masked shares.

This is not NVIDIA's GDPO (2601.05242), which normalises several rewards.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      A = r − group mean
likelihood  three random subsets of the canvas, of the sizes that a Gauss–Legendre rule over the masked share asks for;
            the prompt masked with probability 0.15; the same masks for policy, old policy and reference
loss        clipped ratio exp((ELBO − ELBO_old) / L) of the completion, as in ESPO
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from trl_diffusion.likelihood import Likelihood, MaskedViews, QuadratureSubsets
from trl_diffusion.losses import Loss, SequenceRatio
from trl_diffusion.trainers.base.masked import CompletionLossConfig, MaskBiasConfig, PromptNoiseConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class GDPOConfig(CompletionLossConfig, PromptNoiseConfig, MaskBiasConfig):
    """The defaults of GDPO (2510.08554), which is not NVIDIA's GDPO for several rewards (2601.05242).

    `num_mc_samples` is the number of times in the Gauss–Legendre rule. The views of a completion are scored in one
    pass, whose memory grows with them.

    Raises:
        ValueError: if settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = SequenceRatio.reads

    num_mc_samples: int = field(default=3, metadata={"help": "Noised views: times of the Gauss–Legendre rule."})
    num_iterations: int = field(default=12, metadata={"help": "Inner updates per rollout batch, μ."})
    learning_rate: float = field(default=3e-7, metadata={"help": "Initial learning rate of AdamW."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the sequence ratio."})
    beta: float = field(default=0.0, metadata={"help": "Coefficient of ESPO's quadratic KL estimate."})


class GDPOTrainer(DiffusionGRPOTrainer):
    """GDPO (2510.08554, not NVIDIA's 2601.05242), see the arguments of `DiffusionGRPOTrainer`."""

    config_class = GDPOConfig
    args: GDPOConfig
    _tag_names = ["trl", "trl_diffusion", "gdpo"]
    _name = "GDPO"
    _paper = {
        "title": "Improving Reasoning for Diffusion Language Models via Group Diffusion Policy Optimization",
        "id": "2510.08554",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{rojas2025improving,
                title        = {{Improving Reasoning for Diffusion Language Models via Group Diffusion Policy
                                 Optimization}},
                author       = {Kevin Rojas and Jiahe Lin and Kashif Rasul and Anderson Schneider and
                                Yuriy Nevmyvaka and Molei Tao and Wei Deng},
                year         = 2025,
                eprint       = {arXiv:2510.08554},
            }"""),
    }

    def likelihood(self) -> Likelihood:
        args = self.args
        noise = QuadratureSubsets(args.num_mc_samples, args.prompt_mask_probability, args.informed_masking())
        return MaskedViews(noise, loss_mask="canvas")  # the ELBO is the canvas's

    def loss(self) -> Loss:
        return SequenceRatio(*self.args.clip_range, self.args.beta)
