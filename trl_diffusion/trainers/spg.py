"""SPG, Sandwiched Policy Gradient (2510.09541): a lower bound of the likelihood for good, an upper bound for bad.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      A = r − group mean
likelihood  two views of one block each: earlier blocks shown, later ones masked, a random subset of the block masked
            and scored; shown tokens of earlier blocks and the prompt are masked with probability 0.15
loss        −A · bound · n / mean n; the bound is the ELBO per token where A > 0, else a mix of it and an upper bound
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit.group_credit import Credit, GroupValues, GroupWeights
from trl_diffusion.likelihood import Likelihood, MaskedViews, TextSubsets
from trl_diffusion.losses import Loss, SandwichedBound
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import CompletionLossConfig, MaskBiasConfig, PromptNoiseConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer
from trl_diffusion.validation import one_of

CHOICES = {
    "noise": ("block_random", "random"),
    "scored": ("block", "hidden"),
    "negative_bound": ("mix", "upper", "lower"),
}


@dataclass
class SPGConfig(CompletionLossConfig, PromptNoiseConfig, MaskBiasConfig):
    """The defaults of SPG with mixture (2510.09541).

    The paper's `bound_power` is 1.5 for GSM8K and MATH, 2 for Countdown (1.5 with mixture in its code), 1 for Sudoku.
    The views of a completion are scored in one pass, whose memory grows with their number.

    Args:
        noise: `block_random`, or `random`: subsets of the whole text.
        noise_block_length: block length of `block_random`; that of the rollout if not given.
        scored: `block` scores the subset that was drawn (ours), `hidden` all masked tokens of the text, as the
            release does.
        negative_bound: bound where A < 0: `upper`, `lower` (the ELBO) or `mix`.
        bound_power: b of the upper bound, > 0.
        mix_weight: weight of the upper bound in `mix`.

    Raises:
        ValueError: if a choice is unknown, the block length does not divide the canvas, or settings do not fit.
    """

    noise: str = field(default="block_random", metadata={"help": "Views: block_random or random."})
    noise_block_length: int | None = field(default=None, metadata={"help": "Block length of the views."})
    scored: str = field(default="block", metadata={"help": "Tokens that are scored: block or hidden."})
    negative_bound: str = field(default="mix", metadata={"help": "Bound where A < 0: mix, upper or lower."})
    bound_power: float = field(default=1.5, metadata={"help": "b of the upper bound."})
    mix_weight: float = field(default=0.5, metadata={"help": "Weight of the upper bound in mix."})
    num_mc_samples: int = field(default=2, metadata={"help": "Noised views per completion and update."})
    num_iterations: int = field(default=4, metadata={"help": "Inner updates per rollout batch, μ."})

    def __post_init__(self):
        super().__post_init__()
        for name, values in CHOICES.items():
            one_of(name, getattr(self, name), values)
        if self.noise_block_length is not None and (
            self.noise_block_length < 1 or self.max_completion_length % self.noise_block_length
        ):
            raise ValueError(
                f"noise_block_length ({self.noise_block_length}) must divide the canvas of max_completion_length "
                f"{self.max_completion_length}."
            )
        if self.bound_power <= 0 or not 0 <= self.mix_weight <= 1:
            raise ValueError(
                f"bound_power must be positive and mix_weight lie in [0, 1]; got {self.bound_power} and "
                f"{self.mix_weight}."
            )


class LengthWeights(Credit):
    """A · n / mean n, so that the loss of an update is −Σ A · bound · n / Σ n."""

    def weigh(self, group: GroupValues) -> GroupWeights:
        return GroupWeights(group.advantages * (group.lengths / group.lengths.float().mean().clamp(min=1)))


class SPGTrainer(DiffusionGRPOTrainer):
    """SPG, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = SPGConfig
    args: SPGConfig
    _tag_names = ["trl", "trl_diffusion", "spg"]
    _name = "SPG"
    _paper = {
        "title": "SPG: Sandwiched Policy Gradient for Masked Diffusion Language Models",
        "id": "2510.09541",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2025spg,
                title        = {{SPG: Sandwiched Policy Gradient for Masked Diffusion Language Models}},
                author       = {Chenyu Wang and Paria Rashidinejad and DiJia Su and Song Jiang and Sid Wang and
                                Siyan Zhao and Cai Zhou and Shannon Zejiang Shen and Feiyu Chen and Tommi Jaakkola and
                                Yuandong Tian and Bo Liu},
                year         = 2025,
                eprint       = {arXiv:2510.09541},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return LengthWeights()

    def likelihood(self) -> Likelihood:
        args = self.args
        block = None if args.noise == "random" else args.noise_block_length or args.block_length
        scores_all = args.scored == "hidden"
        noise = TextSubsets(
            args.num_mc_samples, block, args.prompt_mask_probability, scores_all, args.informed_masking()
        )
        return MaskedViews(noise)

    def loss(self) -> Loss:
        upper_weight = {"mix": self.args.mix_weight, "upper": 1.0, "lower": 0.0}[self.args.negative_bound]
        return SandwichedBound(self.args.bound_power, upper_weight)
