"""diffu-GRPO (d1, 2504.12216): GRPO on a one-step likelihood, the common baseline.

rollout     block by block, low-confidence unmasking, temperature 0.9
credit      A = r − group mean
likelihood  one view: the whole canvas masked, and each prompt token with probability 0.15; a fresh prompt mask for
            every inner update, the same for policy, old policy and reference
loss        clipped token ratio on the tokens up to the first end token, k3 KL
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch

from trl_diffusion.likelihood import Views, prompt_masked_views
from trl_diffusion.sampling import row_generators
from trl_diffusion.sampling.noise import uniforms
from trl_diffusion.trainers.diffusion_grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_diffusion.trainers.random_streams import EVAL_VIEWS, TRAIN_VIEWS


@dataclass
class DiffuGRPOConfig(DiffusionGRPOConfig):
    """`DiffusionGRPOConfig` with the defaults of d1's diffu-GRPO (2504.12216).

    The paper's LoRA (r 128, alpha 64) is passed as `peft_config`. `loss_type="dapo"` (ours) divides by the tokens of
    the whole batch; `bnpo` divides per micro-batch, as the paper's code does, so that the update depends on how the
    batch is split.

    Args:
        prompt_mask_probability: probability with which a view masks each prompt token.

    Raises:
        ValueError: if the probability is not in [0, 1), or settings do not fit together.
    """

    prompt_mask_probability: float = field(
        default=0.15, metadata={"help": "Probability with which a view masks each prompt token."}
    )
    num_mc_samples: int = field(default=1, metadata={"help": "Views (prompt masks) per completion and update."})
    num_iterations: int = field(default=12, metadata={"help": "Inner updates per rollout batch, μ."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second moment decay of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=0.2, metadata={"help": "Gradient norm to clip at."})
    num_generations: int | None = field(default=6, metadata={"help": "Completions per prompt, G."})
    temperature: float = field(default=0.9, metadata={"help": "Sampling temperature."})
    unmasking: str = field(default="low_confidence", metadata={"help": "How positions to commit are chosen."})
    epsilon: float = field(default=0.5, metadata={"help": "Clip range of the ratio."})
    beta: float = field(default=0.04, metadata={"help": "Coefficient of the k3 KL."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weight the KL by the ratio."})
    loss_type: str = field(default="dapo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are centred on the group mean only."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.prompt_mask_probability < 1:
            raise ValueError(f"prompt_mask_probability must lie in [0, 1), got {self.prompt_mask_probability}.")


class DiffuGRPOTrainer(DiffusionGRPOTrainer):
    """diffu-GRPO, see the arguments of `DiffusionGRPOTrainer`."""

    config_class = DiffuGRPOConfig
    args: DiffuGRPOConfig
    _tag_names = ["trl", "trl_diffusion", "diffu-grpo"]
    _name = "diffu-GRPO"
    _paper = {
        "title": "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning",
        "id": "2504.12216",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhao2025d1,
                title        = {{d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning}},
                author       = {Siyan Zhao and Devaansh Gupta and Qinqing Zheng and Aditya Grover},
                year         = 2025,
                eprint       = {arXiv:2504.12216},
            }"""),
    }

    def _plan_views(self, mode, trajectory, rows, learns) -> dict[str, torch.Tensor]:
        length = self.family.effective_length(trajectory.completion_ids).unsqueeze(1)
        positions = torch.arange(trajectory.completion_ids.size(1), device=length.device)
        return {
            "completion_mask": ((positions < length) & learns.unsqueeze(1)).long(),
            "prompt_hidden": torch.stack(
                [self._prompt_masks(mode, update, rows) for update in range(self._inner_updates(mode))], dim=1
            ),
        }

    def _prompt_masks(self, mode: str, update: int, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """Bool [B, M, P], the prompt tokens that each view of an inner update masks."""
        purpose = TRAIN_VIEWS if mode == "train" else EVAL_VIEWS
        generators = row_generators(
            self.args.seed, purpose, self._rollouts[mode], update, rows=rows["global_row"].tolist()
        )
        # Position by position from the right, so that a token's noise does not depend on the padding on the left.
        width = rows["prompt_ids"].size(1)
        noise = uniforms(generators, width, self.args.num_mc_samples).to(rows["prompt_ids"].device)
        hidden = noise.flip(1).transpose(1, 2) < self.args.prompt_mask_probability
        return hidden & rows["prompt_mask"].bool().unsqueeze(1)

    def _view_of(self, rows: dict[str, torch.Tensor], update: int, view: int) -> Views:
        return prompt_masked_views(
            rows["completion_ids"],
            rows["completion_mask"].bool(),
            rows["prompt_ids"],
            rows["prompt_hidden"][:, update, view],
            self.family.mask_token_id,
        )
