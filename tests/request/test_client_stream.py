"""A streamed answer: its parts joined are the whole one, a lost server is not noticed, and who leaves ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from processes import HANG_S, eventually
from scripted_server import FIRST, QUICK, Act, Script, client_of, hangs, says, streams, token

from managed_vllm import AsyncVLLMClient, VLLMClient
from managed_vllm.errors import (
    BadRequestError,
    RequestError,
    RequestTimeoutError,
    ServerDiedError,
    UnsupportedParameterError,
)
from managed_vllm.request.outputs import Logprob, RequestOutput

pytestmark = pytest.mark.usefixtures("unhurried")
TEXT = "x"
CHAT = [{"role": "user", "content": "x"}]
PARAMS = {"max_tokens": 9, "temperature": 0}


def delta(ids: list[int] | None = None, finish: str | None = None, first: bool = False, **parts: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": parts, "token_ids": ids, "finish_reason": finish}
    return {"id": "1", "choices": [choice], **({"prompt_token_ids": [50, 51]} if first else {})}


def cut(*events: Any, rest: bytes = b"") -> Act:
    """A stream that breaks off, `rest` being the last bytes."""

    def act(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for event in events:
            client.sendall(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
        client.sendall(rest)
        client.shutdown(socket.SHUT_RDWR)

    return act


def streamed(kind: str, server: Script, prompt: Any, params: Any = PARAMS, **options: Any) -> list[RequestOutput]:
    """All parts, by either client."""
    if kind == "sync":
        with client_of(server) as client:
            return list(client.stream(prompt, params, **options))

    async def main() -> list[RequestOutput]:
        async with AsyncVLLMClient(server.url, "", "m", retry=QUICK) as client:
            return [part async for part in client.stream(prompt, params, **options)]

    return asyncio.run(main())


def joined(parts: list[RequestOutput]) -> tuple[str, list[int], str | None]:
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part.outputs) == 1 for part in parts)
    last = parts[-1].outputs[0]
    text = "".join(part.outputs[0].text for part in parts)
    return text, [one for part in parts for one in part.outputs[0].token_ids], last.finish_reason


kinds = pytest.mark.parametrize("kind", ["sync", "async"])


# -- the parts ---------------------------------------------------------------------------------------------------------


@kinds
def test_parts_joined_are_the_whole(script: Callable[..., Script], kind: str) -> None:
    events = [FIRST, token(2), {"id": "1", "choices": [], "usage": {}}, token(3), token(4, "stop"), b"[DONE]"]
    parts = streamed(kind, script(streams(*events)), TEXT)
    assert joined(parts) == ("t1 t2 t3 t4 ", [1, 2, 3, 4], "stop")
    assert parts[-1].prompt_token_ids == [50, 51]
    assert (parts[-1].attempts, parts[-1].resumed_tokens) == (1, 0)
    assert parts[-1].latency > 0
    assert parts[-1].time_to_first_token is not None
    with client_of(script(streams(*events))) as client:
        whole = client.generate(TEXT, PARAMS, resume=True)[0]
    assert (whole.outputs[0].text, whole.outputs[0].token_ids) == joined(parts)[:2]


def test_parts_come_as_they_are_made(script: Callable[..., Script]) -> None:
    gate = threading.Event()

    def act(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for event in (FIRST, token(2), token(3, "stop")):
            client.sendall(b"data: " + json.dumps(event).encode() + b"\n\n")
            if event["choices"][0]["finish_reason"] is None:
                gate.wait(HANG_S)
                gate.clear()
        client.shutdown(socket.SHUT_RDWR)

    with client_of(script(act)) as client:
        for number, part in enumerate(client.stream(TEXT, PARAMS), 1):
            assert part.outputs[0].token_ids == [number]
            gate.set()
    assert number == 3


def test_every_token_is_asked_for_on_its_own(script: Callable[..., Script]) -> None:
    server = script(streams(token(1, "stop")))
    streamed("sync", server, TEXT)
    streamed("sync", server, TEXT, extra_body={"stream_interval": 5})
    assert [body["stream_interval"] for _, body in server.requests] == [1, 5]


def test_a_server_that_does_not_stream_gives_one_part(script: Callable[..., Script]) -> None:
    choice = {"index": 0, "text": "all", "token_ids": [1, 2], "finish_reason": "stop"}
    parts = streamed("sync", script(says({"id": "1", "choices": [choice]})), TEXT)
    assert joined(parts) == ("all", [1, 2], "stop")


def test_a_chat_is_streamed_with_its_logprobs(script: Callable[..., Script]) -> None:
    def with_logprobs(number: int, value: float, **more: Any) -> dict[str, Any]:
        event = delta([number], content=f"t{number} ", **more)
        entry = {"token": f"token_id:{number}", "logprob": value, "bytes": list(f"t{number} ".encode())}
        top = [{"token": f"token_id:{n}", "logprob": v, "bytes": None} for n, v in ((number, value), (9, value - 1))]
        event["choices"][0]["logprobs"] = {"content": [{**entry, "top_logprobs": top}]}
        return event

    events = [
        delta(None, first=True, role="assistant", content=""),
        with_logprobs(1, -0.5),
        with_logprobs(2, -0.25),
        delta([], "stop", content=""),
    ]
    parts = streamed("sync", script(streams(*events)), CHAT, {**PARAMS, "logprobs": 1})
    assert joined(parts) == ("t1 t2 ", [1, 2], "stop")
    found = [place for part in parts for place in part.outputs[0].logprobs or []]
    assert found == [{1: Logprob(-0.5, 1, "t1 ")}, {2: Logprob(-0.25, 1, "t2 ")}]
    assert sum(part.outputs[0].cumulative_logprob or 0 for part in parts) == -0.75


@kinds
def test_a_completion_is_streamed_with_its_logprobs_across_a_loss(script: Callable[..., Script], kind: str) -> None:
    def with_logprobs(number: int, finish: str | None = None, **more: Any) -> dict[str, Any]:
        top = [{f"token_id:{number}": -0.5, "token_id:9": -1.5}]
        told = {"tokens": [f"token_id:{number}"], "token_logprobs": [-0.5], "top_logprobs": top}
        return token(number, finish, logprobs=told, **more)

    server = script(
        cut(with_logprobs(1, prompt_token_ids=[50]), with_logprobs(2)),
        streams(with_logprobs(3), with_logprobs(4, "stop")),
    )
    parts = streamed(kind, server, TEXT, {**PARAMS, "logprobs": 2})
    assert joined(parts) == ("t1 t2 t3 t4 ", [1, 2, 3, 4], "stop")
    found = [place for part in parts for place in part.outputs[0].logprobs or []]
    assert found == [{number: Logprob(-0.5, 1), 9: Logprob(-1.5, 2)} for number in (1, 2, 3, 4)]


def test_reasoning_and_tool_calls_are_streamed(script: Callable[..., Script]) -> None:
    def call(index: int, arguments: str, **more: Any) -> list[dict[str, Any]]:
        return [{"index": index, "function": {"arguments": arguments, **more}, **({"id": f"c{index}"} if more else {})}]

    events = [
        delta(None, first=True, role="assistant", content=""),
        delta([1], reasoning="let "),
        delta([2], reasoning="me see"),
        delta([3], content="so: "),
        delta([4], tool_calls=call(0, "", name="f")),
        delta([5], tool_calls=call(0, '{"a": ')),
        delta([6], tool_calls=call(0, "1}")),
        delta([7], tool_calls=call(1, "{}", name="g")),
        delta([8], "tool_calls", content=""),
    ]
    parts = streamed("async", script(streams(*events)), CHAT, tools=[{"type": "function", "function": {"name": "f"}}])
    assert joined(parts) == ("so: ", [1, 2, 3, 4, 5, 6, 7, 8], "tool_calls")
    assert "".join(part.outputs[0].reasoning or "" for part in parts) == "let me see"
    assert all(part.outputs[0].tool_calls == [] for part in parts[:-1])
    assert [(one["id"], one["function"]) for one in parts[-1].outputs[0].tool_calls] == [
        ("c0", {"name": "f", "arguments": '{"a": 1}'}),
        ("c1", {"name": "g", "arguments": "{}"}),
    ]


# -- lost --------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("rest", [b"", b"data: {", 'data: {"choices": [{"index": 0, "text": "é'.encode()[:-1]])
def test_a_lost_stream_goes_on_seamlessly(script: Callable[..., Script], kind: str, rest: bytes) -> None:
    server = script(cut(FIRST, token(2), rest=rest), cut(token(3)), streams(token(4), token(5, "stop"), b"[DONE]"))
    parts = streamed(kind, server, TEXT)
    assert joined(parts) == ("t1 t2 t3 t4 t5 ", [1, 2, 3, 4, 5], "stop")
    assert (parts[-1].attempts, parts[-1].resumed_tokens) == (3, 3)
    assert [body["prompt"] for _, body in server.requests] == [TEXT, [50, 51, 1, 2], [50, 51, 1, 2, 3]]


def test_a_stream_that_is_cut_within_a_character_gives_each_character_once(script: Callable[..., Script]) -> None:
    """Token 2 is the first half of "é", of which vLLM holds back the text."""
    server = script(
        cut(FIRST, token(2, text="")),
        says({"prompt": "\ufffd"}),
        streams(token(2, text=""), token(3, text="é"), token(4, "stop")),
    )
    parts = streamed("sync", server, TEXT)
    assert joined(parts) == ("t1 ét4 ", [1, 2, 3, 4], "stop")
    assert parts[-1].resumed_tokens == 1
    assert server.requests[1] == ("/detokenize", {"model": "m", "tokens": [2]})
    assert server.requests[2][1]["prompt"] == [50, 51, 1]


def test_a_stream_begins_again_where_nothing_has_been_given_yet(script: Callable[..., Script]) -> None:
    choice = {"index": 0, "text": "all", "token_ids": [1, 2], "finish_reason": "stop"}
    server = script(cut(), says({"id": "1", "choices": [choice]}))
    assert joined(streamed("sync", server, TEXT, {"max_tokens": 9, "stop": "no"})) == ("all", [1, 2], "stop")


@kinds
def test_a_torn_stream_is_an_error_that_says_so(script: Callable[..., Script], kind: str) -> None:
    server = script(cut(FIRST, token(2)), streams(FIRST, token(2), token(3, "stop")))
    with pytest.raises(ServerDiedError, match="can't go on"):
        streamed(kind, server, TEXT, {**PARAMS, "stop": "a stop string may span the cut"})
    assert len(server.requests) == 1


def test_a_stream_that_the_server_refuses_to_go_on_with_is_torn(script: Callable[..., Script]) -> None:
    """Else the whole answer would follow on its own beginning."""
    choice = {"index": 0, "text": "t1 t2 t3 ", "token_ids": [1, 2, 3], "finish_reason": "stop"}
    server = script(
        cut(FIRST, token(2)), says({"error": {"message": "no"}}, 400), says({"id": "1", "choices": [choice]})
    )
    with pytest.raises(ServerDiedError, match="can't go on"):
        streamed("sync", server, TEXT)


def test_a_stream_without_a_limit_that_the_server_does_not_tell_is_torn(script: Callable[..., Script]) -> None:
    choice = {"index": 0, "message": {"content": "t1 t2 t3 "}, "token_ids": [1, 2, 3], "finish_reason": "stop"}
    beginning = cut(delta([1], first=True, content="t1 "), delta([2], content="t2 "))
    server = script(beginning, says({"data": []}), says({"id": "1", "choices": [choice]}))
    with pytest.raises(ServerDiedError, match="can't go on"):
        streamed("sync", server, CHAT, {"temperature": 0})


def test_reasoning_that_is_lost_tears_the_stream(script: Callable[..., Script]) -> None:
    choice = {"index": 0, "message": {"content": "so", "reasoning": "hm, well"}, "finish_reason": "stop"}
    server = script(cut(delta(None, reasoning="hm, ")), says({"id": "1", "choices": [choice]}))
    with pytest.raises(ServerDiedError, match="can't go on"):
        streamed("sync", server, CHAT)


@pytest.mark.parametrize("give", ["stream", "generate"])
def test_a_rest_that_comes_unstreamed_is_not_taken_for_the_whole(script: Callable[..., Script], give: str) -> None:
    rest = {"id": "1", "choices": [{"index": 0, "text": "t3 ", "token_ids": [3], "finish_reason": "stop"}]}
    whole = {"id": "1", "choices": [{"index": 0, "text": "t1 t2 t3 ", "token_ids": [1, 2, 3], "finish_reason": "stop"}]}
    server = script(cut(FIRST, token(2)), says(rest), says(whole))
    with client_of(server) as client:
        if give == "generate":
            assert client.generate(TEXT, PARAMS, resume=True)[0].outputs[0].text == "t1 t2 t3 "
        else:
            with pytest.raises(ServerDiedError, match="can't go on"):
                list(client.stream(TEXT, PARAMS))


# -- left, late, refused -----------------------------------------------------------------------------------------------


def test_who_leaves_a_stream_ends_it_on_the_server(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, token(2), ends=False))
    with client_of(server) as client:
        for part in client.stream(TEXT, PARAMS):
            assert part.outputs[0].token_ids
            break
        del part
        eventually(lambda: server.hung_up == 1, "the connection is closed")
        parts = client.stream(TEXT, PARAMS)
        next(parts)
        parts.close()  # type: ignore[attr-defined]
        eventually(lambda: server.hung_up == 2, "the connection is closed")


def test_leaving_an_asynchronous_stream_ends_it_on_the_server(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, token(2), ends=False))

    async def main() -> None:
        async with AsyncVLLMClient(server.url, "", "m", retry=QUICK) as client:

            async def hung_up(count: int) -> None:
                await asyncio.to_thread(eventually, lambda: server.hung_up == count, "the connection is closed")

            parts = client.stream(TEXT, PARAMS)
            await anext(parts)
            await parts.aclose()  # type: ignore[attr-defined]
            await hung_up(1)
            async for _ in client.stream(TEXT, PARAMS):
                break
            gc.collect()
            await hung_up(2)

            async def follow() -> None:
                async for _ in client.stream(TEXT, PARAMS):
                    pass

            task = asyncio.create_task(follow())
            await asyncio.to_thread(eventually, lambda: len(server.requests) == 3, "it is in flight")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await hung_up(3)
            assert client.in_flight == 0

    asyncio.run(main())


def test_a_streamed_tool_call_that_was_cut_by_max_tokens_is_told(script: Callable[..., Script]) -> None:
    call = {"index": 0, "id": "c", "function": {"name": "click", "arguments": "{}"}}
    parts = [{"role": "assistant", "content": ""}, {"tool_calls": [call]}, {}]
    ids: list[dict[str, Any]] = [{}, {"token_ids": [1, 2]}, {"token_ids": [3], "finish_reason": "tool_calls"}]
    events = [
        {"id": "1", "choices": [{"index": 0, "delta": delta, **more}]} for delta, more in zip(parts, ids, strict=True)
    ]
    for limit, reason in ((3, "length"), (4, "tool_calls")):
        with client_of(script(streams(*events, b"[DONE]"))) as client:
            *_, last = client.stream([{"role": "user", "content": "x"}], {"max_tokens": limit})
        assert (last.outputs[0].finish_reason, len(last.outputs[0].tool_calls)) == (reason, 1)


def test_a_stream_that_becomes_garbage_in_the_clients_own_loop_is_ended(script: Callable[..., Script]) -> None:
    """The garbage collector runs in whatever thread it likes."""
    from managed_vllm.request import portal

    server = script(streams(FIRST, token(2), ends=False))
    with client_of(server) as client:
        held = [client.stream(TEXT, PARAMS)]
        next(held[0])

        async def drop() -> None:
            held.clear()

        portal.run(drop)
        eventually(lambda: server.hung_up == 1, "the connection is closed")


def test_a_stream_that_failed_behind_the_back_of_its_reader_is_not_told_of(
    script: Callable[..., Script], caplog: pytest.LogCaptureFixture
) -> None:
    server = script(streams(FIRST), says({"error": {"message": "no"}}, 401))
    gc.collect()  # what tests before have left is told of now, and not below
    caplog.clear()
    with caplog.at_level(logging.ERROR), client_of(server) as client:
        parts = client.stream(TEXT, PARAMS)
        next(parts)
        eventually(lambda: len(server.requests) > 1, "it was refused")
        time.sleep(0.1)
        parts.close()  # type: ignore[attr-defined]
        del parts
        gc.collect()
    assert caplog.records == []


@kinds
def test_a_deadline_holds_in_mid_stream(script: Callable[..., Script], kind: str) -> None:
    server = script(streams(FIRST, token(2), ends=False))
    with pytest.raises(RequestTimeoutError):
        streamed(kind, server, TEXT, timeout=0.4)
    eventually(lambda: server.hung_up == server.connections, "the connection is closed")


def test_close_ends_a_stream(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, token(2), ends=False))
    client = VLLMClient(server.url, "", "m", retry=QUICK)
    parts = client.stream(TEXT, PARAMS)
    next(parts)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(ServerDiedError, match="closed"):
        list(parts)
    with pytest.raises(ServerDiedError, match="closed"):
        next(iter(client.stream(TEXT, PARAMS)))


@pytest.mark.parametrize(("field", "value"), [("n", 2), ("echo", True)])
def test_what_has_no_parts_is_refused(script: Callable[..., Script], field: str, value: Any) -> None:
    server = script(hangs)
    with client_of(server) as client:
        with pytest.raises(UnsupportedParameterError, match=f"{field}= does not go with stream") as caught:
            next(iter(client.stream(TEXT, {"max_tokens": 4}, extra_body={field: value})))
        assert caught.value.field == field
    assert server.requests == []


def test_what_the_server_refuses_is_told_at_the_first_part(script: Callable[..., Script]) -> None:
    server = script(says({"error": {"message": "no"}}, 400))
    with client_of(server) as client, pytest.raises(BadRequestError) as caught:
        next(iter(client.stream(TEXT, PARAMS)))
    assert (caught.value.index, caught.value.status) == (None, 400)


def test_an_answer_without_an_answer_is_no_empty_text(script: Callable[..., Script]) -> None:
    empty = streams(delta(None, first=True, role="assistant"), delta(None, "stop"), b"[DONE]")
    with client_of(script(empty)) as client, pytest.raises(RequestError):
        list(client.stream(CHAT, PARAMS))


def test_many_streams_side_by_side(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, *(token(number) for number in range(2, 20)), token(20, "stop"), b"[DONE]"))

    async def main() -> None:
        async with AsyncVLLMClient(server.url, "", "m", retry=QUICK) as client:

            async def follow() -> list[int]:
                return [one async for part in client.stream(TEXT, PARAMS) for one in part.outputs[0].token_ids]

            found = await asyncio.gather(*(follow() for _ in range(50)))
            assert found == [list(range(1, 21))] * 50

    asyncio.run(main())


def test_a_reader_that_is_slow_loses_nothing(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, *(token(number) for number in range(2, 200)), token(200, "stop"), b"[DONE]"))
    with client_of(server) as client, contextlib.closing(client.stream(TEXT, PARAMS)) as parts:  # type: ignore[type-var]
        found: list[int] = []
        for part in parts:
            found += part.outputs[0].token_ids
            time.sleep(0.002)
    assert found == list(range(1, 201))
