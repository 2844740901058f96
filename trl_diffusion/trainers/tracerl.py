"""TraceRL (2509.06949), without its value model: the trajectory in groups of denoising steps.

rollout     block by block
credit      A = (r − group mean) / population standard deviation, 0 where all rewards are equal
likelihood  one view per `shrink` successive steps that were taken: the canvas before the first of them, the tokens of
            all of them as targets, each token of the text once; at the sampling temperature and support. With
            `block_causal` the steps of all blocks at once, each block beside the finished ones before it
loss        clipped token ratio, mean over a view's tokens; k3 to the old policy, summed over a view's tokens; mean
            over a completion's views
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch

from trl_diffusion.trainers.base.quiet import no_luspo_hint
from trl_diffusion.trainers.base.replay import ReplayConfig, ReplayTrainer


@dataclass
class TraceRLConfig(ReplayConfig):
    """`ReplayConfig` with TraceRL's objective (2509.06949). Its optimizer and rollout settings are d1's.

    `loss_type="luspo"` with token ratios sums over tokens; the weights that the views carry make it a mean.

    Args:
        block_causal: for models with block-causal attention; the views then cover the steps of a block.

    Raises:
        ValueError: if `shrink` does not fit the steps, or settings do not fit together.
    """

    block_causal: bool = field(default=False, metadata={"help": "Replay the steps of all blocks at once (SDAR)."})
    shrink: int = field(default=8, metadata={"help": "Denoising steps per view."})
    beta: float = field(
        default=0.01, metadata={"help": "Coefficient of the k3 KL to the old policy, summed over a view's tokens."}
    )
    loss_type: str = field(default="luspo", metadata={"help": "TRL's loss type; luspo only."})

    def __post_init__(self):
        super().__post_init__()
        for name, needed in (("loss_type", "luspo"), ("top_entropy_quantile", 1.0), ("sync_ref_model", False)):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"TraceRL's means over views and its KL to the old policy need {name}={needed!r}; got "
                    f"{getattr(self, name)!r}."
                )

    @property
    def views_beside_completion(self) -> bool:
        return self.block_causal


class TraceRLTrainer(ReplayTrainer):
    """TraceRL, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = TraceRLConfig
    args: TraceRLConfig
    _tag_names = ["trl", "trl_diffusion", "tracerl"]
    _name = "TraceRL"
    _paper = {
        "title": "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models",
        "id": "2509.06949",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2025revolutionizing,
                title        = {{Revolutionizing Reinforcement Learning Framework for Diffusion Large Language
                                 Models}},
                author       = {Yinjie Wang and Ling Yang and Bowen Li and Ye Tian and Ke Shen and Mengdi Wang},
                year         = 2025,
                eprint       = {arXiv:2509.06949},
            }"""),
    }

    def __init__(self, *args, **kwargs):
        with no_luspo_hint():
            super().__init__(*args, **kwargs)

    @staticmethod
    def _needs_reference(args) -> bool:
        return False  # its KL compares with the policy that wrote the completions

    def _view_weights(self, scored) -> torch.Tensor:
        # mean over a view's tokens, and over the views that have any
        filled = (scored > 0).sum(-1, keepdim=True)
        return self._num_views() / (filled * scored).clamp(min=1)

    def _token_loss(self, model, rows, scores, targets, old, compared, weights=None, importance=None):
        # The weights make means of both terms. The release adds up the k3 of a view's tokens: so the weights lose the
        # number of these, which then divides the policy term alone.
        assert weights is not None
        count = targets.sum(1).clamp(min=1)
        rows = rows | {"advantages": rows["advantages"] / count}
        return super()._token_loss(model, rows, scores, targets, old, compared, weights * count, importance)

    def _compared_logps(self, rows, update, view) -> torch.Tensor | None:
        return self._old_logps(rows, update, view, rows["targets"][:, update, view]) if self.args.beta else None
