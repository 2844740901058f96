"""StableDRL (2603.06743): self-normalised importance weights in place of ratios, on the views of SPG or of ESPO.

rollout     block by block, low-confidence unmasking; temperature 0.9, on ESPO's views 1
credit      A = r − group mean (ESPO's: leave-one-out), times the completion's importance weight: its ratio
            p / p_rollout per token, clipped to 1 ± 0.2 whatever the sign of A, divided by the sum over the prompt
likelihood  that of SPG (or ESPO); the ratio is estimated on views that the update does not learn from
loss        −A · bound of SPG, without its weight by length (or −A · ELBO / L and ESPO's KL term)
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

from trl_diffusion.credit import SelfNormalisedWeights, leave_one_out
from trl_diffusion.losses import EstimatedLikelihood, Loss, SequenceRatio
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.espo import ESPOConfig, ESPOTrainer
from trl_diffusion.trainers.spg import SPGConfig, SPGTrainer
from trl_diffusion.validation import clip_range

PAPER = {
    "title": "Stabilizing Reinforcement Learning for Diffusion Language Models",
    "id": "2603.06743",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{zhong2026stabilizing,
            title        = {{Stabilizing Reinforcement Learning for Diffusion Language Models}},
            author       = {Jianyuan Zhong and Kaibo Wang and Ding Ding and Zijin Feng and Haoli Bai and Yang Xiang and
                            Jiacheng Sun and Qiang Xu},
            year         = 2026,
            eprint       = {arXiv:2603.06743},
        }"""),
}


@dataclass
class StableDRLConfig(SPGConfig):
    """`SPGConfig` with the defaults of StableDRL for GSM8K (2603.06743), which trains all weights.

    `epsilon` and `epsilon_high` are the clip range of the ratios that the completions' weights are made of.

    Raises:
        ValueError: if the clip range is not one, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = ("epsilon", "epsilon_high")

    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratios in the completions' weights."})
    num_iterations: int = field(default=2, metadata={"help": "Inner updates per rollout batch, μ."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt, G."})
    learning_rate: float = field(default=2e-6, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning-rate schedule."})

    def __post_init__(self):
        super().__post_init__()
        clip_range(*self.clip_range)


class StableDRLTrainer(SPGTrainer):
    """StableDRL on the views and bounds of SPG, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = StableDRLConfig
    args: StableDRLConfig
    _tag_names = ["trl", "trl_diffusion", "stable-drl"]
    _name = "StableDRL"
    _paper = PAPER

    def credit(self) -> CreditChoice:
        return SelfNormalisedWeights(*self.args.clip_range, self.likelihood())


@dataclass
class StableESPOConfig(ESPOConfig):
    """`ESPOConfig`, whose clip range is that of the ratios in the completions' weights.

    Raises:
        ValueError: if the clip range is not one, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = SequenceRatio.reads

    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratios in the completions' weights."})

    def __post_init__(self):
        super().__post_init__()
        clip_range(*self.clip_range)


class StableESPOTrainer(ESPOTrainer):
    """StableDRL on the views of ESPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = StableESPOConfig
    args: StableESPOConfig
    _tag_names = ["trl", "trl_diffusion", "stable-drl", "espo"]
    _name = "StableDRL on ESPO"
    _paper = PAPER

    def credit(self) -> CreditChoice:
        return SelfNormalisedWeights(*self.args.clip_range, self.likelihood(), leave_one_out)

    def loss(self) -> Loss:
        return EstimatedLikelihood(self.args.beta)
