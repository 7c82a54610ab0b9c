"""Several servers that somebody else runs, by `base_urls=`: where a request goes, and what becomes of the dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import standin
from free_ports import free_port
from processes import HANG_S, eventually
from scripted_server import ANSWER, Script, says

from managed_vllm import ManagedVLLM, RetryPolicy, VLLMClient
from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ModelNotServedError,
    ServerDiedError,
    ServerUnreachableError,
    UnsupportedMethodError,
)
from managed_vllm.masking import Secret
from managed_vllm.request.connections import Transport
from managed_vllm.request.health import is_healthy
from managed_vllm.status import Connection

KEY = "one-key-for-all"


def server(number: int, **orders: Any) -> ManagedVLLM:
    """A server as `managed-vllm serve` runs it on another machine: its own supervisor starts it again."""
    env = {**standin.orders(**orders), "NUMBER": str(number)}
    return ManagedVLLM("stand-in", command=standin.command(), env=env, api_key=KEY, keep_alive=0)


@pytest.fixture
def fleet(home: Path) -> Iterator[tuple[ManagedVLLM, ManagedVLLM]]:
    with server(1) as first, server(2) as second:
        yield first, second


def across(fleet: Sequence[ManagedVLLM], **options: Any) -> ManagedVLLM:
    return ManagedVLLM(base_urls=[one.base_url for one in fleet], api_key=KEY, **options)


def pid_of(one: ManagedVLLM) -> int:
    pid = one.status().server_pid
    assert pid is not None
    return pid


def answered_by(llm: ManagedVLLM, prompt: str = "hi", **fields: Any) -> int:
    """The pid of the server that answered."""
    return int(llm.generate(prompt, **fields)[0].outputs[0].text.rpartition(" from ")[2])


def is_right(prompt: str, ids: Sequence[int]) -> bool:
    return list(ids) == standin.continuation(standin.prompt_ids(prompt), len(ids))


def listens(url: str) -> bool:
    try:
        requests.get(url.removesuffix("/v1") + "/health", timeout=HANG_S)
    except requests.ConnectionError:
        return False
    return True


# -- which server ------------------------------------------------------------------------------------------------------


def test_requests_take_turns_and_sessions_stay(fleet: tuple[ManagedVLLM, ManagedVLLM]) -> None:
    with across(fleet) as llm:
        alone = Counter(answered_by(llm) for _ in range(8))
        assert alone == {pid_of(one): 4 for one in fleet}
        homes = {name: answered_by(llm, session_id=name) for name in ("a", "b", "c", "d")}
        assert Counter(homes.values()) == {pid_of(one): 2 for one in fleet}
        for name, home in homes.items():
            assert {answered_by(llm, session_id=name) for _ in range(3)} == {home}


def test_what_is_in_flight_decides(home: Path) -> None:
    async def play(llm: ManagedVLLM) -> set[str]:
        client = llm.async_client
        async with asyncio.timeout(2 * HANG_S):
            busy = asyncio.create_task(client.generate("long", {"max_tokens": 4000}))
            await asyncio.to_thread(eventually, lambda: client.in_flight, "the long one is in flight")
            texts = [(await client.generate("hi"))[0].outputs[0].text for _ in range(4)]
            assert not busy.done()
            busy.cancel()
        return {text.rpartition(" from ")[2] for text in texts}

    with server(1, token_s=0.02) as first, server(2, token_s=0.02) as second, across((first, second)) as llm:
        assert len(asyncio.run(play(llm))) == 1


def test_the_session_goes_into_the_header_that_routers_read(script: Callable[..., Script]) -> None:
    played = script(says(ANSWER), says(ANSWER))
    with VLLMClient(played.url, None, "m") as client:
        client.generate("hi", session_id="täsk 1/0")
        client.generate("hi")
    assert [headers.get("x-session-id") for headers in played.headers] == ["t%C3%A4sk%201/0", None]
    assert [body.get("session_id") for _, body in played.requests] == ["täsk 1/0", None]


def test_the_openai_sdk_takes_turns_too_and_follows_its_session_header(
    fleet: tuple[ManagedVLLM, ManagedVLLM],
) -> None:
    with across(fleet) as llm:

        def answered(**options: Any) -> str:
            text: str = llm.openai.completions.create(model=llm.model, prompt="hi", **options).choices[0].text
            return text.rpartition(" from ")[2]

        assert Counter(answered() for _ in range(6)) == {str(pid_of(one)): 3 for one in fleet}
        assert len({answered(extra_headers={"X-Session-ID": "mine"}) for _ in range(4)}) == 1
        assert len({answered(extra_body={"session_id": "other"}) for _ in range(4)}) == 1
        assert llm.openai.models.list().data[0].id == llm.model


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_no_request_is_lost_while_servers_are_killed(fleet: tuple[ManagedVLLM, ManagedVLLM]) -> None:
    prompts = [f"prompt {number}" for number in range(600)]
    pids = [pid_of(one) for one in fleet]

    async def play(llm: ManagedVLLM) -> list[Any]:
        places = asyncio.Semaphore(24)
        answered = 0

        async def one(prompt: str) -> Any:
            nonlocal answered
            async with places:
                output = await llm.async_client.generate(prompt, {"max_tokens": 24}, session_id=prompt[-2:])
            answered += 1
            if answered in (100, 350):
                victim = fleet[answered == 350]
                os.kill(pid_of(victim), signal.SIGKILL)
            return output[0]

        async with asyncio.timeout(4 * HANG_S):
            return await asyncio.gather(*map(one, prompts))

    with across(fleet, retry=RetryPolicy(max_deaths=4, max_lost=1000)) as llm:
        outputs = asyncio.run(play(llm))
        assert all(is_right(prompt, one.outputs[0].token_ids) for prompt, one in zip(prompts, outputs, strict=True))
        for one, pid in zip(fleet, pids, strict=True):
            one.wait_ready(HANG_S, after_epoch=1)
            assert pid_of(one) != pid
        expected = {pid_of(one) for one in fleet}
        seen: set[int] = set()

        def both_serve() -> bool:
            seen.add(answered_by(llm))
            return seen >= expected

        eventually(both_serve, "both servers are in use again")


def test_a_dead_server_is_left_in_the_same_moment(fleet: tuple[ManagedVLLM, ManagedVLLM]) -> None:
    with across(fleet) as llm:
        session = next(
            f"s{number}" for number in range(99) if answered_by(llm, session_id=f"s{number}") == pid_of(fleet[0])
        )
        dead, living = pid_of(fleet[0]), pid_of(fleet[1])
        os.kill(dead, signal.SIGKILL)
        assert answered_by(llm, session_id=session) == living
        fleet[0].wait_ready(HANG_S, after_epoch=1)
        # Once it is back it is taken in, and the session stays where its prefix is cached by now.
        eventually(lambda: answered_by(llm) == pid_of(fleet[0]), "the first server is in use again")
        assert answered_by(llm, session_id=session) == living


def test_a_stream_goes_on_elsewhere(home: Path, tmp_path: Path) -> None:
    faults = str(tmp_path)
    with server(1, faults=faults) as first, server(2, faults=faults) as second, across((first, second)) as llm:
        (tmp_path / "1-crash").touch()  # whichever begins it ends after half of the tokens
        parts = llm.stream("a long answer", {"max_tokens": 120}, session_id="one")
        ids = [token for part in parts for token in part.outputs[0].token_ids]
        assert (tmp_path / "1-crash.claimed").exists()
        assert len(ids) == 120
        assert is_right("a long answer", ids)


def test_with_all_servers_dead_a_request_is_given_up(home: Path) -> None:
    with server(1) as first, server(2) as second:
        with across((first, second), retry=RetryPolicy(max_lost=6, backoff_initial_s=0.01)) as llm:
            assert answered_by(llm)
            for one in (first, second):
                url = one.base_url
                one.stop_server()
                eventually(lambda url=url: not listens(url), "the server is gone")  # type: ignore[misc]
            with pytest.raises(ServerDiedError, match="6 times in a row"):
                llm.generate("hi")


# -- attaching ---------------------------------------------------------------------------------------------------------


def is_taken_in(url: str) -> bool:
    """Whether a server that was down would count as up again."""
    connection = Connection(base_url=url, api_key=Secret(KEY), model="stand-in")

    async def look() -> bool:
        transport = Transport()
        try:
            return await is_healthy(transport, connection, with_model=True)
        finally:
            await transport.aclose()

    return asyncio.run(look())


def test_a_server_that_does_not_answer_is_left_out_until_it_does(home: Path) -> None:
    port = free_port()
    with server(1) as first:
        urls = [first.base_url, f"http://127.0.0.1:{port}/v1"]
        with ManagedVLLM(base_urls=urls, api_key=KEY) as llm:
            assert {answered_by(llm) for _ in range(4)} == {pid_of(first)}
            assert llm.status().extra["base_urls"] == urls
            assert not llm.supervised
            late = ManagedVLLM("late", command=standin.command(), api_key=KEY, keep_alive=0, port=port)
            with late:  # of another model: that is not taken in
                assert not is_taken_in(urls[1])
            eventually(lambda: not listens(urls[1]), "its port is free again")
            same = standin.command()
            with ManagedVLLM(
                "stand-in", command=same, env={"NUMBER": "2"}, api_key=KEY, keep_alive=0, port=port
            ) as second:
                assert is_taken_in(urls[1])
                eventually(lambda: answered_by(llm) == pid_of(second), "the second server is in use")


def test_what_several_servers_can_t_be(fleet: tuple[ManagedVLLM, ManagedVLLM], script: Callable[..., Script]) -> None:
    url = fleet[0].base_url
    another = script(says({"data": [{"id": "another"}]}))
    with pytest.raises(ConfigError, match="either base_url= or base_urls="):
        ManagedVLLM(base_url=url, base_urls=[url])
    for wrong in (url, [], [1]):
        with pytest.raises(ConfigError, match="base_urls is a list"):
            ManagedVLLM(base_urls=wrong)  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="no server in it"):
        VLLMClient([], None, "m")
    with pytest.raises(ConfigError, match="max_model_len"):
        ManagedVLLM(base_urls=[url], max_model_len=5)
    with pytest.raises(ModelNotServedError, match=r"serve the same model: .* serves stand-in; .* serves another"):
        ManagedVLLM(base_urls=[url, another.url], api_key=KEY).start()
    with pytest.raises(AuthenticationError):
        ManagedVLLM(base_urls=[one.base_url for one in fleet]).start()
    with pytest.raises(ServerUnreachableError, match=r"none of http://127.0.0.1:9/v1, http://127.0.0.1:10/v1"):
        ManagedVLLM(base_urls=["127.0.0.1:9", "127.0.0.1:10"]).start()


def test_a_list_in_the_environment_and_to_child_processes(
    fleet: tuple[ManagedVLLM, ManagedVLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SERVER_URL", f"{fleet[0].base_url}, {fleet[1].base_url}")
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with ManagedVLLM() as llm:
        assert Counter(answered_by(llm) for _ in range(4)) == {pid_of(one): 2 for one in fleet}
        passed_on = llm.environ()
    for name, value in passed_on.items():
        monkeypatch.setenv(name, value)
    with ManagedVLLM() as child:
        assert {answered_by(child) for _ in range(4)} == {pid_of(one) for one in fleet}


def test_a_client_of_a_list(fleet: tuple[ManagedVLLM, ManagedVLLM]) -> None:
    with VLLMClient([one.base_url for one in fleet], KEY, "stand-in") as client:
        texts = [one.outputs[0].text for one in client.generate(["hi"] * 4)]
    assert {int(text.rpartition(" from ")[2]) for text in texts} == {pid_of(one) for one in fleet}


def test_what_concerns_the_engine_reaches_each_server(script: Callable[..., Script]) -> None:
    served = says({"data": [{"id": "m"}]})
    played = [script(served, says({})) for _ in range(2)]
    with ManagedVLLM(base_urls=[one.url for one in played]) as llm:
        assert llm.client.reset_prefix_cache()
        assert [one.requests[-1][0].partition("?")[0] for one in played] == ["/reset_prefix_cache"] * 2
        with pytest.raises(UnsupportedMethodError, match="of one server, not of 2"):
            llm.client.metrics()


# -- vllm-router -------------------------------------------------------------------------------------------------------

ROUTER = Path(sys.executable).with_name("vllm-router")


@pytest.fixture
def router(fleet: tuple[ManagedVLLM, ManagedVLLM], tmp_path: Path) -> Iterator[str]:
    """The vLLM project's router in front of the fleet, as docs/howto/several-servers.md starts it."""
    if not ROUTER.exists():
        pytest.skip("vllm-router is not installed: pip install managed-vllm[router]")
    url = f"http://127.0.0.1:{free_port()}"
    words = [str(ROUTER), "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--policy", "sticky_least_loaded"]
    words += ["--prometheus-port", str(free_port()), "--health-check-interval-secs", "1"]
    words += ["--health-failure-threshold", "1", "--health-success-threshold", "1"]
    words += ["--health-check-timeout-secs", str(round(HANG_S))]  # one that is slow is not down
    words += ["--worker-urls", *(one.base_url.removesuffix("/v1") for one in fleet)]
    with (tmp_path / "router.log").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:

        def lives() -> bool:
            with contextlib.suppress(requests.ConnectionError):
                return requests.get(f"{url}/liveness", timeout=HANG_S).ok
            return False

        eventually(lives, "the router is up")
        yield url
        process.kill()


def test_sessions_stay_behind_the_router_and_no_request_is_lost(
    fleet: tuple[ManagedVLLM, ManagedVLLM], router: str
) -> None:
    with ManagedVLLM(base_url=router, api_key=KEY) as llm:
        homes = {name: answered_by(llm, session_id=name) for name in ("a", "b", "c", "d")}
        assert Counter(homes.values()) == {pid_of(one): 2 for one in fleet}
        for name, home in homes.items():
            assert {answered_by(llm, session_id=name) for _ in range(3)} == {home}
        os.kill(pid_of(fleet[0]), signal.SIGKILL)
        prompts = [f"prompt {number}" for number in range(100)]
        outputs = llm.generate(prompts, {"max_tokens": 20}, session_id="a", timeout=2 * HANG_S)
        assert all(is_right(prompt, one.outputs[0].token_ids) for prompt, one in zip(prompts, outputs, strict=True))
