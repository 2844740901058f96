"""Policies for rewards and updates that go wrong, as fields of a trainer's config.

A reward function may fail, a rollout may teach nothing, an update may not be finite. By default the run stops with an
error that names the place. The alternative continues, warns once, and counts in a metric `guards/…`, so that nothing
is ignored in silence. `reward_guard.py` applies the policies to rewards, `update_guard.py` to updates.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from trl_diffusion.validation import at_least, one_of


@dataclass
class UpdateGuardConfig:
    """The policy for updates; part of every trainer's config.

    Args:
        nonfinite_update: when the loss or the gradient is NaN or infinite: `raise`, or `skip` the update.
    """

    nonfinite_update: str = field(
        default="raise",
        metadata={"help": "When loss or gradient are NaN or infinite: raise, or skip (no parameter changes)."},
    )

    def check_guards(self) -> None:
        """Check that the policies exist.

        Raises:
            ValueError: if there is no such policy.
        """
        one_of("nonfinite_update", self.nonfinite_update, ("raise", "skip"))


@dataclass
class GuardConfig(UpdateGuardConfig):
    """The policies for rewards and updates; part of every RL method's config.

    Args:
        reward_error: when a reward function raises or runs into `reward_timeout`: `raise`, or `none`: the completions
            of that call get no reward from this function.
        reward_timeout: seconds that one call of a reward function may take.
        reward_nonfinite: when a reward is NaN or infinite (`None` is allowed): `raise`, or `none`: the completion gets
            no reward from this function.
        tied_rollouts_patience: warn after this many rollouts in a row in which the rewards are equal in every group.
    """

    reward_error: str = field(
        default="raise",
        metadata={
            "help": "When a reward function raises or takes too long: raise, or none (the completions of that call "
            "get no reward from it)."
        },
    )
    reward_timeout: float | None = field(
        default=None, metadata={"help": "Seconds that one call of a reward function may take; no limit if not given."}
    )
    reward_nonfinite: str = field(
        default="raise",
        metadata={"help": "When a reward is NaN or infinite: raise, or none (no reward from this function)."},
    )
    tied_rollouts_patience: int = field(
        default=10,
        metadata={"help": "Warn after this many rollouts in a row whose groups all have equal rewards; 0 for never."},
    )

    def check_guards(self) -> None:
        """Check that the policies exist and can be applied here.

        Raises:
            ValueError: if there is no such policy, or no time limit on this platform.
        """
        super().check_guards()
        one_of("reward_error", self.reward_error, ("raise", "none"))
        one_of("reward_nonfinite", self.reward_nonfinite, ("raise", "none"))
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout must be positive, got {self.reward_timeout}. Leave it out for no limit.")
        if self.reward_timeout is not None and sys.platform == "win32":
            raise ValueError("reward_timeout needs alarm signals, which Windows does not have. Leave it out.")
        at_least("tied_rollouts_patience", self.tied_rollouts_patience, 0)
