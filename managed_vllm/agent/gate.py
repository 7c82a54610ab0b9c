"""Whether requests to the model may begin, and whether the time of those that have begun counts.

Both are held up while the weights are being changed: by the run's owner (`pause`), or because the engine is paused
(`engine_watch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Hashable

_PAUSE = "pause"


class Limit:
    """A time limit that stands still while the gate says so; `held_s` are the seconds for which it did.

    Raises `TimeoutError` out of its block, as `asyncio.timeout` does.
    """

    def __init__(self, seconds: float | None) -> None:
        self.held_s = 0.0
        self.began = time.monotonic()
        self.timeout = asyncio.timeout(seconds)
        self._left_s: float | None = None
        self._held_at: float | None = None

    def hold(self) -> None:
        """Its clock stands still."""
        if self._held_at is None:
            now, when = asyncio.get_running_loop().time(), self.timeout.when()
            self._held_at = now
            self._left_s = None if when is None else max(0.0, when - now)
            self._move(None)

    def go_on(self) -> None:
        """Its clock goes on."""
        if self._held_at is not None:
            self.end()
            now = asyncio.get_running_loop().time()
            self._move(None if self._left_s is None else now + self._left_s)

    def end(self) -> None:
        """It counts no further."""
        if self._held_at is not None:
            self.held_s += asyncio.get_running_loop().time() - self._held_at
            self._held_at = None

    def _move(self, when: float | None) -> None:
        if not self.timeout.expired():
            self.timeout.reschedule(when)


class Gate:
    """Lets requests to the model pass, or holds them back. Used from one event loop."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inside = 0
        self._holders: dict[Hashable, bool] = {}
        self._limits: set[Limit] = set()
        self._stuck: set[Limit] = set()

    @property
    def paused(self) -> bool:
        """Whether it is closed by `pause`."""
        return _PAUSE in self._holders

    @contextlib.asynccontextmanager
    async def passed(self) -> AsyncIterator[float]:
        """Waits until it is open, and yields the seconds that this took."""
        began = time.monotonic()
        while not self._open.is_set():
            await self._open.wait()
        self._inside += 1
        self._idle.clear()
        try:
            yield time.monotonic() - began
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def limited(self, seconds: float | None) -> AsyncIterator[Limit]:
        """Bounds what is done within; the time in which requests are frozen does not count."""
        limit = Limit(seconds)
        self._limits.add(limit)
        try:
            async with limit.timeout:
                if self._is_frozen:
                    limit.hold()
                yield limit
        finally:
            self._limits.discard(limit)
            self._stuck.discard(limit)
            limit.end()

    async def pause(self) -> None:
        """Lets nobody in any more, and returns when all who were inside are out."""
        self.close()
        await self._idle.wait()

    def close(self, holder: Hashable = _PAUSE, *, freezes: bool = False, noticed_s: float = 0.0) -> None:
        """Lets nobody in until `holder` opens it again.

        `freezes`: what is inside does not move meanwhile. Else only what slipped in before this was noticed does not,
        for which it took `noticed_s` seconds at most.
        """
        if self._holders.get(holder) == freezes:
            return
        self._holders[holder] = freezes
        now = time.monotonic()
        self._stuck |= {limit for limit in self._limits if now - limit.began < noticed_s}
        self._follow()

    def open(self, holder: Hashable = _PAUSE) -> None:
        """Lets them in again, unless another holder keeps it closed."""
        if self._holders.pop(holder, None) is not None:
            self._follow()

    def resume(self) -> None:
        self.open()

    @property
    def _is_frozen(self) -> bool:
        return any(self._holders.values())

    def _follow(self) -> None:
        if self._holders:
            self._open.clear()
        else:
            self._open.set()
            self._stuck.clear()
        for limit in self._limits:
            limit.hold() if self._is_frozen or limit in self._stuck else limit.go_on()
