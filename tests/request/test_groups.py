"""Prompts that go together in one request: nobody can tell the outputs from those of single requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest
from acting_server import ActingServer, Refusal, acting, prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import HANG_S, eventually

from managed_vllm import AsyncVLLMClient, RetryPolicy, VLLMClient
from managed_vllm.errors import (
    BadRequestError,
    DeadlyRequestError,
    ManagedVLLMError,
    RequestError,
    RequestTimeoutError,
    ServerDiedError,
)
from managed_vllm.masking import Secret
from managed_vllm.request.balancing import Balancer
from managed_vllm.request.bounds import Bound
from managed_vllm.request.concurrency import ConcurrencyLimiter
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.request.placement import Search
from managed_vllm.status import Connection

pytestmark = pytest.mark.usefixtures("unhurried")
QUICK = RetryPolicy(max_lost=2, backoff_initial_s=0.001, spread_s=0)
SHORT: dict[str, Any] = {"max_tokens": 8, "logprobs": 0}


def echo(messages: list[dict[str, Any]]) -> str | Refusal:
    """The prompt itself; but there are bad ones, and some that are refused with an error of the server's own."""
    text = messages[0]["content"]
    if text.startswith("bad"):
        return Refusal(400, f"no {text}")
    return Refusal(500, f"can't {text}") if text.startswith("fault") else text


@contextlib.contextmanager
def client_of(server: ActingServer, **options: Any) -> Iterator[VLLMClient]:
    with contextlib.closing(VLLMClient(server.url, None, "acting", **{"retry": QUICK, **options})) as client:
        yield client


def told(result: Any) -> Any:
    """What a caller can see of an output, but for times, ids and how often it was sent; or of an error."""
    if isinstance(result, ManagedVLLMError):
        return type(result), str(result), getattr(result, "index", None), getattr(result, "status", None)
    assert isinstance(result, RequestOutput)
    raw = {name: value for name, value in result.raw.items() if name != "id"}
    varying = {"request_id", "attempts", "latency", "started_at"}
    return {name: value for name, value in result.to_dict().items() if name not in varying}, raw


def sizes(server: ActingServer) -> list[int]:
    return [len(prompts_of(body)) for body in server.requests]


def singles(client: VLLMClient, prompts: list[Any], params: dict[str, Any]) -> list[Any]:
    """One call for each prompt."""
    found: list[Any] = []
    for index, prompt in enumerate(prompts):
        (result,) = client.generate([prompt], params, return_exceptions=True)
        if isinstance(result, RequestError):
            result.index = index
        found.append(result)
    return found


# -- the same outputs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def echoing() -> Iterator[tuple[ActingServer, VLLMClient]]:
    with acting(echo, tells="cached tokens of each") as server, client_of(server) as client:
        yield server, client


prompts = st.one_of(
    st.sampled_from(["bad", "fault"]),
    st.text("ab", min_size=1, max_size=4),
    st.lists(st.integers(97, 122), min_size=1, max_size=4),
)
params = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12)},
    optional={
        "n": st.integers(1, 3),
        "seed": st.integers(0, 9),
        "logprobs": st.integers(0, 1),
        "prompt_logprobs": st.just(1),
        "detokenize": st.just(False),
    },
)


@settings(max_examples=examples(12), deadline=None)
@given(asked=st.lists(prompts, min_size=16, max_size=40), sampling=params)
def test_any_mix_of_good_and_bad_prompts_is_answered_as_single_requests_are(
    echoing: tuple[ActingServer, VLLMClient], asked: list[Any], sampling: Any
) -> None:
    server, client = echoing
    client.generate(["x"] * 16, sampling)  # so that the server is known
    one_by_one = singles(client, asked, sampling)
    server.requests.clear()
    together = client.generate(asked, sampling, return_exceptions=True)
    assert max(sizes(server)) > 1
    assert list(map(told, together)) == list(map(told, one_by_one))


def test_64_prompts_take_a_scout_and_eight_requests() -> None:
    with acting(echo) as server, client_of(server) as client:
        outputs = client.generate([f"p{number}" for number in range(64)], SHORT)
        assert [one.prompt for one in outputs] == [f"p{number}" for number in range(64)]
        assert sizes(server)[0] == 1
        assert sorted(sizes(server)[1:]) == [7] + [8] * 7
        assert len({one.request_id for one in outputs}) == 1 + 63
        server.requests.clear()
        client.generate([f"p{number}" for number in range(64)], SHORT)  # the server is known by now
        assert sizes(server) == [8] * 8


def test_what_differs_goes_apart() -> None:
    with acting(echo) as server, client_of(server) as client:
        texts, ids = ["text"] * 16, [[97, 98]] * 16
        client.generate([one for pair in zip(texts, ids, strict=True) for one in pair], SHORT)
        assert len(server.requests) < 32
        assert all(len({type(one) for one in prompts_of(body)}) == 1 for body in server.requests)
        server.requests.clear()
        client.generate(["x"] * 32, SHORT, priority=[0, 1] * 16)
        assert sorted(sizes(server)) == [4] * 8


@pytest.mark.parametrize(
    "alone",
    [
        {"sampling_params": [SHORT] * 32},
        {"sampling_params": {"max_tokens": 256}},
        {"sampling_params": {**SHORT, "logprobs": -1}},
        {"sampling_params": {**SHORT, "extra_args": {"of a plugin": 1}}},
        {"sampling_params": SHORT, "extra_body": {"of_tomorrow": 1}},
        {"sampling_params": SHORT, "request_id": "mine"},
        {"sampling_params": SHORT, "resume": True},
    ],
    ids=lambda alone: ",".join(map(str, alone)),
)
def test_what_may_mean_something_else_for_several_prompts_goes_alone(alone: dict[str, Any]) -> None:
    with acting(echo) as server, client_of(server) as client:
        client.generate(["x"] * 16, SHORT)
        server.requests.clear()
        with contextlib.suppress(ManagedVLLMError):  # the acting server does not stream
            client.generate(["x"] * 32, **alone)
        assert set(sizes(server)) == {1}


def test_a_server_that_tells_of_each_request_gets_no_groups() -> None:
    for tells in ("cached tokens", "times"):
        with acting(echo, tells=tells) as server, client_of(server) as client:
            outputs = client.generate(["four"] * 32, SHORT)
            assert sizes(server) == [1] * 32
            assert {(one.num_cached_tokens, bool(one.metrics)) for one in outputs} == {
                (2, False) if tells == "cached tokens" else (None, True)
            }


# -- refused and lost --------------------------------------------------------------------------------------------------


def test_only_the_group_of_a_bad_prompt_is_taken_apart() -> None:
    with acting(echo) as server, client_of(server) as client:
        client.generate(["x"] * 16, SHORT)
        server.requests.clear()
        outputs = client.generate(["x"] * 63 + ["bad"], SHORT, return_exceptions=True)
        assert isinstance(outputs[63], BadRequestError)
        assert outputs[63].index == 63
        assert sorted(sizes(server)) == [1] * 8 + [8] * 8
        assert [one.attempts for one in outputs[:63]] == [1] * 56 + [2] * 7


def test_a_server_that_takes_one_prompt_at_a_time_is_not_asked_again() -> None:
    with acting(echo, takes_lists=False) as server, client_of(server) as client:
        client.generate(["x"] * 64, SHORT)
        server.requests.clear()
        client.generate(["x"] * 64, SHORT)
        assert sizes(server) == [1] * 64


def test_a_lost_group_goes_on_one_by_one_and_counts_as_lost_once() -> None:
    lost: list[str] = []

    def act(messages: list[dict[str, Any]]) -> str | Refusal:
        text: str = messages[0]["content"]
        if text.startswith("lost") and len(lost) < 2:
            lost.append(text)
            return Refusal(0, "hangs up")
        return text

    with acting(act) as server, client_of(server) as client:
        client.generate(["x"] * 16, SHORT)
        server.requests.clear()
        outputs = client.generate([f"lost{number}" for number in range(16)], SHORT)
        assert [one.prompt for one in outputs] == [f"lost{number}" for number in range(16)]
        assert [one.attempts for one in outputs].count(2) >= 2
        assert max(one.attempts for one in outputs) <= 3
        server.requests.clear()
        lost[:] = []
        server.answer = lambda _: Refusal(0, "always")
        with pytest.raises(ServerDiedError, match="2 times in a row"):  # max_lost, the group's loss included
            client.generate(["lost"] * 16, SHORT)
        assert sorted(sizes(server)) == [1] * 16 + [2] * 8


def test_a_prompt_that_kills_the_server_is_sent_twice_however_it_was_sent() -> None:
    deaths = [0]

    def act(messages: list[dict[str, Any]]) -> str | Refusal:
        if messages[0]["content"] != "POISON":
            return "fine"
        deaths[0] += 1
        return Refusal(0, "dies")

    async def main(server: ActingServer) -> None:
        def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> tuple[Connection, int]:
            return Connection(base_url=server.url, api_key=Secret(""), model="m"), 1 + deaths[0]

        client = AsyncVLLMClient(connection=connection, retry=QUICK)
        await client.generate(["x"] * 16, SHORT)
        results: Any = await client.generate(["x"] * 31 + ["POISON"], SHORT, return_exceptions=True)
        assert isinstance(results[31], DeadlyRequestError)
        assert [one.outputs[0].text[1:5] for one in results[:31]] == ["fine"] * 31
        assert deaths == [2]
        await client.aclose()

    with acting(act) as server:
        asyncio.run(main(server))


# -- bounds ------------------------------------------------------------------------------------------------------------


class Held:
    """Answers the prompt "held" once it is let go."""

    def __init__(self) -> None:
        self.asked = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def __call__(self, messages: list[dict[str, Any]]) -> str | Awaitable[str | Refusal]:
        text: str = messages[0]["content"]
        return self._late() if text == "held" else text

    async def _late(self) -> str | Refusal:
        self.asked += 1
        self._waiting.append((asyncio.get_running_loop(), event := asyncio.Event()))
        await event.wait()
        return "late"

    def let_go(self) -> None:
        for loop, event in self._waiting:
            loop.call_soon_threadsafe(event.set)


def test_each_prompt_of_a_group_has_an_error_of_its_own_at_the_deadline() -> None:
    held = Held()
    with acting(held) as server, client_of(server) as client:
        client.generate(["x"] * 16, SHORT)
        for name in ("timeout", "request_timeout"):
            options: Any = {name: 0.3, "return_exceptions": True}
            results: Any = client.generate(["held"] * 16, SHORT, **options)
            assert [type(one) for one in results] == [RequestTimeoutError] * 16
            assert [one.index for one in results] == list(range(16))
        held.let_go()


def test_a_call_that_is_cancelled_or_closed_hangs_up() -> None:
    held = Held()

    async def main(server: ActingServer) -> None:
        client = server.client(retry=QUICK)
        await client.generate(["x"] * 16, SHORT)
        call = asyncio.create_task(client.generate(["held"] * 32, SHORT))
        await asyncio.to_thread(eventually, lambda: held.asked == 32, "the groups are there")
        assert client.in_flight == 32
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        assert client.in_flight == 0
        call = asyncio.create_task(client.generate(["held"] * 32, SHORT, return_exceptions=True))
        await asyncio.to_thread(eventually, lambda: client.in_flight == 32, "they are there again")
        await client.aclose()
        results: Any = await asyncio.wait_for(call, HANG_S)
        assert [(type(one), one.index) for one in results] == [(ServerDiedError, index) for index in range(32)]

    with acting(held) as server:
        asyncio.run(main(server))
        held.let_go()


def test_max_in_flight_counts_prompts() -> None:
    def act(messages: list[dict[str, Any]]) -> Awaitable[str | Refusal]:
        async def soon() -> str | Refusal:
            await asyncio.sleep(0.001)
            return "x"

        return soon()

    with acting(act) as server, client_of(server, max_in_flight=6) as client:
        client.generate(["x"] * 100, SHORT)
        assert 1 < max(sizes(server)) <= 6  # how many go together is not promised
        assert server.most_prompts <= 6


def test_a_group_takes_as_many_places_as_it_has_prompts() -> None:
    async def main() -> None:
        limiter = ConcurrencyLimiter(10)
        await limiter.acquire(8)
        waiting = [asyncio.create_task(limiter.acquire(size)) for size in (4, 2)]
        await asyncio.sleep(0)
        assert limiter.in_flight == 8  # first come, first served: the second would fit
        waiting[0].cancel()
        await asyncio.wait(waiting, timeout=HANG_S)
        assert limiter.in_flight == 10
        limiter.release(8, answered=True)
        limiter.release(2, answered=True)
        assert limiter.in_flight == 0
        await limiter.acquire(50)  # larger than all there is: alone
        assert limiter.in_flight == 50

    asyncio.run(main())


class _TwoServers:
    """Both up, always."""

    def __init__(self) -> None:
        self.both = [(Connection(base_url=f"http://{name}/v1", api_key=Secret(""), model="m"), 1) for name in "ab"]

    async def known(self, search: Search) -> None:
        pass

    def every(self) -> Any:
        return self.both

    up = every

    def working(self, among: Any) -> Any:
        return among

    async def look(self, endpoint: Any) -> None:
        pass

    def after_fork(self) -> None:
        pass

    async def wait(self, seconds: float) -> None:
        pass


def test_the_balancer_counts_a_group_as_its_size() -> None:
    async def main() -> None:
        balancer = Balancer(_TwoServers())
        searches = [Search({}, Bound(set(), None, ""), size=size) for size in (8, 1, 1, 1)]
        places = [await balancer.get(search) for search in searches]
        assert places[1] == places[2] == places[3] != places[0]
        balancer.leave(places[0], 8)
        assert await balancer.get(searches[1]) == places[0]

    asyncio.run(main())
