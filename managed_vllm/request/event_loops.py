"""What a client keeps for each event loop that uses it, and threads for which an event loop waits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One value for each event loop. Thread-safe; the values themselves belong to their loops.

    Args:
        make: makes the value of the running loop.
        drop: gets the value of a loop that was closed; called when the next loop comes.
    """

    def __init__(self, make: Callable[[], T], drop: Callable[[T], None]) -> None:
        self._make = make
        self._drop = drop
        self._lock = threading.Lock()
        self._values: dict[asyncio.AbstractEventLoop, T] = {}

    def current(self) -> T:
        """The value of the running loop."""
        loop = asyncio.get_running_loop()
        value = self._values.get(loop)
        if value is not None:
            return value
        with self._lock:
            for closed in [one for one in self._values if one.is_closed()]:
                self._drop(self._values.pop(closed))
            return self._values.setdefault(loop, self._make())

    def items(self) -> list[tuple[asyncio.AbstractEventLoop, T]]:
        """All loops with their values."""
        with self._lock:
            return list(self._values.items())

    def after_fork(self) -> list[T]:
        """In a forked child: forgets the parent's loops, and returns their values."""
        self._lock = threading.Lock()  # another thread may have held it
        values, self._values = list(self._values.values()), {}
        return values


def in_thread(function: Callable[[], T], name: str) -> concurrent.futures.Future[T]:
    """The function's result, from a daemon thread of its own, called `name`.

    Not from a loop's executor: a loop that ends must not wait for a thread that is stuck, and the program needs the few
    threads that are there.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_settle, args=(future, function), name=name, daemon=True).start()
    return future


def _settle(future: concurrent.futures.Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
        del future, function  # the traceback has this frame: they would keep each other alive
