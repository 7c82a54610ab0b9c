"""One event loop in a thread of its own, for everybody in this process who has none: the synchronous callers.

Made on first use and kept; it works from any thread, within another running event loop (a notebook's), and anew in a
forked child. Who waits here can be interrupted: Ctrl-C cancels what he waits for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from managed_vllm import forks

T = TypeVar("T")

_CANCEL_S = 2.0
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """The event loop; its thread is a daemon, and ends with the process."""
    global _loop
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
    """A task that raises SystemExit or KeyboardInterrupt ends asyncio's loop; who waits for it is told by the next."""
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs the coroutine that `make` makes on the portal's loop and waits for its result.

    If the caller is interrupted (KeyboardInterrupt, a time-out by signal), it is cancelled, for which the caller waits
    2 s at most. Raises `RuntimeError` within the loop itself, which would wait for itself.
    """
    where = loop()
    if _is_running(where):
        raise RuntimeError(
            "a synchronous call from within the loop that is to carry it out; await the asynchronous one"
        )
    future: concurrent.futures.Future[T] = asyncio.run_coroutine_threadsafe(make(), where)
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise
    except BaseException:
        if not future.done():
            future.cancel()
            _settle(where)
        raise


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """The items, one by one, from the loop. Closes an asynchronous generator when the iterator is closed or garbage."""
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
            end(where, items.aclose)


def end(where: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a clean-up on the loop as `run` does; but it may come whenever an object becomes garbage.

    So within the loop itself nobody waits for it, and where that loop does not run nothing is done: in a forked child,
    where what is to clean up is the parent's, and at the interpreter's end.
    """
    if where is not _loop or sys.is_finalizing():
        return
    if _is_running(where):
        asyncio.run_coroutine_threadsafe(make(), where)
    else:
        run(make)


def _is_running(where: asyncio.AbstractEventLoop) -> bool:
    """Whether this is the loop that runs this very code."""
    try:
        return asyncio.get_running_loop() is where
    except RuntimeError:
        return False


def _settle(where: asyncio.AbstractEventLoop) -> None:
    """Waits until the loop has come round: a cancelled task has then closed its connections."""
    with contextlib.suppress(concurrent.futures.TimeoutError, KeyboardInterrupt):
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), where).result(_CANCEL_S)


def _after_fork_in_child() -> None:
    """The thread stayed with the parent, and the lock may have been held by another one."""
    global _lock, _loop
    _lock = threading.Lock()
    _loop = None


forks.call_in_child(_after_fork_in_child)
