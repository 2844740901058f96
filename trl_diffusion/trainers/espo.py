"""ESPO (2512.03759): ratios of whole sequences, from an unbiased estimate of the ELBO.

rollout     block by block, low-confidence unmasking, temperature 1
credit      A = leave-one-out: r − mean of the other completions
likelihood  two pairs of a random subset of the canvas with its complement, sizes stratified over all completions;
            the same masks for policy, old policy and reference
loss        clipped ratio exp((ELBO − ELBO_old) / L) of the completion; KL term β (ELBO − ELBO_ref)² / 2L
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from trl_diffusion.credit import leave_one_out
from trl_diffusion.likelihood import NoisePlan, elbo_of_pairs
from trl_diffusion.trainers.base.completion_loss import CompletionLossConfig, CompletionLossTrainer


@dataclass
class ESPOConfig(CompletionLossConfig):
    """`CompletionLossConfig` with the defaults of ESPO for mathematics (2512.03759).

    For Countdown the paper sets `epsilon=0` and `beta=3e-3`, for Sudoku `beta=1e-2`, both with 128 denoising steps; 16
    completions per prompt on MATH. The views of a completion are scored in one pass, whose memory grows with them.

    Raises:
        ValueError: if `num_mc_samples` is odd, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = ("beta", "epsilon", "epsilon_high", "sync_ref_model")

    num_mc_samples: int = field(default=4, metadata={"help": "Noised views, in complementary pairs."})
    num_iterations: int = field(default=8, metadata={"help": "Inner updates per rollout batch, μ."})
    denoising_steps: int = field(default=256, metadata={"help": "Denoising steps of the canvas."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the sequence ratio."})
    beta: float = field(default=1e-3, metadata={"help": "Coefficient of the quadratic KL estimate."})

    def __post_init__(self):
        super().__post_init__()
        self.require_pairs()


def sequence_ratio(elbo: torch.Tensor, old: torch.Tensor, length: int) -> torch.Tensor:
    """exp((ELBO − ELBO_old) / L), one per completion."""
    return ((elbo - old) / length).exp()


def clipped_loss(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A), one per completion."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def quadratic_kl(elbo: torch.Tensor, reference: torch.Tensor, length: int) -> torch.Tensor:
    """(ELBO − ELBO_ref)² / 2L, one per completion."""
    return (elbo - reference).square() / (2 * length)


class ESPOTrainer(CompletionLossTrainer):
    """ESPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = ESPOConfig
    args: ESPOConfig
    whole_canvas = True  # the ELBO is that of the canvas
    joint = True
    _compares_with_old = True
    _tag_names = ["trl", "trl_diffusion", "espo"]
    _name = "ESPO"
    _paper = {
        "title": "Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective",
        "id": "2512.03759",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ou2025principled,
                title        = {{Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective}},
                author       = {Jingyang Ou and Jiaqi Han and Minkai Xu and Shaoxuan Xu and Jianwen Xie and
                                Stefano Ermon and Yi Wu and Chongxuan Li},
                year         = 2025,
                eprint       = {arXiv:2512.03759},
            }"""),
    }

    def _scored_share(self) -> float:
        return 0.5  # each pair scores the canvas once

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        return self._subset_pairs(mode, update, rows, self.args.num_mc_samples // 2)

    def _group_advantages(self, advantages) -> torch.Tensor:
        return leave_one_out(advantages)

    def _completion_losses(self, rows, update, targets, logps) -> torch.Tensor:
        length = targets.size(-1)
        elbo = elbo_of_pairs(logps, targets)
        ratio = sequence_ratio(elbo, elbo_of_pairs(rows["old_per_token_logps"][:, update], targets), length)
        losses = clipped_loss(ratio, rows["advantages"], self.epsilon_low, self.epsilon_high)
        self._log_clipping(ratio, rows["advantages"])
        if self.args.beta != 0.0:
            kl = quadratic_kl(elbo, elbo_of_pairs(rows["ref_per_token_logps"][:, update], targets), length)
            self._add_metric("kl", self._mean_over_processes(kl))
            losses = losses + self.args.beta * kl
        return losses

    def _log_clipping(self, ratio: torch.Tensor, advantages: torch.Tensor) -> None:
        low = (ratio < 1 - self.epsilon_low) & (advantages < 0)
        high = (ratio > 1 + self.epsilon_high) & (advantages > 0)
        for name, clipped in (("low", low), ("high", high), ("region", low | high)):
            self._add_metric(f"clip_ratio/{name}_mean", self._mean_over_processes(clipped))
