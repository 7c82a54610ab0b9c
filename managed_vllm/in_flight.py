"""How many requests of one client are in flight at once: as many as the server takes in.

A server that is asked too much says so, by HTTP 429 or 503 or by refusing connections; then the bound is halved. While
it is used up and nothing of that kind comes, it grows: doubled in each round until the first refusal, then by one. That
is the additive-increase, multiplicative-decrease rule of TCP (RFC 5681). vLLM queues whatever it is sent and refuses
nothing, so for a server of ours the bound soon is the greatest allowed.
"""

from __future__ import annotations

import asyncio
from collections import deque

FIRST = 512
"""In flight before anything is known: as many as vLLM 0.32 runs at once, by default, on most GPUs, and a queue."""
MOST = 4096
LEAST = 1


class InFlight:
    """The bound, for one event loop. `limit` is what it is now, `now` how many there are."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._room = float(min(FIRST, most))
        self._threshold = float(most)
        self._round = 0
        self.now = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def limit(self) -> int:
        return int(self._room)

    async def enter(self) -> None:
        """Waits for a place; first come, first served."""
        if self.now < self.limit and not self._waiting:
            self.now += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._leave()  # it was given in the same moment
            else:
                self._waiting.remove(place)
            raise

    def leave(self, *, answered: bool) -> None:
        """Gives the place back. `answered`: the server took the request in."""
        if answered and self._room < self._most and self.now >= self.limit:
            self._room = min(self._most, self._room + (1 if self._room < self._threshold else 1 / self._room))
        self._leave()

    def refused(self) -> None:
        """The server does not take it in. Counts once for all that were sent together."""
        if self._round > 0:
            self._round -= 1
            return
        self._room = self._threshold = max(float(LEAST), self._room / 2)
        self._round = self.now - 1

    def _leave(self) -> None:
        self.now -= 1
        while self._waiting and self.now < self.limit:
            place = self._waiting.popleft()
            if not place.done():
                self.now += 1
                place.set_result(None)
