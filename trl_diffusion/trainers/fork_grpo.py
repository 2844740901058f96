"""ForkGRPO (2609.39859): learn where the network has to decide.

rollout     block by block; every position whose largest probability reaches a threshold is committed at once, and
            where none does, the leftmost alone: a forced step
credit      GRPO's advantages, mean over the completions of groups whose rewards differ; the forced steps learn
likelihood  the canvas before a forced step, at the sampling temperature
loss        clipped token ratio, mean over the forced steps of a completion; no KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit import GroupCredit, among_untied
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer


@dataclass
class ForkGRPOConfig(TrajectoryGRPOConfig):
    """`TrajectoryGRPOConfig` with the defaults of ForkGRPO (2609.39859).

    The paper's LoRA (r 128, alpha 64, dropout 0.05, attention and MLP) is passed as `peft_config`.

    `unmasking="max_prob"` (ours) compares the largest probability of a position with the threshold. So whether a step
    is forced does not depend on the token that is drawn there, and the recorded log-probability is the policy's.
    `unmasking="low_confidence"` compares the probability of the drawn token, as the paper does: a forced token is then
    known to be an unlikely one, and its log-probability is not that of the policy.

    Args:
        denoising_steps: derived: as many as the canvas has positions, so that a forced step commits one token.
        num_mc_samples: views; of completions with more forced steps an even share is drawn for each update.

    Raises:
        ValueError: if a forced step could commit several tokens, or settings do not fit together.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate of AdamW."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second moment decay of AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradient norm to clip at."})
    num_generations: int | None = field(default=16, metadata={"help": "Completions per prompt, G."})
    denoising_steps: int = field(
        default=0, metadata={"help": "Steps at most: leave at 0, one for every position of the canvas is taken."}
    )
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})
    unmasking: str = field(
        default="max_prob",
        metadata={"help": "What is compared with the threshold: max_prob, or low_confidence (the drawn token)."},
    )
    confidence_threshold: float | None = field(
        default=0.8, metadata={"help": "Commit every position whose probability reaches this."}
    )
    fallback: str = field(default="leftmost", metadata={"help": "What a forced step commits: leftmost or surest."})
    num_mc_samples: int = field(default=32, metadata={"help": "Forced steps per completion and update, at most."})
    step_draws: str = field(default="forced", metadata={"help": "Steps that learn."})
    step_reduction: str = field(default="mean", metadata={"help": "Mean or sum over the forced steps."})
    loss_type: str = field(default="grpo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="group", metadata={"help": "Advantages are divided by the group's std."})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient."})

    def __post_init__(self):
        self.denoising_steps = self.denoising_steps or self.max_completion_length
        super().__post_init__()
        if self.denoising_steps != self.max_completion_length:
            raise ValueError(
                "A forced step of ForkGRPO commits one token, so denoising_steps must be max_completion_length "
                f"({self.max_completion_length}); got {self.denoising_steps}. Leave it out: with confidence_threshold "
                "it is the most that is taken."
            )


class ForkGRPOTrainer(TrajectoryGRPOTrainer):
    """ForkGRPO, see the arguments of `TrajectoryGRPOTrainer`."""

    config_class = ForkGRPOConfig
    args: ForkGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "fork-grpo"]
    _name = "ForkGRPO"
    _paper = {
        "title": "Fork-dLLM: Avoiding the Flexibility Trap in Diffusion Language Models",
        "id": "2609.39859",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{frkovic2026fork,
                title        = {{Fork-dLLM: Avoiding the Flexibility Trap in Diffusion Language Models}},
                author       = {Stipe Frkovi\'{c} and Metod Jazbec and Christian A. Naesseth},
                year         = 2026,
                eprint       = {arXiv:2609.39859},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return GroupCredit(weighing=among_untied)
