"""How many requests of one client are in flight at once: as many as the server takes.

A server that gets too many says so with HTTP 429 or 503. The limit then drops to half of what was in flight, and the
refused requests wait until there is room again. The same happens where this process can't open more connections. While
the limit is reached and nothing is refused, it grows: doubled in each round until the first refusal, then by one. That
is TCP's rule of additive increase and multiplicative decrease (RFC 5681). vLLM queues whatever it gets and refuses
nothing, so for a server of ours the limit soon is the greatest allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from managed_vllm.policies import MAX_IN_FLIGHT

INITIAL_LIMIT = 1024
"""Requests in flight before anything is known: as many as vLLM 0.32 runs at once, by default, on the largest GPUs."""


class ConcurrencyLimiter:
    """Admits the requests of one event loop, first come, first served.

    Attributes:
        limit: how many may be in flight now.
        in_flight: how many are.
        answered: how many requests the server has taken so far.
    """

    def __init__(self, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._max = max_in_flight
        self._exact_limit = float(min(INITIAL_LIMIT, max_in_flight))
        self._threshold = float(max_in_flight)
        self._refusals_to_ignore = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self.in_flight = 0
        self.answered = 0

    @property
    def limit(self) -> int:
        return int(self._exact_limit)

    async def acquire(self, size: int = 1) -> None:
        """Waits until the request may be sent. It counts for `size` of them, here and in the other methods."""
        if self._has_room(size) and not self._waiting:
            self.in_flight += size
            return
        await self._wait(self._waiting.append, size)

    def release(self, size: int = 1, *, answered: bool) -> None:
        """The request is no longer in flight. `answered`: the server has taken it."""
        self.answered += size * answered
        if answered and self._exact_limit < self._max and (self._waiting or self.in_flight >= self.limit):
            slow = self._exact_limit >= self._threshold
            self._exact_limit = min(self._max, self._exact_limit + size * (1 / self._exact_limit if slow else 1))
        self._refusals_to_ignore = max(0, self._refusals_to_ignore - size)
        self._leave(size)

    def refused(self, size: int = 1) -> None:
        """The server refused a request that is in flight. Counts once for all that were sent together."""
        if self._refusals_to_ignore > 0:
            self._refusals_to_ignore = max(0, self._refusals_to_ignore - size)
            return
        self._exact_limit = self._threshold = max(1.0, min(self._exact_limit, self.in_flight) / 2)
        self._refusals_to_ignore = self.in_flight - size

    async def wait_again(self) -> None:
        """Lets a refused request wait if too many are in flight: before those that were never sent.

        It is in flight again afterwards, also where the waiting is cancelled: `release` is due in any case.
        """
        if self.in_flight <= self.limit:
            return
        self.in_flight -= 1
        try:
            await self._wait(self._waiting.appendleft, 1)
        except BaseException:
            self.in_flight += 1
            raise

    def reset(self) -> None:
        """Another server, or a new epoch: what the last one refused says nothing about it."""
        self._exact_limit = max(self._exact_limit, float(min(INITIAL_LIMIT, self._max)))
        self._threshold = float(self._max)
        self._refusals_to_ignore = 0
        self._admit()

    def fail_waiting(self, error: Callable[[], Exception]) -> None:
        """The server takes nothing at all: raises in all requests that wait, in each an error of its own."""
        for place, _ in self._waiting:
            if not place.done():
                place.set_exception(error())
        self._waiting.clear()

    def _has_room(self, size: int) -> bool:
        """One that is larger than the limit is admitted alone."""
        return self.in_flight + size <= self.limit or not self.in_flight

    async def _wait(self, enqueue: Callable[[tuple[asyncio.Future[None], int]], None], size: int) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        enqueue((place, size))
        try:
            await place
        except BaseException:
            if place.cancelled():
                with contextlib.suppress(ValueError):  # `_admit` has dropped it already
                    self._waiting.remove((place, size))
                self._admit()
            elif place.exception() is None:
                self._leave(size)  # admitted at the moment of the cancellation
            raise

    def _leave(self, size: int) -> None:
        self.in_flight -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][1]):
            place, size = self._waiting.popleft()
            if not place.done():
                self.in_flight += size
                place.set_result(None)
