"""DiPO (DiRL, 2512.22234): block-causal models, every denoising step of every completion, replayed exactly.

rollout     block by block, each block of the length that attention has
credit      A = (r − group mean) / population standard deviation, 0 where all rewards are equal
likelihood  one view per denoising step of a block: all blocks as they were before it, each next to the finished ones
            before it, so that each token of the text is scored once, on what the sampler saw; at the sampling
            temperature and support. Old log-probabilities are those of the rollout
loss        clipped token ratio (0.8 to 1.28), mean over all tokens of the rollout batch; no KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit import population_z_score
from trl_diffusion.likelihood import Likelihood, ReplayViews
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.replay import ReplayConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class DiPOConfig(ReplayConfig):
    """`ReplayConfig` with the objective of DiPO (2512.22234) and the rollout settings of its release.

    Warm-up, weight decay and gradient clipping are d1's. The release draws a token everywhere and commits where it is
    likely; here positions are chosen before their tokens are drawn, so that the log-probabilities are the policy's.

    Raises:
        ValueError: if `shrink` does not fit the steps of a block, or settings do not fit together.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    num_generations: int | None = field(default=8, metadata={"help": "Completions per prompt, G."})
    block_length: int = field(default=4, metadata={"help": "Positions per block; those of the model's attention."})
    denoising_steps: int = field(
        default=256, metadata={"help": "Denoising steps in which the canvas is written; 4 per block of 4 by default."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_k: int = field(default=50, metadata={"help": "Tokens to draw from; 0 for all."})
    unmasking: str = field(default="max_prob", metadata={"help": "How positions to commit are chosen."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range of the ratio."})

    def __post_init__(self):
        super().__post_init__()
        for name, needed in (("loss_type", "dapo"), ("beta", 0.0)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"DiPO is a mean over tokens without a KL term: {name} must be {needed!r}; got "
                    f"{getattr(self, name)!r}. TraceRL with block_causal=True has a KL to the old policy."
                )

    @property
    def two_stream(self) -> bool:
        return True


class DiPOTrainer(DiffusionGRPOTrainer):
    """DiPO, see the arguments of `DiffusionGRPOTrainer`; the model must be block-causal."""

    config_class = DiPOConfig
    args: DiPOConfig
    _tag_names = ["trl", "trl_diffusion", "dipo"]
    _name = "DiPO"
    _paper = {
        "title": "DiRL: An Efficient Post-Training Framework for Diffusion Language Models",
        "id": "2512.22234",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhu2025dirl,
                title        = {{DiRL: An Efficient Post-Training Framework for Diffusion Language Models}},
                author       = {Ying Zhu and Jiaxin Wan and Xiaoran Liu and Siyang He and Qiqi Wang and Xu Guo and
                                Tianyi Liang and Zengfeng Huang and Ziwei He and Xipeng Qiu},
                year         = 2025,
                eprint       = {arXiv:2512.22234},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return population_z_score

    def likelihood(self) -> Likelihood:
        # Every token is in one view, and the loss divides by their number.
        return ReplayViews(self.args.sampling_config(), self.args.shrink, mean_over="tokens", two_stream=True)
