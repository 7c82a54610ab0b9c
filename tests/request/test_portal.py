"""The event loop of synchronous callers: one for all threads; interrupted, nested, left early, in a forked child."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from processes import HANG_S, eventually

from managed_vllm.request import portal


async def this_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def test_all_threads_share_one_loop() -> None:
    found: list[asyncio.AbstractEventLoop] = []
    threads = [threading.Thread(target=lambda: found.append(portal.run(this_loop))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert set(found) == {portal.loop()}
    assert len(found) == 16


def test_it_works_within_another_running_loop() -> None:
    async def main() -> None:
        assert portal.run(this_loop) is not asyncio.get_running_loop()

    asyncio.run(main())


def test_a_call_from_within_the_loop_itself_is_an_error_not_a_deadlock() -> None:
    async def nested() -> None:
        portal.run(this_loop)

    with pytest.raises(RuntimeError, match="await the asynchronous one"):
        portal.run(nested)


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), KeyboardInterrupt()])
def test_what_the_coroutine_raises_comes_back_and_the_loop_goes_on(error: BaseException) -> None:
    async def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        portal.run(fails)
    assert portal.run(this_loop) is portal.loop()


def test_an_interrupted_caller_cancels_what_it_waits_for() -> None:
    waits, ended = threading.Event(), threading.Event()

    async def forever() -> None:
        try:
            waits.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    def interrupt() -> None:
        waits.wait(HANG_S)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        portal.run(forever)
    assert ended.wait(HANG_S)


class Numbers:
    """An asynchronous generator that notes when it was closed."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    async def __call__(self) -> AsyncIterator[int | None]:
        try:
            yield None
            for number in range(5):
                await asyncio.sleep(0)
                yield number
        finally:
            self.closed.set()


def test_items_come_one_by_one_none_included() -> None:
    numbers = Numbers()
    assert list(portal.iterate(numbers())) == [None, 0, 1, 2, 3, 4]
    assert numbers.closed.is_set()


@pytest.mark.parametrize("how", ["closed", "collected", "collected in the loop"])
def test_an_iterator_that_is_left_early_closes_its_generator(how: str) -> None:
    numbers = Numbers()
    items: list[Iterator[int | None]] = [portal.iterate(numbers())]
    assert next(items[0]) is None
    assert not numbers.closed.is_set()

    async def collect() -> None:
        items.clear()
        gc.collect()

    if how == "closed":
        items[0].close()  # type: ignore[attr-defined]
    elif how == "collected":
        items.clear()
        gc.collect()
    else:
        portal.run(collect)
    eventually(numbers.closed.is_set, "the generator is closed")


def test_a_clean_up_for_another_loop_is_not_done() -> None:
    done: list[Any] = []

    async def clean_up() -> None:
        done.append(1)

    other = asyncio.new_event_loop()
    portal.clean_up(other, clean_up)
    other.close()
    portal.clean_up(portal.loop(), clean_up)
    assert done == [1]


def test_a_forked_child_has_a_loop_of_its_own() -> None:
    of_the_parent = portal.run(this_loop)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if portal.run(this_loop) is not of_the_parent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert portal.run(this_loop) is of_the_parent
