"""Whose turn it is to use a server's engine: one call at a time, while the server is there.

A user may reserve it for several calls, those of one weight update: every other call waits then, also the user's own,
because the weights between those calls are half old and half new. A reservation ends with `free`, and with the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from types import TracebackType


class Turn:
    """The turn of one engine. `async with` takes it whether or not a server is there, or it is reserved."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._serving = asyncio.Event()
        self._free = asyncio.Event()
        self._free.set()
        self._user: Hashable = None

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def is_taken(self) -> bool:
        """Whether a call is under way, or the engine is reserved for some."""
        return self._lock.locked() or not self._free.is_set()

    async def take(self, user: Hashable = None) -> None:
        """Returns with the turn taken, while the server is there and the engine free, or reserved for `user`."""
        while True:
            await self._serving.wait()
            if not self.is_free(user):
                await self._free.wait()
                continue
            await self._lock.acquire()
            if self._serving.is_set() and self.is_free(user):
                return
            self._lock.release()

    @property
    def is_serving(self) -> bool:
        """Whether the server is there."""
        return self._serving.is_set()

    async def until_serving(self) -> None:
        """Returns while the server is there."""
        await self._serving.wait()

    async def until_free(self, user: Hashable = None) -> None:
        """Returns while the engine is not reserved, or is for `user`."""
        while not self.is_free(user):
            await self._free.wait()

    def is_free(self, user: Hashable = None) -> bool:
        """Whether the engine is not reserved, or is for `user`."""
        return self._free.is_set() or (user is not None and self._user == user)

    def release(self) -> None:
        """Gives the turn back."""
        self._lock.release()

    def reserve(self, user: Hashable) -> None:
        """From now on only those calls may go that take the turn as `user`. The caller has the turn."""
        self._user = user
        self._free.clear()

    def free(self) -> None:
        """Ends a reservation, if there is one."""
        self._user = None
        self._free.set()

    def server_came(self) -> None:
        """Lets the calls go that wait for the server."""
        self._serving.set()

    def server_left(self) -> None:
        """Calls wait for the next server from now on; a reservation is over."""
        self._serving.clear()
        self.free()
