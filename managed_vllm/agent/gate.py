"""Whether requests to the model may begin: held back while its weights are being changed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator


class Gate:
    """Lets requests to the model pass, or holds them back: `pause` while the weights are being changed."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inside = 0

    @property
    def paused(self) -> bool:
        return not self._open.is_set()

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

    async def pause(self) -> None:
        """Lets nobody in any more, and returns when all who were inside are out."""
        self.close()
        await self._idle.wait()

    def close(self) -> None:
        """Lets nobody in any more."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()
