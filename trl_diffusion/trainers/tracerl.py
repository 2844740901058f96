"""TraceRL (2509.06949), without its value model: the trajectory in groups of denoising steps.

rollout     block by block
credit      A = (r − group mean) / population standard deviation, 0 where all rewards are equal
likelihood  one view per `shrink` successive steps that were taken: the canvas before the first of them, the tokens of
            all of them as targets, each token of the text once; at the sampling temperature and support. With
            `block_causal` the steps of all blocks at once, each block next to the finished ones before it
loss        clipped token ratio, mean over a view's tokens; k3 to the old policy, summed over a view's tokens; mean
            over a completion's views
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit import population_z_score
from trl_diffusion.likelihood import Likelihood, ReplayViews
from trl_diffusion.losses import Loss, TokenRatio
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.replay import ReplayConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class TraceRLConfig(ReplayConfig):
    """`ReplayConfig` with TraceRL's objective (2509.06949). Its optimizer and rollout settings are d1's.

    `loss_type="luspo"` with token ratios sums over tokens; the weights that the views carry make it a mean.

    Args:
        block_causal: for models with block-causal attention; the views then cover the steps of a block.

    Raises:
        ValueError: if `shrink` does not fit the steps, or settings do not fit together.
    """

    block_causal: bool = field(default=False, metadata={"help": "Replay the steps of all blocks at once (SDAR)."})
    shrink: int = field(default=8, metadata={"help": "Denoising steps per view."})
    beta: float = field(
        default=0.01, metadata={"help": "Coefficient of the k3 KL to the old policy, summed over a view's tokens."}
    )
    loss_type: str = field(default="luspo", metadata={"help": "TRL's loss type; luspo only."})

    def __post_init__(self):
        super().__post_init__()
        for name, needed in (("loss_type", "luspo"), ("top_entropy_quantile", 1.0), ("sync_ref_model", False)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"TraceRL's means over views and its KL to the old policy need {name}={needed!r}; got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def two_stream(self) -> bool:
        return self.block_causal


class TraceRLTrainer(DiffusionGRPOTrainer):
    """TraceRL, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = TraceRLConfig
    args: TraceRLConfig
    _tag_names = ["trl", "trl_diffusion", "tracerl"]
    _name = "TraceRL"
    _paper = {
        "title": "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models",
        "id": "2509.06949",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2025revolutionizing,
                title        = {{Revolutionizing Reinforcement Learning Framework for Diffusion Large Language
                                 Models}},
                author       = {Yinjie Wang and Ling Yang and Bowen Li and Ye Tian and Ke Shen and Mengdi Wang},
                year         = 2025,
                eprint       = {arXiv:2509.06949},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return population_z_score

    def likelihood(self) -> Likelihood:
        return ReplayViews(self.args.sampling_config(), self.args.shrink, two_stream=self.args.block_causal)

    def loss(self) -> Loss:
        return TokenRatio(kl_to="old", sum_kl=True)
