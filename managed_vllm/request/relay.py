"""Requests of foreign programs, passed on to our server: what stands between the two sends them by these.

A `RelayedGeneration` is a request to one of the two generation routes. It is asked for again as ours are when its
answer is lost, as long as nothing of it was passed on; the answer is kept as it came, the whole one as its bytes and a
stream event by event. `fetch` is any other request: its response, whatever it says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from managed_vllm.errors import (
    ManagedVLLMError,
    RequestError,
    RequestTimeoutError,
    ServerBusyError,
    ServerDiedError,
    ServerError,
)
from managed_vllm.request.attempts import Sender
from managed_vllm.request.deaths import content_of
from managed_vllm.request.pending import HTTPRequest, RequestStats
from managed_vllm.request.responses import MALFORMED
from managed_vllm.request.retry import AbortedError, ServerFaultError

DONE = b"[DONE]"
"""The last event of a stream."""


class RelayEndedError(Exception):
    """`RelayedGeneration.end` was called."""


class RelayedGeneration:
    """One request to `path`, a generation route, with the body of a foreign program; a `PendingRequest`.

    Attributes:
        whole: the response, where it is no stream.
        stats: how it was served; None until it was.
    """

    optional = False
    kept = 0

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        self._request = HTTPRequest("POST", path, dict(body), stream=bool(body.get("stream")))
        self._events: list[bytes] = []
        self._passed_on = 0
        self._sending: asyncio.Task[RequestStats] | None = None
        self._ended = False
        self.complete = False
        self.broken_off = False
        self.whole: bytes | None = None
        self.stats: RequestStats | None = None

    @property
    def content(self) -> str:
        return content_of(self._request.path, self._request.body)

    @property
    def session(self) -> str | None:
        return self._request.session

    def next(self) -> HTTPRequest:
        return self._request

    def take_headers(self, headers: Mapping[str, str]) -> None:
        """They are not passed on."""

    def take_json(self, data: bytes | None) -> None:
        choices = msgspec.json.decode(data or b"")["choices"]
        _raise_if_aborted(choices)
        self.whole, self.complete = data, True

    def feed(self, event: bytes) -> None:
        if event != DONE:
            _check_event(event)
        self._events.append(event)
        self.complete = event == DONE

    def lost(self) -> bool:
        self.broken_off = self._passed_on > 0
        self._events.clear()
        return False

    def answer(self) -> Mapping[str, Any]:
        if self.whole is None:
            return {}
        found: dict[str, Any] = msgspec.json.decode(self.whole)
        return found

    async def pass_on(self, sender: Sender) -> AsyncGenerator[bytes, None]:
        """Sends it, and yields each event of the stream as it comes; none where the answer is whole.

        Raises what `Sender.send` raises, and `RelayEndedError`.
        """
        news = asyncio.Event()
        self._sending = sending = asyncio.create_task(sender.send(self, None, news.set))
        sending.add_done_callback(lambda _: news.set())
        if self._ended:
            sending.cancel()
        try:
            while self.stats is None:
                await news.wait()
                news.clear()
                if sending.done():
                    if self._ended and sending.cancelled():
                        raise RelayEndedError
                    self.stats = sending.result()
                while self._passed_on < len(self._events):
                    self._passed_on += 1
                    yield self._events[self._passed_on - 1]
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.wait({sending})
            if not sending.cancelled():
                sending.exception()  # asyncio would report one that nobody has seen

    def end(self) -> None:
        """Ends it, in its event loop, and the generation on the server with it."""
        self._ended = True
        if self._sending is not None:
            self._sending.cancel()


def _check_event(event: bytes) -> None:
    """Raises `ResponseLostError` for an error in the stream, or an abort."""
    try:
        chunk = msgspec.json.decode(event)
        choices = chunk.get("choices")
        if choices is None:
            error = chunk.get("error")
            code = error.get("code") if isinstance(error, dict) else None
            said = event[:500].decode(errors="replace")
            raise ServerFaultError(f"in mid-stream: {said}", status=code if type(code) is int else None)
        _raise_if_aborted(choices)
    except MALFORMED as error:
        raise ServerFaultError(f"no part of an answer: {event[:200]!r}") from error


def _raise_if_aborted(choices: Any) -> None:
    if any(choice["finish_reason"] == "abort" for choice in choices if choice.get("finish_reason")):
        raise AbortedError("the server aborted the request")


# -- any request -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole response: `content_type` as the header has it, `body` as it came."""

    status: int
    content_type: str
    body: bytes


async def fetch(sender: Sender, method: str, path: str, content_type: str | None, body: bytes | None) -> Fetched:
    """The server's response to any request. Raises `RequestError`, or what the server ended with."""
    headers = [("Accept-Encoding", "identity")]
    if content_type:
        headers.append(("Content-Type", content_type))
    response, leave = await sender.open(method, path, headers, body, None)
    try:
        data = await response.read()
        return Fetched(response.status, response.headers.get("Content-Type", "application/octet-stream"), data)
    except OSError as error:
        raise ServerDiedError(f"{type(error).__name__}: {error}") from error
    finally:
        response.close() if not response.content.at_eof() else response.release()
        leave()


# -- errors, as a server says them -------------------------------------------------------------------------------------

_KINDS = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}


def status_of(error: ManagedVLLMError) -> int:
    """The HTTP status for an error of ours: that of the server's response, where it comes from one."""
    if isinstance(error, RequestError) and error.status is not None:
        return error.status
    if isinstance(error, ServerBusyError):
        return 429
    if isinstance(error, RequestTimeoutError):
        return 504
    return 503 if isinstance(error, ServerDiedError | ServerError) else 400


def words_of(error: ManagedVLLMError) -> str:
    """What it says; of a server's error response, the server's own words."""
    status = getattr(error, "status", None)
    return error.message.partition(f"HTTP {status}: ")[2] or error.message


def error_body(status: int, message: str, code: str | int | None = None) -> dict[str, Any]:
    """An error in the shape of the OpenAI API, as vLLM writes it."""
    kind = _KINDS.get(status, "InternalServerError" if status >= 500 else "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": None, "code": code or status}}
