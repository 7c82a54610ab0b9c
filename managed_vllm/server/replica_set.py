"""The servers of one instance with `replicas=`: several lives (`managed_vllm.server.life`) that users see as one.

- All are forked from one image, share the key, and have their own devices, port, log and epochs. Epochs are counted
  through all of them, so that a number says which life of which replica is meant.
- The instance is READY once each of them has been, and the router; from then on as long as one of them is. Where one
  gives up before that, the instance has failed with its reason; after that, once all have given up.
- Users of ours are told of each replica and choose for themselves. For everybody else there is the router
  (`managed_vllm.server.router`), which is told at once which of them are up.
- What users make of the engines they make of all, or of none (`managed_vllm.server.every_engine`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from managed_vllm.config import SupervisorOrder
from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.masking import Secret
from managed_vllm.served_files import Files
from managed_vllm.server import launch
from managed_vllm.server.every_engine import EveryEngine
from managed_vllm.server.life import Life, Owner
from managed_vllm.server.router import Router
from managed_vllm.server.starter import ServerStarter
from managed_vllm.status import Connection, Progress, ServerState, ServerStatus

log = logging.getLogger("managed_vllm.supervisor")


class ReplicaSet:
    """Several servers as one; see the module's docstring. Used as a `Life` is, and the owner of those that it has."""

    def __init__(
        self,
        instance: Instance,
        order: SupervisorOrder,
        owner: Owner,
        *,
        predecessor: Mapping[str, Any] | None,
    ) -> None:
        """`predecessor` is the record of a supervisor that was killed."""
        self._instance = instance
        self._owner = owner
        self.starter: ServerStarter = owner.starter
        recorded = [_with_agreed(one, predecessor or {}) for one in cleanup.replicas_in(predecessor)]
        self._epochs = itertools.count(1 + max((_epoch_in(one) for one in recorded), default=0))
        own_address = dataclasses.replace(order.address, host=None, port=None)
        self._order = dataclasses.replace(order, address=own_address)
        self._lives = tuple(
            Life(instance.of_replica(number), self._order, self, predecessor=before)
            for number, before in itertools.zip_longest(range(order.spec.replicas), recorded[: order.spec.replicas])
        )
        self.engine = EveryEngine([life.engine for life in self._lives], on_change=self._tell)
        self._router = Router(
            host=order.address.host,
            port=order.address.port,
            api_key=order.address.api_key or Secret(""),
            log_path=instance.router_log,
            marks=launch.marks(instance),
            on_change=self._tell,
        )
        self._started_at = time.time()
        self._was_up = (predecessor or {}).get("state") in (ServerState.READY, ServerState.RESTARTING)
        self._serving: set[asyncio.Task[None]] = set()
        self._begun = asyncio.Event()
        """Set when a server is begun that had given up."""
        self._said: dict[str, Any] = {}
        """What the supervisor itself has said of the state, which then is no longer that of the servers."""

    # -- for the supervisor --------------------------------------------------------------------------------------------

    @property
    def port(self) -> int | None:
        """Where the router listens."""
        url = self._router.status.base_url
        return None if url is None else urlsplit(url).port

    @property
    def files(self) -> Files | None:
        """The files that the newest server has read."""
        return max(self._lives, key=lambda life: life.status.epoch).files

    @property
    def status(self) -> ServerStatus:
        """What is known of the servers, as one and one by one, without their users."""
        replicas = tuple(life.status for life in self._lives)
        state = self._state(replicas)
        ready = [one for one in replicas if one.state is ServerState.READY]
        # What is said of one of them is said of the one that users wait for.
        shown = _least(replicas)
        together = ServerStatus(
            state=state,
            epoch=max(one.epoch for one in replicas),
            stage="" if ready and state is ServerState.READY else shown.stage,
            detail="" if ready and state is ServerState.READY else shown.detail,
            started_at=self._started_at,
            ready_at=min((one.ready_at for one in ready if one.ready_at is not None), default=None),
            connection=self._door(ready[0].connection) if ready and state is ServerState.READY else None,
            diagnosis=None if state is ServerState.READY else shown.diagnosis,
            log_path=shown.log_path,
            restarts=sum(one.restarts for one in replicas),
            launch=shown.launch,
            supervisor_pid=shown.supervisor_pid,
            image_pid=self.starter.image_pid,
            engine=self.engine.state,
            devices=tuple(itertools.chain.from_iterable(one.devices for one in replicas)),
            router=self._router.status,
            replicas=replicas,
        )
        return dataclasses.replace(together, **self._said)

    def _door(self, first: Connection | None) -> Connection | None:
        """Where everybody is served: by the router, or else by the first that is ready."""
        router = self._router.status
        if first is None or router.base_url is None or not router.ready:
            return first
        return dataclasses.replace(first, base_url=router.base_url)

    def _state(self, replicas: Sequence[ServerStatus]) -> ServerState:
        states = [one.state for one in replicas]
        if ServerState.FAILED in states and (not self._was_up or set(states) == {ServerState.FAILED}):
            return ServerState.FAILED
        if ServerState.READY in states and self._was_up:
            return ServerState.READY
        return ServerState.RESTARTING if self._was_up else ServerState.STARTING

    def to_record(self) -> dict[str, Any]:
        """What a successor of the supervisor must know of the servers."""
        status = self.status
        return {
            "state": status.state,
            "epoch": status.epoch,
            "server_pid": None,
            "replicas": [life.to_record() for life in self._lives],
            **self.engine.to_record(),
        }

    async def serve(self) -> None:
        """Serves with all of them. Returns once they have failed."""
        await asyncio.to_thread(_end_strays, self._instance)
        await self._router.start()
        self._serving = {asyncio.create_task(life.serve()) for life in self._lives}
        try:
            while self.status.state is not ServerState.FAILED:
                for task in await _first_done(self._serving, self._begun):
                    task.result()
                    self._serving.discard(task)
        finally:
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

    def move(self, state: ServerState, **changes: Any) -> None:
        """The supervisor begins, or ends, all of it: users are told."""
        if state is not ServerState.STARTING:
            self._said = {"connection": None, "diagnosis": self.status.diagnosis, **changes, "state": state}
        self.keep_record()
        self._owner.changed()

    def show_progress(self, progress: Progress) -> None:
        """All that are not there yet wait for the same."""
        for life in self._lives:
            life.show_progress(progress)

    def reap(self, pid: int) -> bool:
        """As `Life.reap`."""
        return any([life.reap(pid) for life in self._lives])

    def restart(self) -> None:
        """A user wants another start of every server, of those that had given up as well."""
        has_failed = self._state([life.status for life in self._lives]) is ServerState.FAILED
        for number, life in enumerate(self._lives):
            if life.status.state is not ServerState.FAILED:
                life.restart()
            elif not has_failed and not self._said:  # nobody would end what is begun while all is ended
                serving = life.revive()  # first: one that has failed is left out of calls of the engine
                self.engine.take_in(number)
                self._serving.add(asyncio.create_task(serving))
                self._begun.set()

    def use(self) -> None:
        """A user needs the servers to serve."""
        for life in self._lives:
            life.use()

    def forgive(self, epochs: Collection[int]) -> list[int]:
        """As `Life.forgive`. An epoch is one server's; what ended under one request is counted for each of them."""
        return sorted({died for life in self._lives for died in life.forgive(epochs)})

    def folder_renewed(self) -> None:
        """As `Life.folder_renewed`."""
        for life in self._lives:
            life.folder_renewed()

    async def stop(self, grace_s: float) -> None:
        """Ends all of them."""
        await asyncio.gather(self._router.close(), *(life.stop(grace_s) for life in self._lives))

    async def remove_footprint(self) -> None:
        """As `Life.remove_footprint`."""
        for life in self._lives:
            await life.remove_footprint()

    # -- for the lives -------------------------------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """As `life.Owner` says."""
        return next(self._epochs)

    def changed(self, *, droppable: bool = False) -> None:
        """As `life.Owner` says."""
        replicas = [life.status for life in self._lives]
        for number, one in enumerate(replicas):
            if one.state is ServerState.FAILED:
                self.engine.leave_out(number)
        self._router.serve({n: one.connection.base_url for n, one in enumerate(replicas) if one.connection is not None})
        if not self._was_up and self._are_up(replicas):
            self._was_up = True
            self.keep_record()
        self._owner.changed(droppable=droppable)

    def _are_up(self, replicas: Sequence[ServerStatus]) -> bool:
        """Whether all serve, and the router as well, unless there is none or it has difficulties."""
        router = self._router.status
        is_settled = router.ready or router.base_url is None or router.restarts > 0
        return is_settled and all(one.state is ServerState.READY for one in replicas)

    def keep_record(self) -> None:
        """As `life.Owner` says."""
        self._owner.keep_record()

    def _tell(self) -> None:
        """The router has changed, or what is agreed of the engines."""
        self.keep_record()
        self.changed()

    @property
    def has_folder(self) -> bool:
        """As `life.Owner` says."""
        return self._owner.has_folder


async def _first_done(serving: set[asyncio.Task[None]], begun: asyncio.Event) -> list[asyncio.Task[None]]:
    """Those of them that have ended, once one has; none where others were begun meanwhile."""
    begun.clear()
    waiting = asyncio.create_task(begun.wait())
    try:
        await asyncio.wait({*serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return [task for task in serving if task.done()]


_ORDER = (ServerState.FAILED, ServerState.STARTING, ServerState.RESTARTING, ServerState.SLEEPING, ServerState.READY)


def _least(replicas: Sequence[ServerStatus]) -> ServerStatus:
    """The one that is farthest from serving."""
    return min(replicas, key=lambda one: _ORDER.index(one.state))


def _with_agreed(replica: Mapping[str, Any], record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a record says of one replica: its engine becomes what was agreed of all; one that had failed begins anew."""
    state = replica.get("state") if replica.get("state") != ServerState.FAILED else record.get("state")
    return {**replica, "state": state, "engine": record.get("engine", replica.get("engine", {}))}


def _epoch_in(record: Mapping[str, Any]) -> int:
    epoch = record.get("epoch")
    return epoch if isinstance(epoch, int) else 0


def _end_strays(instance: Instance) -> None:
    """Ends what a supervisor that was killed may have left, of whichever replica."""
    strays = cleanup.marked_processes(instance)
    if strays:
        log.warning("ending processes left by a predecessor: %s", [stray.pid for stray in strays])
        cleanup.end_processes(strays)
