"""Calls of environments, each within its time limit, also where the environment does not heed cancellation."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from managed_vllm.agent import loop_watch
from managed_vllm.errors import EnvironmentFailedError, EnvironmentTimeoutError

log = logging.getLogger("managed_vllm.agent")

T = TypeVar("T")

GRACE_S = 5.0
"""For a call of an environment that was cancelled to come to its end."""


async def bounded(make: Callable[[], Awaitable[T]], seconds: float, what: str) -> T:
    """Awaits what `make` makes, for so many seconds at most, also where it does not heed cancellation.

    A call that goes on for some seconds after it was cancelled is left alone. Raises `EnvironmentTimeoutError`, also
    afterwards for one that blocked the event loop for so long (`loop_watch`); `EnvironmentFailedError`: it wanted to
    end the program; `TypeError`: it is not asynchronous.
    """

    async def calling() -> T:
        try:
            made = make()
            if not inspect.isawaitable(made):
                raise _not_async(what)
            return await made
        except SystemExit as error:  # else it would end the event loop, and all other episodes with it
            raise EnvironmentFailedError(f"{what} raised SystemExit({error.code!r})") from error

    task = asyncio.create_task(calling(), name=what)
    loop_watch.watch(task)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        await _stop(task, what)
        raise
    if not task.done():
        await _stop(task, what)
        raise EnvironmentTimeoutError(f"{what} took more than {seconds:g} s")
    blocked_s = loop_watch.blocked_s(task)
    if blocked_s > seconds:
        if not task.cancelled():
            task.exception()
        raise EnvironmentTimeoutError(
            f"{what} took more than {seconds:g} s: it blocked the event loop for {blocked_s:.1f} s. {loop_watch.ADVICE}"
        )
    if task.cancelled():
        raise EnvironmentFailedError(f"{what} was cancelled from within")
    return task.result()


def _not_async(what: str) -> TypeError:
    hint = (
        f"{what} is not asynchronous. Write it as `async def`; or, if it can't be, hand the environment to "
        "ProcessEnvironment or ThreadEnvironment, which take synchronous ones"
    )
    _hint_once(hint)
    return TypeError(hint)


@functools.cache
def _hint_once(hint: str) -> None:
    log.warning("%s", hint)


async def _stop(task: asyncio.Task[Any], what: str) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=GRACE_S)
    if task.done():
        if not task.cancelled():
            task.exception()  # asyncio tells of one that nobody has looked at
        return
    log.warning("%s goes on %g s after it was cancelled; it is left alone", what, GRACE_S)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


class Deadline:
    """The moment at which an episode is over; None: it may last as long as it likes."""

    def __init__(self, seconds: float | None) -> None:
        self._at = None if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return self._at is not None and time.monotonic() >= self._at

    def left_s(self) -> float | None:
        """Seconds until then, a millisecond at least; None: no bound."""
        return None if self._at is None else max(0.001, self._at - time.monotonic())

    def put_off(self, seconds: float) -> None:
        """The episode was held up from outside: that time does not count."""
        if self._at is not None:
            self._at += seconds
