"""The replicas of one server, as the lease on it tells them: which of them a request can go to now.

The supervisor says at once, over the lease, which replicas are ready, in which epoch, and what is being done with their
engines; that is most of it. What a request sees first is here: a replica that lost an answer and does not answer
`/health` either is left out, until the supervisor has another epoch of it, or it answers again.

No question is asked and no thread runs while all is well.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from managed_vllm.errors import ServerDiedError
from managed_vllm.request.balancing import Balancer
from managed_vllm.request.connections import Transport
from managed_vllm.request.endpoints import Endpoint, Endpoints
from managed_vllm.request.event_loops import PerLoop, in_thread
from managed_vllm.request.health import is_healthy
from managed_vllm.request.placement import OneServer, Placement, Search, Undecided
from managed_vllm.request.watched_servers import RECHECK_S, Look
from managed_vllm.status import ServerState, ServerStatus

_LISTEN_S = 1.0
"""Seconds for which one thread waits for news, at most: so long a handle outlives its last reference."""


class Lease(Protocol):
    """A user's hold on a server: `managed_vllm.instance.attach.Attachment`. Every method from any thread."""

    @property
    def replicas(self) -> int | None:
        """How many replicas the server has; None: that is known only once it is attached to."""

    def last_status(self) -> ServerStatus | None:
        """What the supervisor said last; None without a lease. Never waits."""

    def wait_for_news(self, known: ServerStatus | None, timeout_s: float) -> None:
        """Until `last_status` is another than `known`, or the lease is gone, or the time is over."""


def placed(lease: Lease, attached: Endpoints, transport: Transport) -> Placement:
    """The placement of a client with a lease, for whichever kind of server that is on."""

    def several() -> Balancer:
        return Balancer(LeasedReplicas(lease, attached, functools.partial(is_healthy, transport)))

    if lease.replicas is None:
        return Undecided(attached, lambda: several() if (lease.replicas or 1) > 1 else None)
    return several() if lease.replicas > 1 else OneServer(attached)


@dataclass(frozen=True, slots=True)
class _Told:
    """What one status says of the replicas: those that are ready, and those of them whose engines work."""

    status: ServerStatus | None
    ready: tuple[Endpoint, ...]
    working: frozenset[Endpoint]

    @classmethod
    def of(cls, status: ServerStatus | None) -> _Told:
        ready = {
            (one.connection, one.epoch): one.engine.serves
            for one in (status.replicas if status is not None and status.state is ServerState.READY else ())
            if one.state is ServerState.READY and one.connection is not None
        }
        return cls(status, tuple(ready), frozenset(endpoint for endpoint, works in ready.items() if works))


class LeasedReplicas:
    """The `balancing.Servers` of a client that holds a lease. Thread-safe.

    Args:
        lease: on the server whose replicas they are.
        attached: takes the lease, and waits until the server is ready.
        look: asks a replica whether it is healthy.
    """

    def __init__(self, lease: Lease, attached: Endpoints, look: Look) -> None:
        self._lease = lease
        self._attached = attached
        self._look = look
        self._told = _Told.of(None)
        self._silent: dict[Endpoint, float] = {}
        """Replicas that are ready by the supervisor's word, and gave no answer; when they were asked last."""
        self._news: PerLoop[dict[Endpoint | None, asyncio.Future[None]]] = PerLoop(dict, lambda _: None)
        """What is waited for: an answer of a replica, and with None a word of the supervisor."""

    async def known(self, search: Search) -> None:
        if not self._now().ready:
            await self._attached.get(search.lookups, None, 0.0, search.bound)
        if search.only is not None:
            self._raise_if_replaced(search)

    def _raise_if_replaced(self, search: Search) -> None:
        status = self._now().status
        connections = [] if status is None else [one.connection for one in status.replicas]
        if connections and None not in connections and search.only not in connections:
            raise ServerDiedError("the replica that this was for was started again elsewhere")

    def every(self) -> Sequence[Endpoint]:
        return self._now().ready

    def up(self) -> Sequence[Endpoint]:
        """Those that are ready and have not fallen silent; if all of them have, whichever are ready."""
        ready = self._now().ready
        if not self._silent:
            return ready
        self._ask_again(ready)
        return [one for one in ready if one not in self._silent] or ready

    def working(self, among: Sequence[Endpoint]) -> Sequence[Endpoint]:
        told = self._now()
        return among if len(told.working) == len(told.ready) else [one for one in among if one in told.working]

    async def look(self, endpoint: Endpoint) -> None:
        if endpoint in self._now().ready and endpoint not in self._silent:
            await asyncio.wait({self._ask(endpoint)})

    async def wait(self, seconds: float) -> None:
        waiting = self._news.current()
        if None not in waiting:
            known = self._now().status
            listening = in_thread(lambda: self._lease.wait_for_news(known, _LISTEN_S), "managed-vllm-news")
            self._keep(None, asyncio.wrap_future(listening))
        await asyncio.wait(set(waiting.values()), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    def after_fork(self) -> None:
        """In a forked child: what is waited for is the parent's."""
        self._news.after_fork()
        self._silent = {}

    def _now(self) -> _Told:
        status = self._lease.last_status()
        if status is not self._told.status:
            self._told = _Told.of(status)
        return self._told

    def _ask_again(self, ready: Sequence[Endpoint]) -> None:
        """Asks those that fell silent, unless that was just done; forgets those that are gone."""
        for endpoint, asked_at in list(self._silent.items()):
            if endpoint not in ready:
                self._silent.pop(endpoint, None)
            elif time.monotonic() - asked_at >= RECHECK_S:
                self._ask(endpoint)

    def _ask(self, endpoint: Endpoint) -> asyncio.Future[None]:
        asking = self._news.current().get(endpoint)
        return asking or self._keep(endpoint, asyncio.create_task(self._hear(endpoint)))

    async def _hear(self, endpoint: Endpoint) -> None:
        if await self._look(endpoint[0], False):
            self._silent.pop(endpoint, None)
        else:
            self._silent[endpoint] = time.monotonic()

    def _keep(self, what: Endpoint | None, future: asyncio.Future[Any]) -> asyncio.Future[Any]:
        """Until it is done: all who wait for the same wait together."""
        waiting = self._news.current()
        waiting[what] = future
        future.add_done_callback(lambda _: waiting.pop(what, None))
        return future
