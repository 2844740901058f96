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

from trl_diffusion.likelihood import NoisePlan
from trl_diffusion.likelihood.plans import bernoulli
from trl_diffusion.trainers.base.masked import MaskRateConfig, NoisedGRPOTrainer


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
        self.require_token_ratios()


class UniGRPOTrainer(NoisedGRPOTrainer):
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

    def _scored_share(self) -> float:
        return (self.args.min_mask_rate + self.args.max_mask_rate) / 2

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        streams, views = self._streams(mode, update, rows), self._num_views()
        rates, noise = self._uniforms(streams, views), self._uniforms(streams, views, scope.size(1))
        return bernoulli(rates, noise, self.args.min_mask_rate, self.args.max_mask_rate)
