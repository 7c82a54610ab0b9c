"""Notices an environment that blocks the event loop: `async def step` with a call in it that waits without `await`.

It is the commonest mistake in an environment of one's own. Everything stands still meanwhile, and no limit of time
fires, since it is the loop that would fire it. Nothing can end such a call from outside; but a thread beside the loop
sees that it does not answer, and which task runs. So the mistake is named, once for each place, with what to do about
it; and a call that took longer than its limit fails afterwards (`bounded`).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
import weakref
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger("managed_vllm.agent")

LAG_S = 1.0
"""From which on a loop that does not answer is looked at."""
_EVERY_S = 0.25

ADVICE = (
    "Everything else stands still meanwhile. Await what takes long (asyncio.sleep, aiohttp, asyncio.to_thread), or let "
    "the environment be synchronous, in a process of its own (ProcessEnvironment) or a thread (ThreadEnvironment)"
)

_watched: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
_blocked_s: weakref.WeakKeyDictionary[asyncio.Task[Any], float] = weakref.WeakKeyDictionary()


def watch(task: asyncio.Task[Any]) -> None:
    """Marks a task that may be to blame; its name says what it does."""
    _watched.add(task)


def blocked_s(task: asyncio.Task[Any]) -> float:
    """Seconds for which it was seen to block its loop; 0: never."""
    return _blocked_s.get(task, 0.0)


class LoopWatch:
    """Watches the running loop while it is entered. Several may watch one loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._answered = threading.Event()
        self._over = threading.Event()
        self._told: set[tuple[str, int]] = set()
        self._thread = threading.Thread(target=self._run, name="managed-vllm-loop-watch", daemon=True)

    def __enter__(self) -> LoopWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            self._answered.clear()
            asked_at = time.monotonic()
            try:
                self._loop.call_soon_threadsafe(self._answered.set)
            except RuntimeError:  # it is closed
                return
            if not self._answered.wait(LAG_S):
                self._look(asked_at)

    def _look(self, asked_at: float) -> None:
        """As long as the loop does not answer: if one task of an environment runs all the time, it is to blame."""
        suspect = self._running()
        while not self._answered.wait(_EVERY_S) and not self._over.is_set():
            if suspect is None or self._running() is not suspect:
                suspect = None
                continue
            seconds = time.monotonic() - asked_at
            _blocked_s[suspect] = max(blocked_s(suspect), seconds)
            self._tell(suspect, seconds)

    def _running(self) -> asyncio.Task[Any] | None:
        task = asyncio.current_task(self._loop)
        return task if task in _watched else None

    def _tell(self, task: asyncio.Task[Any], seconds: float) -> None:
        frame = sys._current_frames().get(self._thread_id)
        where = None if frame is None else _place(frame)
        if where is None or where in self._told:
            return
        self._told.add(where)
        log.warning(
            "%s has blocked the event loop for %.1f s, at %s:%d. %s\n%s",
            *(task.get_name(), seconds, *where, ADVICE),
            "".join(traceback.format_stack(frame)[-6:]).rstrip(),
        )


def _place(frame: FrameType) -> tuple[str, int] | None:
    """The innermost line that is neither the standard library's nor ours: the environment's own."""
    found: FrameType | None = frame
    library = asyncio.__file__.rpartition("/asyncio/")[0]
    package = __file__.rpartition("/agent/")[0]
    while found is not None:
        path = found.f_code.co_filename
        if not path.startswith((library + "/", package + "/", "<")) or "site-packages" in path:
            return path, found.f_lineno
        found = found.f_back
    return frame.f_code.co_filename, frame.f_lineno
