"""Where a request goes: the server that is ready now, or after a loss the one that comes back.

Requests that wait for the same server wait together: one thread asks for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from managed_vllm.errors import ManagedVLLMError
from managed_vllm.request.bounds import Bound
from managed_vllm.request.event_loops import in_thread
from managed_vllm.status import Connection

Endpoint = tuple[Connection, int]
"""A server that is ready, and its epoch."""
Lookups = dict[int | None, asyncio.Future[Endpoint]]
"""The searches of one event loop that are under way, by the epoch that was lost."""
Find = Callable[[int | None, float | None, float], Endpoint]
Ready = Callable[[], Endpoint | None]


class Endpoints:
    """Finds the server of one client.

    Args:
        find: may block, and is called in a thread; see `AsyncVLLMClient`'s argument `connection`.
        ready: never blocks: the server if it is ready now, or None.
    """

    def __init__(self, find: Find, ready: Ready) -> None:
        self._find = find
        self._ready = ready

    async def get(self, lookups: Lookups, lost_epoch: int | None, pause_s: float, bound: Bound) -> Endpoint:
        """The server for the next attempt. After a loss: another epoch, or after `pause_s` seconds the lost one.

        Raises what the server ended with (`StartupError`, `ServerStoppedError`).
        """
        if lost_epoch is None and (ready := self._ready()) is not None:
            return ready
        again_at = time.monotonic() + pause_s
        while True:
            first = lost_epoch not in lookups
            connection, epoch = await self._look_up(lookups, lost_epoch, max(0.0, again_at - time.monotonic()), bound)
            left_s = again_at - time.monotonic()
            if epoch != lost_epoch or left_s <= 0:
                return connection, epoch
            if first:
                await asyncio.sleep(left_s)
                return connection, epoch

    async def _look_up(self, lookups: Lookups, lost_epoch: int | None, pause_s: float, bound: Bound) -> Endpoint:
        while True:
            lookup = lookups.get(lost_epoch)
            if lookup is None:
                left_s = bound.left_s
                found = in_thread(lambda: self._find(lost_epoch, left_s, pause_s), "managed-vllm-find")  # noqa: B023
                lookup = lookups[lost_epoch] = asyncio.wrap_future(found)
                lookup.add_done_callback(lambda done: _forget(lookups, lost_epoch, done))
            await asyncio.wait({lookup})  # others wait for it, too: it goes on where this request ends
            try:
                return lookup.result()
            except ManagedVLLMError as error:  # first: a start that timed out is a TimeoutError as well
                raise _copy(error) from error
            except TimeoutError:  # of the request that began the look-up; this one may have more time
                bound.check()


def _copy(error: ManagedVLLMError) -> ManagedVLLMError:
    """One for each request that waited: each is raised, and gets its traceback, in another place."""
    rebuild, arguments = error.__reduce__()
    copied: ManagedVLLMError = rebuild(*arguments)
    return copied


def _forget(lookups: Lookups, lost_epoch: int | None, done: asyncio.Future[Endpoint]) -> None:
    lookups.pop(lost_epoch, None)
    done.exception()  # asyncio would report one that nobody waits for any more
