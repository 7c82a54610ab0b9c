"""How many requests of one client are in flight at once: as many as the server takes in.

A server that is asked too much says so, by HTTP 429 or 503; then the bound is half of what was in flight, and who was
refused waits until there is room again. It is the same where this process may open no more connections. While the bound
is used up and nothing of that kind comes, it grows: doubled in each round until the first refusal, then by one. That is
the additive-increase, multiplicative-decrease rule of TCP (RFC 5681). vLLM queues whatever it is sent and refuses
nothing, so for a server of ours the bound soon is the greatest allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

FIRST = 1024
"""In flight before anything is known: as many as vLLM 0.32 runs at once, by default, on the largest GPUs."""
MOST = 4096
LEAST = 1


class InFlight:
    """The bound, for one event loop. `limit` is what it is now, `now` how many there are, `answered` how many were."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._room = float(min(FIRST, most))
        self._threshold = float(most)
        self._round = 0
        self.now = 0
        self.answered = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        return int(self._room)

    async def enter(self) -> None:
        """Waits for a place; first come, first served."""
        if self.now < self.limit and not self._waiting:
            self.now += 1
            return
        await self._wait(self._waiting.append)

    def leave(self, *, answered: bool) -> None:
        """Gives the place back. `answered`: the server took the request in."""
        self.answered += answered
        if answered and self._room < self._most and self.now >= self.limit:
            self._room = min(self._most, self._room + (1 if self._room < self._threshold else 1 / self._room))
        self._round = max(0, self._round - 1)
        self._leave()

    def refused(self) -> None:
        """The server does not take it in. Counts once for all that were sent together."""
        if self._round > 0:
            self._round -= 1
            return
        self._room = self._threshold = max(float(LEAST), min(self._room, self.now) / 2)
        self._round = self.now - 1

    async def give_way(self) -> None:
        """For one that was refused, and has its place: if there are too many, it waits for another, before new ones.

        Also if it is cancelled meanwhile, a place is counted as its own afterwards: it has to `leave`.
        """
        if self.now <= self.limit:
            return
        self.now -= 1
        try:
            await self._wait(self._waiting.appendleft)
        except BaseException:
            self.now += 1
            raise

    def renew(self) -> None:
        """Another server, or another life of it: what the one before has refused says nothing."""
        self._room, self._threshold, self._round = max(self._room, float(min(FIRST, self._most))), float(self._most), 0
        self._admit()

    def give_up(self, error: Callable[[], Exception]) -> None:
        """The server takes in nothing at all: raises for all who wait, each an error of its own."""
        for place in self._waiting:
            if not place.done():
                place.set_exception(error())
        self._waiting.clear()

    async def _wait(self, queue: Callable[[asyncio.Future[None]], None]) -> None:
        place = asyncio.get_running_loop().create_future()
        queue(place)
        try:
            await place
        except BaseException:
            if place.cancelled():
                with contextlib.suppress(ValueError):  # whoever left meanwhile has thrown it out
                    self._waiting.remove(place)
            elif place.exception() is None:
                self._leave()  # it was given in the same moment
            raise

    def _leave(self) -> None:
        self.now -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self.now < self.limit:
            place = self._waiting.popleft()
            if not place.done():
                self.now += 1
                place.set_result(None)
