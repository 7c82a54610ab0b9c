"""To which server a request goes: `Placement`, and the one where there is only one, `OneServer`.

The sender asks with a `Search` before each attempt, and says `leave` after it. `balancing.Balancer` chooses among
several; `Undecided` waits to see which of the two it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from managed_vllm.request.bounds import Bound
from managed_vllm.request.endpoints import Endpoint, Endpoints, Lookups
from managed_vllm.status import Connection


@dataclass(slots=True)
class Search:
    """What one request looks for.

    Attributes:
        lookups: the searches of this event loop that are under way.
        bound: the request's.
        session: requests of the same session go to the same server, as long as it is there.
        only: the only server that will do.
        size: how many requests it counts for.
        lost: the server that lost the last answer.
        losses: answers lost in a row.
        pause_s: seconds to wait, at most, before the server that lost the answer is asked again.
    """

    lookups: Lookups
    bound: Bound
    session: str | None = None
    only: Connection | None = None
    size: int = 1
    lost: Endpoint | None = None
    losses: int = 0
    pause_s: float = 0.0


class Placement(Protocol):
    """Where the requests of one client go."""

    async def get(self, search: Search) -> Endpoint:
        """The server for the next attempt, which counts as in flight there until `leave`.

        Raises what the server ended with (`StartupError`, `ServerStoppedError`).
        """

    def leave(self, endpoint: Endpoint, size: int = 1) -> None:
        """An attempt is over, which counted for so many. From any thread."""

    def is_over(self, lost: Endpoint, now: Endpoint) -> bool:
        """Whether the life of the server that lost an answer has ended, and `now` is one that lives."""

    async def every(self, search: Search) -> Sequence[Connection | None]:
        """All servers, for what concerns each of them: for `Search.only`."""

    def after_fork(self) -> None:
        """In a forked child: what is in flight is the parent's."""


class OneServer:
    """The placement of a client that has one server."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def get(self, search: Search) -> Endpoint:
        lost_epoch = None if search.lost is None else search.lost[1]
        return await self._endpoints.get(search.lookups, lost_epoch, search.pause_s, search.bound)

    def leave(self, endpoint: Endpoint, size: int = 1) -> None:
        pass

    def is_over(self, lost: Endpoint, now: Endpoint) -> bool:
        return now[1] != lost[1]

    async def every(self, search: Search) -> Sequence[Connection | None]:
        return (None,)

    def after_fork(self) -> None:
        pass


class Undecided:
    """The placement of a client that knows only with its first server whether there are several.

    Args:
        attached: finds that server.
        several: the placement to use from then on, or None: there is one.
    """

    def __init__(self, attached: Endpoints, several: Callable[[], Placement | None]) -> None:
        self._placement: Placement = OneServer(attached)
        self._several: Callable[[], Placement | None] | None = several

    async def get(self, search: Search) -> Endpoint:
        if self._several is not None:
            await self._decide(search)
        return await self._placement.get(search)

    async def _decide(self, search: Search) -> None:
        await self._placement.get(search)
        several, self._several = self._several, None
        if several is not None:  # else another request was here first
            self._placement = several() or self._placement

    def leave(self, endpoint: Endpoint, size: int = 1) -> None:
        self._placement.leave(endpoint, size)

    def is_over(self, lost: Endpoint, now: Endpoint) -> bool:
        return self._placement.is_over(lost, now)

    async def every(self, search: Search) -> Sequence[Connection | None]:
        if self._several is not None:
            await self._decide(search)
        return await self._placement.every(search)

    def after_fork(self) -> None:
        self._placement.after_fork()
