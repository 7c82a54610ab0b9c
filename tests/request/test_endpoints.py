"""Where a request goes: a server that is ready is used at once; those who wait for one wait together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

import pytest
from processes import HANG_S

from managed_vllm.errors import RequestTimeoutError, ServerStoppedError
from managed_vllm.masking import Secret
from managed_vllm.request.bounds import Bound
from managed_vllm.request.endpoints import Endpoint, Endpoints, Lookups
from managed_vllm.status import Connection

HERE = Connection(base_url="http://localhost:1/v1", api_key=Secret(""), model="m")


class Finder:
    """`find`, which waits until `found` is set, and notes what it was asked."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch
        self.found = threading.Event()
        self.begun = threading.Semaphore(0)
        self.asked: list[tuple[int | None, float | None, float]] = []

    def __call__(self, lost_epoch: int | None, timeout_s: float | None, pause_s: float) -> Endpoint:
        self.asked.append((lost_epoch, timeout_s, pause_s))
        self.begun.release()
        if not self.found.wait(HANG_S if timeout_s is None else timeout_s):
            raise TimeoutError
        return HERE, self.epoch


def nowhere() -> None:
    return None


def never(lost_epoch: int | None, timeout_s: float | None, pause_s: float) -> NoReturn:
    raise AssertionError("it was asked for")


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(HANG_S):
            await body()

    asyncio.run(main())


async def get(
    endpoints: Endpoints, lookups: Lookups, lost: int | None = None, *, within: float | None = None
) -> Endpoint:
    deadline = None if within is None else time.monotonic() + within
    async with Bound(set(), deadline, "not ready") as bound:
        return await endpoints.get(lookups, lost, 0.0, bound)


def test_a_server_that_is_ready_is_used_without_a_thread() -> None:
    async def body() -> None:
        assert await get(Endpoints(never, lambda: (HERE, 3)), {}) == (HERE, 3)

    run(body)


def test_a_ready_server_is_not_believed_in_after_a_loss() -> None:
    async def body() -> None:
        find = Finder(epoch=4)
        find.found.set()
        assert await get(Endpoints(find, lambda: (HERE, 3)), {}, lost=3) == (HERE, 4)
        assert find.asked == [(3, None, 0.0)]

    run(body)


def test_requests_that_wait_for_the_same_ask_once() -> None:
    async def body() -> None:
        find = Finder()
        lookups: Lookups = {}
        endpoints = Endpoints(find, nowhere)
        waiting = [asyncio.create_task(get(endpoints, lookups)) for _ in range(100)]
        await asyncio.to_thread(find.begun.acquire)
        find.found.set()
        assert await asyncio.gather(*waiting) == [(HERE, 1)] * 100
        assert len(find.asked) == 1
        assert lookups == {}

    run(body)


def test_a_request_that_gives_up_leaves_the_look_up_to_the_others() -> None:
    async def body() -> None:
        find = Finder()
        lookups: Lookups = {}
        endpoints = Endpoints(find, nowhere)
        patient = asyncio.create_task(get(endpoints, lookups))
        await asyncio.to_thread(find.begun.acquire)
        with pytest.raises(RequestTimeoutError, match="not ready"):
            await get(endpoints, lookups, within=0.01)
        find.found.set()
        assert await patient == (HERE, 1)
        assert len(find.asked) == 1

    run(body)


def test_the_time_out_of_the_one_who_asked_is_not_that_of_the_others() -> None:
    async def body() -> None:
        find = Finder()
        lookups: Lookups = {}
        endpoints = Endpoints(find, nowhere)
        hasty = asyncio.create_task(get(endpoints, lookups, within=0.05))
        patient = asyncio.create_task(get(endpoints, lookups))
        with pytest.raises(RequestTimeoutError):
            await hasty
        for _ in range(2):
            await asyncio.to_thread(find.begun.acquire)
        find.found.set()
        assert await patient == (HERE, 1)
        assert [timeout_s is None for _, timeout_s, _ in find.asked] == [False, True]

    run(body)


def test_each_of_those_who_wait_gets_an_error_of_its_own() -> None:
    def stopped(lost_epoch: int | None, timeout_s: float | None, pause_s: float) -> NoReturn:
        raise ServerStoppedError("the server was stopped", instance="demo-1")

    async def body() -> None:
        endpoints = Endpoints(stopped, nowhere)
        lookups: Lookups = {}
        errors = await asyncio.gather(*(get(endpoints, lookups) for _ in range(3)), return_exceptions=True)
        assert [(type(error), error.instance) for error in errors] == [(ServerStoppedError, "demo-1")] * 3  # type: ignore[union-attr]
        assert len(set(map(id, errors))) == 3

    run(body)
