"""diffu-GRPO (d1, 2504.12216): GRPO on a one-step likelihood, the common baseline.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      A = r − group mean
likelihood  one view: the whole canvas masked, and each prompt token with probability 0.15; a fresh prompt mask for
            every inner update, the same for policy, old policy and reference
loss        clipped token ratio on the tokens up to the first end token, k3 KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.likelihood import FullMask, Likelihood, MaskedViews
from trl_diffusion.trainers.base.masked import PromptNoiseConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class DiffuGRPOConfig(PromptNoiseConfig):
    """`PromptNoiseConfig` with the defaults of d1's diffu-GRPO (2504.12216).

    `loss_type="dapo"` (ours) divides by the tokens of the whole batch; `bnpo` divides per micro-batch, as the paper's
    code does, so that the update depends on how the batch is split.
    """

    num_iterations: int = field(default=12, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the k3 KL."})


class DiffuGRPOTrainer(DiffusionGRPOTrainer):
    """diffu-GRPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = DiffuGRPOConfig
    args: DiffuGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "diffu-grpo"]
    _name = "diffu-GRPO"
    _paper = {
        "title": "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        "id": "2504.12216",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhao2025d1,
                title        = {{d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning}},
                author       = {Siyan Zhao and Devaansh Gupta and Qinqing Zheng and Aditya Grover},
                year         = 2025,
                eprint       = {arXiv:2504.12216},
            }"""),
    }

    def likelihood(self) -> Likelihood:
        return MaskedViews(FullMask(self.args.num_mc_samples, self.args.prompt_mask_probability))
