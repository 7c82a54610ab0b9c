"""Turns: a server with `share="sleep"` gives its devices to those that wait for them, and comes back when it is asked.

What must hold:

1. A server gives way only if somebody in the line for devices wants its own, and it has been up for as long as its
   start took, and a second: else two servers would do nothing but start.
2. The one that was used least recently gives way first. Each tells when that was, in the notes of its places; who says
   so and does not give way holds up nobody for longer than half a minute.
3. Nothing in flight is cut. One at rest gives way at once. One that is not, and has been asked for a while, closes its
   door: from then on our clients' new requests wait, as they do for a restart; then what is in flight is finished.
4. What would be lost stays: weights that are in no file. So does an engine that users have paused, or are changing, and
   a server whose metrics don't tell what is in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from managed_vllm.server.device_claim import DeviceClaim
from managed_vllm.server.engine import Engine

if TYPE_CHECKING:
    from managed_vllm.server.probe import Probe

log = logging.getLogger("managed_vllm.supervisor")

T = TypeVar("T")

_LOOK_S = 0.5
_UNWANTED_LOOKS = 4
"""While nobody waits, one look in so many reads the metrics, which cost a server some time."""
_DRAIN_LOOK_S = 0.1
_AT_REST = 3
"""As many looks in a row must find nothing in flight before the server is stopped: some of it may be on its way."""
_IN_USE_S = 2.0
"""One that was used within these last seconds counts as in use, unless nobody else could give way."""
_TOLD_S = 1.0
"""Seconds in which each has read who waits, and told the others when it was used."""
_PATIENCE_S, _LONG_PATIENCE_S = 3.0, 30.0
"""Seconds that one goes on that is in use, and one that others ought to give way before."""
_AWAKE_S = 1.0

_IN_FLIGHT = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} ([\d.e+]+)$", re.MULTILINE)


class GaveWay:
    """How an epoch ended: others have its devices now. That is no crash, and is not counted as one."""


class Turns:
    """Watches over one epoch of a server, and says when it gives way; see the module's docstring."""

    def __init__(self, claim: DeviceClaim, engine: Engine, probe: Probe, *, started_at: float) -> None:
        """`started_at` is when the start of the server, which is ready now, began (Unix time)."""
        self._claim = claim
        self._engine = engine
        self._probe = probe
        self._until = time.monotonic() + _AWAKE_S + max(0.0, time.time() - started_at)
        self._used_at = time.time()
        self._signs = ""
        self._tells = False
        self._wanted_at: float | None = None
        self._looks = 0

    async def until_given_way(self, show_door: Callable[[bool], None]) -> GaveWay:
        """Returns once others wait for its devices, its door is closed, and it is at rest.

        `show_door` is called with False when users are to wait from now on, with True if they need not after all.
        """
        await self._is_at_rest()
        await asyncio.to_thread(self._claim.tell, used_at=self._used_at, in_use=True)
        while True:
            await asyncio.sleep(_LOOK_S)
            if not await self._is_to_give_way():
                continue
            log.info("others wait for our devices: we give way")
            self._claim.asked_for.clear()  # from now on it is one who waits for us
            show_door(False)
            if await self._drained():
                return GaveWay()
            self._wanted_at = None
            show_door(True)

    async def _is_to_give_way(self) -> bool:
        self._looks += 1
        wanted = await asyncio.to_thread(self._claim.is_wanted)
        if not wanted and self._looks % _UNWANTED_LOOKS:
            self._wanted_at = None
            return False
        at_rest = await self._is_at_rest()
        in_use = time.time() - self._used_at < _IN_USE_S
        await asyncio.to_thread(self._claim.tell, used_at=self._used_at, in_use=in_use)
        if not (wanted and self._tells and self._may) or time.monotonic() < self._until:
            self._wanted_at = None
            return False
        self._wanted_at = self._wanted_at or time.monotonic()
        waited_s = time.monotonic() - self._wanted_at
        with contextlib.suppress(OSError):  # the directory has been removed meanwhile
            if waited_s < _TOLD_S or not await asyncio.to_thread(self._claim.is_first_to_give_way):
                return waited_s > _LONG_PATIENCE_S
        return at_rest or waited_s > _PATIENCE_S

    @property
    def _may(self) -> bool:
        """Whether nothing is lost with the server, and nobody is just changing its engine."""
        return not self._engine.may_stand_still and self._engine.loss is None

    async def _is_at_rest(self) -> bool:
        """Whether nothing is in flight; never of a server that does not tell."""
        signs = await self._probe.signs_of_life()
        counts = _IN_FLIGHT.findall(signs or "")
        self._tells = bool(counts)
        rests = self._tells and not any(float(count) for count in counts)
        if signs is not None and (not rests or signs != self._signs):
            self._used_at = time.time()
            self._signs = signs
        return rests

    async def _drained(self) -> bool:
        """Waits until nothing is in flight; False if the server must not give way after all."""
        clean = 0
        while clean < _AT_REST:
            if not self._may:
                return False
            clean = clean + 1 if await self._is_at_rest() else 0
            await asyncio.sleep(_DRAIN_LOOK_S)
        return True


async def first(*watching: Coroutine[Any, Any, T]) -> T:
    """What the first of them to end returns; the others are cancelled."""
    tasks = [asyncio.create_task(one) for one in watching]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
