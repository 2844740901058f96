"""Config of methods that train on all denoising steps of the rollout, several per view: TraceRL and DiPO."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_diffusion.losses.token_ratio import check_token_level
from trl_diffusion.trainers.base.masked import NoisedGRPOConfig


@dataclass
class ReplayConfig(NoisedGRPOConfig):
    """`NoisedGRPOConfig` for methods that replay the rollout.

    Args:
        shrink: denoising steps per view. With 1, old log-probabilities are those of the rollout; with more, they are
            recomputed on the views, as they are after a rollout under an approximate cache.
        num_mc_samples: derived: ⌈steps / shrink⌉ views cover all steps, or those of a block for block-causal models.

    Raises:
        ValueError: if `shrink` does not fit the steps, or settings do not fit together.
    """

    shrink: int = field(default=1, metadata={"help": "Denoising steps per view."})
    num_mc_samples: int = field(
        default=0, metadata={"help": "Views: leave at 0, the number that covers the denoising steps is used."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Inner updates per rollout batch, μ."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio."})

    def __post_init__(self):
        steps, named = self.denoising_steps, f"denoising_steps={self.denoising_steps}"
        if self.two_stream:
            steps = self.sampling_config().steps_per_block
            named = f"the {steps} denoising steps of a block"
        if not 1 <= self.shrink <= steps:
            raise ValueError(f"shrink must lie between 1 and {named}; got {self.shrink}.")
        views = -(-steps // self.shrink)
        if self.num_mc_samples not in (0, views):
            raise ValueError(
                f"The views of {type(self).__name__} replay the trajectory: {named} with shrink={self.shrink} makes "
                f"{views}, got num_mc_samples={self.num_mc_samples}. Leave it out."
            )
        self.num_mc_samples = views
        super().__post_init__()
        check_token_level(self)

    @property
    def two_stream(self) -> bool:
        """Views replay the steps of all blocks at once, for block-causal attention."""
        return False
