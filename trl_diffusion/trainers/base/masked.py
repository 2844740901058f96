"""Configs of methods that score the finished completion under random masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trl_diffusion.likelihood.informed import InformedMasking
from trl_diffusion.trainers.base.choices import refuse_unread
from trl_diffusion.trainers.base.config import DiffusionGRPOConfig
from trl_diffusion.validation import one_of

MASK_BIASES = ("uniform", "informed")


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
class MaskBiasConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods whose random subsets may be biased by what the rollout shows (2609.25927).

    Args:
        mask_bias: `uniform`, or `informed`: a view masks the tokens more often that shifted the network's confidence
            at their masked neighbours little when they were written. See `InformedMasking`.
        mask_sharpness: d, how much more often; with 0 masks are uniform.
        mask_window: how many positions away a neighbour may be.

    Raises:
        ValueError: if the bias is unknown, a number is too small or would have no effect, or settings do not fit
            together.
    """

    mask_bias: str = field(default="uniform", metadata={"help": "How masks are drawn: uniform or informed."})
    mask_sharpness: float = field(
        default=InformedMasking.sharpness, metadata={"help": "Sharpness of informed masks; 0 for uniform ones."}
    )
    mask_window: int = field(
        default=InformedMasking.window, metadata={"help": "Distance to neighbours that informed masks look at."}
    )

    def __post_init__(self):
        super().__post_init__()
        one_of("mask_bias", self.mask_bias, MASK_BIASES)
        for name, default in (("mask_sharpness", InformedMasking.sharpness), ("mask_window", InformedMasking.window)):
            if self.mask_bias == "uniform" and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} would have no effect: masks are uniform. Set mask_bias='informed', "
                    f"or leave it at {default}."
                )
        self.informed_masking()

    def informed_masking(self) -> InformedMasking | None:
        """Return how masks are biased; `None` if they are uniform."""
        return InformedMasking(self.mask_sharpness, self.mask_window) if self.mask_bias == "informed" else None


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


@dataclass
class CompletionLossConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods that do not use TRL's loss.

    A changed field of that loss is refused, unless the method names it in `reads`.

    Raises:
        ValueError: if such a field is changed, or settings do not fit together.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        refuse_unread(self, self.reads, type(self).__name__)
        super().__post_init__()

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 a ratio may be: `epsilon` and `epsilon_high`, which is `epsilon` if not given."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    def require_plain_rewards(self) -> None:
        """For methods whose weights are a softmax of the rewards over a prompt's completions.

        Raises:
            ValueError: if the rewards are to be scaled before.
        """
        for name, plain in (("scale_rewards", "none"), ("multi_objective_aggregation", "sum_then_normalize")):
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{type(self).__name__} weighs a prompt's completions by the softmax of the rewards themselves: "
                    f"{name} must be {plain!r}; got {getattr(self, name)!r}. To change how much a reward counts, set "
                    "reward_weights (or DMPO's alpha)."
                )
