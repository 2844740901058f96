"""Rollouts of a policy that is close to the network's but not the same: those under an approximate cache.

Their log-probabilities are the behaviour policy's. Either the old log-probabilities are the network's own, recomputed
on the views, and every token's loss is weighted with the truncated ratio of the two, as TRL does for vLLM
(`recompute`); or the old log-probabilities are the behaviour policy's, and the ratio that is clipped starts away from
1 (`behaviour`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import GRPOTrainer

from trl_diffusion.sampling import SamplingConfig

CORRECTIONS = ("recompute", "behaviour")


@dataclass
class RolloutCorrectionConfig:
    """What to do about rollouts under an approximate cache; mixed into the configs that read a rollout's
    log-probabilities.

    Args:
        rollout_correction: `recompute` or `behaviour`; only with an approximate cache.
        rollout_correction_cap: C, the largest weight of a token with `recompute`.
    """

    rollout_correction: str = field(
        default="recompute",
        metadata={
            "help": "With cache=prefix or dual: recompute (old log-probabilities are the network's, the loss is "
            "weighted with the truncated ratio to the rollout's) or behaviour (they are the rollout's)."
        },
    )
    rollout_correction_cap: float = field(
        default=3.0, metadata={"help": "Largest weight of a token with rollout_correction=recompute."}
    )

    def check_rollout_correction(self, sampling: SamplingConfig) -> None:
        """Whether the fields make sense together.

        Raises:
            ValueError: if not, or if they are changed although nothing is approximate.
        """
        if self.rollout_correction not in CORRECTIONS:
            raise ValueError(
                f"rollout_correction must be one of {', '.join(CORRECTIONS)}; got {self.rollout_correction!r}."
            )
        if self.rollout_correction_cap <= 0:
            raise ValueError(f"rollout_correction_cap must be positive, got {self.rollout_correction_cap}.")
        needed = {"cache='prefix' or 'dual'": sampling.approximate}
        if self.rollout_correction_cap != 3.0:
            needed["rollout_correction='recompute'"] = self.rollout_correction == "recompute"
        changed = self.rollout_correction != "recompute" or self.rollout_correction_cap != 3.0
        for setting, given in needed.items():
            if changed and not given:
                raise ValueError(
                    f"rollout_correction={self.rollout_correction!r} with rollout_correction_cap="
                    f"{self.rollout_correction_cap} needs {setting}; got cache={sampling.cache!r}. Leave them out."
                )


def log_mismatch(trainer: GRPOTrainer, exact: torch.Tensor, rollout: torch.Tensor, targets: torch.Tensor) -> None:
    """Log how far a rollout's log-probabilities are from the network's, under TRL's names for vLLM.

    Args:
        trainer: for its processes and metrics.
        exact: float32 [B, L].
        rollout: float32 [B, L].
        targets: bool [B, L], the tokens to compare.
    """
    gather, metrics = trainer.accelerator.gather, trainer._metrics["train"]
    difference = (exact - rollout).abs() * targets
    total, count = gather(torch.stack([difference.sum(), targets.sum()])).view(-1, 2).sum(0).tolist()
    metrics["sampling/sampling_logp_difference/mean"].append(total / max(count, 1.0))
    name = "sampling/sampling_logp_difference/max"
    metrics[name] = [max([gather(difference.max()).max().item(), *metrics[name]])]
