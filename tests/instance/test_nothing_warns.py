"""Under `filterwarnings = error` nothing of ours warns: whoever opens a connection, socket, loop or process closes it.

What is collected or ends with its event loop is closed as well; `gc.collect` shows it within the test that left it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
from processes import INSTANT, eventually, own_state

from managed_vllm import AsyncVLLMClient, ManagedVLLM, VLLMClient
from managed_vllm.errors import StartupError

pytestmark = pytest.mark.filterwarnings("error")

HI: Any = [{"role": "user", "content": "Hi"}]
LONG = {"max_tokens": 200}


def server(model: str = "m", **order: Any) -> ManagedVLLM:
    return ManagedVLLM(model, command=standin.command(), env=standin.orders(**order), keep_alive=INSTANT)


def forget_what_others_left() -> None:
    """Collects what earlier tests of this process have dropped, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module")
def llm() -> Iterator[ManagedVLLM]:
    forget_what_others_left()
    with own_state(), server() as shared:
        yield shared


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    forget_what_others_left()
    yield
    gc.collect()


def synchronous(llm: ManagedVLLM) -> None:
    with server() as same:
        same.generate(["a", "b"], use_tqdm=True)
        same.openai.chat.completions.create(model="m", messages=HI)
        same.status()


def not_entered(llm: ManagedVLLM) -> None:
    server().generate("x")


def asynchronous(llm: ManagedVLLM) -> None:
    async def main() -> None:
        async with server() as same:
            await same.async_client.chat(HI)
            await same.async_openai.chat.completions.create(model="m", messages=HI)

    asyncio.run(main())


def two_event_loops(llm: ManagedVLLM) -> None:
    for _ in range(2):
        asyncio.run(llm.async_client.chat(HI))


def async_sdk_not_closed(llm: ManagedVLLM) -> None:
    async def main() -> None:
        await llm.async_openai.chat.completions.create(model="m", messages=HI)

    asyncio.run(main())


def streams_left_early(llm: ManagedVLLM) -> None:
    next(llm.stream("x", LONG))
    next(iter(llm.openai.chat.completions.create(model="m", messages=HI, stream=True)))

    async def main() -> None:
        async for _ in llm.async_client.stream("x", LONG):
            break

    asyncio.run(main())


def cancelled_while_starting(llm: ManagedVLLM) -> None:
    async def main() -> None:
        async with asyncio.timeout(0.2), server(start_s=60):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def failed_start(llm: ManagedVLLM) -> None:
    with pytest.raises(StartupError), server(exit=3):
        pass


def clients_dropped(llm: ManagedVLLM) -> None:
    VLLMClient(llm.base_url, llm.api_key, "m").generate("x")

    async def main() -> None:
        await AsyncVLLMClient(llm.base_url, llm.api_key, "m").generate("x")
        kept = AsyncVLLMClient(llm.base_url, llm.api_key, "m")
        await kept.generate("x")

    asyncio.run(main())


def by_url(llm: ManagedVLLM) -> None:
    with ManagedVLLM(base_url=llm.base_url, api_key=llm.api_key) as there:
        there.generate("x")


def killed_supervisor(llm: ManagedVLLM) -> None:
    with server("other") as other:
        other.generate("x")
        killed = other.status().supervisor_pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: other.status().supervisor_pid != killed, "the next supervisor")
        other.generate("x")


@pytest.mark.parametrize(
    "use",
    [
        synchronous,
        not_entered,
        asynchronous,
        two_event_loops,
        async_sdk_not_closed,
        streams_left_early,
        cancelled_while_starting,
        failed_start,
        clients_dropped,
        by_url,
        killed_supervisor,
    ],
)
def test_nothing_warns(llm: ManagedVLLM, use: Callable[[ManagedVLLM], None]) -> None:
    use(llm)


def test_nothing_warns_in_supervisor_and_server_of_a_program_where_warnings_are_errors(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    monkeypatch.setenv("PYTHONDEVMODE", "1")
    with server() as llm:
        llm.restart()
        assert llm.generate("x")[0].outputs[0].text.startswith("echo x")
        said = next(home.glob("*/supervisor.log")).read_text()
    assert "Warning" not in said
