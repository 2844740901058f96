"""Decides which completions succeeded: by a function, or by a threshold on their reward.

SAPO's process reward and the confusion zones of a rollout both need the success of every completion. A reward says how
good a completion is, and not where success begins, so the user states that, in one of two ways.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch


def check_success(user: str, success: Callable[..., Any] | None, success_threshold: float | None) -> None:
    """Check that success is defined in exactly one way.

    Args:
        user: what needs it, for the message.
        success: a function that is called like a reward function and returns one truth value per completion, or `None`
            for a completion of which it cannot say.
        success_threshold: a completion succeeded if its reward is at least this.

    Raises:
        ValueError: if neither or both are given.
    """
    if (success is None) == (success_threshold is None):
        raise ValueError(
            f"{user} needs to know which completions succeeded: give either `success`, a function, or "
            f"`success_threshold`, a number; got success={success}, success_threshold={success_threshold}."
        )


def successes(
    success: Callable[..., Any] | None,
    success_threshold: float | None,
    rewards: Sequence[float | None] | None = None,
    **texts: Any,
) -> torch.Tensor:
    """Return the success of every completion.

    Args:
        success: see `check_success`; one of the two is `None`.
        success_threshold: see `check_success`.
        rewards: one per completion, `None` or NaN (TRL takes one for the other) where there is none. Where there is no
            reward, success is unknown, whatever `success` says. A function needs no rewards.
        **texts: what `success` is called with, as a reward function is: prompts, completions and columns.

    Returns:
        Float64 [B]: 1, 0, or NaN where success is unknown.

    Raises:
        ValueError: if there is not one reward and one success per completion.
    """
    if success_threshold is not None:
        assert rewards is not None
        # In float32, in which TRL keeps rewards: a reward of 0.9 from there would miss a threshold of 0.9.
        threshold = np.float32(success_threshold)
        values: list = [None if reward is None else np.float32(reward) >= threshold for reward in rewards]
    else:
        assert success is not None
        values = awaited(success(**texts))
    completions = texts.get("completions", values)
    if not len(values) == len(completions) == len(values if rewards is None else rewards):
        given = "" if rewards is None else f"{len(rewards)} rewards and "
        raise ValueError(
            f"{len(completions)} completions got {given}{len(values)} successes; the reward and success functions "
            "must return one value per completion."
        )
    unknown = [value is None for value in values]
    if rewards is not None:
        unknown = [u or r is None or r != r for u, r in zip(unknown, rewards, strict=True)]
    found = [float("nan") if missing else float(bool(v)) for missing, v in zip(unknown, values, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def awaited(value: Any) -> Any:
    """Return what a reward function gave, also an asynchronous one.

    Another thread waits for it, because an event loop may already run in this one.
    """
    if not inspect.isawaitable(value):
        return value

    async def wait() -> Any:
        return await value

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()
