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
from trl_diffusion.likelihood import NoisePlan, Scores
from trl_diffusion.likelihood.plans import bernoulli, concatenate, full_mask, with_complements
from trl_diffusion.trainers.base.masked import MaskRateConfig, NoisedGRPOTrainer


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
        self.require_token_ratios()
        if self.max_mask_rate == 1:
            raise ValueError("max_mask_rate must be below 1: the complement of a full mask scores nothing.")


def coupled_statistic(logps: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """½ [ℓ under the full mask + mean over pairs of ℓ in the view that masks the token ÷ the view's rate].

    Args:
        logps: float [B, V, L], 0 where a view does not score a token; view 0 masks everything, the others in pairs.
        share: [B, V], rates.

    Returns:
        [B, L].
    """
    pairs = (logps.size(1) - 1) / 2
    partial = (logps[:, 1:] / share[:, 1:].unsqueeze(-1)).sum(1) / pairs
    return (logps[:, 0] + partial) / 2


class CoupledGRPOTrainer(NoisedGRPOTrainer):
    """coupled-GRPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = CoupledGRPOConfig
    args: CoupledGRPOConfig
    joint = True
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

    def _num_views(self) -> int:
        return self.args.num_mc_samples + 1

    def _scored_share(self) -> float:
        return (1 + self.args.num_mc_samples / 2) / self._num_views()  # each pair scores the canvas once

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        streams, (batch, length) = self._streams(mode, update, rows), scope.shape
        pairs = self.args.num_mc_samples // 2
        rates, noise = self._uniforms(streams, pairs), self._uniforms(streams, pairs, length)
        masked = bernoulli(rates, noise, self.args.min_mask_rate, self.args.max_mask_rate)
        return concatenate([full_mask(batch, 1, length, device=scope.device), with_complements(masked)])

    def _group_advantages(self, advantages) -> torch.Tensor:
        return leave_one_out(advantages)

    def _view_loss(self, model, rows, update, view) -> torch.Tensor:
        scores = self._score_views(model, rows, update, range(self._num_views()))
        share = rows["hidden_share"][:, update]
        statistic = coupled_statistic(scores.logps, share)
        old = coupled_statistic(rows["old_per_token_logps"][:, update], share)
        compared = None
        if self.args.beta != 0.0:
            compared = coupled_statistic(rows["ref_per_token_logps"][:, update], share)
        targets = rows["completion_mask"].bool()
        return self._token_loss(model, rows, Scores(statistic, scores.entropies[:, 0]), targets, old, compared)
