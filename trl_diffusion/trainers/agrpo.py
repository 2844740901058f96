"""AGRPO (2510.04019): policy gradient over the real denoising steps, with Monte-Carlo draws of the steps.

rollout     block by block, random order, temperature 0.6, top-k 150, top-p 0.99
credit      A = r − group mean; the steps up to the last one that wrote text learn, their mean counts
likelihood  the canvas before a drawn step; steps drawn in proportion to the entropy of their tokens, weighted back
loss        clipped token ratio, summed over the step's tokens
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer


@dataclass
class AGRPOConfig(TrajectoryGRPOConfig):
    """`TrajectoryGRPOConfig` with the defaults of the AGRPO paper (2510.04019).

    The paper's LoRA (r 64, alpha 64, all linear layers but the head, no dropout) is passed as `peft_config`.
    `loss_type="luspo"` with token ratios is the paper's objective in TRL's terms: the sum over the tokens of a step,
    the mean over steps and completions.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(default=0.01, metadata={"help": "Share (below 1) or number of warm-up steps."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second moment decay of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    num_generations: int | None = field(default=8, metadata={"help": "Completions per prompt, G."})
    max_completion_length: int = field(default=384, metadata={"help": "Length of the canvas in tokens."})
    block_length: int = field(default=12, metadata={"help": "Positions per block."})
    denoising_steps: int = field(default=128, metadata={"help": "Denoising steps of the canvas."})
    num_mc_samples: int = field(default=24, metadata={"help": "Monte-Carlo draws of a step per completion, M."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature."})
    top_k: int = field(default=150, metadata={"help": "Tokens kept by top-k."})
    top_p: float = field(default=0.99, metadata={"help": "Probability mass kept by top-p."})
    step_draws: str = field(default="entropy", metadata={"help": "Distribution of the drawn steps."})
    step_scope: str = field(default="paper", metadata={"help": "Steps that may learn: paper or exact."})
    step_reduction: str = field(default="mean", metadata={"help": "Reduction over steps: mean or sum."})
    loss_type: str = field(default="luspo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are centred on the group mean only."})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient; with the ratio's gradient when not 0."})


class AGRPOTrainer(TrajectoryGRPOTrainer):
    """AGRPO, see the arguments of `TrajectoryGRPOTrainer`."""

    config_class = AGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "agrpo"]
    _name = "AGRPO"
    _paper = {
        "title": "Simple Policy Gradients for Reasoning with Diffusion Language Models",
        "id": "2510.04019",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhan2025simple,
                title        = {{Simple Policy Gradients for Reasoning with Diffusion Language Models}},
                author       = {Anthony Zhan},
                year         = 2025,
                eprint       = {arXiv:2510.04019},
            }"""),
    }
