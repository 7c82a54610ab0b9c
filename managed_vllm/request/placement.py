"""To which server a request goes: `Placement`, and the one where there is only one, `OneServer`.

The sender asks with a `Search` before each attempt, and says `leave` after it. `balancing.Balancer` chooses among
several.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        lost: the server that lost the last answer.
        losses: answers lost in a row.
        pause_s: seconds to wait, at most, before the server that lost the answer is asked again.
    """

    lookups: Lookups
    bound: Bound
    session: str | None = None
    only: Connection | None = None
    lost: Endpoint | None = None
    losses: int = 0
    pause_s: float = 0.0


class Placement(Protocol):
    """Where the requests of one client go."""

    async def get(self, search: Search) -> Endpoint:
        """The server for the next attempt, which counts as in flight there until `leave`.

        Raises what the server ended with (`StartupError`, `ServerStoppedError`).
        """

    def leave(self, endpoint: Endpoint) -> None:
        """An attempt is over. From any thread."""

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

    def leave(self, endpoint: Endpoint) -> None:
        pass

    def is_over(self, lost: Endpoint, now: Endpoint) -> bool:
        return now[1] != lost[1]

    async def every(self, search: Search) -> Sequence[Connection | None]:
        return (None,)

    def after_fork(self) -> None:
        pass
