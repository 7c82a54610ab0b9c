"""What the clients of a test talk to: an HTTP server that plays a cassette, records one, or both.

It stands in front of the model server, or in its place, so that everything that is asked over HTTP is covered: every
method of our clients, the OpenAI SDK, and any other program that is given the URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aiohttp import web

from managed_vllm.cassettes import cassette
from managed_vllm.cassettes.cassette import Cassette, Interaction, Response, Server
from managed_vllm.cassettes.player import Player
from managed_vllm.cassettes.requests import canonical
from managed_vllm.errors import CassetteError, CassetteMismatchError, ManagedVLLMError, RequestError
from managed_vllm.loopback import LoopbackServer
from managed_vllm.request.http_errors import NOT_RECORDED
from managed_vllm.request.relay import DONE, RelayedGeneration, error_body, fetch, status_of, words_of

if TYPE_CHECKING:
    from managed_vllm.client import AsyncVLLMClient

Mode = Literal["none", "once", "new_episodes", "all"]
MODES: tuple[Mode, ...] = ("none", "once", "new_episodes", "all")
_GENERATION = ("/v1/chat/completions", "/v1/completions")
_NOT_SENT_ON = ("/health", "/ping")
_LEFT = "when this stream was recorded the client left it here; --managed-vllm-record records it again"
_JSON, _EVENTS = "application/json", "text/event-stream; charset=utf-8"
Upstream = Callable[[], "tuple[AsyncVLLMClient, str]"]


class CassetteServer:
    """Serves one cassette for one model server.

    Args:
        path: the cassette.
        mode: of vcrpy: `none` plays only; `once` plays a cassette that is there, and records one that is not;
            `new_episodes` plays what it has, and records the rest; `all` records everything.
        asked: the model server.
        upstream: gives a client of it and its key, called when it is first needed; may block.

    Raises `CassetteError`: the cassette is damaged, or with `none` missing; `CassetteMismatchError`: it was recorded
    with another server.
    """

    def __init__(self, path: Path, mode: Mode, asked: Server, upstream: Upstream) -> None:
        exists = path.exists()
        if mode == "once":
            mode = "none" if exists else "all"
        if mode == "none" and not exists:
            raise CassetteError(f"there is no cassette {path}; --managed-vllm-record={path} records it", path=str(path))
        self._path = path
        self._mode = mode
        self._asked = asked
        self._find = upstream
        self._lock = threading.Lock()
        self._client: AsyncVLLMClient | None = None
        self._upstream_key = ""
        self._vllm: str | None = None
        self._player: Player | None = None
        self._key = secrets.token_urlsafe(24)
        self._test = ""
        self._tests: set[str] = set()
        self._numbers = itertools.count()
        self._recorded: dict[int, Interaction] = {}
        self._server = LoopbackServer(self._handle, name="cassette")
        if mode != "all" and exists:
            self._player = _player(cassette.read(path), asked, path, mode)

    @property
    def base_url(self) -> str:
        """For clients."""
        return f"{self._server.origin}/v1"

    @property
    def api_key(self) -> str:
        """That they must send."""
        return self._key

    def start(self) -> None:
        """Listens; where everything is recorded, the model server is started, too. Raises what keeps it from that."""
        if self._mode == "all":
            self._upstream()
        self._server.start()

    def begin(self, test: str) -> None:
        """What is asked from now on is of this test; an empty name: of none."""
        self._test = test
        if self._player is not None:
            self._player.begin(test)
        if test:
            self._tests.add(test)
            for number in [number for number, each in self._recorded.items() if each.test == test]:
                del self._recorded[number]  # it runs once more

    def close(self) -> None:
        """Ends it, and writes what was recorded. Raises `CassetteError`."""
        self._server.close()
        if not self._recorded:
            return
        server = Server(self._asked.model, self._asked.arguments, self._vllm)
        recorded = [self._recorded[number] for number in sorted(self._recorded)]
        replaced = self._tests if self._mode == "all" else ()
        cassette.merge(self._path, [server], recorded, replaced, (self._key, self._upstream_key))
        self._recorded.clear()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if not hmac.compare_digest(_key_in(request), self._key.encode()):
            return _refusal(401, "this is not the key of the cassette's server")
        method, path, test = request.method, str(request.rel_url), self._test
        if method == "GET" and path in _NOT_SENT_ON:
            return web.Response()
        body = await request.read()
        asked = canonical(method, path, body)
        found = None if self._player is None else self._player.play(test, asked)
        if found is not None:
            return await _play(request, found)
        if self._mode == "none":
            assert self._player is not None
            return _refusal(NOT_RECORDED, self._player.miss(test, asked).message)
        # Those of the server rather than of a test stand apart.
        recording = _Recording(request, next(self._numbers), "" if method == "GET" else test, asked)
        try:
            client = await asyncio.to_thread(self._upstream)
            response = await recording.passed_on(client.sender, path, body)
        except ManagedVLLMError as error:
            return await recording.failed(error)
        finally:
            if (interaction := recording.interaction(self._asked.id)) is not None:
                self._recorded[recording.number] = interaction
        if self._vllm is None:
            self._vllm = await _version_of(client)
        return response

    def _upstream(self) -> AsyncVLLMClient:
        with self._lock:
            if self._client is None:
                self._client, self._upstream_key = self._find()
            return self._client


class _Recording:
    """One request on its way to the model server, and what came back. `number`: of its arrival."""

    def __init__(self, request: web.Request, number: int, test: str, asked: dict[str, Any]) -> None:
        self.number = number
        self._request = request
        self._test = test
        self._asked = asked
        self._events: list[bytes] = []
        self._stream: web.StreamResponse | None = None
        self._response: Response | None = None

    async def passed_on(self, sender: Any, path: str, body: bytes) -> web.StreamResponse:
        """The response to the client. Raises what the sender raises."""
        asked = self._asked.get("body")
        if self._request.method == "POST" and path in _GENERATION and isinstance(asked, dict) and "sha256" not in asked:
            return await self._generated(sender, RelayedGeneration(path, json.loads(body)))
        found = await fetch(sender, self._request.method, path, self._request.headers.get("Content-Type"), body or None)
        if found.status < 500:
            self._response = Response(found.status, found.content_type, found.body)
        return web.Response(status=found.status, body=found.body, headers={"Content-Type": found.content_type})

    async def _generated(self, sender: Any, generation: RelayedGeneration) -> web.StreamResponse:
        async with contextlib.aclosing(generation.pass_on(sender)) as events:
            async for event in events:
                self._events.append(event)
                if self._stream is None:
                    self._stream = await _begun(self._request, _EVENTS)
                await self._stream.write(b"data: " + event + b"\n\n")
        if self._stream is None:
            assert generation.whole is not None
            self._response = Response(200, _JSON, generation.whole)
            return web.Response(body=generation.whole, headers={"Content-Type": _JSON})
        self._response = Response(200, _EVENTS, events=tuple(self._events))
        await self._stream.write_eof()
        return self._stream

    async def failed(self, error: ManagedVLLMError) -> web.StreamResponse:
        """The response to the client; recorded if it is the server's own word."""
        status = status_of(error)
        body = json.dumps(error_body(status, words_of(error))).encode()
        if self._stream is not None:  # what came of the stream is no answer: the client is told that it broke off
            self._events.clear()
            if self._request.transport is not None:
                self._request.transport.close()
            return self._stream
        if isinstance(error, RequestError) and error.status is not None and status < 500 and status != 429:
            self._response = Response(status, _JSON, body)
        if not isinstance(error, RequestError):
            status = 400  # the model server can't be had: no reason to ask again
        return web.Response(status=status, body=body, headers={"Content-Type": _JSON})

    def interaction(self, server: str) -> Interaction | None:
        """What is to be recorded; of a stream that the client has left, the part that it has got: all, at its end."""
        response = self._response
        if response is None and self._events:
            response = Response(200, _EVENTS, events=tuple(self._events), cut=self._events[-1] != DONE)
        return None if response is None else Interaction(self._test, server, self._asked, response)


async def _play(request: web.Request, found: Response) -> web.StreamResponse:
    if found.events is None:
        return web.Response(status=found.status, body=found.body, headers={"Content-Type": found.content_type})
    stream = await _begun(request, found.content_type)
    events = [*found.events, json.dumps(error_body(NOT_RECORDED, _LEFT)).encode()] if found.cut else found.events
    await stream.write(b"".join(b"data: " + event + b"\n\n" for event in events))
    await stream.write_eof()
    return stream


async def _begun(request: web.Request, content_type: str) -> web.StreamResponse:
    stream = web.StreamResponse(headers={"Content-Type": content_type})
    await stream.prepare(request)
    return stream


async def _version_of(client: AsyncVLLMClient) -> str:
    """vLLM's; empty where the server does not tell."""
    with contextlib.suppress(ManagedVLLMError, ValueError, KeyError, TypeError):
        found = await fetch(client.sender, "GET", "/version", None, None)
        return str(json.loads(found.body)["version"])
    return ""


def _player(found: Cassette, asked: Server, path: Path, mode: Mode) -> Player:
    try:
        server = found.server_for(asked, path)
    except CassetteMismatchError:
        if mode == "none":
            raise
        server = asked.id
    return Player(found, server, str(path))


def _key_in(request: web.Request) -> bytes:
    return request.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="replace")


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response(
        error_body(status, message), status=status, reason="Not Recorded" if status == NOT_RECORDED else None
    )
