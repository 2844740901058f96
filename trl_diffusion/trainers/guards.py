"""What a run does when a reward function fails, a rollout teaches nothing or an update is not finite.

Every case has a policy that the config names. The default stops the run with an error that says where; the other one
goes on, and warns and counts in a metric `guards/…`. Nothing is passed over in silence.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_diffusion.credit import StepAwareReward

if TYPE_CHECKING:
    from trl_diffusion.trainers.diffusion_grpo import DiffusionGRPOTrainer

logger = logging.getLogger(__name__)  # each process tells of its own rows
_SHOWN = 200  # characters of a prompt or completion in a message


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned a value that is no finite number."""


@dataclass
class GuardConfig:
    """The guards' policies; part of every method's config.

    Args:
        reward_error: when a reward function raises or runs into `reward_timeout`: `raise`, or `none`: the completions
            of that call get no reward from this function.
        reward_timeout: seconds that one call of a reward function may take.
        reward_nonfinite: when a reward is NaN or infinite (`None` is allowed): `raise`, or `none`: the completion gets
            no reward from this function.
        nonfinite_update: when the loss or the gradient is NaN or infinite: `raise`, or `skip` the update.
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
    nonfinite_update: str = field(
        default="raise",
        metadata={"help": "When loss or gradient are NaN or infinite: raise, or skip (no parameter changes)."},
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
        choices = {
            "reward_error": ("raise", "none"),
            "reward_nonfinite": ("raise", "none"),
            "nonfinite_update": ("raise", "skip"),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(self, name)!r}.")
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout must be positive, got {self.reward_timeout}. Leave it out for no limit.")
        if self.reward_timeout is not None and sys.platform == "win32":
            raise ValueError("reward_timeout needs alarm signals, which Windows does not have. Leave it out.")
        if self.tied_rollouts_patience < 0:
            raise ValueError(f"tied_rollouts_patience must be at least 0, got {self.tied_rollouts_patience}.")


# ---------------------------------------------------------------- reward functions


class _TimeUp(BaseException):
    """Raised inside a reward function; no `Exception`, which the function may catch."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt what runs inside after some seconds.

    An alarm signal interrupts Python code, sleeping and waiting for sockets, locks or processes, but neither a
    computation inside a C extension (before it returns) nor code that sets alarms itself.

    Args:
        seconds: the limit; none if `None`.

    Raises:
        TimeoutError: when the time is up.
        RuntimeError: outside of the main thread, where Python handles no signals.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "reward_timeout needs reward functions to be called in the main thread; this is "
            f"{threading.current_thread().name}. Train in the main thread, or leave reward_timeout out."
        )

    def stop(*_) -> None:
        raise _TimeUp

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeUp:
        raise TimeoutError(_too_long(seconds)) from None
    finally:
        signal.signal(signal.SIGALRM, previous)


def _too_long(seconds: float) -> str:
    return f"it took longer than reward_timeout={seconds} seconds"


class RewardGuard:
    """Applies the policies to a trainer's reward functions and counts what happened.

    Args:
        trainer: whose reward functions these are.
    """

    def __init__(self, trainer: DiffusionGRPOTrainer):
        self.trainer, self.args = trainer, trainer.args
        self._calls = self._errors = self._values = self._nonfinite = 0
        self._told: set[tuple[str, str]] = set()
        self._tied_rollouts = 0

    def wrap(self, function, convert: Callable[[Any], float] = float):
        """A reward function under the policies; the functions inside of a `StepAwareReward`; a reward model as it is.

        Args:
            function: as TRL takes it.
            convert: makes a number of what it returns for a completion.
        """
        if isinstance(function, torch.nn.Module):
            return function
        if isinstance(function, StepAwareReward):
            guarded = copy.copy(function)
            guarded.reward = self.wrap(function.reward)
            if function.success is not None:
                guarded.success = self.wrap(function.success, _truth)
            return guarded
        name = get_callable_name(function)

        async def wait(value, prompts, completions) -> list:
            limit = self.args.reward_timeout
            try:
                values, numbers = _numbers(await asyncio.wait_for(value, limit), convert)
            except Exception as error:  # whatever a user's function may raise
                if limit is not None and isinstance(error, asyncio.TimeoutError) and not error.args:
                    error = TimeoutError(_too_long(limit))
                return self._failed(name, prompts, error)
            return self._finite(name, values, numbers, prompts, completions)

        if is_async_callable(function):

            @functools.wraps(function, updated=())
            async def guarded_async(prompts, completions, **columns):
                return await wait(function(prompts=prompts, completions=completions, **columns), prompts, completions)

            return guarded_async

        @functools.wraps(function, updated=())
        def guarded_sync(prompts, completions, **columns):
            try:
                with time_limit(self.args.reward_timeout):
                    value = function(prompts=prompts, completions=completions, **columns)
                    if not inspect.isawaitable(value):
                        values, numbers = _numbers(value, convert)
            except Exception as error:  # whatever a user's function may raise
                return self._failed(name, prompts, error)
            if inspect.isawaitable(value):
                return wait(value, prompts, completions)
            return self._finite(name, values, numbers, prompts, completions)

        return guarded_sync

    def _failed(self, name: str, prompts: list, error: Exception) -> list[None]:
        self._calls += 1
        self._errors += 1
        what = (
            f"The reward function {name} failed on a batch of {len(prompts)} completions, the first of them for the "
            f"prompt {_shown(prompts[0])}: {type(error).__name__}: {error}"
        )
        if self.args.reward_error == "raise":
            raise RewardError(
                f"{what}. Repair the function, or set reward_error='none' to go on without its rewards for such a "
                "batch."
            ) from error
        self._tell_once(name, "error", f"{what}. These completions get no reward from it (reward_error='none').")
        return [None] * len(prompts)

    def _finite(self, name: str, values: list, numbers: torch.Tensor, prompts: list, completions: list) -> list:
        self._calls += 1
        self._values += len(values)
        bad = (~numbers.isfinite()).nonzero().flatten().tolist()
        if not bad or len(values) != len(prompts):  # TRL refuses another number of rewards
            return values
        self._nonfinite += len(bad)
        row = bad[0]
        what = (
            f"The reward function {name} returned {values[row]} for row {row} of its batch, prompt "
            f"{_shown(prompts[row])}, completion {_shown(completions[row])} ({len(bad)} of {len(values)} rewards are "
            "not finite in float32)"
        )
        self._nonfinite_rewards(name, what)
        return [None if index in bad else value for index, value in enumerate(values)]

    def _nonfinite_rewards(self, name: str, what: str) -> None:
        if self.args.reward_nonfinite == "raise":
            raise RewardError(
                f"{what}. Return None where the function does not apply, or set reward_nonfinite='none' to take such "
                "values for None."
            )
        self._tell_once(name, "nonfinite", f"{what}. They count as None (reward_nonfinite='none').")

    def _tell_once(self, name: str, kind: str, message: str) -> None:
        if (name, kind) not in self._told:
            self._told.add((name, kind))
            logger.warning("%s This is said once; the metric guards/reward_%s counts.", message, _METRIC[kind])

    def check_models(self, rewards: torch.Tensor) -> torch.Tensor:
        """Apply the policy for non-finite rewards to the columns of reward models.

        Args:
            rewards: float [rows of all processes, reward functions].
        """
        for index, function in enumerate(self.trainer.reward_funcs):
            if isinstance(function, torch.nn.Module):
                bad = ~rewards[:, index].isfinite()
                count, mine = int(bad.sum()), self.trainer.accelerator.is_main_process
                self._values += len(bad) * mine
                if count:
                    self._nonfinite += count * mine
                    name = self.trainer.reward_func_names[index]
                    what = f"The reward model {name} returned {count} of {len(bad)} rewards that are not finite"
                    self._nonfinite_rewards(name, what)
                    rewards[bad, index] = torch.nan
        return rewards

    def log(self, mode: str, rewards: torch.Tensor) -> None:
        """Log what happened since the last rollout, and warn when rollouts keep teaching nothing.

        Args:
            mode: `"train"` or `"eval"`.
            rewards: float [rows of all processes, reward functions], NaN for none.
        """
        accelerator, metrics = self.trainer.accelerator, self.trainer._metrics[mode]
        if "none" in (self.args.reward_error, self.args.reward_nonfinite):
            counts = torch.tensor([self._errors, self._calls, self._nonfinite, self._values])
            errors, calls, nonfinite, values = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
            self._calls = self._errors = self._values = self._nonfinite = 0
            metrics["guards/reward_errors"].append(errors / max(calls, 1))
            metrics["guards/reward_nonfinite"].append(nonfinite / max(values, 1))
        metrics["guards/unscored_completions"].append(rewards.isnan().all(1).float().mean().item())
        if mode == "train":
            self._watch_ties(rewards)

    def _watch_ties(self, rewards: torch.Tensor) -> None:
        tied = all_tied(rewards, self.trainer.reward_weights.to(rewards.device), self.trainer.group_size("train"))
        self.trainer._metrics["train"]["guards/tied_rollouts"].append(float(tied))
        self._tied_rollouts = self._tied_rollouts + 1 if tied else 0
        patience = self.args.tied_rollouts_patience
        if tied and patience and self._tied_rollouts % patience == 0 and self.trainer.accelerator.is_main_process:
            logger.warning(
                "In the last %d rollouts the rewards were equal in every group, so no completion was better than "
                "another and nothing was learned from them. Look at the completions (log_completions=True) and at "
                "what the reward functions return; raise the temperature or num_generations, or choose problems that "
                "the model sometimes solves.",
                self._tied_rollouts,
            )


_METRIC = {"error": "errors", "nonfinite": "nonfinite"}


def all_tied(rewards: torch.Tensor, weights: torch.Tensor, group: int) -> bool:
    """Whether the weighted rewards are equal, up to rounding, in every group.

    Args:
        rewards: float [B, reward functions], whole groups; NaN for none.
        weights: float [reward functions].
        group: completions per prompt.
    """
    scored = ~rewards.isnan().all(1).view(-1, group)
    total = (rewards * weights).nansum(1).view(-1, group)
    highest = total.masked_fill(~scored, -torch.inf).amax(1)
    lowest = total.masked_fill(~scored, torch.inf).amin(1)
    scale = (rewards * weights).abs().nansum(1).max()
    return bool(((highest - lowest) <= 1e-6 * scale).all())


def _numbers(values: Any, convert: Callable[[Any], float]) -> tuple[list, torch.Tensor]:
    """The values as a list, and as float32 in which TRL keeps them; 0 for `None`."""
    values = list(values)
    return values, torch.tensor([0.0 if value is None else convert(value) for value in values], dtype=torch.float32)


def _truth(value: Any) -> float:
    """What a success function says, as a number; NaN is no truth value."""
    return value if isinstance(value, float) else float(bool(value))


def _shown(text: Any) -> str:
    text = repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# ---------------------------------------------------------------- updates


class GuardedUpdates(Trainer):
    """Looks at the loss and the gradient before every step of the optimizer.

    It stands before TRL's trainer in the method resolution order.
    """

    args: Any
    model: Any  # transformers types it as optional
    _metrics: Any
    _losses_finite: torch.Tensor | None = None

    def check_update_policy(self) -> None:
        """Refuse what cannot be done.

        Raises:
            ValueError: for `skip` with DeepSpeed.
        """
        if self.args.nonfinite_update == "skip" and self.is_deepspeed_enabled:
            raise ValueError(
                "nonfinite_update='skip' does not work with DeepSpeed, which takes the optimizer step inside of the "
                "backward pass, before the gradient can be looked at. Set nonfinite_update='raise'."
            )

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            finite = loss.detach().isfinite()
            self._losses_finite = finite if self._losses_finite is None else self._losses_finite & finite
            if self._steps_in_backward() and self.accelerator.sync_gradients:
                self._check_update(model, None)  # the last moment before the step
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._check_update(model, grad_norm)
        return grad_norm

    def _steps_in_backward(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _check_update(self, model, grad_norm) -> None:
        finite, self._losses_finite = self._losses_finite, None
        loss_is_bad = finite is not None and not bool(finite)
        # The loss scaler of fp16 meets infinite gradients in ordinary operation, and leaves such updates out itself.
        looked_at = grad_norm is not None and self.accelerator.mixed_precision != "fp16"
        norm_is_bad = looked_at and not math.isfinite(float(grad_norm))
        flags = torch.tensor([loss_is_bad, norm_is_bad], dtype=torch.long, device=self.accelerator.device)
        loss_is_bad, norm_is_bad = self.accelerator.reduce(flags, reduction="sum").bool().tolist()
        skip = self.args.nonfinite_update == "skip"
        if skip:
            self._metrics["train"]["guards/skipped_updates"].append(float(loss_is_bad or norm_is_bad))
        if not (loss_is_bad or norm_is_bad):
            return
        bad = " and ".join(
            name for name, is_bad in (("the loss", loss_is_bad), ("the gradient norm", norm_is_bad)) if is_bad
        )
        what = f"Update {self.state.global_step + 1}: not finite: {bad}"
        if not skip:
            stepped = self._steps_in_backward() and grad_norm is not None
            raise FloatingPointError(
                f"{what}. "
                + ("DeepSpeed has already tried the step; go back to a checkpoint. " if stepped else "")
                + "Lower learning_rate, set max_grad_norm, or use bfloat16 or float32 in place of float16"
                + ("." if self._steps_in_backward() else "; nonfinite_update='skip' leaves such updates out.")
            )
        # Without gradients the optimizer touches neither parameters nor its own state; zeros would still decay them.
        model.zero_grad(set_to_none=True)
        if self.accelerator.is_main_process:
            logger.warning("%s. The update is skipped; the metric guards/skipped_updates counts.", what)
