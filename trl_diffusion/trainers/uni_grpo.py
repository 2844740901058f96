"""UniGRPO (MMaDA, 2505.15809): GRPO on randomly masked views.

rollout     block by block
credit      A = r − group mean
likelihood  positions masked independently at a rate t ~ U(0.1, 0.9), fresh for every inner update; the masked
            tokens of the text are scored
loss        clipped token ratio, mean over a completion's scored tokens, mean over completions; k3 KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.likelihood import Bernoulli, Likelihood, MaskedViews
from trl_diffusion.losses.token_ratio import check_token_level
from trl_diffusion.trainers.base.masked import MaskRateConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class UniGRPOConfig(MaskRateConfig):
    """`MaskRateConfig` with UniGRPO's views (2505.15809). Its other settings are d1's, because none are known to us.

    `loss_type="grpo"`: a view scores a random number of tokens, and only a mean within each completion keeps the
    update independent of how the batch is split.

    Raises:
        ValueError: if settings do not fit together.
    """

    num_iterations: int = field(default=4, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the k3 KL."})
    loss_type: str = field(default="grpo", metadata={"help": "TRL's loss type."})

    def __post_init__(self):
        super().__post_init__()
        check_token_level(self)


class UniGRPOTrainer(DiffusionGRPOTrainer):
    """UniGRPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = UniGRPOConfig
    args: UniGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "uni-grpo"]
    _name = "UniGRPO"
    _paper = {
        "title": "MMaDA: Multimodal Large Diffusion Language Models",
        "id": "2505.15809",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{yang2025mmada,
                title        = {{MMaDA: Multimodal Large Diffusion Language Models}},
                author       = {Ling Yang and Ye Tian and Bowen Li and Xinchen Zhang and Ke Shen and Yunhai Tong and
                                Mengdi Wang},
                year         = 2025,
                eprint       = {arXiv:2505.15809},
            }"""),
    }

    def likelihood(self) -> Likelihood:
        args = self.args
        return MaskedViews(Bernoulli(args.num_mc_samples, args.min_mask_rate, args.max_mask_rate))
