"""The OpenAI SDK on our connections: what its HTTP library calls a transport, for `llm.openai` and `llm.async_openai`.

A request goes to where the server is now, whatever address the SDK's client was made with. One that could not be sent,
or whose connection broke before an answer began, waits for the server to come back and is sent again, as often as the
client's `RetryPolicy` allows; what breaks later is the SDK's to retry (its `max_retries`). The SDK's `timeout=` bounds
the wait for the answer's beginning, and each wait within it.

The SDK has changed its HTTP library from httpx to httpx2; so the classes are made from the module that it uses.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import aiohttp

from managed_vllm.errors import RequestTimeoutError, ServerDiedError
from managed_vllm.request import portal

if TYPE_CHECKING:
    from managed_vllm.request.attempts import Exchange

_OURS = frozenset({b"host", b"content-length", b"connection", b"transfer-encoding"})
"""Headers that are made anew for the connection that a request goes by."""


def async_transport(httpx: ModuleType, exchange: Exchange) -> Any:
    """An `httpx.AsyncBaseTransport`."""

    class Stream(httpx.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, answer: _Answer) -> None:
            self._answer = answer

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while piece := await self._answer.read():
                yield piece

        async def aclose(self) -> None:
            self._answer.close()

    class Transport(httpx.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        async def handle_async_request(self, request: Any) -> Any:
            answer = await _ask(httpx, exchange, request, await request.aread())
            return httpx.Response(answer.status, headers=answer.headers, stream=Stream(answer), request=request)

    return Transport()


def transport(httpx: ModuleType, exchange: Exchange) -> Any:
    """An `httpx.BaseTransport`, which works in the portal's loop."""

    class Stream(httpx.SyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, answer: _Answer) -> None:
            self._answer = answer
            self._where = portal.loop()

        def __iter__(self) -> Iterator[bytes]:
            while piece := portal.run(self._answer.read):
                yield piece

        def close(self) -> None:
            async def close() -> None:
                self._answer.close()

            portal.end(self._where, close)

    class Transport(httpx.BaseTransport):  # type: ignore[name-defined,misc]
        def handle_request(self, request: Any) -> Any:
            body = request.read()
            answer = portal.run(lambda: _ask(httpx, exchange, request, body))
            return httpx.Response(answer.status, headers=answer.headers, stream=Stream(answer), request=request)

    return Transport()


async def _ask(httpx: ModuleType, exchange: Exchange, request: Any, body: bytes) -> _Answer:
    limits = request.extensions.get("timeout") or {}
    headers = [
        (name.decode("ascii"), value.decode("latin-1"))
        for name, value in request.headers.raw
        if name.lower() not in _OURS
    ]
    path = request.url.raw_path.decode("ascii")
    read_s = limits.get("read")
    deadline = None if read_s is None else time.monotonic() + read_s
    with _translated(httpx, request):
        response = await exchange.open(request.method, path, headers, body or None, deadline)
    return _Answer(httpx, exchange, request, response, read_s)


class _Answer:
    """An answer on its way."""

    def __init__(
        self,
        httpx: ModuleType,
        exchange: Exchange,
        request: Any,
        response: aiohttp.ClientResponse,
        read_s: float | None,
    ) -> None:
        self._httpx = httpx
        self._exchange = exchange
        self._request = request
        self._response = response
        self._read_s = read_s
        self.status = response.status
        self.headers = [(bytes(name), bytes(value)) for name, value in response.raw_headers]

    async def read(self) -> bytes:
        """What has come; empty at the end."""
        content = self._response.content
        with _translated(self._httpx, self._request):
            async with self._exchange.bounded(self._read_s):
                data = await content.readany()
                while not data and not content.at_eof():
                    data = await content.readany()
                return data

    def close(self) -> None:
        """Gives the connection back, or closes it where the answer is not at its end: then the server stops, too."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


@contextlib.contextmanager
def _translated(httpx: ModuleType, request: Any) -> Iterator[None]:
    """Errors as the SDK knows them; those of our own that say more pass as they are."""
    try:
        yield
    except (RequestTimeoutError, TimeoutError) as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except ServerDiedError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientError, OSError) as error:
        raise httpx.ReadError(f"{type(error).__name__}: {error}", request=request) from error
