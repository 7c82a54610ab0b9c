"""An instant OpenAI-shaped server, so that what a client costs is measured and not what a server does.

    python benchmarks/stub_server.py                 prints its address, serves until SIGTERM
    python benchmarks/stub_server.py --delay 30      each answer comes 30 s after its request

It knows of HTTP/1.1 what the clients need: keep-alive and Content-Length. An answer is made once, at the start: 30
tokens with two candidates each, in the shape of vLLM 0.32 (`return_token_ids`, `return_tokens_as_token_ids`, nulls
included), whatever is asked. A body is counted and thrown away as it comes, so thousands of large ones cost no memory.

`GET /stats` tells connections and requests, as in `Stats`. In a program: `with running(delay_s=0) as address: …`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

MODEL = "stub"
TOKENS = 30
PROMPT_TOKENS = 40
TEXT = (
    *("The", " window", " shows", " a", " form", " with", " three", " fields", ",", " and", " the", " second", " one"),
    *(" is", " empty", ".", " I", " click", " into", " it", " and", " type", " the", " name", " of", " the", " street"),
    *(",", " then", "."),
)
_BACKLOG = 4096


@dataclass
class Stats:
    """What the stub has seen since its start. `connections` are without the one that asks."""

    connections: int = 0
    most_connections: int = 0
    accepted: int = 0
    requests: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    body_bytes: int = 0


# -- the answers -------------------------------------------------------------------------------------------------------


def logprobs() -> list[tuple[float, float]]:
    """Of the sampled token and of the one after it, per token: float32 written as double, as vLLM does."""
    found = []
    for place in range(TOKENS):
        first, second = -0.05 - 0.013 * place, -2.5 - 0.11 * place
        found.append(struct.unpack("ff", struct.pack("ff", first, second)))
    return found


def token_ids() -> list[int]:
    return [1000 + 137 * place for place in range(TOKENS)]


def _candidates() -> list[list[tuple[str, float]]]:
    pairs = zip(token_ids(), logprobs(), strict=True)
    return [[(f"token_id:{token}", one), (f"token_id:{token + 1}", two)] for token, (one, two) in pairs]


def _usage() -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + TOKENS,
        "completion_tokens": TOKENS,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def chat_answer() -> dict[str, Any]:
    content = []
    for text, candidates in zip(TEXT, _candidates(), strict=True):
        top = [{"token": name, "logprob": value, "bytes": list(name.encode())} for name, value in candidates]
        content.append({**top[0], "bytes": list(text.encode()), "top_logprobs": top})
    message: dict[str, Any] = {"role": "assistant", "content": "".join(TEXT)}
    message |= dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": token_ids(),
        "routed_experts": None,
    }
    head = {"id": "chatcmpl-9f6b1f0c2d3e4a5b", "object": "chat.completion", "created": 1767225600, "model": MODEL}
    tail = ("prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics")
    return {
        **head,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": _usage(),
        "prompt_logprobs": None,
        "prompt_token_ids": list(range(500, 500 + PROMPT_TOKENS)),
        **dict.fromkeys(tail),
    }


def completion_answer() -> dict[str, Any]:
    offsets = [sum(map(len, TEXT[:place])) for place in range(TOKENS)]
    candidates = _candidates()
    choice = {
        "index": 0,
        "text": "".join(TEXT),
        "logprobs": {
            "text_offset": offsets,
            "token_logprobs": [first for first, _ in logprobs()],
            "tokens": [one[0][0] for one in candidates],
            "top_logprobs": [dict(one) for one in candidates],
        },
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": token_ids(),
        "prompt_logprobs": None,
        "prompt_token_ids": list(range(500, 500 + PROMPT_TOKENS)),
        "routed_experts": None,
    }
    head = {"id": "cmpl-9f6b1f0c2d3e4a5b", "object": "text_completion", "created": 1767225600, "model": MODEL}
    tail = ("kv_transfer_params", "ec_transfer_params", "metrics")
    return {
        **head,
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": _usage(),
        **dict.fromkeys(tail),
    }


def _models() -> dict[str, Any]:
    card = {"id": MODEL, "object": "model", "created": 1767225600, "owned_by": "vllm", "root": MODEL, "parent": None}
    return {"object": "list", "data": [{**card, "max_model_len": 32768, "permission": []}]}


def _response(body: bytes, status: str = "200 OK") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
    )
    return head.encode() + body


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


GENERATIONS = {
    b"/v1/chat/completions": _response(_json(chat_answer())),
    b"/v1/completions": _response(_json(completion_answer())),
}
OTHERS = {b"/health": _response(b""), b"/v1/models": _response(_json(_models()))}
_NOT_FOUND = _response(
    b'{"error":{"message":"Not Found","type":"NotFoundError","param":null,"code":404}}', "404 Not Found"
)
_LENGTH_REQUIRED = _response(b'{"error":{"message":"the stub wants a Content-Length"}}', "411 Length Required")


# -- the server --------------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection. A client sends its next request only after the answer, as all clients do that don't pipeline."""

    def __init__(self, stats: Stats, delay_s: float) -> None:
        self._stats = stats
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._head = b""
        self._path = b""
        self._body_left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        stats = self._stats
        stats.connections += 1
        stats.accepted += 1
        stats.most_connections = max(stats.most_connections, stats.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stats.connections -= 1

    def data_received(self, data: bytes) -> None:
        if self._body_left:
            self._body_left -= len(data)
            if self._body_left <= 0:
                self._answer()
            return
        data = self._head + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._head = data
            return
        self._head = b""
        head = data[:end].lower()
        self._path = data[data.find(b" ") + 1 : data.find(b" ", data.find(b" ") + 1)]
        at = head.find(b"\r\ncontent-length:")
        if at < 0 and head.startswith(b"post"):
            self._transport.write(_LENGTH_REQUIRED)
            self._transport.close()
            return
        length = 0 if at < 0 else int(head[at + 17 :].partition(b"\r\n")[0])
        self._stats.body_bytes += length
        self._body_left = length - (len(data) - end - 4)
        if self._body_left <= 0:
            self._answer()

    def _answer(self) -> None:
        self._body_left = 0
        answer = GENERATIONS.get(self._path)
        if answer is None:
            self._transport.write(OTHERS.get(self._path) or self._told())
            return
        stats = self._stats
        stats.requests += 1
        stats.in_flight += 1
        stats.most_in_flight = max(stats.most_in_flight, stats.in_flight)
        if self._delay_s:
            self._loop.call_later(self._delay_s, self._write, answer)
        else:
            self._write(answer)

    def _write(self, answer: bytes) -> None:
        self._stats.in_flight -= 1
        if not self._transport.is_closing():
            self._transport.write(answer)

    def _told(self) -> bytes:
        if self._path != b"/stats":
            return _NOT_FOUND
        return _response(_json({**asdict(self._stats), "connections": self._stats.connections - 1}))


async def serve(host: str, port: int, delay_s: float, until_eof: bool) -> None:
    loop = asyncio.get_running_loop()
    stats = Stats()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if until_eof:
        loop.add_reader(sys.stdin.fileno(), ended.set)
    server = await loop.create_server(lambda: Connection(stats, delay_s), host, port, backlog=_BACKLOG)
    address = server.sockets[0].getsockname()
    print(f"http://{address[0]}:{address[1]}", flush=True)
    await ended.wait()
    server.close()


@contextlib.contextmanager
def running(delay_s: float = 0.0) -> Iterator[str]:
    """A stub in a process of its own, at the address that is given; it ends with the block, or with this process."""
    words = [sys.executable, str(Path(__file__).resolve()), "--delay", str(delay_s), "--until-eof"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise RuntimeError("the stub server did not start")
            yield address
        finally:
            process.terminate()


def stats_of(address: str) -> Stats:
    parts = urlsplit(address)
    with contextlib.closing(HTTPConnection(parts.hostname or "", parts.port, timeout=60)) as connection:
        connection.request("GET", "/stats")
        return Stats(**json.loads(connection.getresponse().read()))


def raise_open_files() -> None:
    """To what is allowed: with 4,096 connections the usual 1,024 are not enough."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--delay", type=float, default=0.0, metavar="S", help="seconds before each answer")
    parser.add_argument("--until-eof", action="store_true", help="end when stdin does")
    arguments = parser.parse_args()
    raise_open_files()
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(serve(arguments.host, arguments.port, arguments.delay, arguments.until_eof))


if __name__ == "__main__":
    main()
