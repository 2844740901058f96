"""ATPO (2511.15208): policy gradient over the denoising steps at which the network hesitates most.

Only the paper's abstract is public: the signals, their average over the batch and the hybrid rule are the paper's;
the formulas, and every default but those, are ours.

rollout     block by block, random order; entropy and confidence margin of every step are recorded
credit      GRPO's advantages; the K steps with the highest mean z-score of RoEC and confidence margin learn
likelihood  the canvas before a selected step
loss        clipped token ratio, mean over the step's tokens, mean over the K steps
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer


@dataclass
class ATPOConfig(TrajectoryGRPOConfig):
    """`TrajectoryGRPOConfig` with ATPO's step selection (2511.15208).

    `num_mc_samples` is K, the number of selected steps. `loss_type="grpo"` takes the mean over the tokens of a step.
    """

    num_mc_samples: int = field(default=8, metadata={"help": "Selected denoising steps per rollout, K."})
    step_selector: str | None = field(
        default="roec_cm",
        metadata={
            "help": "Selects the same num_mc_samples steps for all completions: all, uniform, random, entropy, "
            "confidence_margin, roec, roec_cm, threshold or sampled."
        },
    )
    step_reduction: str = field(default="mean", metadata={"help": "Mean over the selected steps."})
    loss_type: str = field(default="grpo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="group", metadata={"help": "Advantages are divided by the group's std."})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient."})


class ATPOTrainer(TrajectoryGRPOTrainer):
    """ATPO, see the arguments of `TrajectoryGRPOTrainer`."""

    config_class = ATPOConfig
    _tag_names = ["trl", "trl_diffusion", "atpo"]
    _name = "ATPO"
    _paper = {
        "title": "Reasoning in Diffusion Large Language Models is Concentrated in Dynamic Confusion Zones",
        "id": "2511.15208",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{chen2025reasoning,
                title        = {{Reasoning in Diffusion Large Language Models is Concentrated in Dynamic
                                 Confusion Zones}},
                author       = {Ranfei Chen and Ming Chen and Kaifei Wang},
                year         = 2025,
                eprint       = {arXiv:2511.15208},
            }"""),
    }
