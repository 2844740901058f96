"""coupled-GRPO (DiffuCoder, 2506.20639): complementary masks, so that every token is scored equally often.

rollout     block by block
credit      A = leave-one-out: r − mean of the other completions
likelihood  one view with the whole canvas masked, and pairs of a random mask with its complement; a token's statistic
            is the mean of its log-probability under the full mask and of that in the view that masks it, divided by
            the view's rate
loss        clipped ratio of that statistic on the text, k3 KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch

from trl_diffusion.credit import leave_one_out
from trl_diffusion.likelihood import Likelihood, MaskedViews, Noise, NoisePlan, ScoredViews
from trl_diffusion.likelihood.plans import bernoulli, concatenate, full_mask, with_complements
from trl_diffusion.losses.token_ratio import check_token_level
from trl_diffusion.sampling.rollout import Rollout
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.base.masked import MaskRateConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class CoupledGRPOConfig(MaskRateConfig):
    """`MaskRateConfig` with the defaults of coupled-GRPO (2506.20639).

    `num_mc_samples` counts the masked views, in pairs; the full mask comes on top. The views of a completion are
    scored in one pass, whose memory grows with their number.

    Raises:
        ValueError: if `num_mc_samples` is odd, a complement could be empty, or settings do not fit together.
    """

    min_mask_rate: float = field(default=0.2, metadata={"help": "Smallest share of the canvas that is masked."})
    max_mask_rate: float = field(default=0.8, metadata={"help": "Largest share of the canvas that is masked."})
    num_mc_samples: int = field(default=2, metadata={"help": "Masked views, in complementary pairs."})
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    num_generations: int | None = field(default=10, metadata={"help": "Completions per prompt, G."})
    num_iterations: int = field(default=2, metadata={"help": "Inner updates per rollout batch, μ."})
    denoising_steps: int = field(default=256, metadata={"help": "Denoising steps of the canvas."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.01, metadata={"help": "Coefficient of the k3 KL."})

    def __post_init__(self):
        super().__post_init__()
        self.require_pairs()
        check_token_level(self)
        if self.max_mask_rate == 1:
            raise ValueError("max_mask_rate must be below 1: the complement of a full mask scores nothing.")


def coupled_statistic(logps: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """½ [ℓ under the full mask + mean over pairs of ℓ in the view that masks the token ÷ the view's rate].

    Args:
        logps: float [B, V, L], 0 where a view does not score a token; view 0 masks everything, the others in pairs.
        rates: [B, V].

    Returns:
        [B, L].
    """
    pairs = (logps.size(1) - 1) / 2
    partial = (logps[:, 1:] / rates[:, 1:].unsqueeze(-1)).sum(1) / pairs
    return (logps[:, 0] + partial) / 2


@dataclass
class CoupledMasks(Noise):
    """The whole canvas masked, then pairs of a random mask with its complement.

    Args:
        pairs: the number of pairs.
        low: smallest rate of the first mask of a pair.
        high: largest rate.
    """

    paper = "2506.20639"

    pairs: int
    low: float
    high: float

    def __post_init__(self) -> None:
        self.num_views = 2 * self.pairs + 1

    def draw(self, rollout: Rollout, update: int) -> NoisePlan:
        noise, (batch, length) = rollout.view_noise(update), rollout.trajectory.completion_ids.shape
        masks = bernoulli(noise.uniform(self.pairs), noise.uniform(self.pairs, length), self.low, self.high)
        return concatenate([full_mask(batch, 1, length, device=rollout.device), with_complements(masks)])

    def estimate(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        """The sum of the tokens' statistics."""
        assert views.rates is not None
        return coupled_statistic(logps, views.rates).sum(-1)

    def scored_share(self, length: int) -> float:
        return (1 + self.pairs) / self.num_views  # each pair scores the canvas once


class CoupledViews(MaskedViews):
    """Masked views whose log-probabilities make one statistic per token."""

    scored_together = True

    def combine(self, logps: torch.Tensor, views: ScoredViews) -> torch.Tensor:
        assert views.rates is not None
        return coupled_statistic(logps, views.rates).unsqueeze(1)


class CoupledGRPOTrainer(DiffusionGRPOTrainer):
    """coupled-GRPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = CoupledGRPOConfig
    args: CoupledGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "coupled-grpo"]
    _name = "coupled-GRPO"
    _paper = {
        "title": "DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation",
        "id": "2506.20639",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{gong2025diffucoder,
                title        = {{DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation}},
                author       = {Shansan Gong and Ruixiang Zhang and Huangjie Zheng and Jiatao Gu and Navdeep Jaitly and
                                Lingpeng Kong and Yizhe Zhang},
                year         = 2025,
                eprint       = {arXiv:2506.20639},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return leave_one_out

    def likelihood(self) -> Likelihood:
        args = self.args
        return CoupledViews(CoupledMasks(args.num_mc_samples // 2, args.min_mask_rate, args.max_mask_rate))
