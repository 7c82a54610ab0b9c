"""The limiter: halved by refusals, raised by answers; first come, first served; no place is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import HANG_S

from managed_vllm.request.concurrency import INITIAL_LIMIT, ConcurrencyLimiter


def run(body: Callable[[], Any]) -> None:
    async def main() -> None:
        await body()

    asyncio.run(main())


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_refusals_of_one_round_halve_the_limit_once() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(16)
        for _ in range(16):
            await limiter.acquire()
        for _ in range(16):
            limiter.refused()
        assert limiter.limit == 8
        limiter.refused()
        assert limiter.limit == 4

    run(body)


def test_answers_end_a_round_as_refusals_do() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(16)
        for _ in range(16):
            await limiter.acquire()
        limiter.refused()
        assert limiter.limit == 8
        for _ in range(15):
            limiter.release(answered=False)
        for _ in range(7):
            await limiter.acquire()
        limiter.refused()
        assert limiter.limit == 4

    run(body)


def test_the_limit_never_falls_below_one() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(3)
        for _ in range(100):
            limiter.refused()
        assert limiter.limit == 1
        await limiter.acquire()
        waiting = asyncio.create_task(limiter.acquire())
        await turn()
        assert not waiting.done()
        limiter.release(answered=True)
        await waiting

    run(body)


def test_the_limit_doubles_in_each_round_until_the_first_refusal_and_then_grows_by_one() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(4096)
        assert limiter.limit == INITIAL_LIMIT

        async def round_() -> None:
            count = limiter.limit
            for _ in range(count):
                await limiter.acquire()
            waiting = [asyncio.create_task(limiter.acquire()) for _ in range(2 * count)]
            await turn()
            for _ in range(count):
                limiter.release(answered=True)
            await turn()
            while limiter.in_flight:
                limiter.release(answered=False)
                await asyncio.sleep(0)
            await asyncio.gather(*waiting)

        await round_()
        assert limiter.limit == 2 * INITIAL_LIMIT
        await round_()
        assert limiter.limit == 4 * INITIAL_LIMIT
        for _ in range(4 * INITIAL_LIMIT):
            await limiter.acquire()
        for _ in range(4 * INITIAL_LIMIT):
            limiter.refused()
        for _ in range(4 * INITIAL_LIMIT):
            limiter.release(answered=False)
        assert limiter.limit == 2 * INITIAL_LIMIT
        await round_()
        assert 2 * INITIAL_LIMIT <= limiter.limit <= 2 * INITIAL_LIMIT + 2

    run(body)


def test_the_limit_does_not_grow_while_it_is_not_used_up() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(4096)
        for _ in range(1000):
            await limiter.acquire()
            limiter.release(answered=True)
        assert limiter.limit == INITIAL_LIMIT

    run(body)


def test_who_comes_first_is_served_first() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(2)
        order: list[int] = []

        async def one(number: int) -> None:
            await limiter.acquire()
            order.append(number)

        await limiter.acquire()
        await limiter.acquire()
        tasks = [asyncio.create_task(one(number)) for number in range(10)]
        await turn()
        for _ in range(10):
            limiter.release(answered=True)
            late = asyncio.create_task(one(99))  # does not push in
            await turn()
            late.cancel()
        await asyncio.gather(*tasks)
        assert order == list(range(10))

    run(body)


def test_who_is_refused_waits_before_those_who_were_never_sent() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(2)
        await limiter.acquire()
        await limiter.acquire()
        order: list[str] = []

        async def new() -> None:
            await limiter.acquire()
            order.append("new")

        async def refused() -> None:
            limiter.refused()
            await limiter.wait_again()
            order.append("refused")

        tasks = [asyncio.create_task(new()), asyncio.create_task(refused())]
        await turn()
        assert (limiter.in_flight, limiter.limit, order) == (1, 1, [])
        limiter.release(answered=False)
        await turn()
        assert order == ["refused"]
        limiter.release(answered=False)
        await asyncio.gather(*tasks)
        assert limiter.in_flight == 1

    run(body)


def test_cancelled_while_waiting_loses_no_place() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(1)
        await limiter.acquire()
        first, second = (asyncio.create_task(limiter.acquire()) for _ in range(2))
        await turn()
        first.cancel()
        limiter.release(answered=True)  # before the cancelled one has noticed
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1] is None
        assert limiter.in_flight == 1

        third, fourth = (asyncio.create_task(limiter.acquire()) for _ in range(2))
        await turn()
        limiter.release(answered=True)
        third.cancel()  # it has the place already
        results = await asyncio.gather(third, fourth, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1] is None
        assert limiter.in_flight == 1

    run(body)


@settings(max_examples=examples(100), deadline=None)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from("ecolrgt"), st.integers(0, 30)), max_size=80),
)
def test_whatever_happens_places_are_counted_right_and_nobody_waits_for_ever(most: int, acts: list[Any]) -> None:
    """e: acquire, c: cancel, l: release answered, o: release, r: refused, g: refused and wait again, t: turns."""

    async def body() -> None:
        limiter = ConcurrencyLimiter(most)
        ends: list[asyncio.Event] = []
        answered: list[bool] = []
        tasks: list[asyncio.Task[None]] = []
        holding: set[int] = set()
        giving: dict[int, asyncio.Event] = {}

        async def one(number: int) -> None:
            await limiter.acquire()
            try:
                holding.add(number)
                while not ends[number].is_set():
                    waits = [asyncio.create_task(event.wait()) for event in (ends[number], giving[number])]
                    try:
                        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for wait in waits:
                            wait.cancel()
                    if giving[number].is_set():
                        giving[number].clear()
                        limiter.refused()
                        holding.discard(number)
                        await limiter.wait_again()
                        holding.add(number)
            finally:
                holding.discard(number)
                limiter.release(answered=answered[number])

        for act, which in acts:
            if act == "e":
                ends.append(asyncio.Event())
                answered.append(True)
                giving[len(tasks)] = asyncio.Event()
                tasks.append(asyncio.create_task(one(len(tasks))))
            elif act == "r":
                limiter.refused()
            elif act == "t":
                await turn()
            elif tasks:
                number = which % len(tasks)
                if act == "c":
                    tasks[number].cancel()
                elif act == "g":
                    giving[number].set()
                else:
                    answered[number] = act == "l"
                    ends[number].set()
            assert 1 <= limiter.limit <= most
        await turn()
        await turn()
        assert len(holding) == limiter.in_flight
        for end in ends:
            end.set()
        async with asyncio.timeout(HANG_S):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert limiter.in_flight == 0

    run(body)


def test_requests_that_wait_fail_each_with_an_error_of_its_own() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(1)
        await limiter.acquire()
        waiting = [asyncio.create_task(limiter.acquire()) for _ in range(3)]
        await turn()
        limiter.fail_waiting(lambda: ValueError("nothing is taken"))
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [ValueError] * 3
        assert len({id(error) for error in errors}) == 3
        assert limiter.in_flight == 1

    run(body)


def test_another_epoch_starts_with_the_initial_limit_and_admits_at_once() -> None:
    async def body() -> None:
        limiter = ConcurrencyLimiter(4)
        for _ in range(4):
            await limiter.acquire()
        limiter.refused()
        waiting = asyncio.create_task(limiter.acquire())
        limiter.release(answered=False)
        await turn()
        assert (limiter.limit, waiting.done()) == (2, False)
        limiter.reset()
        await waiting
        assert (limiter.limit, limiter.in_flight) == (4, 4)

    run(body)
