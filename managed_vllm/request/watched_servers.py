"""Several servers that somebody else runs: which of them are up, as far as this client can see.

Nobody tells. A server from which an answer was lost is asked for `/health`: no answer, or a 5xx, and it is left out.
Servers that are left out are asked again while there are requests: one that is healthy and has the model is taken in,
and its next life begins. No thread or task runs while nothing is asked.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from managed_vllm.request.balancing import Balancer
from managed_vllm.request.connections import Transport
from managed_vllm.request.endpoints import Endpoint, Endpoints
from managed_vllm.request.event_loops import PerLoop
from managed_vllm.request.health import is_healthy
from managed_vllm.request.placement import Search
from managed_vllm.status import Connection

RECHECK_S = 1.0
"""Seconds between two looks at a server that is down, while others are up."""
_URGENT_S = 0.1
"""As `RECHECK_S`, while requests wait for it."""

Servers = Callable[[], Sequence[tuple[Connection, bool]]]
"""All servers of a client, and whether each is up."""
Look = Callable[[Connection, bool], Awaitable[bool]]
"""Whether a server is healthy; asked with True, whether it has the model as well. Never raises."""


def balanced(servers: Servers, attached: Endpoints, transport: Transport) -> Balancer:
    """The placement of a client with several servers that somebody else runs."""
    return Balancer(WatchedServers(attached, servers, functools.partial(is_healthy, transport)))


@dataclass(slots=True)
class _Server:
    connection: Connection
    epoch: int
    up: bool
    looked_at: float = 0.0

    @property
    def endpoint(self) -> Endpoint:
        return self.connection, self.epoch


class WatchedServers:
    """Keeps track of the servers of one client, by looking at them.

    Args:
        attached: finds the first server, and with it all others.
        given: all servers, and whether each was up; called once `attached` has found one.
        look: asks a server.
    """

    def __init__(self, attached: Endpoints, given: Servers, look: Look) -> None:
        self._attached = attached
        self._given = given
        self._look = look
        self._lives = itertools.count(1)
        self._servers: tuple[_Server, ...] = ()
        self._looking: PerLoop[dict[Connection, asyncio.Task[None]]] = PerLoop(dict, lambda _: None)

    async def known(self, search: Search) -> None:
        if self._servers:
            return
        await self._attached.get(search.lookups, None, 0.0, search.bound)
        if not self._servers:  # of another request, meanwhile
            self._servers = tuple(_Server(each, next(self._lives), up) for each, up in self._given())

    def every(self) -> Sequence[Endpoint]:
        return [server.endpoint for server in self._servers]

    def up(self) -> Sequence[Endpoint]:
        up = [server.endpoint for server in self._servers if server.up]
        if len(up) < len(self._servers):
            self._look_at_those_down(RECHECK_S)
        return up

    def working(self, among: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return among  # nobody tells

    async def look(self, endpoint: Endpoint) -> None:
        server = next(server for server in self._servers if server.connection == endpoint[0])
        if server.up and server.epoch == endpoint[1]:
            await asyncio.wait({self._begin(server)})

    async def wait(self, seconds: float) -> None:
        deadline, before = time.monotonic() + seconds, self._lives_up
        while (left_s := deadline - time.monotonic()) > 0 and self._lives_up <= before:
            looks = self._look_at_those_down(_URGENT_S)
            if looks:
                await asyncio.wait(looks, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(min(left_s, _URGENT_S))

    @property
    def _lives_up(self) -> set[int]:
        return {server.epoch for server in self._servers if server.up}

    def _look_at_those_down(self, after_s: float) -> set[asyncio.Task[None]]:
        """The looks that are under way, begun where the last one was so long ago."""
        under_way = self._looking.current()
        looks = set()
        for server in self._servers:
            if not server.up and (server.connection in under_way or time.monotonic() - server.looked_at >= after_s):
                looks.add(self._begin(server))
        return looks

    def _begin(self, server: _Server) -> asyncio.Task[None]:
        under_way = self._looking.current()
        task = under_way.get(server.connection)
        if task is None:
            task = under_way[server.connection] = asyncio.create_task(self._see(server))
            task.add_done_callback(lambda _: under_way.pop(server.connection, None))
        return task

    async def _see(self, server: _Server) -> None:
        epoch, was_up = server.epoch, server.up
        is_up = await self._look(server.connection, not was_up)
        server.looked_at = time.monotonic()
        if (server.epoch, server.up) != (epoch, was_up):  # seen from another event loop meanwhile
            return
        if is_up and not was_up:
            server.epoch = next(self._lives)
        server.up = is_up

    def after_fork(self) -> None:
        """In a forked child: the looks are the parent's."""
        self._looking.after_fork()
