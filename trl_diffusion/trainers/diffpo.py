"""DiFFPO (2510.02212): tokens scored on two canvases, and weighted by how far these are from what the sampler saw.

rollout     block by block, low-confidence unmasking, temperature 0.9; or with `learn_bound` entropy-bound unmasking,
            whose bound is drawn for each completion by a policy that learns, too
credit      A = r − group mean
likelihood  a denoising step τ of the completion is drawn for each update: tokens written before τ are scored on the
            masked canvas, all others on the canvas before τ
loss        clipped token ratio to the old policy on the same canvas, times min(C, p_old / p_rollout); k3 KL

There is no release. Of the paper only digests were known when this was written; C and all settings of training are
ours or d1's.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.likelihood import Likelihood, SplitAtSteps, SplitViews
from trl_diffusion.losses.token_ratio import SUMS_OF_TOKENS
from trl_diffusion.trainers.base.learnt_bound import LearntBoundConfig, LearntBoundTrainer


@dataclass
class DiFFPOConfig(LearntBoundConfig):
    """`LearntBoundConfig` with DiFFPO's views and weights (2510.02212) on the settings of diffu-GRPO.

    Args:
        num_mc_samples: two views for each drawn step τ.
        weight_cap: C, largest importance weight of a token; `None` for no weights.

    Raises:
        ValueError: if the cap is not positive, the number of views is odd, the loss type does not sum over tokens, or
            settings do not fit together.
    """

    num_mc_samples: int = field(default=2, metadata={"help": "Views per completion and update, two for each τ."})
    weight_cap: float | None = field(
        default=2.0, metadata={"help": "Largest importance weight of a token, C; None for no weights."}
    )
    num_iterations: int = field(default=12, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the k3 KL."})

    def __post_init__(self):
        super().__post_init__()
        self.require_pairs()
        if self.weight_cap is not None and not self.weight_cap > 0:
            raise ValueError(f"weight_cap must be positive, or None for no weights; got {self.weight_cap}.")
        if self.loss_type not in SUMS_OF_TOKENS:
            raise ValueError(
                "DiFFPO scores the tokens of a completion in two views, in which all count alike only if loss_type "
                f"sums over tokens: one of {', '.join(SUMS_OF_TOKENS)}. Got {self.loss_type!r}."
            )


class DiFFPOTrainer(LearntBoundTrainer):
    """DiFFPO, see the arguments of `DiffusionGRPOTrainer`; the model must have full attention."""

    config_class = DiFFPOConfig
    args: DiFFPOConfig
    _tag_names = ["trl", "trl_diffusion", "diffpo"]
    _name = "DiFFPO"
    _paper = {
        "title": "DiFFPO: Training Diffusion LLMs to Reason Fast and Furious via Reinforcement Learning",
        "id": "2510.02212",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhao2025diffpo,
                title        = {{DiFFPO: Training Diffusion LLMs to Reason Fast and Furious via Reinforcement
                                 Learning}},
                author       = {Hanyang Zhao and Dawen Liang and Wenpin Tang and David D. Yao and Nathan Kallus},
                year         = 2025,
                eprint       = {arXiv:2510.02212},
            }"""),
    }

    def likelihood(self) -> Likelihood:
        return SplitViews(SplitAtSteps(self.args.num_mc_samples), cap=self.args.weight_cap)
