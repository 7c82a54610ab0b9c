"""`blocking`: a coroutine run to its end by callers without an event loop, and by those within one (a notebook).

Unlike `managed_vllm.request.portal` the loop is the call's own, and Ctrl-C waits until the coroutine has cleaned up:
environments are closed, and what has finished is on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def blocking(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs the coroutine in an event loop of its own and waits, also where a loop runs already (a notebook).

    Ctrl-C cancels it, and its own clean-up is waited for.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    result: list[T] = []
    error: list[BaseException] = []
    ready = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def inside() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        ready.set()
        return await make()

    def whole() -> None:
        try:
            result.append(asyncio.run(inside()))
        except BaseException as raised:
            error.append(raised)
        finally:
            ready.set()

    thread = threading.Thread(target=whole, name="managed-vllm-run")
    thread.start()
    try:
        thread.join()
    except BaseException:
        ready.wait()
        for loop, task in running:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if error:
        raise error[0]
    return result[0]
