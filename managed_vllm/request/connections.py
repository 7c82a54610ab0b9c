"""HTTP connections to a server, on aiohttp: over TCP or a Unix socket, for any number of event loops and addresses.

aiohttp was chosen by measurement (benchmarks/client.py): httpx, and what is built on it, needs several times its CPU
time per request, and more with every connection in flight. What must hold:

- There are as many connections as requests in flight; idle ones are closed before the server closes them.
- The only time-out of its own is that for connecting. Deadlines are the caller's.
- For a server on this machine, no proxy is taken from the environment; netrc and cookies for none.
- A body is released once it is sent: with images in it, it is what costs memory.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import functools
import os
import resource
import socket
import threading
import urllib.request
import weakref
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from aiohttp.client_exceptions import UnixClientConnectorError
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from managed_vllm import tracing
from managed_vllm.request.bodies import RequestBody
from managed_vllm.request.bounds import closed_error
from managed_vllm.request.event_loops import PerLoop
from managed_vllm.status import Connection
from managed_vllm.urls import is_this_machine

SESSION_HEADER = "X-Session-ID"
"""vLLM reads it (0.32, unless the body has a `session_id`), and vllm-router keeps a session with one server by it."""
CONNECT_TIMEOUT_S = 10.0
"""For connecting. The caller's deadline may be sooner."""
MAX_IDLE_S = 2.0
"""A vLLM started elsewhere closes a connection after 5 s without a request (uvicorn's default), ours after 60 s."""
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A host that has vanished is noticed after two minutes, however long a generation may be silent."""
_RESERVED = 128
"""Descriptors that are left to the program, of its soft limit; a quarter of that at most."""
_ALWAYS = 4
"""Connections of a pool that are made even with the last descriptors."""
_PIECE_BYTES = 1 << 16
_MAX_HEADER_BYTES = 1 << 16


class Transport:
    """All connections of one client: a pool for each address, in each event loop that uses it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._pools: PerLoop[dict[Connection, ConnectionPool]] = PerLoop(dict, _abandon_all)

    def pool(self, connection: Connection) -> ConnectionPool:
        """The running loop's connections to one address. Raises `ServerDiedError` once closed."""
        pools = self._pools.current()
        found = pools.get(connection)
        if found is not None and not found.closed:
            return found
        with self._lock:
            if self._closed:
                raise closed_error()
            made = pools[connection] = ConnectionPool(connection)
            return made

    def close(self) -> None:
        """Closes every connection, from any thread; what is in flight on them fails at once."""
        with self._lock:
            self._closed = True
        for loop, pools in self._pools.items():
            for pool in list(pools.values()):
                try:
                    loop.call_soon_threadsafe(pool.close)
                except RuntimeError:  # that loop is closed
                    pool.abandon()

    async def aclose(self) -> None:
        """As `close`; the connections of the running loop are closed when it returns."""
        self.close()
        await asyncio.sleep(0)  # until they have begun to close
        closing = [task for task in _closing if task.get_loop() is asyncio.get_running_loop()]
        if closing:
            await asyncio.wait(closing)

    def after_fork(self) -> None:
        """In a forked child: everything is the parent's."""
        self._lock = threading.Lock()  # another thread may have held it
        for pools in self._pools.after_fork():
            for pool in pools.values():
                pool.after_fork()


class ConnectionPool:
    """The connections of one event loop to one address."""

    def __init__(self, connection: Connection) -> None:
        self._root = connection.base_url.removesuffix("/v1")
        self._origin = URL(self._root, encoded=True).origin()
        self._paths: dict[str, URL] = {}
        connector: aiohttp.BaseConnector
        if connection.uds:
            connector = _UnixConnector(connection.uds, limit=0, keepalive_timeout=MAX_IDLE_S)
        else:
            connector = _TCPConnector(limit=0, keepalive_timeout=MAX_IDLE_S, ttl_dns_cache=60, family=socket.AF_UNSPEC)
        headers = {"Accept": "*/*", "Content-Type": "application/json"}
        if connection.api_key:
            headers["Authorization"] = f"Bearer {connection.api_key.reveal()}"
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, connect=None, sock_read=None),
            trust_env=False,  # reads ~/.netrc and the proxy settings anew for each request
            proxy=None if connection.uds else proxy_for(connection.base_url),
            max_line_size=_MAX_HEADER_BYTES,
            max_field_size=_MAX_HEADER_BYTES,
        )
        _pools.add(self)
        self._end_of_loop = _closing_with_the_loop(self._session)
        with contextlib.suppress(StopIteration):
            self._end_of_loop.__anext__().send(None)  # as far as its `yield`: from here on the loop knows of it

    @property
    def closed(self) -> bool:
        """Whether its connections were closed."""
        return self._session.closed

    async def request(
        self, method: str, path: str, body: RequestBody | None, *, session: str | None = None
    ) -> aiohttp.ClientResponse:
        """Sends a request; returns once the response's header is there. The caller releases or closes the response.

        `session` goes into the header by which routers keep a session with one server.
        """
        url = self._paths.get(path)
        if url is None:
            url = self._paths[path] = URL(self._root + path, encoded=True)
        data: Any = None
        if body is not None:
            only = body.parts[0] if len(body.parts) == 1 else None
            data = only if isinstance(only, bytes) and len(only) <= _PIECE_BYTES else _BodyPayload(body)
            del body, only
        headers = tracing.headers()
        if session is not None:
            headers[SESSION_HEADER] = quote(session)
        return await self._session.request(method, url, data=data, headers=headers, allow_redirects=False)

    async def open(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None
    ) -> aiohttp.ClientResponse:
        """As `request`, with the caller's own absolute path and headers; a compressed response stays compressed."""
        data = _BodyPayload(RequestBody((body,))) if body is not None and len(body) > _PIECE_BYTES else body
        url = self._origin.join(URL(path, encoded=True))
        given = {name.lower() for name, _ in headers}
        headers = headers + [one for one in tracing.headers().items() if one[0] not in given]
        return await self._session.request(
            method, url, data=data, headers=headers, allow_redirects=False, auto_decompress=False
        )

    def close(self) -> None:
        """Ends every connection at once. To be called within its event loop.

        Which may end before the task begins: so the transports are closed here, and a session that stays is abandoned.
        """
        if (connector := self._session.connector) is not None:
            for handler in _handlers(connector, in_flight=True):
                handler.close()
        task = asyncio.get_running_loop().create_task(self.aclose())
        _closing.add(task)
        task.add_done_callback(self._close_done)

    def _close_done(self, task: asyncio.Task[None]) -> None:
        _closing.discard(task)
        if not self._session.closed:
            self.abandon()

    async def aclose(self) -> None:
        """As `close`; they are closed when it returns."""
        with contextlib.suppress(Exception):
            await self._session.close()

    def abandon(self) -> None:
        """Closes the connections without using the event loop, which is closed or ends with the interpreter.

        aiohttp 3.14 has no public way for that. What is in flight in a loop that still runs is left to it.
        """
        connector: Any = self._session.connector
        self._session.detach()
        if connector is None:
            return
        loop_is_closed = connector._loop.is_closed()
        handlers = _handlers(connector, in_flight=loop_is_closed)
        connector._closed = True
        connector._conns.clear()
        for handler in handlers:
            # One that its loop is about to close would make that fail.
            if loop_is_closed or handler.transport is None or not handler.transport.is_closing():
                _close_socket(handler)

    def after_fork(self) -> None:
        """In a forked child: closes its copies of the sockets, without using the loop, whose epoll the parent shares.

        While a child has a copy, the server does not notice that the parent hangs up.
        """
        connector: Any = self._session.connector
        if connector is None:
            return
        handlers = _handlers(connector, in_flight=True)
        self.abandon()
        for handler in handlers:
            _close_socket(handler)


def _handlers(connector: Any, *, in_flight: bool) -> list[Any]:
    """The protocols of a connector's connections: the idle ones, and those `in_flight`."""
    idle = [one for idle in connector._conns.values() for one, _ in idle]
    return [*connector._acquired, *idle] if in_flight else idle


def _close_socket(handler: Any) -> None:
    """Closes a connection whose loop can't: asyncio would warn of its transport when that is collected."""
    transport: Any = getattr(handler, "transport", None)
    found = None if transport is None else transport.get_extra_info("socket")
    if isinstance(own := getattr(found, "_sock", None), socket.socket):  # asyncio's wrapper of it
        own.close()
    if getattr(transport, "_sock", None) is not None:
        transport._sock = None


async def _closing_with_the_loop(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    """Closes a session when its event loop ends, or nothing refers to this generator any more.

    Whoever ends a loop as `asyncio.run` does closes the asynchronous generators that were begun in it.
    """
    try:
        yield
    finally:
        await session.close()


class _ResponseHandler(ResponseHandler):
    """Fails the reader of a body when the rest is not HTTP; in aiohttp 3.14 a bad chunk lets it wait for ever."""

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)
        payload = self._payload
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(aiohttp.ClientPayloadError(f"{type(exc).__name__}: {exc}"), *cause)


class _CleanConnections:
    """Never reuses a connection that has received unrequested data: it would be taken for the next response.

    (aiohttp 3.14 checks that when a connection becomes idle, but not when it is used again.)
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._acquired: set[Any]
        self._factory: Any = functools.partial(_ResponseHandler, loop=asyncio.get_running_loop())

    def _leave_some(self, made: socket.socket) -> None:
        """Raises `OSError` (EMFILE) where a new socket is one of the last that this process may have.

        They are for the program around us, which opens files and starts processes meanwhile. The first few
        connections are made all the same.
        """
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reserve = min(_RESERVED, soft // 4)
        if soft != resource.RLIM_INFINITY and made.fileno() >= soft - reserve and len(self._acquired) > _ALWAYS:
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}; the last {reserve} are left to the program")

    async def _get(self, *args: Any) -> Any:
        while (connection := await super()._get(*args)) is not None:  # type: ignore[misc]
            if not connection.protocol.should_close:
                break
            connection.close()
        return connection


class _TCPConnector(_CleanConnections, aiohttp.TCPConnector):
    def __init__(self, **options: Any) -> None:
        super().__init__(socket_factory=self._make_socket, **options)

    def _make_socket(self, address: Any) -> socket.socket:
        made = _socket(address)
        try:
            self._leave_some(made)
        except OSError:
            made.close()
            raise
        return made


class _UnixConnector(_CleanConnections, aiohttp.UnixConnector):
    async def _create_connection(self, *args: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as probe:  # has the number that the connection gets
            try:
                self._leave_some(probe)
            except OSError as error:
                raise UnixClientConnectorError(self.path, args[0].connection_key, error) from error
        connected: Any = super()
        return await connected._create_connection(*args)


_closing: set[asyncio.Task[None]] = set()
_pools: weakref.WeakSet[ConnectionPool] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """For clients that were not closed: aiohttp would write a warning about each of them to standard error."""
    with contextlib.suppress(RuntimeError):  # another thread is making one
        for pool in list(_pools):
            pool.abandon()


def _abandon_all(pools: dict[Connection, ConnectionPool]) -> None:
    for pool in pools.values():
        pool.abandon()


class _BodyPayload(aiohttp.payload.Payload):
    """A large body, made and written in pieces, so that the event loop is not blocked, and released once written."""

    def __init__(self, body: RequestBody) -> None:
        super().__init__(None, content_type="application/json")
        self._size = body.size
        self._body: RequestBody | None = body

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return "" if self._body is None else self._body.data.decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        body, self._body = self._body, None
        self._consumed = True
        if body is None:
            raise aiohttp.ClientPayloadError("a body is sent only once")
        for piece in body.pieces():
            view = memoryview(piece)
            for start in range(0, len(view), _PIECE_BYTES):
                await writer.write(view[start : start + _PIECE_BYTES])


def _socket(address: Any) -> socket.socket:
    family, kind, protocol = address[:3]
    made = socket.socket(family=family, type=kind, proto=protocol)
    with contextlib.suppress(OSError):
        for option in _KEEPALIVE:
            made.setsockopt(*option)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setblocking(False)
    return made


def proxy_for(base_url: str) -> str | None:
    """The proxy for a server, from the environment; None for this machine."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if is_this_machine(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    if not url:
        return None
    return url if "://" in url else f"http://{url}"
