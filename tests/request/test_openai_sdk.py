"""`llm.openai` and `llm.async_openai`: the SDK's own clients, on our connections, following the server."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import standin
from processes import HANG_S, INSTANT, eventually
from scripted_server import Script, says

from managed_vllm import ManagedVLLM, RestartPolicy

MESSAGES: Any = [{"role": "user", "content": "hello there"}]
AT_ONCE = RestartPolicy(max_restarts=100, backoff_initial_s=0.05, backoff_max_s=0.2)


def server(*, uds: bool = False, **order: Any) -> ManagedVLLM:
    return ManagedVLLM(
        "stand-in", command=standin.command(), env=standin.orders(**order), keep_alive=INSTANT, restart=AT_ONCE, uds=uds
    )


def whole(llm: ManagedVLLM, **options: Any) -> str:
    answer = llm.openai.chat.completions.create(model=llm.model, messages=MESSAGES, **options)
    return answer.choices[0].message.content or ""


@pytest.mark.parametrize("uds", [False, True])
def test_a_stream_joined_is_the_whole(home: Path, uds: bool) -> None:
    with server(uds=uds) as llm:
        expected = whole(llm, max_tokens=20)
        stream = llm.openai.chat.completions.create(model=llm.model, messages=MESSAGES, max_tokens=20, stream=True)
        assert expected
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected


def test_the_asynchronous_handle_has_hundreds_in_flight(home: Path) -> None:
    with server() as llm:
        expected = whole(llm, max_tokens=5)

        async def ask() -> list[str | None]:
            create = llm.async_openai.chat.completions.create
            many = (create(model=llm.model, messages=MESSAGES, max_tokens=5) for _ in range(300))
            return [answer.choices[0].message.content for answer in await asyncio.gather(*many)]

        assert asyncio.run(ask()) == [expected] * 300
        assert asyncio.run(ask()) == [expected] * 300  # another event loop


def test_what_a_handle_hands_out_may_be_closed(home: Path) -> None:
    with server() as llm:
        with llm.openai as sync:
            assert sync.models.list().data
        assert whole(llm, max_tokens=5)
        with llm.client as client:
            expected = client.generate("x", {"max_tokens": 5})[0].outputs[0].text
        assert whole(llm, max_tokens=5)
        assert llm.generate("x", {"max_tokens": 5})[0].outputs[0].text == expected

        async def ask() -> list[Any]:
            async with llm.async_client as client:
                one = await client.generate("x", {"max_tokens": 5})
            async with llm.async_openai as sdk:
                await sdk.models.list()
            return [one, await llm.async_client.generate("x", {"max_tokens": 5}), await llm.async_openai.models.list()]

        first, second, models = asyncio.run(ask())
        assert first[0].outputs[0].text == second[0].outputs[0].text == expected
        assert models.data
        llm.async_client.close()
        assert llm.generate("x", {"max_tokens": 5})[0].outputs[0].text == expected


def test_a_client_with_another_address_goes_there(home: Path, script: Callable[..., Script]) -> None:
    other = script(says({"object": "list", "data": [{"id": "elsewhere", "object": "model"}]}))
    with server() as llm:
        there = llm.openai.with_options(base_url=f"{other.url}/v1", api_key="its own")
        assert [model.id for model in there.models.list().data] == ["elsewhere"]
        assert [model.id for model in llm.openai.models.list().data] == [llm.model]

        async def ask() -> list[str]:
            there = llm.async_openai.with_options(base_url=f"{other.url}/v1", api_key="its own")
            return [model.id for model in (await there.models.list()).data]

        assert asyncio.run(ask()) == ["elsewhere"]
    assert [path for path, _ in other.requests] == ["/v1/models"] * 2


def test_a_handle_follows_a_restart(home: Path) -> None:
    with server() as llm:
        handle, expected = llm.openai, whole(llm, max_tokens=5)
        pid = llm.status().server_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        answer = handle.chat.completions.create(model=llm.model, messages=MESSAGES, max_tokens=5)
        assert answer.choices[0].message.content == expected
        assert llm.status().epoch == 2


def test_a_server_that_dies_under_a_request_is_waited_for(home: Path, tmp_path: Path) -> None:
    with server(faults=str(tmp_path)) as llm:
        expected = whole(llm, max_tokens=5)
        (tmp_path / "1-crash").touch()
        assert whole(llm, max_tokens=5) == expected
        assert llm.status().epoch == 2


def test_the_sdks_timeout_is_the_callers(home: Path) -> None:
    with server(token_s=2) as llm:
        handle = llm.openai.with_options(timeout=0.5, max_retries=0)
        with pytest.raises(openai.APITimeoutError):
            handle.chat.completions.create(model=llm.model, messages=MESSAGES, max_tokens=4)


def test_a_stream_that_is_left_ends_on_the_server(home: Path) -> None:
    with server(token_s=0.05) as llm:
        stream = llm.openai.chat.completions.create(model=llm.model, messages=MESSAGES, max_tokens=2000, stream=True)
        next(iter(stream))
        eventually(lambda: "num_requests_running 1" in metrics(llm), "it runs")
        stream.close()
        eventually(lambda: "num_requests_running 0" in metrics(llm), "it runs no more")


def test_what_the_server_refuses_is_the_sdks_error(home: Path) -> None:
    with server() as llm, pytest.raises(openai.AuthenticationError):
        llm.openai.with_options(api_key="wrong").models.list()


def test_a_closed_handle_says_so(home: Path) -> None:
    with server() as llm:
        handle = llm.openai.with_options(max_retries=0)
        handle.models.list()
    with pytest.raises(RuntimeError, match="closed"):
        handle.models.list()


def test_closing_ends_a_stream_that_is_being_read(home: Path) -> None:
    with server(token_s=0.5) as llm:
        stream = llm.openai.chat.completions.create(model=llm.model, messages=MESSAGES, max_tokens=2000, stream=True)
        parts = iter(stream)
        next(parts)
        threading.Timer(0.2, llm.client.close).start()
        with pytest.raises(Exception, match=r"closed|Connection|disconnected"):
            for _ in parts:
                pass


def test_a_client_that_was_taken_before_a_fork_works_in_the_child(home: Path) -> None:
    with server() as llm:
        client = llm.client
        expected = client.generate("x", {"max_tokens": 5})[0].outputs[0].token_ids
        child = multiprocessing.get_context("fork").Process(
            target=lambda: os._exit(client.generate("x", {"max_tokens": 5})[0].outputs[0].token_ids != expected)
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0


def metrics(llm: ManagedVLLM) -> str:
    import re

    import requests

    root, headers = llm.base_url.removesuffix("/v1"), {"Authorization": f"Bearer {llm.api_key}"}
    text = requests.get(f"{root}/metrics", headers=headers, timeout=HANG_S).text
    return re.sub(r"\{[^}]*\}| (\d+)\.0", lambda found: f" {found[1]}" if found[1] else "", text)
