"""Rewards under the policies of `GuardConfig`: functions that raise or hang, values that are not finite, and ties."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.runtime.guards import GuardConfig

logger = logging.getLogger(__name__)  # each process tells of its own rows
_SHOWN = 200  # characters of a prompt or completion in a message
BETWEEN_ALARMS = 0.1  # seconds, for a reward function that catches the interruption
PATIENCE = 10  # alarms, before they come in quick succession


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned a value that is no finite number."""


class _TimeUp(BaseException):
    """Raised inside a reward function; no `Exception`, which the function may catch."""


class TimeLimit:
    """Interrupt what runs inside after some seconds, and again until it ends.

    An alarm signal interrupts Python code, sleeping and waiting for sockets, locks or processes, but neither a
    computation inside a C extension (before it returns) nor code that sets alarms itself. The interruption is an
    exception. Code that catches it has more time, `BETWEEN_ALARMS` seconds, to clean up. After `PATIENCE` alarms they
    follow each other so closely that also one of `while True: try: … except: pass` falls outside of the `try`.

    Args:
        seconds: the limit; none if `None`.

    Raises:
        TimeoutError: when the time was up, however the code inside ended.
        RuntimeError: outside of the main thread, where Python handles no signals.
    """

    def __init__(self, seconds: float | None):
        self.seconds, self.alarms = seconds, 0
        self._previous: Any = None

    def __enter__(self) -> None:
        if self.seconds is None:
            return
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "reward_timeout needs reward functions to be called in the main thread; this is "
                f"{threading.current_thread().name}. Train in the main thread, or leave reward_timeout out."
            )
        self._previous = signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, BETWEEN_ALARMS)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.alarms += 1
        # An exception in these would leave the alarm on.
        if frame is None or frame.f_code in _OWN_CODE:
            return
        if self.alarms > PATIENCE:
            # 1 to 50 microseconds: the time from the `raise` to the next line outside of a `try` is among them.
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (self.alarms % 50 + 1), BETWEEN_ALARMS)
        raise _TimeUp

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.seconds is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)
        if self.alarms and (kind is None or issubclass(kind, (Exception, _TimeUp))):
            raise TimeoutError(_too_long(self.seconds)) from None


_OWN_CODE = {TimeLimit.__enter__.__code__, TimeLimit.__exit__.__code__, TimeLimit._stop.__code__}


async def within(seconds: float | None, coroutine: Awaitable) -> Any:
    """The result of a coroutine, which is cancelled after some seconds, and again if it catches that.

    Args:
        seconds: the limit; none if `None`.
        coroutine: what to wait for. One that catches `PATIENCE` cancellations is left behind.

    Raises:
        TimeoutError: when the time was up, however the coroutine ended.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if done:
            return task.result()
        for _ in range(PATIENCE):
            task.cancel()
            if (await asyncio.wait({task}, timeout=BETWEEN_ALARMS))[0]:
                break
    except asyncio.CancelledError:  # of whoever waits here
        task.cancel()
        raise
    if task.done() and not task.cancelled():
        task.exception()  # otherwise asyncio reports one that nobody asked for
    raise TimeoutError(_too_long(float(seconds or 0)))


def _too_long(seconds: float) -> str:
    return f"it took longer than reward_timeout={seconds} seconds"


class RewardGuard:
    """Applies the policies to reward functions and counts what happened.

    Args:
        args: the policies.
        accelerator: of the run.
    """

    def __init__(self, args: GuardConfig, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
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
            try:
                values, numbers = _numbers(await within(self.args.reward_timeout, value), convert)
            except Exception as error:  # whatever a user's function may raise
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
                with TimeLimit(self.args.reward_timeout):
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
        self._tell_once(name, "errors", f"{what}. These completions get no reward from it (reward_error='none').")
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
            logger.warning("%s This is said once; the metric guards/reward_%s counts.", message, kind)

    def check_models(self, rewards: torch.Tensor, functions: Sequence, names: Sequence[str]) -> torch.Tensor:
        """Apply the policy for non-finite rewards to the columns of reward models.

        Args:
            rewards: float [rows of all processes, reward functions].
            functions: the reward functions and models.
            names: theirs.
        """
        for index, function in enumerate(functions):
            if isinstance(function, torch.nn.Module):
                bad = ~rewards[:, index].isfinite()
                count, mine = int(bad.sum()), self.accelerator.is_main_process
                self._values += len(bad) * mine
                if count:
                    self._nonfinite += count * mine
                    name = names[index]
                    what = f"The reward model {name} returned {count} of {len(bad)} rewards that are not finite"
                    self._nonfinite_rewards(name, what)
                    rewards[bad, index] = torch.nan
        return rewards

    def metrics(self, rewards: torch.Tensor) -> dict[str, float]:
        """Errors and missing rewards since the last rollout, by the names of the metrics.

        Args:
            rewards: float [rows of all processes, reward functions], NaN for none.
        """
        found = {}
        if "none" in (self.args.reward_error, self.args.reward_nonfinite):
            counts = torch.tensor([self._errors, self._calls, self._nonfinite, self._values])
            errors, calls, nonfinite, values = self.accelerator.reduce(
                counts.to(self.accelerator.device), "sum"
            ).tolist()
            self._calls = self._errors = self._values = self._nonfinite = 0
            found["guards/reward_errors"] = errors / max(calls, 1)
            found["guards/reward_nonfinite"] = nonfinite / max(values, 1)
        found["guards/unscored_completions"] = rewards.isnan().all(1).float().mean().item()
        return found

    def watch_ties(self, rewards: torch.Tensor, weights: torch.Tensor, group: int) -> dict[str, float]:
        """Warn when the rewards of every group stay tied for `tied_rollouts_patience` rollouts.

        Args:
            rewards: float [rows of all processes, reward functions], NaN for none.
            weights: float [reward functions].
            group: completions per prompt.

        Returns:
            The metric that counts such rollouts.
        """
        tied = all_tied(rewards, weights.to(rewards.device), group)
        self._tied_rollouts = self._tied_rollouts + 1 if tied else 0
        patience = self.args.tied_rollouts_patience
        if tied and patience and self._tied_rollouts % patience == 0 and self.accelerator.is_main_process:
            logger.warning(
                "In the last %d rollouts the rewards were equal in every group, so no completion was better than "
                "another and nothing was learned from them. Look at the completions (log_completions=True) and at "
                "what the reward functions return; raise the temperature or num_generations, or choose problems that "
                "the model sometimes solves.",
                self._tied_rollouts,
            )
        return {"guards/tied_rollouts": float(tied)}


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
