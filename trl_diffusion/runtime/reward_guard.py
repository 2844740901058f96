"""Apply the policies of `GuardConfig` to rewards: functions that raise or hang, values that are not finite, ties."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from trl.trainer.utils import get_callable_name, is_async_callable

from trl_diffusion.credit import StepAwareReward
from trl_diffusion.runtime.guards import GuardConfig
from trl_diffusion.runtime.time_limit import TimeLimit, within

logger = logging.getLogger(__name__)  # not accelerate's: every process reports its own rows
_SHOWN = 200  # characters of a prompt or completion in a message


class RewardError(RuntimeError):
    """A reward function raised, took too long, or returned a value that is no finite number."""


class RewardGuard:
    """Applies the policies to reward functions and counts how often each was needed.

    Args:
        args: the policies.
        accelerator: of the run.
    """

    def __init__(self, args: GuardConfig, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self._calls = self._errors = self._values = self._nonfinite = 0
        self._warned: set[tuple[str, str]] = set()
        self._tied_rollouts = 0

    def wrap(self, function, convert: Callable[[Any], float] = float):
        """Put a reward function under the policies.

        Args:
            function: as TRL takes it. Of a `StepAwareReward` the functions inside are wrapped. Reward models are
                returned unchanged, see `check_models`.
            convert: makes a number of what the function returns for a completion.
        """
        if isinstance(function, torch.nn.Module):
            return function
        if isinstance(function, StepAwareReward):
            guarded = copy.copy(function)
            guarded.reward = self.wrap(function.reward)
            if function.success is not None:
                guarded.success = self.wrap(function.success, _truth)
            return guarded
        guarded_class = AsyncGuardedReward if is_async_callable(function) else GuardedReward
        return guarded_class(function, self, convert)

    def replace_failed(self, name: str, prompts: list, error: Exception) -> list[None]:
        """Raise for a call that failed or, as the policy says, return `None` for each of its completions."""
        self._calls += 1
        self._errors += 1
        problem = (
            f"The reward function {name} failed on a batch of {len(prompts)} completions, the first of them for the "
            f"prompt {_shown(prompts[0])}: {type(error).__name__}: {error}"
        )
        if self.args.reward_error == "raise":
            raise RewardError(
                f"{problem}. Repair the function, or set reward_error='none' to continue without its rewards for such "
                "a batch."
            ) from error
        self._warn_once(name, "errors", f"{problem}. These completions get no reward from it (reward_error='none').")
        return [None] * len(prompts)

    def replace_nonfinite(self, name: str, rewards: Rewards, prompts: list, completions: list) -> list:
        """Raise for a reward that is not finite or, as the policy says, return `None` in its place."""
        values = rewards.values
        self._calls += 1
        self._values += len(values)
        bad = (~rewards.numbers.isfinite()).nonzero().flatten().tolist()
        if not bad or len(values) != len(prompts):  # TRL refuses another number of rewards
            return values
        self._nonfinite += len(bad)
        row = bad[0]
        problem = (
            f"The reward function {name} returned {values[row]} for row {row} of its batch, prompt "
            f"{_shown(prompts[row])}, completion {_shown(completions[row])} ({len(bad)} of {len(values)} rewards are "
            "not finite in float32)"
        )
        self._nonfinite_rewards(name, problem)
        return [None if index in bad else value for index, value in enumerate(values)]

    def _nonfinite_rewards(self, name: str, problem: str) -> None:
        if self.args.reward_nonfinite == "raise":
            raise RewardError(
                f"{problem}. Return None where the function does not apply, or set reward_nonfinite='none' to take "
                "such values for None."
            )
        self._warn_once(name, "nonfinite", f"{problem}. They count as None (reward_nonfinite='none').")

    def _warn_once(self, name: str, kind: str, message: str) -> None:
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            logger.warning("%s This is said once; the metric guards/reward_%s counts.", message, kind)

    def check_models(self, rewards: torch.Tensor, functions: Sequence, names: Sequence[str]) -> torch.Tensor:
        """Apply the policy for non-finite rewards to the columns of reward models.

        Args:
            rewards: float [rows of all processes, reward functions].
            functions: the reward functions and models.
            names: theirs.
        """
        for index, function in enumerate(functions):
            if not isinstance(function, torch.nn.Module):
                continue
            bad = ~rewards[:, index].isfinite()
            count = int(bad.sum())
            # Every process sees the rows of all, and `metrics` adds up the counts of processes: only one counts these.
            if self.accelerator.is_main_process:
                self._values += len(bad)
                self._nonfinite += count
            if count:
                name = names[index]
                problem = f"The reward model {name} returned {count} of {len(bad)} rewards that are not finite"
                self._nonfinite_rewards(name, problem)
                rewards[bad, index] = torch.nan
        return rewards

    def metrics(self, rewards: torch.Tensor) -> dict[str, float]:
        """Return the shares of errors and missing rewards since the last rollout, by the names of their metrics.

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
    """Return whether the weighted rewards are equal, up to rounding, in every group.

    Args:
        rewards: float [B, reward functions], whole groups; NaN for none.
        weights: float [reward functions].
        group: completions per prompt.
    """
    scored = ~rewards.isnan().all(1).view(-1, group)  # `nansum` of a completion without rewards would be 0
    total = (rewards * weights).nansum(1).view(-1, group)
    highest = total.masked_fill(~scored, -torch.inf).amax(1)
    lowest = total.masked_fill(~scored, torch.inf).amin(1)
    scale = (rewards * weights).abs().nansum(1).max()
    return bool(((highest - lowest) <= 1e-6 * scale).all())


class Rewards(NamedTuple):
    """The values that a reward function returned, and the same in float32, as TRL keeps them (0 for `None`)."""

    values: list
    numbers: torch.Tensor

    @classmethod
    def read(cls, returned: Any, convert: Callable[[Any], float]) -> Rewards:
        """Read what a function returned; raises whatever `convert` raises for something that is no number."""
        values = list(returned)
        numbers = [0.0 if value is None else convert(value) for value in values]
        return cls(values, torch.tensor(numbers, dtype=torch.float32))


class GuardedReward:
    """A reward function under the policies of a guard; TRL calls it in place of the function, and logs its name.

    Args:
        function: a reward function in TRL's form. One that is not declared `async` may return an awaitable all the
            same; then so does this.
        guard: says what happens with errors and values, and counts them.
        convert: makes a number of what the function returns for a completion.
    """

    def __init__(self, function: Callable[..., Any], guard: RewardGuard, convert: Callable[[Any], float]):
        functools.update_wrapper(self, function, updated=())
        self.__name__ = get_callable_name(function)  # of a callable object, which has no `__name__` itself
        self.function, self.guard, self.convert = function, guard, convert

    def __call__(self, prompts, completions, **columns):
        try:
            with TimeLimit(self.guard.args.reward_timeout):
                returned = self.function(prompts=prompts, completions=completions, **columns)
                if not inspect.isawaitable(returned):
                    # inside the limit, because the function may be a generator, which does its work only now
                    returned = Rewards.read(returned, self.convert)
        except Exception as error:  # whatever a user's function may raise
            return self.guard.replace_failed(self.__name__, prompts, error)
        if isinstance(returned, Rewards):
            return self.guard.replace_nonfinite(self.__name__, returned, prompts, completions)
        return self._wait_for(returned, prompts, completions)

    async def _wait_for(self, awaitable: Awaitable, prompts, completions) -> list:
        try:
            rewards = Rewards.read(await within(self.guard.args.reward_timeout, awaitable), self.convert)
        except Exception as error:  # whatever a user's function may raise
            return self.guard.replace_failed(self.__name__, prompts, error)
        return self.guard.replace_nonfinite(self.__name__, rewards, prompts, completions)


class AsyncGuardedReward(GuardedReward):
    """A `GuardedReward` of an `async` function. TRL awaits together all functions whose `__call__` is `async`."""

    async def __call__(self, prompts, completions, **columns):
        returned = self.function(prompts=prompts, completions=completions, **columns)
        return await self._wait_for(returned, prompts, completions)


def _truth(value: Any) -> float:
    """Turn the answer of a success function into a number; NaN stays, and is refused as no truth value."""
    return value if isinstance(value, float) else float(bool(value))


def _shown(text: Any) -> str:
    text = repr(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
