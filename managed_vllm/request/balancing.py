"""Which of several servers of the same model a request goes to.

- A session stays with its server: that has the beginning of its prompts in its prefix cache.
- Else the server with the fewest requests in flight is taken; between equals they take turns.
- A server that lost an answer is looked at at once. If it is gone, nothing goes there until it is back; its requests go
  on elsewhere, and its sessions move for good: what they had is lost with it.
- One that is up and yet works on nothing (its engine is paused, asleep, or takes new weights) is left to its sessions
  while another one works.

Only what this client has in flight is counted: no process asks another one.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from managed_vllm.request.endpoints import Endpoint
from managed_vllm.request.placement import Search
from managed_vllm.status import Connection

MOST_SESSIONS = 100_000
"""Sessions whose server is kept; beyond them the one that was asked longest ago is forgotten: about 20 MB."""
_AGAIN_S = 1.0
"""Seconds until a request that has no server to go to looks again, if no news come before."""


class Servers(Protocol):
    """Several servers, of which some may be down."""

    async def known(self, search: Search) -> None:
        """Until it is known which servers there are. Raises what a handle raises on entering."""

    def every(self) -> Sequence[Endpoint]:
        """All servers that may answer, each in its present or last life."""

    def up(self) -> Sequence[Endpoint]:
        """Those that are up, as far as is known. Called in an event loop; never waits."""

    def working(self, among: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Of these, those whose engine works on requests, as far as is known."""

    async def look(self, endpoint: Endpoint) -> None:
        """Finds out whether a server that lost an answer is still up."""

    def after_fork(self) -> None:
        """In a forked child: the event loops are the parent's."""

    async def wait(self, seconds: float) -> None:
        """Until another server may be up than before, at most so many seconds."""


class Balancer:
    """The placement of a client that has several servers. Thread-safe."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._lock = threading.Lock()
        self._in_flight: dict[Connection, int] = {}
        self._sessions: OrderedDict[str, Connection] = OrderedDict()
        self._turn = random.randrange(1 << 16)  # or the first request of every process would go to the same server

    async def get(self, search: Search) -> Endpoint:
        await self._servers.known(search)
        lost = search.lost
        if lost is not None:
            await self._servers.look(lost)
        again_at = time.monotonic() + search.pause_s
        while True:
            up = self._fitting(self._servers.up(), search)
            left_s = again_at - time.monotonic()
            fresh = [one for one in up if one != lost]
            if fresh and (search.losses <= len(up) or left_s <= 0):  # else each has refused it: no hurry
                return self._choose(fresh, search)
            if left_s <= 0 and (rest := up or self._fitting(self._servers.every(), search)):
                return self._choose(rest, search)
            await self._servers.wait(left_s if left_s > 0 else _AGAIN_S)
            await self._servers.known(search)

    def _fitting(self, servers: Sequence[Endpoint], search: Search) -> list[Endpoint]:
        return [one for one in servers if search.only is None or one[0] == search.only]

    def _choose(self, among: Sequence[Endpoint], search: Search) -> Endpoint:
        session = search.session
        with self._lock:
            kept = None if session is None else self._sessions.get(session)
            chosen = next((one for one in among if one[0] == kept), None) or self._idlest(among)
            self._in_flight[chosen[0]] = self._in_flight.get(chosen[0], 0) + search.size
            if session is not None:
                self._sessions[session] = chosen[0]
                self._sessions.move_to_end(session)
                if len(self._sessions) > MOST_SESSIONS:
                    self._sessions.popitem(last=False)
            return chosen

    def _idlest(self, among: Sequence[Endpoint]) -> Endpoint:
        among = self._servers.working(among) or among
        self._turn += 1
        rotated = [among[(self._turn + index) % len(among)] for index in range(len(among))]
        return min(rotated, key=lambda one: self._in_flight.get(one[0], 0))

    def leave(self, endpoint: Endpoint, size: int = 1) -> None:
        with self._lock:
            left = self._in_flight.pop(endpoint[0], 0) - size
            if left > 0:
                self._in_flight[endpoint[0]] = left

    def is_over(self, lost: Endpoint, now: Endpoint) -> bool:
        up = self._servers.up()
        return lost not in up and now in up

    async def every(self, search: Search) -> Sequence[Connection | None]:
        await self._servers.known(search)
        while not (every := self._servers.every()):
            await self._servers.wait(_AGAIN_S)
            await self._servers.known(search)
        return [connection for connection, _ in every]

    def after_fork(self) -> None:
        """In a forked child: what is in flight is the parent's, and another thread may have held the lock."""
        self._lock = threading.Lock()
        self._in_flight = {}
        self._servers.after_fork()
