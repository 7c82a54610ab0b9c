"""The event loop of synchronous callers, in a thread of its own: one for the whole process.

Started on first use and kept. It can be used from any thread, and within another running event loop (a notebook's); a
forked child starts its own. Waiting can be interrupted: Ctrl-C cancels what is waited for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from managed_vllm import forks, green_threads

T = TypeVar("T")

_CANCEL_S = 2.0
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The event loop. Its thread is a daemon, so it ends with the process.

    Raises `ConfigError` where threads are none (`managed_vllm.green_threads`).
    """
    global _loop
    green_threads.refuse()
    with _lock:
        if _loop is None:
            made = asyncio.new_event_loop()
            running = threading.Event()
            made.call_soon(running.set)
            threading.Thread(target=_run_forever, args=(made,), name="managed-vllm-io", daemon=True).start()
            running.wait()
            _loop = made
        return _loop


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    """Goes on after a task that raises SystemExit or KeyboardInterrupt, which ends asyncio's loop."""
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs the coroutine that `make` makes in the portal's loop, and returns its result.

    If the caller is interrupted (KeyboardInterrupt, a time-out by signal), the coroutine is cancelled, which may take
    up to 2 s. Raises `RuntimeError` within the loop itself, which would wait for itself.
    """
    where = loop()
    if _is_running(where):
        raise RuntimeError(
            "a synchronous call from within the loop that is to carry it out; await the asynchronous one"
        )
    coroutine = make()  # in the caller's thread: it may wait for a lock
    tasks: list[asyncio.Task[Any]] = []
    interrupted = threading.Event()

    async def cancellable() -> T:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        if interrupted.is_set():
            coroutine.close()
            raise asyncio.CancelledError
        return await coroutine

    def cancel() -> None:
        for task in tasks:
            task.cancel()

    try:
        return asyncio.run_coroutine_threadsafe(cancellable(), where).result()
    except concurrent.futures.CancelledError:
        raise
    except BaseException:
        # An interrupt may come at any moment, even before there is a future to cancel.
        if not tasks or not tasks[0].done():
            interrupted.set()
            where.call_soon_threadsafe(cancel)
            _settle(where)
        raise


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """The items, one by one, from the portal's loop.

    An asynchronous generator is closed when the iterator is closed or collected.
    """
    where = loop()

    async def following() -> tuple[T] | None:
        try:
            return (await anext(items),)
        except StopAsyncIteration:
            return None

    try:
        while (found := run(following)) is not None:
            yield found[0]
    finally:
        if isinstance(items, AsyncGenerator):
            clean_up(where, items.aclose)


def clean_up(where: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """As `run`, for clean-up that may come at any time, when an object is collected.

    Within the loop itself it does not wait. It does nothing in a forked child, where the parent cleans up, and when the
    interpreter ends.
    """
    if where is not _loop or sys.is_finalizing():
        return
    if _is_running(where):
        asyncio.run_coroutine_threadsafe(make(), where)
    else:
        run(make)


def _is_running(where: asyncio.AbstractEventLoop) -> bool:
    """Whether this code runs in that loop."""
    try:
        return asyncio.get_running_loop() is where
    except RuntimeError:
        return False


def _settle(where: asyncio.AbstractEventLoop) -> None:
    """Waits for one round of the loop: then a cancelled task has closed its connections."""
    with contextlib.suppress(concurrent.futures.TimeoutError, KeyboardInterrupt):
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), where).result(_CANCEL_S)


def _after_fork_in_child() -> None:
    """The thread stayed with the parent, and another one may have held the lock."""
    global _lock, _loop
    _lock = threading.Lock()
    _loop = None


forks.call_in_child(_after_fork_in_child)
