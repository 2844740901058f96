"""GRPO over noised completions: log-probabilities in views that a noise plan hides, not in those of the rollout.

A method says what its views hide (`_noise`) and which tokens may learn (`whole_canvas`). Views of one completion that
need each other in the loss are scored in one forward pass (`joint`); all others one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from trl_diffusion.likelihood import NoisePlan, Scores, Views, noised_views, stack_views
from trl_diffusion.likelihood.plans import (
    full_mask,
    prompt_noise,
    random_subsets,
    stratified_counts,
    with_complements,
)
from trl_diffusion.runtime.run import CompletionCost
from trl_diffusion.sampling import Trajectory, row_generators
from trl_diffusion.streams import Purpose, uniforms
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.trainers.base.trainer import DiffusionGRPOTrainer


@dataclass
class NoisedGRPOConfig(DiffusionGRPOConfig):
    """`DiffusionGRPOConfig` with the training set-up of d1 (2504.12216), which these methods started from.

    Its LoRA (r 128, alpha 64) is passed as `peft_config`.

    Raises:
        ValueError: if settings do not fit together.
    """

    num_mc_samples: int = field(default=1, metadata={"help": "Noised views per completion and update."})
    learning_rate: float = field(default=3e-6, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    adam_beta2: float = field(default=0.99, metadata={"help": "Second moment decay of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=0.2, metadata={"help": "Gradient norm to clip at."})
    num_generations: int | None = field(default=6, metadata={"help": "Completions per prompt, G."})
    temperature: float = field(default=0.9, metadata={"help": "Sampling temperature."})
    unmasking: str = field(default="low_confidence", metadata={"help": "How positions to commit are chosen."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weight the KL by the ratio."})
    loss_type: str = field(default="dapo", metadata={"help": "TRL's loss type."})
    scale_rewards: str = field(default="none", metadata={"help": "Rewards are centred on the group mean only."})

    @property
    def views_beside_completion(self) -> bool:
        """Whether views noise every block beside the finished ones before it, for block-causal attention."""
        return False

    def require_pairs(self) -> None:
        """For methods whose views come in complementary pairs.

        Raises:
            ValueError: if `num_mc_samples` is odd.
        """
        if self.num_mc_samples % 2:
            raise ValueError(
                f"{type(self).__name__} takes its views in complementary pairs, so num_mc_samples must be even; got "
                f"{self.num_mc_samples}."
            )


@dataclass
class PromptNoiseConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods whose views also mask the prompt, as d1 does.

    Args:
        prompt_mask_probability: probability with which a view masks each prompt token.

    Raises:
        ValueError: if the probability is not in [0, 1), or settings do not fit together.
    """

    prompt_mask_probability: float = field(
        default=0.15, metadata={"help": "Probability with which a view masks each prompt token."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.prompt_mask_probability < 1:
            raise ValueError(f"prompt_mask_probability must lie in [0, 1), got {self.prompt_mask_probability}.")


@dataclass
class MaskRateConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods whose views mask positions independently, at a random rate.

    Args:
        min_mask_rate: smallest rate of a view.
        max_mask_rate: largest rate of a view.

    Raises:
        ValueError: if not 0 < min_mask_rate ≤ max_mask_rate ≤ 1, or settings do not fit together.
    """

    min_mask_rate: float = field(default=0.1, metadata={"help": "Smallest share of the canvas that a view masks."})
    max_mask_rate: float = field(default=0.9, metadata={"help": "Largest share of the canvas that a view masks."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.min_mask_rate <= self.max_mask_rate <= 1:
            raise ValueError(
                f"Mask rates must satisfy 0 < min_mask_rate <= max_mask_rate <= 1; got {self.min_mask_rate} and "
                f"{self.max_mask_rate}."
            )


class NoisedGRPOTrainer(DiffusionGRPOTrainer):
    """GRPO over noised completions, see the arguments of `DiffusionGRPOTrainer`.

    A subclass overrides `_noise`. It sets `whole_canvas` if the end tokens behind the text learn too, and `joint` if
    the views of a completion need each other in the loss and are scored in one pass.
    """

    config_class: type[DiffusionGRPOConfig] = NoisedGRPOConfig
    whole_canvas: bool = False
    joint: bool = False
    args: NoisedGRPOConfig

    def _check_family(self) -> None:
        blocks, family = self.args.views_beside_completion, self.family.name
        if self.family.attention_block is None and blocks:
            raise ValueError(
                f"{self._name} noises every block beside the finished ones, which needs block-causal attention; "
                f"{family} attends to the whole canvas. Take a block-causal model (sdar), or TraceRL without "
                "block_causal."
            )
        if self.family.attention_block is not None and not blocks:
            raise ValueError(
                f"{self._name} noises the canvas as a whole, and {family} has block-causal attention: its blocks are "
                "written beside finished ones, which such views do not show. Use DiPO, TraceRL with "
                "block_causal=True, AGRPO or ATPO."
            )
        super()._check_family()

    def _noise(
        self, mode: str, update: int, trajectory: Trajectory, rows: dict[str, torch.Tensor], scope: torch.Tensor
    ) -> NoisePlan:
        """The views of one inner update.

        Args:
            mode: `"train"` or `"eval"`.
            update: index of the inner update.
            trajectory: of the B completions.
            rows: as in `_plan_views`.
            scope: bool [B, L], the tokens that may learn.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its views hide.")

    def _scope(self, completion_ids: torch.Tensor) -> torch.Tensor:
        """Tokens that may learn, bool [B, L]: the canvas, or the text up to and including the first end token."""
        length = self.family.effective_length(completion_ids).unsqueeze(1)
        return (torch.arange(completion_ids.size(1), device=length.device) < length) | self.whole_canvas

    def _planned_updates(self, mode: str) -> int:
        """Inner updates that get views of their own."""
        return self._inner_updates(mode)

    def _plan_views(self, mode, trajectory, rows, learns) -> dict[str, torch.Tensor]:
        scope = self._scope(trajectory.completion_ids) & learns.unsqueeze(1)
        plans = [
            self._noise(mode, update, trajectory, rows, scope).only(scope)
            for update in range(self._planned_updates(mode))
        ]
        plan = {
            "completion_mask": scope.long(),
            "hidden": torch.stack([plan.hidden for plan in plans], 1),
            "targets": torch.stack([plan.targets for plan in plans], 1),
            "hidden_share": torch.stack([plan.share for plan in plans], 1),
        }
        prompts = [plan.prompt_hidden for plan in plans if plan.prompt_hidden is not None]
        return plan | ({"prompt_hidden": torch.stack(prompts, 1)} if prompts else {})

    def _view_of(self, rows: dict[str, torch.Tensor], update: int, view: int) -> Views:
        return noised_views(
            rows["completion_ids"],
            rows["hidden"][:, update, view],
            rows["targets"][:, update, view],
            self.family.mask_token_id,
            rows["prompt_ids"],
            rows["prompt_hidden"][:, update, view] if "prompt_hidden" in rows else None,
            self.args.views_beside_completion,
        )

    def _passes(self) -> int:
        return 1 if self.joint else super()._passes()

    def _score_views(self, model, rows: dict[str, torch.Tensor], update: int, views: range) -> Scores:
        """Scores [B, V, L] of several views in one forward pass of V · B rows."""
        stacked = stack_views([self._view_of(rows, update, view) for view in views])
        repeated = {name: rows[name].repeat(len(views), 1) for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        repeated |= {"support": rows["support"].repeat(len(views), 1, 1)} if "support" in rows else {}
        scores = self._score(model, repeated, stacked)
        self._count_training(stacked.forward_units(rows["prompt_ids"].size(1)))
        return Scores(*(values.unflatten(0, (len(views), -1)).transpose(0, 1) for values in scores))

    def _scored_share(self) -> float:
        """Share of the canvas that a view scores on average when the text fills it; for estimates of cost."""
        return 1.0

    def completion_cost(self) -> CompletionCost:
        cost, length = super().completion_cost(), self.args.max_completion_length
        planned = self._planned_updates("train") * self._num_views()
        copied = length / (self.prompt_length() + length) if self.args.views_beside_completion else 0.0
        return replace(
            cost,
            old=cost.old * (1 + copied),
            reference=cost.reference * (1 + copied),
            training=cost.training * (1 + copied),
            targets=self._scored_share() * length,
            buffer_bytes=2.0 * length * planned,
        )

    # ---------------------------------------------------------------- noise

    def _streams(self, mode: str, update: int, rows: dict[str, torch.Tensor]) -> list[np.random.Generator]:
        """The private stream of each row for the views of one inner update."""
        purpose = Purpose.TRAIN_VIEWS if mode == "train" else Purpose.EVAL_VIEWS
        return row_generators(self.args.seed, purpose, self._rollouts[mode], update, rows=rows["global_row"].tolist())

    def _uniforms(self, streams: list[np.random.Generator], *shape: int) -> torch.Tensor:
        return uniforms(streams, *shape).to(self.accelerator.device)

    def _prompt_noise(
        self, streams: list[np.random.Generator], rows: dict[str, torch.Tensor], probability: float
    ) -> torch.Tensor:
        """Prompt tokens to mask, bool [B, V, P]. Drawn last from a stream: the padding changes how much is taken."""
        noise = self._uniforms(streams, rows["prompt_ids"].size(1), self._num_views())
        return prompt_noise(noise, probability, rows["prompt_mask"])

    def _masked_canvas(
        self, mode: str, update: int, rows: dict[str, torch.Tensor], prompt_mask_probability: float
    ) -> NoisePlan:
        """d1's view (2504.12216): the whole canvas masked, and some tokens of the prompt."""
        (batch, length), device = rows["completion_ids"].shape, self.accelerator.device
        hidden = self._prompt_noise(self._streams(mode, update, rows), rows, prompt_mask_probability)
        return replace(full_mask(batch, self._num_views(), length, device=device), prompt_hidden=hidden)

    def _subset_pairs(self, mode: str, update: int, rows: dict[str, torch.Tensor], pairs: int) -> NoisePlan:
        """Random subsets with their complements, whose ELBO estimate is unbiased (ESPO, 2512.03759)."""
        length, rollout = rows["completion_ids"].size(1), self._rollouts[mode]
        streams = self._streams(mode, update, rows)
        purpose = Purpose.TRAIN_VIEWS if mode == "train" else Purpose.EVAL_VIEWS
        shared = row_generators(self.args.seed, Purpose.VIEW_COUNTS, purpose, rollout, update, rows=range(pairs))
        offsets = (self._uniforms(shared) * (length + 1)).long()
        per_device = self.args.per_device_eval_batch_size * self.accelerator.num_processes
        num_rows = (self.args.generation_batch_size or 1) if mode == "train" else per_device
        counts = stratified_counts(offsets, rows["global_row"], num_rows, length)
        return with_complements(random_subsets(counts, self._uniforms(streams, pairs, length)))
