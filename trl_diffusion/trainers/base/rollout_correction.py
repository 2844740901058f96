"""Rollouts of a policy that is close to the network's but not the same.

Such are those under an approximate cache; and in bfloat16 every rollout, by the rounding that batches of other shapes
bring. Their log-probabilities are the behaviour policy's. Either the old log-probabilities are the network's own,
recomputed on the views, and every token's loss is weighted with the truncated ratio of the two, as TRL does for vLLM
(`recompute`); or the old log-probabilities are the behaviour policy's, and the ratio that is clipped starts away from
1 (`behaviour`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_diffusion.sampling import SamplingConfig
from trl_diffusion.validation import one_of

CORRECTIONS = ("recompute", "behaviour")


@dataclass
class RolloutCorrectionConfig:
    """Settings of the old log-probabilities that a ratio is taken to; for configs that read a rollout's.

    Args:
        rollout_correction: `recompute` or `behaviour`. If not given, `recompute` with an approximate cache, else
            `behaviour`, which costs no pass.
        rollout_correction_cap: C, the largest weight of a token with `recompute`.
    """

    rollout_correction: str | None = field(
        default=None,
        metadata={
            "help": "recompute (old log-probabilities are the network's, the loss is weighted with the truncated "
            "ratio to the rollout's; the default with cache=prefix or dual) or behaviour (they are the rollout's; the "
            "default otherwise)."
        },
    )
    rollout_correction_cap: float = field(
        default=3.0, metadata={"help": "Largest weight of a token with rollout_correction=recompute."}
    )

    def recomputes_old(self, sampling: SamplingConfig) -> bool:
        """Return whether old log-probabilities are the network's on the views, and not the rollout's."""
        if self.rollout_correction is None:
            return sampling.approximate
        return self.rollout_correction == "recompute"

    def check_rollout_correction(self, sampling: SamplingConfig) -> None:
        """Check that the fields make sense together.

        Raises:
            ValueError: if a value is unknown, or the cap is changed where nothing is weighted.
        """
        if self.rollout_correction is not None:
            one_of("rollout_correction", self.rollout_correction, CORRECTIONS)
        if self.rollout_correction_cap <= 0:
            raise ValueError(f"rollout_correction_cap must be positive, got {self.rollout_correction_cap}.")
        if self.rollout_correction_cap != 3.0 and not self.recomputes_old(sampling):
            raise ValueError(
                f"rollout_correction_cap={self.rollout_correction_cap} would have no effect: only with "
                f"rollout_correction='recompute' are tokens weighted; got rollout_correction="
                f"{self.rollout_correction!r} with cache={sampling.cache!r}. Leave it out, or set 'recompute'."
            )
