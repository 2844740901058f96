"""wd1 (2507.08838): weighted likelihoods instead of ratios.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      softmax(A) − softmax(−A) over the completions of a prompt
likelihood  d1's view: the whole canvas masked, and each prompt token with probability 0.15; the text is scored
loss        −Σ weight · log-likelihood over the completions of a prompt, mean over prompts; no old, no reference pass
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch

from trl_diffusion.credit import opposed_softmax
from trl_diffusion.credit.group_credit import GroupCredit
from trl_diffusion.likelihood import FullMask, Likelihood, MaskedViews
from trl_diffusion.losses import Loss, WeightedLikelihood
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import CompletionLossConfig, PromptNoiseConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class WD1Config(CompletionLossConfig, PromptNoiseConfig):
    """The defaults of wd1 (2507.08838): d1's, but for `num_iterations`, which is ours.

    Raises:
        ValueError: if the rewards are to be scaled, or settings do not fit together.
    """

    num_iterations: int = field(default=8, metadata={"help": "Inner updates per rollout batch, μ."})

    def __post_init__(self):
        super().__post_init__()
        self.require_plain_rewards()


def wd1_weights(advantages: torch.Tensor) -> torch.Tensor:
    """G · (softmax(A) − softmax(−A)), [N, G]; G, since the loss is a mean over completions and wd1's a sum over a
    prompt's."""
    return opposed_softmax(advantages) * advantages.size(1)


class WD1Trainer(DiffusionGRPOTrainer):
    """wd1, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = WD1Config
    args: WD1Config
    _tag_names = ["trl", "trl_diffusion", "wd1"]
    _name = "wd1"
    _paper = {
        "title": "wd1: Weighted Policy Optimization for Reasoning in Diffusion Language Models",
        "id": "2507.08838",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{tang2025wd1,
                title        = {{wd1: Weighted Policy Optimization for Reasoning in Diffusion Language Models}},
                author       = {Xiaohang Tang and Rares Dolga and Sangwoong Yoon and Ilija Bogunovic},
                year         = 2025,
                eprint       = {arXiv:2507.08838},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return GroupCredit(weighing=wd1_weights)

    def likelihood(self) -> Likelihood:
        return MaskedViews(FullMask(self.args.num_mc_samples, self.args.prompt_mask_probability))

    def loss(self) -> Loss:
        return WeightedLikelihood("sum")
