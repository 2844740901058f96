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
from trl_diffusion.likelihood import NoisePlan
from trl_diffusion.trainers.base.completion_loss import CompletionLossConfig, CompletionLossTrainer
from trl_diffusion.trainers.base.masked import PromptNoiseConfig


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


class WD1Trainer(CompletionLossTrainer):
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

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        return self._masked_canvas(mode, update, rows, self.args.prompt_mask_probability)

    def _assign_credit(self, mode, rows) -> None:
        # times G, because the loss is the mean over completions and wd1's is a sum over the prompt's
        rows["weights"] = self._over_groups(mode, rows["advantages"], opposed_softmax) * self.group_size(mode)

    def _completion_losses(self, rows, update, targets, logps) -> torch.Tensor:
        return -rows["weights"] * logps.sum(-1).mean(1)
