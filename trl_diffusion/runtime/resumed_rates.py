"""Give a resumed run the learning rates of its own settings, at the place in the schedule that it has reached.

transformers loads the optimizer and the schedule of the interrupted run with all their numbers, so that a changed
learning rate, schedule or weight decay would be ignored. Here a new schedule is advanced to that place instead.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

# Hyperparameters in an optimizer's groups that may change between runs. The others there (Adam's betas, …) belong to
# its averages and are loaded with them.
_RATES = ("lr", "initial_lr")
_OTHERS = ("weight_decay", "eps")


class SavedSchedule:
    """Takes the place of a schedule while a checkpoint is loaded, and keeps the state that would be loaded into it."""

    state: dict[str, Any] | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Rates:
    """The rates and the schedule of a run's own settings, remembered before a checkpoint overwrites them.

    Args:
        optimizer: as the training loop has it, wrapped or not.
        schedule: as the training loop has it, wrapped or not.
    """

    def __init__(self, optimizer: Any, schedule: Any):
        self.optimizer = optimizer
        self.schedule = schedule.scheduler if isinstance(schedule, AcceleratedScheduler) else schedule
        self.start = copy.deepcopy(self.schedule.state_dict())
        self.groups = [
            {name: group[name] for name in (*_RATES, *_OTHERS) if name in group} for group in optimizer.param_groups
        ]

    def resume(self, saved: dict[str, Any] | None, updates: int, *, anew: bool) -> None:
        """Make the run's own settings take effect, after the optimizer was loaded.

        Args:
            saved: state of the schedule in the checkpoint; `None` if DeepSpeed has loaded it into the schedule.
            updates: number of updates that the interrupted run has made.
            anew: start a schedule that follows measurements (`ReduceLROnPlateau`) again at the run's own rate.

        Raises:
            ValueError: if the rates changed under a schedule whose place cannot be found again.
        """
        if isinstance(self.schedule, LambdaLR):
            saved = self.schedule.state_dict() if saved is None else saved
            # Not the number of updates: the schedule does not count those that fp16's loss scaler skipped.
            place = saved["last_epoch"] if "lr_lambdas" in saved else updates
            self._put_back(*_RATES, *_OTHERS)
            self.schedule.load_state_dict(copy.deepcopy(self.start))
            # Stepped one by one, because PyTorch has deprecated `step(epoch)`, which would go there at once.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch expects the optimizer's steps in between
                for _ in range(place):
                    self.schedule.step()
        elif saved is None:  # a schedule of DeepSpeed's, whose rates are a function of the update
            self._put_back(*_OTHERS)
            self.schedule.step(self.schedule.last_batch_iteration)
        elif anew:
            self._put_back(*_RATES, *_OTHERS)
        else:
            self._refuse_other_rates()
            self._put_back(*_OTHERS)
            self.schedule.load_state_dict(saved)

    def _put_back(self, *names: str) -> None:
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update({name: value for name, value in own.items() if name in names})

    def _refuse_other_rates(self) -> None:
        """Refuse changed rates under another kind of schedule, which is loaded together with the rates it had."""
        for own, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            if isinstance(self.schedule, LRScheduler) and own.get("initial_lr") != group.get("initial_lr"):
                raise ValueError(
                    f"The learning rate of an optimizer was {group['initial_lr']} and is {own['initial_lr']}, but its "
                    f"{type(self.schedule).__name__} resumes at the rates of the checkpoint. Set it back, or pass a "
                    "LambdaLR to the trainer."
                )
