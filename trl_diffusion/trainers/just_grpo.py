"""JustGRPO (2601.15165): GRPO on completions that are written from left to right, with their exact likelihood.

rollout     one token a step from left to right: blocks of one position
credit      GRPO's advantages, mean over the completions of groups whose rewards differ; every step learns. The paper's
            faster form trains the quarter of the steps with the most entropy; ours draws steps without bias
likelihood  the canvas before each step: the token's probability given the prompt and the text before it
loss        clipped token ratio, summed over the text and divided by the length of the canvas; no KL
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

from trl_diffusion.credit import GroupCredit, among_untied
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer

FAST_SHARE = 0.25


@dataclass
class JustGRPOConfig(TrajectoryGRPOConfig):
    """`TrajectoryGRPOConfig` with the defaults of JustGRPO (2601.15165).

    The paper trains all weights. `loss_type="dr_grpo"` with the sum over steps is its objective in TRL's terms.

    Its faster form is `step_draws="top_entropy"`, of a quarter of the steps if `step_share` says nothing else. It is
    biased: other steps never learn.
    `step_draws="entropy"` (ours) costs as many views and has the gradient of the whole method in expectation.

    Args:
        denoising_steps: derived: one for every position of the canvas.
        num_mc_samples: if left at 0, a view for every step that learns: all, or the `step_share` of them; a quarter
            of all for steps that are drawn (`uniform`, `entropy`).

    Raises:
        ValueError: if completions would not be written from left to right, one token at a time, or settings do not fit
            together.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt, G."})
    block_length: int = field(default=1, metadata={"help": "Positions per block: 1, so that text grows to the right."})
    denoising_steps: int = field(
        default=0, metadata={"help": "Steps: leave at 0, one for every position of the canvas is taken."}
    )
    num_mc_samples: int = field(
        default=0, metadata={"help": "Views per completion and update; 0 for one per step that learns."}
    )
    step_draws: str = field(
        default="all",
        metadata={"help": "Steps that learn: all; top_entropy (the paper's faster form, biased); entropy (drawn)."},
    )
    loss_type: str = field(default="dr_grpo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="group", metadata={"help": "Advantages are divided by the group's std."})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient."})

    def __post_init__(self):
        self.denoising_steps = self.denoising_steps or self.max_completion_length
        if self.step_draws == "top_entropy" and self.step_share is None:
            self.step_share = FAST_SHARE
        if self.num_mc_samples == 0:
            share = 1.0 if self.step_draws == "all" else self.step_share or FAST_SHARE
            self.num_mc_samples = math.ceil(share * self.max_completion_length)
        super().__post_init__()
        for name, needed in (
            ("block_length", 1),
            ("denoising_steps", self.max_completion_length),
            ("confidence_threshold", None),
            ("entropy_bound", None),
        ):
            if getattr(self, name) != needed:
                raise ValueError(
                    f"JustGRPO writes one token a step from left to right, which needs {name}={needed}; got "
                    f"{getattr(self, name)}. For steps that commit several tokens take ForkGRPO or AGRPO."
                )


class JustGRPOTrainer(TrajectoryGRPOTrainer):
    """JustGRPO, see the arguments of `TrajectoryGRPOTrainer`; the model must have full attention."""

    config_class = JustGRPOConfig
    args: JustGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "just-grpo"]
    _name = "JustGRPO"
    _paper = {
        "title": "The Flexibility Trap: Why Arbitrary Order Limits Reasoning Potential in Diffusion Language Models",
        "id": "2601.15165",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ni2026flexibility,
                title        = {{The Flexibility Trap: Why Arbitrary Order Limits Reasoning Potential in Diffusion
                                 Language Models}},
                author       = {Zanlin Ni and Shenzhi Wang and Yang Yue and Tianyu Yu and Weilin Zhao and Yeguo Hua and
                                Tianyi Chen and Jun Song and Cheng Yu and Bo Zheng and Gao Huang},
                year         = 2026,
                eprint       = {arXiv:2601.15165},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return GroupCredit(weighing=among_untied)

    def _check_loaded_model(self, datasets: dict[str, Any]) -> None:
        block = self.family.attention_block
        if block is not None and block > 1:
            raise ValueError(
                f"JustGRPO writes from left to right, and {self.family.name} was trained to write blocks of {block} "
                "tokens at once: text that grows by single tokens is not what it knows, and training on it damages "
                "the model. Take a model with full attention, or DiPO for this one."
            )
        super()._check_loaded_model(datasets)
