"""Whatever a server says: a right answer or an error by type, within a bound; never half of one, never another type."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis_profiles import examples
from processes import HANG_S
from scripted_server import Script, client_of, stop_listening

from managed_vllm import RetryPolicy, VLLMClient
from managed_vllm.errors import ManagedVLLMError, RequestError, RequestTimeoutError, ServerDiedError
from managed_vllm.masking import Secret
from managed_vllm.request.exchange import take_response
from managed_vllm.request.http_errors import checked_shape
from managed_vllm.request.outputs import CompletionOutput, Logprob, RequestOutput
from managed_vllm.request.pending import RequestStats
from managed_vllm.request.responses import EventDecoder
from managed_vllm.request.resume import Generation
from managed_vllm.request.retry import ResponseLostError
from managed_vllm.status import Connection

HERE = Connection(base_url="http://localhost:1/v1", api_key=Secret(""), model="m")
STATS = RequestStats("m", 1, 1, 0, 0.0, 0.1, None)
QUICK = RetryPolicy(max_lost=3, max_deaths=2, backoff_initial_s=0.001, backoff_max_s=0.001, spread_s=0)

# -- what a right server says: a byte-level tokenizer, whose tokens may end within a character -------------------------

PROMPT = [50, 51]
SPELT = [b"t1", b" ", "é".encode()[:1], "é".encode()[1:], *(bytes([one]) for one in "😀".encode()), b" end"]
IDS = list(range(1, len(SPELT) + 1))
TEXT = b"".join(SPELT).decode()


def pieces() -> list[str]:
    """The text that comes with each token: vLLM holds it back until a character is whole."""
    found, held = [], b""
    for spelt in SPELT:
        held += spelt
        try:
            found.append(held.decode())
            held = b""
        except UnicodeDecodeError:
            found.append("")
    return found


def logprobs_of(ids: list[int], *, chat: bool) -> dict[str, Any]:
    def one(token: int, value: float) -> dict[str, Any]:
        spelt = SPELT[token - 1] if token in IDS else b"?"
        return {"token": f"token_id:{token}", "logprob": value, "bytes": list(spelt)}

    if chat:
        return {"content": [{**one(i, -0.5), "top_logprobs": [one(i, -0.5), one(i + 20, -1.25)]} for i in ids]}
    return {
        "text_offset": [0] * len(ids),
        "tokens": [f"token_id:{i}" for i in ids],
        "token_logprobs": [-0.5 for _ in ids],
        "top_logprobs": [{f"token_id:{i}": -0.5, f"token_id:{i + 20}": -1.25} for i in ids],
    }


def whole(*, chat: bool) -> dict[str, Any]:
    """An unstreamed answer with all there is."""
    choice: dict[str, Any] = {"index": 0, "logprobs": logprobs_of(IDS, chat=chat), "finish_reason": "stop"}
    choice |= {"stop_reason": None, "token_ids": IDS, "routed_experts": None}
    answer: dict[str, Any] = {"id": "cmpl-1", "object": "x", "created": 1, "model": "m", "choices": [choice]}
    answer |= {"usage": {"prompt_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}, "metrics": {"a": 1.0}}
    prompt_logprobs = [None, {"51": {"logprob": -1.5, "rank": 3, "decoded_token": "x"}}]
    if chat:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        choice["message"] = {"role": "assistant", "content": TEXT, "reasoning": "hm", "tool_calls": [call]}
        answer |= {"prompt_token_ids": PROMPT, "prompt_text": "p", "prompt_logprobs": prompt_logprobs}
    else:
        choice |= {"text": TEXT, "prompt_token_ids": PROMPT, "prompt_logprobs": prompt_logprobs}
    return answer


def event(ids: list[int], text: str, finish: str | None, *, chat: bool, first: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "token_ids": ids, "finish_reason": finish, "stop_reason": None}
    choice["logprobs"] = logprobs_of(ids, chat=chat)
    answer: dict[str, Any] = {"id": "cmpl-1", "created": 1, "model": "m", "choices": [choice]}
    if chat:
        choice["delta"] = {"content": text}
    else:
        choice["text"] = text
    if first:
        (answer if chat else choice)["prompt_token_ids"] = PROMPT
    return answer


def stream_of(start: int = 0, *, chat: bool, step: int = 1) -> list[dict[str, Any]]:
    """The events from the token `start` on, `step` tokens in each."""
    texts = pieces()
    found = []
    for at in range(start, len(IDS) + (start == len(IDS)), step):
        ids, text = IDS[at : at + step], "".join(texts[at : at + step])
        finish = "stop" if at + step >= len(IDS) else None
        found.append(event(ids, text, finish, chat=chat, first=at == start))
    if chat:
        head = event([], "", None, chat=True, first=True)
        head["choices"][0] |= {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "token_ids": None}
        found.insert(0, head)
    return found


def body_of(*, chat: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    params = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 1}
    return {**asked, **params, "max_tokens": 40, "temperature": 0, "return_tokens_as_token_ids": True}


# -- what an output must be --------------------------------------------------------------------------------------------


def check(output: RequestOutput) -> None:
    """Each value is of the type that outputs.py declares; and there is an answer in it."""
    assert type(output.request_id) is str
    assert output.prompt is None or type(output.prompt) is str
    check_ids(output.prompt_token_ids)
    assert type(output.outputs) is list
    assert output.outputs
    if output.prompt_logprobs is not None:
        check_places(output.prompt_logprobs, none=True)
    for mapping in (output.metrics, output.kv_transfer_params, output.ec_transfer_params):
        assert mapping is None or type(mapping) is dict
    assert output.num_cached_tokens is None or type(output.num_cached_tokens) is int
    assert type(output.model) is str
    for one in output.outputs:
        check_completion(one)
        if output.finished and one.text == "" and not one.token_ids:
            choice = next(choice for choice in output.raw["choices"] if choice["index"] == one.index)
            message = choice.get("message") or {}
            said = choice.get("text"), message.get("content"), message.get("refusal")
            assert any(part is not None for part in said) or one.reasoning or one.tool_calls, output.raw


def check_ids(ids: Any) -> None:
    assert type(ids) is list
    assert all(type(one) is int for one in ids)


def check_places(places: Any, *, none: bool) -> None:
    assert type(places) is list
    for place in places:
        if none and place is None:
            continue
        assert type(place) is dict
        for token, value in place.items():
            assert type(token) is int
            assert type(value) is Logprob
            assert type(value.logprob) is float
            assert not math.isnan(value.logprob)
            assert value.rank is None or type(value.rank) is int
            assert value.decoded_token is None or type(value.decoded_token) is str


def check_completion(one: CompletionOutput) -> None:
    assert type(one.index) is int
    assert type(one.text) is str
    one.text.encode()
    check_ids(one.token_ids)
    assert one.cumulative_logprob is None or type(one.cumulative_logprob) is float
    if one.logprobs is not None:
        check_places(one.logprobs, none=False)
        assert len(one.logprobs) == len(one.token_ids)
    assert one.finish_reason is None or type(one.finish_reason) is str
    assert one.stop_reason is None or type(one.stop_reason) in (int, str)
    assert one.reasoning is None or type(one.reasoning) is str
    assert type(one.tool_calls) is list
    assert all(type(call) is dict for call in one.tool_calls)
    assert one.routed_experts is None or type(one.routed_experts) is str


def output_of(answer: Any, body: dict[str, Any], stats: RequestStats | None, *, chat: bool) -> RequestOutput:
    """As the client does it."""
    with checked_shape(answer):
        return RequestOutput.from_response(answer, body, stats, chat=chat, logprobs=1)


# -- mutations ---------------------------------------------------------------------------------------------------------

STRANGE: st.SearchStrategy[Any] = st.sampled_from(
    [
        *(None, True, False, 0, -1, 7, 2**63, 10**30, 0.5, 1e308, -1e308, "", "x", "token_id:", "token_id:x", "7", "é"),
        *("token_id:99999999999999999999", "token_id:²", "abort", "x" * 3000, [], {}, [None], [[]], [{}], [1, "a"]),
        *([True], {"x": 1}, {"index": 0}, {"logprob": "x"}, {"token_id:1": None}, [1.5], "\ufffd", {"content": None}),
    ]
)


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places_in(inner, (*path, key))


def mutate(data: st.DataObject, value: Any, most: int = 3) -> Any:
    """A copy with some values changed, gone, doubled, or in another order."""
    found = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, most))):
        paths = list(places_in(found))
        if not paths:
            break
        path = data.draw(st.sampled_from(paths))
        holder = found
        for key in path[:-1]:
            holder = holder[key]
        how = data.draw(st.sampled_from(["set", "set", "drop", "double", "reverse", "rename"]))
        key = path[-1]
        if how == "set":
            holder[key] = copy.deepcopy(data.draw(STRANGE))
        elif how == "drop":
            del holder[key]
        elif how == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == "reverse" and isinstance(holder, list):
            holder.reverse()
        elif how == "rename" and isinstance(holder, dict):
            holder[data.draw(st.sampled_from(["text", "content", "message", "delta", "index", "x"]))] = holder.pop(key)
    return found


def mutated_answer(data: st.DataObject) -> None:
    chat = data.draw(st.booleans())
    answer = mutate(data, whole(chat=chat))
    body = body_of(chat=chat)
    generation = Generation("/chat/completions" if chat else "/completions", body, stream=False)
    generation.next()
    with contextlib.suppress(ResponseLostError, RequestError):
        take_response(generation, 200, json.dumps(answer).encode(), HERE)
        assert generation.complete
        check(output_of(generation.whole or generation.answer(), body, STATS, chat=chat))


def mutated_stream(data: st.DataObject) -> None:
    """A stream of mutated events, cut anywhere; then the rest, mutated as well; then a right whole answer."""
    chat = data.draw(st.booleans())
    body = body_of(chat=chat)
    generation = Generation("/chat/completions" if chat else "/completions", body, stream=True)
    cuts = data.draw(st.lists(st.integers(0, 12), max_size=3))
    for life in range(40):
        step = generation.next()
        try:
            if step.path == "/detokenize":
                assert step.body is not None
                check_ids(step.body["tokens"])
                said = data.draw(STRANGE) if life < 6 else "x"
                take_response(generation, 200, json.dumps({"prompt": said}).encode(), HERE)
            elif step.path == "/v1/models":
                take_response(
                    generation, 200, json.dumps(mutate(data, {"data": [{"max_model_len": 99}]})).encode(), HERE
                )
            elif not step.stream:
                take_response(generation, 200, json.dumps(whole(chat=chat)).encode(), HERE)
            else:
                assert step.body is not None
                resumed = step.path == "/v1/completions" and isinstance(step.body.get("prompt"), list)
                start = min(len(IDS), len(step.body["prompt"]) - len(PROMPT)) if resumed else 0
                width = data.draw(st.integers(1, 3))
                events = stream_of(max(0, start), chat=chat and not resumed, step=width)
                if life < 4 and data.draw(st.booleans()):
                    events = mutate(data, events)
                for one in events[: cuts.pop() if cuts else None]:
                    generation.feed(json.dumps(one).encode())
                    part = generation.new_part()
                    if part is not None:
                        check(output_of(part, body, None, chat=chat))
                if not generation.complete:
                    raise ResponseLostError("the stream ended")
        except ResponseLostError:
            generation.lost()
        except RequestError:
            return
        if generation.complete:
            break
    assert generation.complete
    with contextlib.suppress(RequestError):
        check(output_of(generation.whole or generation.answer(), body, STATS, chat=chat))


def right_stream_however_it_is_cut(data: st.DataObject) -> None:
    """Events that are right, and lost anywhere: the answer is exactly the right one, each part of it once."""
    chat = data.draw(st.booleans())
    body = body_of(chat=chat)
    generation = Generation("/chat/completions" if chat else "/completions", body, stream=True)
    cuts = data.draw(st.lists(st.integers(0, 12), max_size=5))
    parts: list[RequestOutput] = []
    while not generation.complete:
        step = generation.next()
        assert step.body is not None
        if step.path == "/detokenize":
            said = b"".join(SPELT[one - 1] for one in step.body["tokens"]).decode(errors="replace")
            take_response(generation, 200, json.dumps({"prompt": said}).encode(), HERE)
            continue
        resumed = isinstance(step.body.get("prompt"), list)
        start = len(step.body["prompt"]) - len(PROMPT) if resumed else 0
        events = stream_of(start, chat=chat and not resumed, step=data.draw(st.integers(1, 4)))
        for one in events[: cuts.pop() if cuts else None]:
            generation.feed(json.dumps(one).encode())
            # `feed` may have completed it, which mypy does not see.
            if not generation.complete and (part := generation.new_part()) is not None:  # type: ignore[redundant-expr]
                parts.append(output_of(part, body, None, chat=chat))
        if not generation.complete:
            generation.lost()
            assert not generation.broken_off
    last = generation.new_part()
    if last is not None:
        parts.append(output_of(last, body, STATS, chat=chat))
    output = output_of(generation.whole or generation.answer(), body, STATS, chat=chat)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == (TEXT, IDS)
    assert output.prompt_token_ids == PROMPT
    assert "".join(part.outputs[0].text for part in parts) == TEXT
    assert [one for part in parts for one in part.outputs[0].token_ids] == IDS
    assert output.outputs[0].logprobs is not None
    assert [next(iter(place)) for place in output.outputs[0].logprobs] == IDS
    check(output)


def events_of(raw: bytes, sizes: list[int]) -> list[bytes]:
    events, at = EventDecoder(), 0
    found: list[bytes] = []
    for size in [*sizes, len(raw)]:
        found += events.feed(raw[at : at + size])
        at += size
    return found


def any_spelling_of_events(data: st.DataObject) -> None:
    wanted = [json.dumps(one, ensure_ascii=False).encode() for one in stream_of(chat=False)]
    end = data.draw(st.sampled_from([b"\n", b"\r\n"]))
    raw = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    for one in wanted:
        raw += data.draw(st.sampled_from([b"", b": ping" + end, b":" + end + end, b"event: x" + end, b"id: 5" + end]))
        raw += data.draw(st.sampled_from([b"data: ", b"data:"])) + one + end
        raw += data.draw(st.sampled_from([b"", b"retry: 5" + end])) + end
    sizes = data.draw(st.lists(st.integers(0, 40), max_size=60))
    assert events_of(raw, sizes) == wanted
    for at in data.draw(st.lists(st.integers(0, len(raw)), max_size=10)):
        assert events_of(raw, [at]) == wanted


# -- the same over HTTP ------------------------------------------------------------------------------------------------


class Damaged:
    """A right server; but what it answers to the first `damage` requests is made wrong by these functions."""

    def __init__(self) -> None:
        self.damage: list[Callable[[bytes], bytes]] = []
        self.framing = "length"
        self.sizes: list[int] = []
        self.requests = 0
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, client.makefile("rb") as file:
            while line := file.readline():
                size = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    if found := re.match(rb"content-length: (\d+)", header, re.IGNORECASE):
                        size = int(found[1])
                body = json.loads(file.read(size) or b"null")
                if line.startswith(b"GET "):  # /health
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    continue
                self.requests += 1
                data, ends = self._answer(line.split()[1].decode(), body)
                if self.damage:
                    data, ends = self.damage.pop(0)(data), True
                at = 0
                for size in self.sizes:
                    client.sendall(data[at : at + size])
                    at += size
                client.sendall(data[at:])
                if ends:
                    client.shutdown(socket.SHUT_WR)
                    return

    def _answer(self, path: str, body: Any) -> tuple[bytes, bool]:
        chat = path.endswith("/chat/completions")
        kind = b"application/json"
        if path == "/detokenize":
            said = b"".join(SPELT[one - 1] for one in body["tokens"]).decode(errors="replace")
            content = [json.dumps({"prompt": said}).encode()]
        elif body.get("stream"):
            kind = b"text/event-stream"
            resumed = isinstance(body.get("prompt"), list)
            events = stream_of(len(body["prompt"]) - len(PROMPT) if resumed else 0, chat=chat)
            lines = [b"data: " + json.dumps(one, ensure_ascii=False).encode() + b"\n\n" for one in events]
            content = [*lines, b"data: [DONE]\n\n"]
        else:
            content = [json.dumps(whole(chat=chat), ensure_ascii=False).encode()]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: " + kind + b"\r\n"
        if self.framing == "chunked":
            chunks = [b"%x\r\n%b\r\n" % (len(one), one) for one in content]
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks) + b"0\r\n\r\n", False
        joined = b"".join(content)
        if self.framing == "length":
            return head + b"Content-Length: %d\r\n\r\n" % len(joined) + joined, False
        return head + b"\r\n" + joined, True

    def close(self) -> None:
        stop_listening(self._socket)


@pytest.fixture(scope="module")
def server() -> Iterator[Damaged]:
    made = Damaged()
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(server: Damaged) -> Iterator[VLLMClient]:
    made = VLLMClient(server.url, "", "m", retry=QUICK)
    yield made
    made.close()


MESSAGES = [{"role": "user", "content": "x"}]


def ask(client: VLLMClient, *, chat: bool, resume: bool = False, **options: Any) -> RequestOutput:
    """One request. It is answered, or an error is raised: it does not hang."""
    params = {"max_tokens": 40, "temperature": 0, "logprobs": 1}
    options = {"timeout": HANG_S, "resume": resume, **options}
    try:
        output = client.chat(MESSAGES, params, **options)[0] if chat else client.generate("x", params, **options)[0]
    except RequestTimeoutError:
        pytest.fail("the client hangs")
    check(output)
    return output


def right(output: RequestOutput) -> bool:
    return (output.outputs[0].text, output.outputs[0].token_ids) == (TEXT, IDS)


def cut_anywhere(data: st.DataObject, server: Damaged, client: VLLMClient) -> None:
    """Cut at any byte of head or body, once: the answer is right, in the second attempt, or resumed."""
    server.framing = data.draw(st.sampled_from(["length", "chunked", "close"]))
    server.sizes = data.draw(st.lists(st.integers(1, 300), max_size=4))
    at = data.draw(st.floats(0, 1))
    server.damage = [lambda raw: raw[: int(at * len(raw))]]
    chat, resume = data.draw(st.booleans()), data.draw(st.booleans())
    output = ask(client, chat=chat, resume=resume)
    assert right(output)
    if resume:
        assert output.outputs[0].logprobs is not None
        assert [next(iter(place)) for place in output.outputs[0].logprobs] == IDS


def damaged_anywhere(data: st.DataObject, server: Damaged, client: VLLMClient) -> None:
    """Bytes changed, put in, or left out, in each attempt: right types, or an error by type."""
    server.framing = data.draw(st.sampled_from(["length", "chunked", "close"]))
    server.sizes = data.draw(st.lists(st.integers(1, 300), max_size=3))
    junk = st.binary(max_size=6) | st.sampled_from(
        [
            b"\r\n",
            b"\n\n",
            b"0\r\n\r\n",
            b"data: ",
            b"[DONE]",
            b'"',
            b"{",
            b"}",
            b"\xff",
            b"\x00",
            b"\xef\xbb\xbf",
            b"null",
        ]
    )
    places = data.draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), junk), min_size=1, max_size=4))

    def damage(raw: bytes) -> bytes:
        for at, gone, put in places:
            start = int(at * len(raw))
            raw = raw[:start] + put + raw[start + gone :]
        return raw

    server.damage = [damage] * data.draw(st.integers(1, 4))
    with contextlib.suppress(ManagedVLLMError):
        ask(client, chat=data.draw(st.booleans()), resume=data.draw(st.booleans()))
    server.damage = []


def strange_head(data: st.DataObject, server: Damaged, client: VLLMClient) -> None:
    """Any status and headers that don't fit, before a right body."""
    status = data.draw(
        st.sampled_from([b"100", b"101", b"102", b"103", b"199", b"200", b"201", b"204", b"205", b"206"])
        | st.sampled_from([b"300", b"301", b"302", b"304", b"307", b"400", b"404", b"418", b"429", b"500", b"501"])
        | st.sampled_from([b"599", b"600", b"999", b"000", b"20", b"2000", b"abc", b"-1", b""])
    )
    header = st.sampled_from(
        [
            *(b"Content-Length: 0", b"Content-Length: 5", b"Content-Length: 99999999", b"Content-Length: -1"),
            *(b"Content-Length: abc", b"Content-Length: 5, 6", b"Content-Length: 99999999999999999999999"),
            *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: identity, chunked"),
            *(b"Content-Encoding: gzip", b"Content-Encoding: br", b"Content-Encoding: nonsense", b"Content-Type:"),
            *(b"Content-Type: text/event-stream", b"Content-Type: \xff\xfe", b"Content-Type: a/b; charset=nonsense"),
            *(b"Location: /x", b"Location: \xff", b"Set-Cookie: a=b; c", b"Connection: close", b"Connection: upgrade"),
            *(b"Upgrade: websocket", b": no name", b"no colon", b" folded", b"X: " + b"y" * 70_000, b"X\x00: 1"),
            *(b"X: \x00", b"\xc3\xa9: 1", b"X : 1", b"Trailer: X", b"Retry-After: soon", b"Link: <x", b"Keep-Alive: x"),
        ]
    )
    headers = data.draw(st.lists(header, max_size=3))
    version = data.draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2", b"HTTP/9.9", b"ICY", b""]))
    server.framing = "close"
    server.sizes = []

    def damage(raw: bytes) -> bytes:
        _, _, rest = raw.partition(b"\r\n")
        return b"\r\n".join([version + b" " + status + b" X", *headers, rest])

    server.damage = [damage] * 4
    with contextlib.suppress(ManagedVLLMError):
        output = ask(client, chat=data.draw(st.booleans()), resume=data.draw(st.booleans()))
        assert right(output)
    server.damage = []


# -- tests -------------------------------------------------------------------------------------------------------------

ALONE = [mutated_answer, mutated_stream, right_stream_however_it_is_cut, any_spelling_of_events]
OVER_HTTP = [cut_anywhere, damaged_anywhere, strange_head]


def play(check: Callable[..., None], count: int, *arguments: Any) -> None:
    """Runs the property for so many examples."""

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data: st.DataObject) -> None:
        check(data, *arguments)

    one()


@pytest.mark.no_cover
@pytest.mark.parametrize("check", ALONE, ids=lambda check: check.__name__)
def test_without_a_network(check: Callable[..., None]) -> None:
    play(check, examples(100))


@pytest.mark.parametrize("check", OVER_HTTP, ids=lambda check: check.__name__)
def test_over_http(server: Damaged, client: VLLMClient, check: Callable[..., None]) -> None:
    play(check, examples(50), server, client)
    server.damage = []
    assert right(ask(client, chat=True))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("check", ALONE, ids=lambda check: check.__name__)
def test_without_a_network_for_long(check: Callable[..., None]) -> None:
    play(check, 20_000)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("check", OVER_HTTP, ids=lambda check: check.__name__)
def test_over_http_for_long(server: Damaged, client: VLLMClient, check: Callable[..., None]) -> None:
    play(check, 5_000, server, client)


@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_no_beginning_of_an_answer_is_an_answer(chat: bool) -> None:
    data = json.dumps(whole(chat=chat), ensure_ascii=False).encode()
    body = body_of(chat=chat)
    for end in range(len(data)):
        generation = Generation("/chat/completions" if chat else "/completions", body, stream=False)
        generation.next()
        with pytest.raises(ResponseLostError):
            take_response(generation, 200, data[:end], HERE)
    take_response(generation, 200, data, HERE)
    assert right(output_of(generation.whole, body, STATS, chat=chat))


def chat_with(message: Any, **choice: Any) -> bytes:
    return json.dumps(
        {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}
    ).encode()


WRONG: dict[str, bytes] = {
    "nothing": b"",
    "spaces": b"   \r\n",
    "null": b"null",
    "a text": b'"fine"',
    "an error": b'{"error": {"message": "x", "code": 500}}',
    "an error as text": b'{"error": "x"}',
    "BOM": b"\xef\xbb\xbf" + json.dumps(whole(chat=True)).encode(),
    "UTF-16": json.dumps(whole(chat=True)).encode("utf-16"),
    "not UTF-8": chat_with({"content": "@"}).replace(b"@", b"\xff\xfe"),
    "half a surrogate": chat_with({"content": "\ud800"}),
    "NaN": chat_with({"content": "a"}, x=float("nan")),
    "two answers": json.dumps(whole(chat=True)).encode() * 2,
    "deep": b"[" * 100_000,
    "deep inside": chat_with({"content": "a"}, x=5).replace(b'"x": 5', b'"text": ' + b'{"a":' * 100_000),
    "a deep token": chat_with({"content": "a"}, token_ids="@").replace(b'"@"', b"[" * 100_000 + b"]" * 100_000),
    "a number of 100,000 digits": chat_with({"content": "a"}, token_ids="@").replace(
        b'"@"', b"[1" + b"0" * 100_000 + b"]"
    ),
    "a number beyond floats": chat_with({"content": "a"}, index="@").replace(b'"@"', b"1e999"),
    "no content": chat_with({"role": "assistant"}),
    "content null": chat_with({"role": "assistant", "content": None}),
    "content null, not finished": chat_with({"role": "assistant", "content": None}, finish_reason=None),
    "content null, no tokens": chat_with({"content": None, "tool_calls": [], "reasoning": ""}, token_ids=[]),
    "no message": b'{"id": "1", "choices": [{"index": 0, "finish_reason": "stop"}]}',
    "message null": chat_with(None),
    "a completion": json.dumps(whole(chat=False)).encode(),
    "choices null": b'{"choices": null}',
    "a choice null": b'{"choices": [null]}',
    "a text of a number": chat_with({"content": 5}),
    "tokens of True": chat_with({"content": "a"}, token_ids=[True]),
    "tokens of fractions": chat_with({"content": "a"}, token_ids=[1.5]),
    "tokens as a text": chat_with({"content": "a"}, token_ids="12"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_what_is_no_answer_is_an_error_by_type(server: Damaged, client: VLLMClient, case: str, framing: str) -> None:
    server.framing, server.sizes = "length", []
    body = WRONG[case]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    if framing == "length":
        raw = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    else:
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        raw = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"0\r\n\r\n"
    server.damage = [lambda _: raw] * 4
    with pytest.raises(RequestError) as caught:
        ask(client, chat=True)
    server.damage = []
    assert len(str(caught.value)) < 3000


RIGHT: dict[str, tuple[bytes, str, int]] = {
    "an empty text": (chat_with({"content": ""}), "", 0),
    "tool calls alone": (chat_with({"content": None, "tool_calls": [{"id": "c"}]}), "", 0),
    "reasoning alone": (chat_with({"content": None, "reasoning": "hm"}), "", 0),
    "a refusal": (chat_with({"content": None, "refusal": "no"}), "", 0),
    "an end at once": (chat_with({"content": None}, token_ids=[2]), "", 1),
    "a large number": (chat_with({"content": "a"}, token_ids=[2**40]), "a", 1),
    "what nobody knows": (chat_with({"content": "a", "x": {"y": [1]}}, z=None), "a", 0),
    "whole numbers as logprobs": (
        chat_with({"content": "a"}, token_ids=[7], logprobs={"content": [{"token": "a", "logprob": -1}]}),
        "a",
        1,
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_an_answer_is_one(server: Damaged, client: VLLMClient, case: str) -> None:
    body, text, tokens = RIGHT[case]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    server.framing, server.sizes, server.damage = "length", [], [lambda _: head + body]
    output = ask(client, chat=True)
    assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == (text, tokens)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BAD_CHUNKS: dict[str, bytes] = {
    "no size": b"zz\r\nabc\r\n",
    "longer than its size": b"5\r\nabcdefgh\r\n0\r\n\r\n",
    "shorter than its size": b"9\r\nabc\r\n0\r\n\r\n",
    "negative": b"-5\r\nabc\r\n",
    "enormous": b"f" * 40 + b"\r\nabc\r\n",
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_a_chunk_that_is_none_is_a_loss_also_when_it_comes_late(case: str, kind: bytes) -> None:
    """aiohttp 3.14 leaves who reads the body waiting for ever, if the head came before."""

    def act(client: socket.socket) -> None:
        client.sendall(CHUNKED.replace(b"application/json", kind))
        time.sleep(0.05)
        client.sendall(BAD_CHUNKS[case])
        client.shutdown(socket.SHUT_WR)

    server = Script(act)
    with client_of(server, QUICK) as client:
        with pytest.raises(ServerDiedError, match="lost 3 times"):
            client.generate("x", {"max_tokens": 4}, timeout=HANG_S, resume=kind != b"application/json")
    server.close()


def sse(*events: Any, end: bytes = b"\n\n") -> bytes:
    lines = [b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) for one in events]
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"".join(line + end for line in lines)


BEGINNING = stream_of(chat=False)[:3]
WRONG_STREAMS: dict[str, bytes] = {
    "an error inside": sse(*BEGINNING, {"error": {"message": "x", "code": 500}}, b"[DONE]"),
    "an error at once": sse({"error": {"message": "x", "code": 500}}),
    "nothing": sse(),
    "done at once": sse(b"[DONE]"),
    "done early": sse(*BEGINNING, b"[DONE]"),
    "deep": sse(*BEGINNING, b"[" * 100_000),
    "deep inside": sse(*BEGINNING, b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a large number": sse(
        *BEGINNING, b'{"choices": [{"index": 0, "text": "a", "token_ids": [1' + b"0" * 5000 + b"]}]}"
    ),
    "not UTF-8": sse(*BEGINNING, b'{"choices": [{"text": "\xff\xfe", "token_ids": [1]}]}'),
    "half a surrogate": sse(*BEGINNING, b'{"choices": [{"text": "\\ud800", "token_ids": [1]}]}'),
    "NaN": sse(*BEGINNING, b'{"choices": [{"text": "a", "token_ids": [NaN]}]}'),
    "lines without an end": sse(*BEGINNING) + b"data: " + b"x" * 3_000_000,
    "CR only": sse(*stream_of(chat=False), end=b"\r\r"),
}


@pytest.mark.parametrize("case", WRONG_STREAMS)
@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
def test_what_is_no_stream_is_lost_and_no_more(server: Damaged, client: VLLMClient, case: str, always: bool) -> None:
    server.framing, server.sizes = "length", []
    server.damage = [lambda _: WRONG_STREAMS[case]] * (50 if always else 1)
    if not always:
        assert right(ask(client, chat=False, resume=True))
    elif WRONG_STREAMS[case].startswith(sse(*BEGINNING)):  # each attempt gets some tokens further
        begun = [one for event in BEGINNING for choice in event["choices"] for one in choice.get("token_ids") or []]
        found = ask(client, chat=False, resume=True).outputs[0].token_ids
        assert found == (begun[:-1] * 40)[:40]  # the last one may have been cut
    else:
        with pytest.raises(RequestError):
            ask(client, chat=False, resume=True)
    server.damage = []
