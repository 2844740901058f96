"""EGSPO-SA (2603.12554): the steps with the most entropy learn, each by what the rest of the denoising gained.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      A = r − group mean; a step adds λ times the centred difference between the completion's reward and that of
            the text which the network writes greedily in one step from the canvas before it
likelihood  the canvas before each of the completion's 8 steps with the most entropy
loss        clipped token ratio, summed over the step's tokens, mean over the steps; k3 KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from trl_diffusion.credit import Credit, FillAdvantages
from trl_diffusion.trainers.base.choices import CreditChoice
from trl_diffusion.trainers.trajectory_grpo import TrajectoryGRPOConfig, TrajectoryGRPOTrainer


@dataclass
class EGSPOConfig(TrajectoryGRPOConfig):
    """`TrajectoryGRPOConfig` with the defaults of EGSPO-SA's release (2603.12554).

    The paper's LoRA (r 128, alpha 64) is passed as `peft_config`. `loss_type="luspo"` sums over the tokens of a step,
    which are equally many at every step; it is the loss type whose KL term can carry the weights of the views.

    Args:
        fill_weight: λ.

    Raises:
        ValueError: if settings do not fit together.
    """

    fill_weight: float = field(default=0.1, metadata={"help": "Weight λ of a step's own advantage; 0 for none."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second moment decay of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=0.2, metadata={"help": "Gradient norm to clip at."})
    temperature: float = field(default=0.9, metadata={"help": "Sampling temperature."})
    unmasking: str = field(default="low_confidence", metadata={"help": "How positions to commit are chosen."})
    num_mc_samples: int = field(default=8, metadata={"help": "Steps of each completion that learn, K."})
    step_draws: str = field(default="top_entropy", metadata={"help": "Steps of each completion that learn."})
    step_reduction: str = field(default="mean", metadata={"help": "Mean over the steps that learn."})
    loss_type: str = field(default="luspo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are centred on the group mean only."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the k3 KL."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weight the KL by the ratio."})


class EGSPOTrainer(TrajectoryGRPOTrainer):
    """EGSPO-SA, see the arguments of `TrajectoryGRPOTrainer`; the model must have full attention."""

    config_class = EGSPOConfig
    args: EGSPOConfig
    _tag_names = ["trl", "trl_diffusion", "egspo-sa"]
    _name = "EGSPO-SA"
    _paper = {
        "title": "Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection and Stepwise "
        "Advantages",
        "id": "2603.12554",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{kunde2026reinforcement,
                title        = {{Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection and
                                 Stepwise Advantages}},
                author       = {Vishnu Teja Kunde and Fatemeh Doudi and Mahdi Farahbakhsh and Dileep Kalathil and
                                Krishna Narayanan and Jean-Francois Chamberland},
                year         = 2026,
                eprint       = {arXiv:2603.12554},
            }"""),
    }

    def credit(self) -> CreditChoice:
        return FillAdvantages(self.args.fill_weight) if self.args.fill_weight else Credit()
