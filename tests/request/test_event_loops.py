"""One value for each event loop: made in it, dropped when it is closed, forgotten in a forked child."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from managed_vllm.request.event_loops import PerLoop


def test_each_loop_has_a_value_of_its_own_until_it_is_closed() -> None:
    dropped: list[Any] = []
    values: PerLoop[object] = PerLoop(object, dropped.append)

    async def twice() -> object:
        found = values.current()
        await asyncio.sleep(0)
        assert values.current() is found
        return found

    first = asyncio.run(twice())
    assert [value for _, value in values.items()] == [first]
    assert dropped == []
    second = asyncio.run(twice())
    assert second is not first
    assert dropped == [first]
    assert [value for _, value in values.items()] == [second]


def test_loops_side_by_side_do_not_share_a_value() -> None:
    values: PerLoop[object] = PerLoop(object, lambda _: None)
    together = threading.Barrier(4)
    found: list[object] = []

    async def one() -> None:
        found.append(values.current())
        await asyncio.to_thread(together.wait, 30)  # all loops are open

    threads = [threading.Thread(target=lambda: asyncio.run(one())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(map(id, found))) == 4


def test_a_forked_child_starts_without_the_parents_values() -> None:
    values: PerLoop[object] = PerLoop(object, lambda _: None)

    async def main() -> None:
        of_the_parent = values.current()
        assert values.after_fork() == [of_the_parent]
        assert values.current() is not of_the_parent

    asyncio.run(main())
