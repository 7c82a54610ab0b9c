"""A synchronous environment in a thread of its own: cheap, and not killable.

A call that is not over within its limit ends with `EnvironmentTimeoutError`; its thread can't be ended from outside and
is abandoned. So that a process does not fill up with such threads there may be `MAX_ABANDONED` at a time; from then on
calls that would start one are refused. A crash in C takes the whole rollout with it. `ProcessEnvironment` has none of
these limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, cast

from managed_vllm.agent.actions import Action
from managed_vllm.agent.environments.synchronous import (
    SyncEnvironment,
    check_call,
    checked,
    name_of,
    raised,
    type_name,
    whole_traceback,
)
from managed_vllm.agent.types import Limits, Observation, StepResult, Task
from managed_vllm.errors import EnvironmentFailedError, EnvironmentRaisedError, EnvironmentTimeoutError

MAX_ABANDONED = 16
"""Threads that did not return in time and still run, of all environments of this process."""

_LEFT = "its thread can't be killed and was abandoned (a process could be: isolation='process', ProcessEnvironment)"

_Calls = queue.SimpleQueue[tuple[str, tuple[Any, ...], Future[Any]] | None]

_abandoned: set[threading.Thread] = set()
_lock = threading.Lock()


def hung_threads() -> int:
    """How many threads did not return in time and still run."""
    with _lock:
        _abandoned.intersection_update(threading.enumerate())
        return len(_abandoned)


class ThreadEnvironment:
    """An `Environment` around a `SyncEnvironment` all of whose methods are called in one thread of its own.

    Attributes:
        limits: seconds of each call; may be changed between two of them.
    """

    patience_s = 1.0

    def __init__(
        self,
        make: Callable[..., SyncEnvironment],
        *,
        arguments: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        name: str | None = None,
    ) -> None:
        """The environment is made by `make(**arguments)`, in the thread, with the first `reset`.

        `limits`: its `reset_timeout_s`, `step_timeout_s`, `evaluate_timeout_s` and `close_timeout_s` bound the calls.
        `name`: for messages.
        """
        if not callable(make):
            raise TypeError(f"make must be callable, not {type(make).__name__}")
        self._make = make
        self._arguments = dict(arguments or {})
        self.limits = limits or Limits()
        self._name = name or name_of(make)
        self._calls: _Calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._calling: str | None = None
        self._unusable: str | None = None
        self._closed = False
        self._left = False

    async def reset(self, task: Task) -> Observation:
        """See `Environment.reset`."""
        return cast(Observation, await self._call("reset", (task,), self.limits.reset_timeout_s))

    async def step(self, action: Action) -> StepResult:
        """See `Environment.step`."""
        return cast(StepResult, await self._call("step", (action,), self.limits.step_timeout_s))

    async def evaluate(self) -> float | None:
        """See `Environment.evaluate`."""
        return cast("float | None", await self._call("evaluate", (), self.limits.evaluate_timeout_s))

    async def close(self) -> None:
        """Closes the environment and ends its thread. After a call that was cancelled or not over in time, the thread
        does so by itself, if that call ever returns. A second time it does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            return
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        self._calls.put(("close", (), done))
        self._calls.put(None)
        if self._calling is not None or self._left:
            return
        limit_s = self.limits.close_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wrap_future(done)
        except TimeoutError:
            self._abandon()
            raise EnvironmentTimeoutError(f"{self._name}: close was not over within {limit_s:g} s; {_LEFT}") from None
        except asyncio.CancelledError:
            self._abandon()
            raise

    async def _call(self, method: str, arguments: tuple[Any, ...], limit_s: float) -> Any:
        check_call(
            self._name,
            method,
            closed=self._closed,
            unusable=self._unusable,
            calling=self._calling,
            begun=self._thread is not None,
        )
        if self._thread is None:
            self._begin()
        self._calling = method
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()
        self._calls.put((method, arguments, done))
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.wrap_future(done)
        except EnvironmentRaisedError as error:
            self._unusable = f"{error.call} raised {error.error_type}"
            raise
        except TimeoutError:
            self._unusable = f"{method} was not over within {limit_s:g} s"
            self._abandon()
            raise EnvironmentTimeoutError(f"{self._name}: {self._unusable}; {_LEFT}") from None
        except BaseException as error:
            self._unusable = f"{method} was cancelled or failed ({type_name(error)})"
            self._abandon()
            raise
        finally:
            self._calling = None

    def _begin(self) -> None:
        if (hung := hung_threads()) >= MAX_ABANDONED:
            raise EnvironmentFailedError(
                f"{self._name} is not started: {hung} threads of environments did not return in time and still run "
                "in this process. They can't be killed; let environments that hang have processes of their own "
                "(ProcessEnvironment, isolation='process')"
            )
        self._thread = threading.Thread(
            target=_serve,
            args=(self._calls, self._make, self._arguments, self._name),
            name=f"environment {self._name}",
            daemon=True,
        )
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)

    def _abandon(self) -> None:
        """The thread is left to itself; if its call returns, it closes the environment and ends."""
        assert self._thread is not None
        self._left = True
        with _lock:
            if self._thread.is_alive():
                _abandoned.add(self._thread)
        if not self._closed:
            done: Future[Any] = Future()
            done.set_running_or_notify_cancel()
            self._calls.put(("close", (), done))
            self._calls.put(None)


def _serve(calls: _Calls, make: Callable[..., SyncEnvironment], arguments: dict[str, Any], name: str) -> None:
    """The life of a thread. It does not hold the `ThreadEnvironment`, so that it ends with it, closed or not."""
    environment: SyncEnvironment | None = None
    try:
        while (call := calls.get()) is not None:
            method, given, done = call
            where = method
            try:
                if environment is None and method != "close":
                    where = "make"
                    environment = make(**arguments)
                    where = method
                value = None
                called, environment = environment, None if method == "close" else environment
                if called is not None:
                    value = checked(method, getattr(called, method)(*given))
            except BaseException as error:  # SystemExit, too: it is not the rollout's
                done.set_exception(raised(name, where, type_name(error), str(error), whole_traceback(error)))
            else:
                done.set_result(value)
    finally:
        with contextlib.suppress(Exception):
            if environment is not None:
                environment.close()
        with _lock:
            _abandoned.discard(threading.current_thread())
