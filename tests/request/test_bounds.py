"""A bound: ends what runs within it at its deadline, or when the client is closed; each with an error of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from processes import HANG_S

from managed_vllm.errors import RequestTimeoutError, ServerDiedError
from managed_vllm.request.bounds import Bound


def run(body: Callable[[set[Bound]], Awaitable[None]]) -> None:
    async def main() -> None:
        bounds: set[Bound] = set()
        async with asyncio.timeout(HANG_S):
            await body(bounds)
        assert not bounds

    asyncio.run(main())


def test_at_the_deadline_it_ends_with_its_reason_at_that_time() -> None:
    async def body(bounds: set[Bound]) -> None:
        async def answer() -> None:
            async with Bound(bounds, time.monotonic() + 0.01, "not sent") as bound:
                bound.reason = "no answer"
                await asyncio.Event().wait()

        with pytest.raises(RequestTimeoutError, match="no answer"):
            await answer()

    run(body)


def test_closing_ends_it_whether_it_has_a_deadline_or_not() -> None:
    async def body(bounds: set[Bound]) -> None:
        async def answer(deadline: float | None) -> None:
            async with Bound(bounds, deadline, "late") as bound:
                assert bounds == {bound}
                asyncio.get_running_loop().call_soon(bound.close)
                await asyncio.Event().wait()

        for deadline in (None, time.monotonic() + HANG_S):
            with pytest.raises(ServerDiedError, match="the client was closed under this request"):
                await answer(deadline)

    run(body)


def test_a_deadline_only_moves_to_sooner() -> None:
    async def body(bounds: set[Bound]) -> None:
        async def answer() -> None:
            async with Bound(bounds, None, "late") as bound:
                assert bound.left_s is None
                bound.tighten(time.monotonic() + 0.01)
                bound.tighten(time.monotonic() + HANG_S)
                await asyncio.Event().wait()

        with pytest.raises(RequestTimeoutError):
            await answer()

    run(body)


def test_check_raises_at_once_when_it_is_over() -> None:
    async def body(bounds: set[Bound]) -> None:
        async with Bound(bounds, time.monotonic() + HANG_S, "late") as bound:
            bound.check()
            bound.close()
            with pytest.raises(ServerDiedError):
                bound.check()
        async with Bound(bounds, time.monotonic() - 1, "late") as bound:
            with pytest.raises(RequestTimeoutError, match="late"):
                bound.check()

    run(body)


def test_the_callers_own_cancelling_is_left_alone() -> None:
    async def body(bounds: set[Bound]) -> None:
        async def waiting() -> None:
            async with Bound(bounds, time.monotonic() + HANG_S, "late"):
                await asyncio.Event().wait()

        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body)


def test_what_raises_within_it_passes() -> None:
    async def body(bounds: set[Bound]) -> None:
        with pytest.raises(KeyError):
            async with Bound(bounds, time.monotonic() + HANG_S, "late"):
                raise KeyError

    run(body)
