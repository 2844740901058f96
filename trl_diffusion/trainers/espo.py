"""ESPO (2512.03759): ratios of whole sequences, from an unbiased estimate of the ELBO.

rollout     block by block, low-confidence unmasking, temperature 1
credit      A = leave-one-out: r − mean of the other completions
likelihood  two pairs of a random subset of the canvas with its complement, sizes stratified over all completions;
            the same masks for policy, old policy and reference
loss        clipped ratio exp((ELBO − ELBO_old) / L) of the completion; KL term β (ELBO − ELBO_ref)² / 2L
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from trl_diffusion.credit import leave_one_out
from trl_diffusion.likelihood import Likelihood, MaskedViews, SubsetPairs
from trl_diffusion.losses import Loss, SequenceRatio
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import CompletionLossConfig, MaskBiasConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class ESPOConfig(CompletionLossConfig, MaskBiasConfig):
    """`CompletionLossConfig` with the defaults of ESPO for mathematics (2512.03759).

    For Countdown the paper sets `epsilon=0` and `beta=3e-3`, for Sudoku `beta=1e-2`, both with 128 denoising steps; 16
    completions per prompt on MATH. The views of a completion are scored in one pass, whose memory grows with them.

    Raises:
        ValueError: if `num_mc_samples` is odd, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = SequenceRatio.reads

    num_mc_samples: int = field(default=4, metadata={"help": "Noised views, in complementary pairs."})
    num_iterations: int = field(default=8, metadata={"help": "Inner updates per rollout batch, μ."})
    denoising_steps: int = field(default=256, metadata={"help": "Denoising steps of the canvas."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the sequence ratio."})
    beta: float = field(default=1e-3, metadata={"help": "Coefficient of the quadratic KL estimate."})

    def __post_init__(self):
        super().__post_init__()
        self.require_pairs()


class ESPOTrainer(DiffusionGRPOTrainer):
    """ESPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = ESPOConfig
    args: ESPOConfig
    _tag_names = ["trl", "trl_diffusion", "espo"]
    _name = "ESPO"
    _paper = {
        "title": "Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective",
        "id": "2512.03759",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ou2025principled,
                title        = {{Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective}},
                author       = {Jingyang Ou and Jiaqi Han and Minkai Xu and Shaoxuan Xu and Jianwen Xie and
                                Stefano Ermon and Yi Wu and Chongxuan Li},
                year         = 2025,
                eprint       = {arXiv:2512.03759},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return leave_one_out

    def likelihood(self) -> Likelihood:
        noise = SubsetPairs(self.args.num_mc_samples // 2, self.args.informed_masking())
        return MaskedViews(noise, loss_mask="canvas")  # the ELBO is the canvas's

    def loss(self) -> Loss:
        return SequenceRatio(*self.args.clip_range, self.args.beta)
