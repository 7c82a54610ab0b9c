"""The devices of one supervisor's server: taken before the first start, kept over all restarts, given back at the end.

With `devices="auto"`. Else there is nothing to take: a single server sees all that there are, and each of several
replicas has its share of them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from managed_vllm.config import SupervisorOrder
from managed_vllm.errors import StateDirectoryError
from managed_vllm.instance.directory import Instance
from managed_vllm.server import devices, diagnosis
from managed_vllm.server.devices import Pool, TakenDevices
from managed_vllm.server.places import (
    FOLDER_VARIABLE,
    USUAL_FOLDER,
    Occupant,
    PlacesFolder,
    Ticket,
    Waiting,
    give_back,
)
from managed_vllm.status import Diagnosis, Progress, Stage

log = logging.getLogger("managed_vllm.supervisor")

_LOOK_S = 0.1
"""Seconds between two tries of the first in the line. Those behind it look less often."""
_TELL_S = 1.0
"""Seconds between two looks at who holds what."""
_NAMED = 4
"""As many holders are named in one line of progress."""


class DeviceClaim:
    """See the module's docstring. `taken` is what the server has; empty before, and without `devices="auto"`."""

    def __init__(self, order: SupervisorOrder, instance: Instance, record: Mapping[str, Any] | None) -> None:
        """`record` is that of the supervisor before us, if it was killed: its places are the first that we try."""
        self._order = order
        self._instance = instance
        self._preferred = _places_in(record)
        self._places: dict[str, int] = {}
        self._folder: PlacesFolder | None = None
        self._holder = Occupant(os.getuid(), instance.label, os.getpid(), time.time())
        self._is_free: Callable[[str], bool] = devices.is_free
        self.taken = TakenDevices()
        self.asked_for = asyncio.Event()
        """Set when a user asks for a server that has given way."""

    def to_record(self) -> dict[str, Any]:
        """What a successor takes again if it can."""
        return {"places": sorted(self._places)} if self._places else {}

    async def take(self, on_progress: Callable[[Progress], None]) -> Diagnosis | None:
        """Takes the places, and waits in the line for them if need be. Returns why there will be none."""
        if not self._order.spec.auto_devices:
            replica = self._instance.replica
            return None if replica is None else await asyncio.to_thread(self._share, replica)
        pool = await asyncio.to_thread(devices.pool, self._order.spec)
        self._is_free = devices.is_free if pool.kind == "GPU" else lambda _: True
        if len(pool.devices) < pool.wanted:
            return diagnosis.too_few_devices(pool.number(pool.wanted), pool.labelled([d.place for d in pool.devices]))
        try:
            self._folder = await asyncio.to_thread(PlacesFolder, self._path())
            return await self._wait_in_line(self._folder, pool, on_progress)
        except StateDirectoryError as error:
            return diagnosis.no_places(error.message)

    def _share(self, replica: int) -> Diagnosis | None:
        """A replica's part of what they all see. Cores that the user has bound stay as they are."""
        spec = self._order.spec
        pool = devices.pool(spec)
        wanted = pool.wanted * spec.replicas
        if pool.kind == "core" and (len(pool.devices) < wanted or devices.binds_cores(spec)):
            return None
        if len(pool.devices) < wanted:
            return diagnosis.too_few_devices(pool.number(wanted), pool.labelled([d.place for d in pool.devices]))
        places = [device.place for device in pool.devices[replica * pool.wanted : (replica + 1) * pool.wanted]]
        self.taken = TakenDevices(pool.labelled(places), pool.variables(places))
        return None

    def is_wanted(self) -> bool:
        """Whether one in the line wants places of ours, and lacks some.

        Nobody, as far as can be seen, where the directory has been removed under us: that ends no server.
        """
        try:
            return self._lacks() is not None
        except OSError as error:
            log.debug("no line: %s", error)
            return False

    def tell(self, *, used_at: float, in_use: bool) -> None:
        """Tells the others when our server was last used, and whether it still is."""
        self._holder = dataclasses.replace(self._holder, used_at=used_at, in_use=in_use)
        for place in self._places:
            if self._folder is not None:
                self._folder.note(place, self._holder)

    def is_first_to_give_way(self) -> bool:
        """Whether those whose turn it is before ours would not be enough for the one that waits, if they gave way."""
        lacking, folder = self._lacks(), self._folder
        if folder is None or lacking is None:
            return False
        missing, held = lacking
        holders = [folder.holder(place) for place in held]
        sharing = [one for one in holders if one is not None and one.used_at is not None]
        return sum(_rank(one) < _rank(self._holder) for one in sharing) < missing

    def _lacks(self) -> tuple[int, list[str]] | None:
        """How many places the first in the line lacks that wants some of ours, and which others of them are held."""
        folder, ours = self._folder, set(self._places)
        ticket = None if folder is None else next((one for one in folder.line() if one.places & ours), None)
        if folder is None or ticket is None:
            return None
        others = sorted(ticket.places - ours)
        held = [place for place in others if folder.is_held(place)]
        free = [place for place in others if place not in held and self._is_free(place)]
        return None if len(free) >= ticket.wanted else (ticket.wanted - len(free), held)

    def give_back(self) -> None:
        """After the end of the server: others may have the devices. It may take some again."""
        if self._folder is not None:
            for place in self._places:
                self._folder.forget(place)
            self._preferred = frozenset(self._places)
            give_back(self._places)
            self.taken = TakenDevices()
            self._folder.close()
            self._folder = None

    def _path(self) -> Path:
        """The first starter's word, as for all that the identity does not cover."""
        return Path(self._order.environment.reveal().get(FOLDER_VARIABLE) or USUAL_FOLDER)

    async def _wait_in_line(
        self, folder: PlacesFolder, pool: Pool, on_progress: Callable[[Progress], None]
    ) -> Diagnosis | None:
        began, told_at = time.monotonic(), -_TELL_S
        occupant = Occupant(os.getuid(), self._instance.label, os.getpid(), time.time())
        places = sorted((device.place for device in pool.devices), key=lambda place: place not in self._preferred)
        waiting = await asyncio.to_thread(folder.join, places, pool.wanted, occupant)
        view = _View(folder, waiting, pool)
        try:
            while not await asyncio.to_thread(self._try, folder, waiting, pool, places):
                now = time.monotonic()
                if now - began >= self._order.policy.wait_for_devices_s:
                    seen = await asyncio.to_thread(view.look)
                    return diagnosis.devices_busy(*seen, wanted=pool.number(pool.wanted), waited_s=now - began)
                if now - told_at >= _TELL_S:
                    told_at = now
                    missing, holders = await asyncio.to_thread(view.look)
                    on_progress(Progress(Stage.WAITING, _detail(missing, pool, holders)))
                await asyncio.sleep(view.pause_s)
        finally:
            waiting.leave()
        log.info("took %s after %.1f s", ", ".join(self.taken.labels), time.monotonic() - began)
        return None

    def _try(self, folder: PlacesFolder, waiting: Waiting, pool: Pool, places: Sequence[str]) -> bool:
        self._places = waiting.take(places, pool.wanted, self._is_free)
        if not self._places:
            return False
        self.taken = TakenDevices(
            pool.labelled([*self._places]), pool.variables([*self._places]), tuple(self._places.values())
        )
        self._holder = Occupant(os.getuid(), self._instance.label, os.getpid(), time.time())
        for place in self._places:
            folder.note(place, self._holder)
        return True


class _View:
    """What one that waits is told: how many devices it lacks, and who has them or comes first."""

    def __init__(self, folder: PlacesFolder, waiting: Waiting, pool: Pool) -> None:
        self._folder = folder
        self._waiting = waiting
        self._pool = pool
        self.pause_s = _LOOK_S

    def look(self) -> tuple[int, tuple[str, ...]]:
        """How many are missing, and a text for each of those that have them, or came before."""
        places = [device.place for device in self._pool.devices]
        before = self._waiting.before(places)
        held = {place: self._folder.holder(place) for place in places if self._folder.is_held(place)}
        in_use = [place for place in places if place not in held and not self._is_free(place)]
        # Asking NVML takes a while, on every core of a machine with many GPUs.
        self.pause_s = _TELL_S if in_use else _LOOK_S * (1 + min(len(before), 9))
        missing = self._pool.wanted - (len(places) - len(held) - len(in_use))
        return max(0, missing), (*self._holders(held), *self._strangers(in_use), *map(_before, before))

    def _is_free(self, place: str) -> bool:
        return self._pool.kind != "GPU" or devices.is_free(place)

    def _holders(self, held: Mapping[str, Occupant | None]) -> list[str]:
        found: dict[Occupant | None, list[str]] = {}
        for place, occupant in held.items():
            found.setdefault(occupant, []).append(place)
        return [
            f"{', '.join(self._pool.labelled(places))} held by {who or 'somebody who does not say who'}"
            for who, places in found.items()
        ]

    def _strangers(self, places: Collection[str]) -> list[str]:
        return [f"{label} in use by other programs" for label in self._pool.labelled(sorted(places))]


def _rank(holder: Occupant) -> tuple[bool, float, str, int]:
    """In the order in which they give way: the least recently used first; of those in use the one that is so longest.

    When one was used is told with some delay: among those in use each would take the other for the one used before.
    """
    when = holder.since if holder.in_use else holder.used_at or 0.0
    return holder.in_use, when, holder.instance, holder.pid


def _before(ticket: Ticket) -> str:
    return f"before us {ticket.occupant}, for {ticket.wanted}"


def _detail(missing: int, pool: Pool, holders: Sequence[str]) -> str:
    what = f"for {f'{missing} of ' if 0 < missing < pool.wanted else ''}{pool.number(pool.wanted)}"
    more = [f"and {len(holders) - _NAMED} more"] if len(holders) > _NAMED else []
    return "; ".join([what, *holders[:_NAMED], *more])


def _places_in(record: Mapping[str, Any] | None) -> frozenset[str]:
    places = (record or {}).get("places")
    return frozenset(map(str, places)) if isinstance(places, list) else frozenset()
