"""What a run does when a reward function fails, a rollout teaches nothing or an update is not finite: the policies.

Every case has a policy that the config names. The default stops the run with an error that says where; the other one
goes on, and warns and counts in a metric `guards/…`. Nothing is passed over in silence. `reward_guard.py` applies them
to rewards, `update_guard.py` to updates.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field


@dataclass
class UpdateGuardConfig:
    """The policy of updates; part of every trainer's config.

    Args:
        nonfinite_update: when the loss or the gradient is NaN or infinite: `raise`, or `skip` the update.
    """

    nonfinite_update: str = field(
        default="raise",
        metadata={"help": "When loss or gradient are NaN or infinite: raise, or skip (no parameter changes)."},
    )

    def check_guards(self) -> None:
        """Check the policies.

        Raises:
            ValueError: if there is no such policy.
        """
        self._check_choices({"nonfinite_update": ("raise", "skip")})

    def _check_choices(self, choices: dict[str, tuple[str, ...]]) -> None:
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}.")


@dataclass
class GuardConfig(UpdateGuardConfig):
    """The guards' policies; part of every RL method's config.

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
        """Check the policies.

        Raises:
            ValueError: if there is no such policy, or no time limit on this platform.
        """
        super().check_guards()
        self._check_choices({"reward_error": ("raise", "none"), "reward_nonfinite": ("raise", "none")})
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout must be positive, got {self.reward_timeout}. Leave it out for no limit.")
        if self.reward_timeout is not None and sys.platform == "win32":
            raise ValueError("reward_timeout needs alarm signals, which Windows does not have. Leave it out.")
        if self.tied_rollouts_patience < 0:
            raise ValueError(f"tied_rollouts_patience must be at least 0, got {self.tied_rollouts_patience}.")
