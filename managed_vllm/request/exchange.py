"""One HTTP request and its response, which goes to the `PendingRequest` that waits for it, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from managed_vllm.errors import RequestError
from managed_vllm.request.bodies import RequestBody
from managed_vllm.request.connections import ConnectionPool
from managed_vllm.request.http_errors import (
    error_for_status,
    may_be_json,
    message_of,
    retry_after_s,
    unexpected_error,
)
from managed_vllm.request.pending import HTTPRequest, PendingRequest
from managed_vllm.request.responses import MALFORMED, EventDecoder
from managed_vllm.request.retry import ResponseLostError, ServerFaultError
from managed_vllm.status import Connection

Progress = Callable[[], None]

_LOST = (408, 429, 500, 502, 503, 504)
STREAM_END_S = 0.25
"""For what follows the last token of a stream: once it is read to its end, its connection can be used again."""
_MAX_RESPONSE = 1 << 30
"""Bytes. All logprobs of a long answer, with a vocabulary of 150,000, take some hundred million."""


async def open_response(
    pool: ConnectionPool, http: HTTPRequest, body: RequestBody | None, connection: Connection
) -> aiohttp.ClientResponse:
    """Sends a request until its response begins. Raises `ResponseLostError`, or a `RequestError` for good."""
    try:
        return await pool.request(http.method, http.path, body, session=http.session)
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ResponseLostError(f"can't connect to {connection.base_url}: {error}", sent=False) from error
    except (aiohttp.InvalidURL, UnicodeError) as error:
        raise RequestError(f"{connection.base_url} can't be asked: {error}") from error


async def read_response(
    response: aiohttp.ClientResponse,
    http: HTTPRequest,
    request: PendingRequest,
    on_progress: Progress,
    connection: Connection,
) -> bytes | None:
    """Reads a whole response and returns it, or a stream into `request`: None."""
    if not (http.stream and response.status == 200 and response.content_type == "text/event-stream"):
        return await _read_whole(response)
    try:
        await _read_stream(response, request, on_progress)
    except ServerFaultError as error:
        if error.status is not None and 400 <= error.status < 500 and error.status not in _LOST:
            raise error_for_status(error.status, str(error), connection, http.body) from error
        raise
    if not request.complete:
        raise ResponseLostError("the stream ended before the answer did")
    return None


async def _read_whole(response: aiohttp.ClientResponse) -> bytes:
    if response.content_length is not None and response.content_length <= _MAX_RESPONSE:
        return await response.read()
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_RESPONSE:
            response.close()
            raise RequestError(f"the answer is longer than {_MAX_RESPONSE} bytes", status=response.status)
    return b"".join(pieces)


async def _read_stream(response: aiohttp.ClientResponse, request: PendingRequest, on_progress: Progress) -> None:
    """Also reads to the end of the stream, if that comes at once: then the connection can be used again."""
    decoder = EventDecoder()
    content = response.content
    while not request.complete:
        data = await content.readany()
        if not data and content.at_eof():
            return
        for event in decoder.feed(data):
            request.feed(event)
        on_progress()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STREAM_END_S):
            while not content.at_eof():
                await content.readany()


def take_response(
    request: PendingRequest,
    status: int,
    data: bytes,
    connection: Connection,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Gives a whole response to `request`.

    Raises `ResponseLostError`, or the `RequestError` for a request that the server refuses, or that nothing which can
    be understood comes back for; `body` is what was sent.
    """
    headers = headers or {}
    if status in _LOST:
        lost = ServerFaultError if status == 500 else ResponseLostError
        message = f"HTTP {status}: {message_of(data)}"
        raise lost(message, status=status, retry_after_s=retry_after_s(headers.get("Retry-After")))
    if status >= 400:
        if request.optional:
            return request.take_json(None)
        raise error_for_status(status, message_of(data), connection, body)
    if status != 200 and not request.optional:
        raise unexpected_error(status, data, connection, headers.get("Location"))
    try:
        request.take_headers(headers)
        request.take_json(data if status == 200 else None)
    except MALFORMED as error:
        if not may_be_json(data):
            if request.optional:
                return request.take_json(None)
            raise unexpected_error(status, data, connection) from error
        raise ServerFaultError(f"not an answer ({error}): {data[:500]!r}", status=status) from error
