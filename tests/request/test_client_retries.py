"""What a client does with lost answers, against a server that plays a script: retried, bounded, and told in types."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from free_ports import nobody
from processes import HANG_S, eventually
from scripted_server import (
    ANSWER,
    FIRST,
    QUICK,
    Act,
    Script,
    client_of,
    drips,
    hangs,
    http,
    redirects,
    says,
    sends,
    streams,
    token,
)

from managed_vllm import RetryPolicy, VLLMClient
from managed_vllm.errors import (
    BadRequestError,
    DeadlyRequestError,
    RequestError,
    RequestTimeoutError,
    ServerBusyError,
    ServerDiedError,
    UnsupportedParameterError,
)
from managed_vllm.masking import Secret
from managed_vllm.request import exchange
from managed_vllm.status import Connection

pytestmark = pytest.mark.usefixtures("unhurried")
LOSSES: dict[str, Act] = {
    **{f"HTTP {status}": says({"error": {"message": "x"}}, status) for status in (500, 502, 503, 504)},
    "closed at once": sends(b""),
    "closed in the head": sends(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    "truncated": sends(http(json.dumps(ANSWER).encode()[:30], length=500)),
    "cut JSON": sends(http(b'{"id": "1", "choi'), then_closes=False),
    "empty": sends(http(b""), then_closes=False),
    "not HTTP": sends(b"\x00\x01\x02 nonsense\r\n\r\n"),
    "no object": says([1, 2]),
    "no choices": says({"error": {"message": "the engine died", "code": 500}}),
    "empty choices": says({"choices": []}),
    "choices of another kind": says({"choices": [5]}),
    "abort": says({"choices": [{"index": 0, "text": "", "finish_reason": "abort"}]}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_answer_is_asked_for_again(script: Callable[..., Script], loss: str) -> None:
    server = script(LOSSES[loss], says(ANSWER))
    with client_of(server) as client:
        output = client.generate("x", {"max_tokens": 4})[0]
    assert output.outputs[0].text == "fine"
    assert output.attempts == 2
    assert output.resumed_tokens == 0


STREAM_LOSSES: dict[str, Act] = {
    "error in the stream": streams(FIRST, token(2), {"error": {"message": "engine", "code": 500}}, b"[DONE]"),
    "abort": streams(FIRST, token(2), token(3, "abort", text="", token_ids=[]), b"[DONE]"),
    "ended early": streams(FIRST, token(2), b"[DONE]"),
    "without its end": streams(FIRST, token(2)),
    "half an event": sends(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"".join(
            b"%x\r\ndata: %b\n\n\r\n" % (len(e) + 8, e) for e in [json.dumps(t).encode() for t in (FIRST, token(2))]
        )
        + b'1000\r\ndata: {"id": "cmpl'
    ),
    "garbage": streams(FIRST, token(2), b"{garbage"),
    "another shape": streams(FIRST, token(2), {"choices": [{"index": 0}]}),
}


@pytest.mark.parametrize("loss", STREAM_LOSSES)
def test_a_lost_stream_goes_on_with_the_tokens_so_far(script: Callable[..., Script], loss: str) -> None:
    server = script(STREAM_LOSSES[loss], streams(token(3), token(4, "length"), b"[DONE]"))
    with client_of(server) as client:
        output = client.generate("x", {"max_tokens": 4, "temperature": 0}, resume=True)[0]
    assert output.outputs[0].token_ids == [1, 2, 3, 4]
    assert output.outputs[0].text == "t1 t2 t3 t4 "
    assert output.outputs[0].finish_reason == "length"
    assert output.prompt_token_ids == [50, 51]
    assert (output.attempts, output.resumed_tokens) == (2, 2)
    path, body = server.requests[1]
    assert path == "/v1/completions"
    assert body["prompt"] == [50, 51, 1, 2]
    assert body["max_tokens"] == 2
    assert output.raw["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def test_a_server_that_does_not_stream_is_understood(script: Callable[..., Script]) -> None:
    with client_of(script(says(ANSWER))) as client:
        assert client.generate("x", {"max_tokens": 4}, resume=True)[0].outputs[0].text == "fine"


def test_a_stream_that_never_ends_after_its_last_token_is_an_answer_and_is_hung_up(
    script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "STREAM_END_S", 0.05)
    server = script(streams(FIRST, token(2, "stop"), ends=False))
    with client_of(server) as client:
        assert client.generate("x", {"max_tokens": 9}, resume=True)[0].outputs[0].token_ids == [1, 2]
        eventually(lambda: server.hung_up == 1, "the connection was closed")


def test_a_stream_read_to_its_end_leaves_its_connection_for_the_next(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, token(2, "stop"), b"[DONE]"))
    with client_of(server) as client:
        for _ in range(5):
            client.generate("x", {"max_tokens": 9}, resume=True)
    assert server.connections == 1


def test_answers_lost_too_often_are_an_error_that_says_so(script: Callable[..., Script]) -> None:
    server = script(says({"error": {"message": "the wheel came off"}}, 503))
    with client_of(server, instance=lambda: "demo-1") as client:
        with pytest.raises(ServerDiedError, match=r"lost 4 times in a row.*the wheel came off") as caught:
            client.generate(["x", "y"], {"max_tokens": 4})
        assert caught.value.index in (0, 1)
        assert caught.value.instance == "demo-1"
        assert caught.value.status == 503
    assert len(server.requests) == 5  # after the first refusal one waits for the other


def test_nobody_there_is_an_error_without_any_deadline() -> None:
    with nobody() as url:
        with VLLMClient(url, "", "m", retry=QUICK) as client:
            with pytest.raises(ServerDiedError, match="lost 4 times in a row"):
                client.generate("x")
        with VLLMClient(url, "", "m", retry=RetryPolicy(max_lost=10_000)) as patient:
            with pytest.raises(RequestTimeoutError):
                patient.generate("x", timeout=0.5)


STUCK: dict[str, Act] = {
    "silent": hangs,
    "a head that drips": drips(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
    "a body that drips": drips(b'HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{"a": '),
    "a stream that drips": drips(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\n:\n\r\n"
    ),
}


@pytest.mark.parametrize("stuck", STUCK)
@pytest.mark.parametrize("resume", [False, True])
def test_the_deadline_holds_whatever_the_server_does(script: Callable[..., Script], stuck: str, resume: bool) -> None:
    with client_of(script(STUCK[stuck])) as client:
        started = time.monotonic()
        with pytest.raises(RequestTimeoutError) as caught:
            client.generate("x", {"max_tokens": 9}, timeout=0.6, resume=resume)
        assert time.monotonic() - started > 0.5
        assert caught.value.index is None


@pytest.mark.parametrize("stuck", STUCK)
def test_close_ends_what_is_in_flight(script: Callable[..., Script], stuck: str) -> None:
    server = script(STUCK[stuck])
    client = VLLMClient(server.url, "key", "m", retry=QUICK)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            client.generate(["x", "y"], {"max_tokens": 9})
        except BaseException as error:
            raised.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: len(server.requests) == 2, "both are in flight")
    client.close()
    asking.join(HANG_S)
    assert isinstance(raised[0], ServerDiedError)
    assert "closed" in str(raised[0])
    with pytest.raises(ServerDiedError, match="closed"):
        client.generate("x")


@pytest.mark.parametrize("status", [400, 404, 422])
def test_what_the_server_refuses_is_not_sent_again(script: Callable[..., Script], status: int) -> None:
    server = script(says({"error": {"message": "no"}}, status))
    with client_of(server) as client, pytest.raises(BadRequestError) as caught:
        client.generate(["x"], {"max_tokens": 4}, resume=True)
    assert (caught.value.status, caught.value.index) == (status, 0)
    assert len(server.requests) == 1


NO_ANSWERS: dict[str, tuple[Act, str]] = {
    "a page": (sends(http(b"<html>login</html>", kind="text/html"), then_closes=False), "no answer: HTTP 200.*login"),
    "text": (sends(http(b"hello"), then_closes=False), "no answer: HTTP 200.*hello"),
    "redirect": (redirects("https://user:word@elsewhere/v1?token=1"), "redirects to https://elsewhere/v1 .HTTP 307"),
    "redirect to nowhere": (says({}, 302), "redirects .HTTP 302"),
    "accepted": (says({}, 202), "no answer: HTTP 202"),
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
@pytest.mark.parametrize("resume", [False, True])
def test_a_redirect_and_what_is_not_json_are_never_asked_for_again(
    script: Callable[..., Script], kind: str, resume: bool
) -> None:
    act, words = NO_ANSWERS[kind]
    server = script(act)
    with client_of(server) as client, pytest.raises(RequestError, match=words) as caught:
        client.generate("x", {"max_tokens": 4, "temperature": 0}, resume=resume)
    assert not isinstance(caught.value, ServerDiedError)
    assert "word" not in str(caught.value)
    assert len(server.requests) == 1


FAULTS: dict[str, Act] = {
    "HTTP 500": says({"error": {"message": "cannot read <_io.BytesIO object at 0x7f01>"}}, 500),
    "an error with HTTP 200": says({"error": {"message": "cannot read", "code": 500}}),
    "no answer in JSON": says({"choices": []}),
}


def _told(server: Script) -> list[str]:
    return [path for path, _ in server.requests if path != "/health"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_fault_twice_of_a_server_that_lives_is_the_requests_own(
    script: Callable[..., Script], fault: str
) -> None:
    server = script(FAULTS[fault], FAULTS[fault], says({}), says(ANSWER))
    with client_of(server) as client:
        with pytest.raises(RequestError, match=r"said twice, by a server that is healthy") as caught:
            client.generate("x", {"max_tokens": 4})
        assert not isinstance(caught.value, ServerDiedError)
        assert client.generate("y", {"max_tokens": 4})[0].attempts == 1
    assert len(_told(server)) == 3


def test_the_same_fault_in_a_stream_twice_is_the_requests_own(script: Callable[..., Script]) -> None:
    fault = streams({"error": {"message": "the grammar refers to itself", "code": 500}}, b"[DONE]")
    server = script(fault, fault, says({}))
    with client_of(server) as client, pytest.raises(RequestError, match="the grammar refers to itself") as caught:
        client.generate("x", {"max_tokens": 4, "temperature": 0}, resume=True)
    assert (caught.value.status, len(_told(server))) == (500, 2)


def test_what_a_stream_refuses_is_not_sent_again(script: Callable[..., Script]) -> None:
    server = script(streams({"error": {"message": "no such grammar", "code": 400}}, b"[DONE]"))
    with client_of(server) as client, pytest.raises(BadRequestError, match="no such grammar"):
        client.generate("x", {"max_tokens": 4, "temperature": 0}, resume=True)
    assert len(server.requests) == 1


def test_faults_that_differ_and_those_of_a_dying_server_are_losses(script: Callable[..., Script]) -> None:
    one, other = (says({"error": {"message": words}}, 500) for words in ("one", "other"))
    sick = says({}, 503)
    with client_of(script(one, other, one, says(ANSWER))) as client:
        assert client.generate("x", {"max_tokens": 4})[0].attempts == 4
    with client_of(script(one, one, sick, one, sick, says(ANSWER))) as client:
        assert client.generate("x", {"max_tokens": 4})[0].attempts == 4


def test_a_busy_server_is_left_alone_for_as_long_as_it_says(script: Callable[..., Script]) -> None:
    busy = sends(http(b'{"error": {"message": "slow down"}}', 429, headers="Retry-After: 1\r\n"), then_closes=False)
    with client_of(script(busy, says(ANSWER))) as client:
        started = time.monotonic()
        assert client.generate("x", {"max_tokens": 4})[0].attempts == 2
        assert time.monotonic() - started >= 1


def test_a_busy_server_that_wants_more_time_than_there_is_ends_the_request_at_once(
    script: Callable[..., Script],
) -> None:
    busy = sends(http(b'{"error": {"message": "slow down"}}', 429, headers="Retry-After: 3000\r\n"), then_closes=False)
    server = script(busy)
    with client_of(server) as client, pytest.raises(ServerBusyError, match=r"3000 s of rest.*slow down") as caught:
        client.generate("x", {"max_tokens": 4}, timeout=30)
    assert (caught.value.status, len(server.requests)) == (429, 1)


def test_what_cannot_be_asked_is_refused_before_anything_is_sent(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    with client_of(server) as client:
        with pytest.raises(BadRequestError, match="can't be resumed: n=2: there are several answers"):
            client.generate("x", {"n": 2}, resume=True)
        with pytest.raises(BadRequestError, match="stream= can't be passed on"):
            client.generate("x", stream=True)  # type: ignore[call-arg]
        with pytest.raises(BadRequestError, match="stream= is not for this client"):
            client.generate("x", extra_body={"stream": True})
        with pytest.raises(BadRequestError, match="can't be written as JSON"):
            client.generate("x", user=object())  # type: ignore[arg-type]
    assert server.requests == []


def test_what_the_route_does_not_know_is_refused_before_anything_is_sent(script: Callable[..., Script]) -> None:
    server = script(says(ANSWER))
    with client_of(server) as client:
        with pytest.raises(UnsupportedParameterError, match="did you mean 'chat_template_kwargs'"):
            client.chat([{"role": "user", "content": "x"}], chat_template_kwarg={})  # type: ignore[call-arg]
        with pytest.raises(UnsupportedParameterError, match="did you mean 'temperature'"):
            client.generate("x", {"temprature": 1})
        assert server.requests == []
        client.generate("x", {"top_k": 3}, add_special_tokens=False, extra_body={"tomorrow": 1})
    sent = server.requests[0][1]
    assert (sent["top_k"], sent["add_special_tokens"], sent["tomorrow"]) == (3, False, 1)


def test_a_server_that_gives_fewer_candidates_is_asked_for_no_more_than_the_caller_wants(
    script: Callable[..., Script],
) -> None:
    top = [{"token": f"token_id:{number}", "logprob": -1.0 * number, "bytes": None} for number in (7, 8)]
    content = [{"token": "token_id:7", "logprob": -1.0, "bytes": [97], "top_logprobs": top}]
    choice = {"index": 0, "message": {"content": "a"}, "token_ids": [7], "logprobs": {"content": content}}
    refusal = "Requested sample logprobs of 3, which is greater than max allowed: 2"
    server = script(says({"error": {"message": refusal}}, 400), says({"id": "1", "choices": [choice]}))
    with client_of(server) as client:
        output = client.chat([{"role": "user", "content": "x"}], {"logprobs": 2, "max_tokens": 1})[0]
    assert [sent["top_logprobs"] for _, sent in server.requests] == [3, 2]
    assert output.attempts == 2
    assert output.outputs[0].logprobs is not None
    assert list(output.outputs[0].logprobs[0]) == [7, 8]


@pytest.mark.parametrize("given", [5, True])
def test_candidates_of_a_chat_as_a_keyword_are_what_they_are_in_sampling_parameters(
    script: Callable[..., Script], given: int
) -> None:
    server = script(says({"id": "1", "choices": [{"index": 0, "message": {"content": "a"}, "token_ids": [7]}]}))
    messages = [{"role": "user", "content": "x"}]
    with client_of(server) as client:
        client.chat(messages, {"logprobs": 5})
        if given is True:
            client.chat(messages, logprobs=True, top_logprobs=6)
        else:
            client.chat(messages, logprobs=given)
        with pytest.raises(BadRequestError, match="give one"):
            client.chat(messages, logprobs=5, top_logprobs=5)
        with pytest.raises(BadRequestError, match="given twice"):
            client.chat(messages, {"logprobs": 2}, logprobs=5)
    asked = [{name: sent[name] for name in ("logprobs", "top_logprobs")} for _, sent in server.requests]
    assert asked == [{"logprobs": True, "top_logprobs": 6}] * 2


@pytest.mark.parametrize("choice", [{}, {"index": 0}, {"index": "x", "text": 5, "logprobs": {"tokens": 3}}, 5])
def test_a_whole_answer_of_another_shape_is_an_error_by_type(script: Callable[..., Script], choice: Any) -> None:
    server = script(says({"id": "1", "choices": [choice]}))
    with client_of(server) as client, pytest.raises(RequestError):
        client.generate("x", {"max_tokens": 4})


# -- deaths ------------------------------------------------------------------------------------------------------------


def client_of_epochs(server: Script, retry: RetryPolicy) -> VLLMClient:
    """A client of a server that is in a new life after each loss."""
    epochs = iter(range(1, 100))
    now = [next(epochs)]

    def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> tuple[Connection, int]:
        if lost == now[0]:
            now[0] = next(epochs)
        return Connection(base_url=f"{server.url}/v1", api_key=Secret(""), model="m"), now[0]

    return VLLMClient(connection=connection, retry=retry)


def test_a_request_under_which_the_server_dies_again_and_again_is_given_up(script: Callable[..., Script]) -> None:
    server = script(sends(b""))
    client = client_of_epochs(server, RetryPolicy(spread_s=0))
    with pytest.raises(
        DeadlyRequestError, match="the server died 2 times under this request; it may be what"
    ) as caught:
        client.generate("x")
    client.close()
    assert (len(server.requests), caught.value.epochs) == (2, (1, 2))


def test_a_generation_that_goes_on_may_lose_its_server_any_number_of_times(script: Callable[..., Script]) -> None:
    parts = [streams(token(number)) for number in range(2, 30)]
    server = script(streams(FIRST), *parts, streams(token(30, "stop")))
    client = client_of_epochs(server, RetryPolicy(spread_s=0))
    output = client.generate("x", {"max_tokens": 99}, resume=True)[0]
    client.close()
    assert output.outputs[0].token_ids == list(range(1, 31))
    assert (output.attempts, output.epoch, output.resumed_tokens) == (30, 30, 29)


def test_a_generation_that_kills_its_server_at_the_same_place_is_given_up(script: Callable[..., Script]) -> None:
    server = script(streams(FIRST, token(2)), sends(b""))
    client = client_of_epochs(server, RetryPolicy(spread_s=0))
    with pytest.raises(DeadlyRequestError, match="died 2 times"):
        client.generate("x", {"max_tokens": 99}, resume=True)
    client.close()
    assert len(server.requests) == 2
