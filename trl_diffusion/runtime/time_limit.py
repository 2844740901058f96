"""Time limits for code of users, which may hang or catch every exception: functions and coroutines."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable
from types import FrameType
from typing import Any

BETWEEN_ALARMS = 0.1  # seconds, for code that catches the interruption
PATIENCE = 10  # alarms, before they come in quick succession


class _TimeUp(BaseException):
    """Raised inside the limited code; no `Exception`, which it may catch with reason."""


class TimeLimit:
    """Interrupts the code inside after some seconds, and again until it ends.

    An alarm signal interrupts Python code, sleeping and waiting for sockets, locks or processes, but neither a
    computation inside a C extension (before it returns) nor code that sets alarms itself. The interruption is an
    exception. Code that catches it has more time, `BETWEEN_ALARMS` seconds, to clean up. After `PATIENCE` alarms they
    follow each other so closely that one of them falls outside of the `try` even in
    `while True: try: … except: pass`.

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
        """Handle an alarm: raise `_TimeUp` in the code that it interrupts."""
        self.alarms += 1
        # Raised while `__enter__` or `__exit__` runs, the exception would leave the alarm on for the rest of the run.
        if frame is None or frame.f_code in _OWN_CODE:
            return
        if self.alarms > PATIENCE:
            # 1 to 50 microseconds, all of them in turn: the time that the code needs from the `raise` to its next line
            # outside of a `try` is among them.
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (self.alarms % 50 + 1), BETWEEN_ALARMS)
        raise _TimeUp

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self.seconds is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._previous)
        # Another BaseException, such as KeyboardInterrupt, is no error of the code inside and passes.
        if self.alarms and (kind is None or issubclass(kind, (Exception, _TimeUp))):
            raise TimeoutError(_too_long(self.seconds)) from None


_OWN_CODE = {TimeLimit.__enter__.__code__, TimeLimit.__exit__.__code__, TimeLimit._stop.__code__}


async def within(seconds: float | None, coroutine: Awaitable) -> Any:
    """Wait for the result of a coroutine; cancel it after some seconds, and again if it catches that.

    Args:
        seconds: the limit; none if `None`.
        coroutine: what to wait for. One that catches `PATIENCE` cancellations is no longer waited for.

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
    except asyncio.CancelledError:  # somebody cancelled the waiting, not the task
        task.cancel()
        raise
    if task.done() and not task.cancelled():
        task.exception()  # fetched, because asyncio logs an exception that nobody has fetched
    raise TimeoutError(_too_long(float(seconds or 0)))


def _too_long(seconds: float) -> str:
    return f"it took longer than reward_timeout={seconds} seconds"
