"""The OpenAI SDK's clients on our connections, for `llm.openai` and `llm.async_openai`.

A request goes to where the server is now, though the SDK's client was made with the address of a while ago; one for
another address (`with_options(base_url=…)`) goes there, by the SDK's own connections. A request that could not be
sent, or whose connection broke before a response began, waits for the server to come back and is sent again, as often
as the client's `RetryPolicy` allows. What breaks later is left to the SDK's `max_retries`. The SDK's `timeout=` limits
the wait for the beginning of the response, and each wait within it.

The SDK has changed its HTTP library from httpx to httpx2; so the classes are made from the module that it uses.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

import aiohttp

from managed_vllm.errors import RequestTimeoutError, ServerDiedError
from managed_vllm.request import portal
from managed_vllm.request.attempts import Sender
from managed_vllm.status import Connection

_SET_BY_US = frozenset({b"host", b"content-length", b"connection", b"transfer-encoding"})
"""Headers that depend on the connection by which a request goes."""


def make_client(kind: str, connection: Connection, sender: Sender) -> Any:
    """An `openai.OpenAI` or `openai.AsyncOpenAI` (`kind`) that sends by `sender`, without a time-out of its own."""
    sdk = importlib.import_module("openai")
    http_client = getattr(sdk, "DefaultHttpxClient" if kind == "OpenAI" else "DefaultAsyncHttpxClient")
    httpx = importlib.import_module(http_client.__mro__[1].__module__.partition(".")[0])
    ours = httpx.URL(connection.base_url)
    transport = _transport(httpx, sender, ours) if kind == "OpenAI" else _async_transport(httpx, sender, ours)
    return getattr(sdk, kind)(
        base_url=connection.base_url,
        api_key=connection.api_key.reveal() or "none",
        timeout=None,
        http_client=http_client(transport=transport, trust_env=False),
    )


def _elsewhere(url: Any, ours: Any) -> bool:
    """Whether it is the address of another server."""
    return (url.scheme, url.host, url.port) != (ours.scheme, ours.host, ours.port)


def _async_transport(httpx: ModuleType, sender: Sender, ours: Any) -> Any:
    """An `httpx.AsyncBaseTransport`."""

    class Stream(httpx.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, body: _ResponseBody) -> None:
            self._body = body

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while piece := await self._body.read():
                yield piece

        async def aclose(self) -> None:
            self._body.close()

    class Transport(httpx.AsyncBaseTransport):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self._others: Any = None

        async def handle_async_request(self, request: Any) -> Any:
            if _elsewhere(request.url, ours):
                self._others = self._others or httpx.AsyncHTTPTransport()
                return await self._others.handle_async_request(request)
            body = await _send(httpx, sender, request, await request.aread())
            return httpx.Response(body.status, headers=body.headers, stream=Stream(body), request=request)

        async def aclose(self) -> None:
            if self._others is not None:
                await self._others.aclose()

    return Transport()


def _transport(httpx: ModuleType, sender: Sender, ours: Any) -> Any:
    """An `httpx.BaseTransport`, which works in the portal's event loop."""

    class Stream(httpx.SyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, body: _ResponseBody) -> None:
            self._body = body
            self._loop = portal.loop()

        def __iter__(self) -> Iterator[bytes]:
            while piece := portal.run(self._body.read):
                yield piece

        def close(self) -> None:
            async def close() -> None:
                self._body.close()

            portal.clean_up(self._loop, close)

    class Transport(httpx.BaseTransport):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            self._others: Any = None

        def handle_request(self, request: Any) -> Any:
            if _elsewhere(request.url, ours):
                self._others = self._others or httpx.HTTPTransport()
                return self._others.handle_request(request)
            content = request.read()
            body = portal.run(lambda: _send(httpx, sender, request, content))
            return httpx.Response(body.status, headers=body.headers, stream=Stream(body), request=request)

        def close(self) -> None:
            if self._others is not None:
                self._others.close()

    return Transport()


async def _send(httpx: ModuleType, sender: Sender, request: Any, content: bytes) -> _ResponseBody:
    limits = request.extensions.get("timeout") or {}
    headers = [
        (name.decode("ascii"), value.decode("latin-1"))
        for name, value in request.headers.raw
        if name.lower() not in _SET_BY_US
    ]
    path = request.url.raw_path.decode("ascii")
    read_s = limits.get("read")
    deadline = None if read_s is None else time.monotonic() + read_s
    with _sdk_errors(httpx, request):
        response, leave = await sender.open(request.method, path, headers, content or None, deadline)
    return _ResponseBody(httpx, sender, request, response, leave, read_s)


class _ResponseBody:
    """The body of a response, which is read piece by piece."""

    def __init__(
        self,
        httpx: ModuleType,
        sender: Sender,
        request: Any,
        response: aiohttp.ClientResponse,
        leave: Callable[[], None],
        read_s: float | None,
    ) -> None:
        self._httpx = httpx
        self._sender = sender
        self._request = request
        self._response = response
        self._leave: Callable[[], None] | None = leave
        self._read_s = read_s
        self.status = response.status
        self.headers = [(bytes(name), bytes(value)) for name, value in response.raw_headers]

    async def read(self) -> bytes:
        """The next piece; empty at the end."""
        content = self._response.content
        with _sdk_errors(self._httpx, self._request):
            async with self._sender.bound(self._read_s):
                data = await content.readany()
                while not data and not content.at_eof():
                    data = await content.readany()
                return data

    def close(self) -> None:
        """Gives the connection back. Before the end of the body it is closed instead: then the server stops, too."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


@contextlib.contextmanager
def _sdk_errors(httpx: ModuleType, request: Any) -> Iterator[None]:
    """Raises the HTTP library's errors, which the SDK knows; errors of ours that say more pass as they are."""
    try:
        yield
    except (RequestTimeoutError, TimeoutError) as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except ServerDiedError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientError, OSError) as error:
        raise httpx.ReadError(f"{type(error).__name__}: {error}", request=request) from error
