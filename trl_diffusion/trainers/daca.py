"""DACA-GRPO (2605.16342): diffu-GRPO with masks by strata, and weights for tokens that were decided late.

rollout     block by block, low-confidence unmasking, temperature 0.9; it is recorded since when the network had
            expected each token
credit      A = r − group mean; a token counts more, the later it was expected
likelihood  the positions in 4 random parts; each view masks one part and shows the others
loss        clipped token ratio on the tokens up to the first end token, k3 KL

Of the paper only the abstract was known when this was written: that tokens are weighed by intermediate predictions,
and that positions are scored in strata next to most of the text. The formulas and numbers are ours.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit import ProgressWeights
from trl_diffusion.likelihood import Likelihood, MaskedViews, Strata
from trl_diffusion.losses.token_ratio import check_token_level
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import NoisedGRPOConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class DACAConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` with DACA-GRPO's masks and weights (2605.16342) on the settings of diffu-GRPO.

    Args:
        progress_floor: weight of a token that was expected from the start, see `ProgressWeights`; above 0. The larger,
            the more equal the weights.

    Raises:
        ValueError: if the floor is not positive, there are more strata than positions, or settings do not fit.
    """

    num_mc_samples: int = field(default=4, metadata={"help": "Strata: views per completion and update."})
    progress_floor: float = field(
        default=0.5, metadata={"help": "Weight of tokens that were expected from the start, before normalisation."}
    )
    num_iterations: int = field(default=12, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the k3 KL."})

    def __post_init__(self):
        super().__post_init__()
        check_token_level(self)
        if not self.progress_floor > 0:
            raise ValueError(f"progress_floor must be positive, got {self.progress_floor}.")
        if self.num_mc_samples > self.max_completion_length:
            raise ValueError(
                f"A canvas of {self.max_completion_length} positions has no {self.num_mc_samples} strata: lower "
                "num_mc_samples."
            )


class DACATrainer(DiffusionGRPOTrainer):
    """DACA-GRPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = DACAConfig
    args: DACAConfig
    _tag_names = ["trl", "trl_diffusion", "daca-grpo"]
    _name = "DACA-GRPO"
    _paper = {
        "title": "DACA-GRPO: Denoising-Aware Credit Assignment for Reinforcement Learning in Diffusion Language "
        "Models",
        "id": "2605.16342",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{monsefi2026daca,
                title        = {{DACA-GRPO: Denoising-Aware Credit Assignment for Reinforcement Learning in Diffusion
                                 Language Models}},
                author       = {Amin Karimi Monsefi and Dominic Culver and Nikhil Bhendawade and Lokesh Boominathan and
                                Manuel R. Ciosici and Yizhe Zhang and Irina Belousova},
                year         = 2026,
                eprint       = {arXiv:2605.16342},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return ProgressWeights(self.args.progress_floor)

    def likelihood(self) -> Likelihood:
        return MaskedViews(Strata(self.args.num_mc_samples))
