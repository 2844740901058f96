"""SPG, Sandwiched Policy Gradient (2510.09541): a lower bound of the likelihood for good, an upper bound for bad.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      A = r − group mean
likelihood  two views of one block each: earlier blocks shown, later ones masked, a random subset of the block masked
            and scored; shown tokens of earlier blocks and the prompt are masked with probability 0.15
loss        −A · bound · n / mean n; the bound is the ELBO per token where A > 0, else a mix of it and an upper bound
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace

import torch

from trl_diffusion.likelihood import NoisePlan, mean_of_targets, upper_bound_per_token
from trl_diffusion.likelihood.plans import block_random, random_text
from trl_diffusion.trainers.base.completion_loss import CompletionLossConfig, CompletionLossTrainer
from trl_diffusion.trainers.base.masked import PromptNoiseConfig

CHOICES = {
    "noise": ("block_random", "random"),
    "scored": ("block", "hidden"),
    "negative_bound": ("mix", "upper", "lower"),
}


@dataclass
class SPGConfig(CompletionLossConfig, PromptNoiseConfig):
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
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}.")
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


def sandwiched_bound(
    logps: torch.Tensor,
    targets: torch.Tensor,
    length: torch.Tensor,
    advantages: torch.Tensor,
    power: float,
    upper_weight: float,
) -> torch.Tensor:
    """ELBO per token where A ≥ 0, else upper_weight · upper bound + (1 − upper_weight) · ELBO.

    Args:
        logps: float [B, V, L], 0 where a position is no target.
        targets: bool [B, V, L].
        length: long [B], n.
        advantages: [B].
        power: b.
        upper_weight: 1 for the upper bound alone.

    Returns:
        [B], in nats per token.
    """
    lower = mean_of_targets(logps, targets).mean(1)
    upper = upper_bound_per_token(logps, targets, length, power)
    return torch.where(advantages < 0, upper_weight * upper + (1 - upper_weight) * lower, lower)


class SPGTrainer(CompletionLossTrainer):
    """SPG, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = SPGConfig
    args: SPGConfig
    joint = True
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

    def _scored_share(self) -> float:
        length = self.args.max_completion_length
        block = length if self.args.noise == "random" else self.args.noise_block_length or self.args.block_length
        behind = (
            (length - block) / 2 if self.args.scored == "hidden" else 0.0
        )  # blocks after the drawn one, on average
        return ((block + 1) / 2 + behind) / length

    def _noise(self, mode, update, trajectory, rows, scope) -> NoisePlan:
        args, streams, views = self.args, self._streams(mode, update, rows), self._num_views()
        length = self.family.effective_length(trajectory.completion_ids)
        counts, noise = self._uniforms(streams, views), self._uniforms(streams, views, scope.size(1))
        if args.noise == "random":
            plan = random_text(counts, noise, length)
        else:
            blocks, size = self._uniforms(streams, views), args.noise_block_length or args.block_length
            plan = block_random(blocks, counts, noise, length, size, args.prompt_mask_probability)
        prompt_hidden = self._prompt_noise(streams, rows, args.prompt_mask_probability)
        targets = plan.targets if args.scored == "block" else plan.hidden
        return replace(plan, targets=targets, prompt_hidden=prompt_hidden)

    def _assign_credit(self, mode, rows) -> None:
        length = rows["completion_mask"].sum(1)
        rows["length_weight"] = length / self.accelerator.gather(length).float().mean().clamp(min=1)

    def _completion_losses(self, rows, update, targets, logps) -> torch.Tensor:
        upper_weight = {"mix": self.args.mix_weight, "upper": 1.0, "lower": 0.0}[self.args.negative_bound]
        advantages, length = rows["advantages"], rows["completion_mask"].sum(1).clamp(min=1)
        bound = sandwiched_bound(logps, targets, length, advantages, self.args.bound_power, upper_weight)
        return -advantages * bound * rows["length_weight"]
