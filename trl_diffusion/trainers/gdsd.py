"""GDSD, Guided Denoiser Self-Distillation (2605.29398): the log-ratio of a completion is fitted to its advantage.

rollout     block by block, low-confidence unmasking, temperature 1
credit      A = leave-one-out: r − mean of the other completions
likelihood  two pairs of a random subset of the canvas with its complement, sizes stratified over all completions; a
            pair scores each token once
loss        (Δ / L − ψA)² of each pair, Δ the change of the tokens' log-probabilities since the rollout, Δ / L clipped
            to log(1 ± 4e-4); quadratic KL term
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from trl_diffusion.credit import Credit, leave_one_out
from trl_diffusion.likelihood import Likelihood, MaskedViews, ScoredViews, SubsetPairs
from trl_diffusion.losses import LogRatioRegression, Loss
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import CompletionLossConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer
from trl_diffusion.validation import clip_range, one_of

TOKEN_WEIGHTS = ("equal", "elbo")


@dataclass
class GDSDConfig(CompletionLossConfig):
    """The defaults of GDSD's release for GSM8K (2605.29398).

    For MATH the release sets `learning_rate=1e-5` and `beta=1e-4`, for other tasks `psi=1` with 64 denoising steps.

    Args:
        psi: ψ, the log-ratio per token that an advantage of 1 asks for.
        token_weights: `equal`, or `elbo`: the weights of the ELBO, with which the release's variant "TLC" differs from
            its plain form.

    Raises:
        ValueError: if `num_mc_samples` is odd, ψ is not positive, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = LogRatioRegression.reads

    psi: float = field(default=10.0, metadata={"help": "ψ, log-ratio per token that an advantage of 1 asks for."})
    token_weights: str = field(default="equal", metadata={"help": "Weights of a pair's tokens: equal or elbo."})
    num_mc_samples: int = field(default=4, metadata={"help": "Noised views, in complementary pairs."})
    num_iterations: int = field(default=8, metadata={"help": "Inner updates per rollout batch, μ."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt, G."})
    denoising_steps: int = field(default=256, metadata={"help": "Denoising steps of the canvas."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    epsilon: float = field(default=4e-4, metadata={"help": "Clip range of the log-ratio per token."})
    beta: float = field(default=1e-3, metadata={"help": "Coefficient of the quadratic KL estimate."})

    def __post_init__(self):
        super().__post_init__()
        self.require_pairs()
        one_of("token_weights", self.token_weights, TOKEN_WEIGHTS)
        clip_range(*self.clip_range)
        if not self.psi > 0:
            raise ValueError(f"psi must be positive, so that good completions become more likely; got {self.psi}.")


class ScoredLeaveOneOut(Credit):
    """Leave-one-out advantages. An advantage of 0 asks for a log-ratio of 0, which one without a reward must not."""

    only_scored = True

    def centre(self, advantages: torch.Tensor) -> torch.Tensor:
        return leave_one_out(advantages)


@dataclass
class TokenPairs(SubsetPairs):
    """`SubsetPairs` whose estimate is the sum of the tokens' log-probabilities, each once, in place of the ELBO's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.independent_halves = False  # they are no estimates of the ELBO

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        return 2 * logps.sum(-1).mean(1)  # a pair holds every token once


class GDSDTrainer(DiffusionGRPOTrainer):
    """GDSD, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = GDSDConfig
    args: GDSDConfig
    _tag_names = ["trl", "trl_diffusion", "gdsd"]
    _name = "GDSD"
    _paper = {
        "title": "GDSD: Reinforcement Learning as Guided Denoiser Self-Distillation for Diffusion Language Models",
        "id": "2605.29398",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{tang2026gdsd,
                title        = {{GDSD: Reinforcement Learning as Guided Denoiser Self-Distillation for Diffusion
                                 Language Models}},
                author       = {Xiaohang Tang and Keyue Jiang and Che Liu and Qifang Zhao and Xiaoxiao Xu and
                                Sangwoong Yoon and Ilija Bogunovic},
                year         = 2026,
                eprint       = {arXiv:2605.29398},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return ScoredLeaveOneOut()

    def likelihood(self) -> Likelihood:
        noise = SubsetPairs if self.args.token_weights == "elbo" else TokenPairs
        return MaskedViews(noise(self.args.num_mc_samples // 2), loss_mask="canvas")

    def loss(self) -> Loss:
        args = self.args
        return LogRatioRegression(args.psi, *args.clip_range, args.beta, samples=args.num_mc_samples // 2)
