"""Connections: HTTP on aiohttp, over TCP or a Unix socket, for any number of event loops and addresses.

aiohttp was chosen by measurement (benchmarks/client.py): httpx and what stands on it need several times its CPU per
request, and more with every connection in flight. What must hold:

- as many connections as there are requests in flight, the last idle one closed before the server closes it;
- no time-out of its own but for connecting: a deadline is the caller's;
- no proxy, netrc or cookie from the environment for a server on loopback;
- a body is let go once it is sent: with images in it, it is what costs memory.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import socket
import threading
import urllib.request
import weakref
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from managed_vllm.request.bodies import RequestBody
from managed_vllm.status import Connection, is_loopback

CONNECT_S = 10.0
"""For connecting, at most; the caller's deadline may be sooner."""
IDLE_S = 2.0
"""A vLLM that others started closes a connection after 5 s without a request (uvicorn's default), ours after 60 s."""
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A host that has vanished is noticed after two minutes, however long a generation may be silent."""
_PIECE = 1 << 16
_MAX_HEAD = 1 << 16


class Transport:
    """All connections of one client. Each event loop that uses it has its own; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Connection, Session]] = (
            weakref.WeakKeyDictionary()
        )

    def session(self, connection: Connection) -> Session | None:
        """The connections to one address, of the running loop; None once closed."""
        loop = asyncio.get_running_loop()
        sessions = self._sessions.get(loop)
        found = None if sessions is None else sessions.get(connection)
        if found is not None and not found.closed:
            return found
        with self._lock:
            if self._closed:
                return None
            for dead in [one for one in self._sessions if one.is_closed()]:
                for session in self._sessions.pop(dead).values():
                    session.drop()
            made = self._sessions.setdefault(loop, {})[connection] = Session(connection)
            return made

    def close(self) -> None:
        """Closes every connection, from whatever thread; what is in flight on them fails at once."""
        with self._lock:
            self._closed = True
            everything = [(loop, list(sessions.values())) for loop, sessions in self._sessions.items()]
            self._sessions.clear()
        for loop, sessions in everything:
            for session in sessions:
                try:
                    loop.call_soon_threadsafe(session.close)
                except RuntimeError:  # that loop is closed
                    session.drop()

    def forget(self) -> None:
        """In a forked child: everything is the parent's."""
        self._lock = threading.Lock()
        sessions = [session for each in self._sessions.values() for session in each.values()]
        self._sessions = weakref.WeakKeyDictionary()
        for session in sessions:
            session.forget()

    async def aclose(self) -> None:
        """As `close`; those of the running loop are closed when it returns."""
        self.close()
        await asyncio.sleep(0)  # until they have begun to close
        closing = [task for task in _closing if task.get_loop() is asyncio.get_running_loop()]
        if closing:
            await asyncio.wait(closing)


class Session:
    """The connections of one event loop to one address."""

    def __init__(self, connection: Connection) -> None:
        self._root = connection.base_url.removesuffix("/v1")
        self._origin = URL(self._root, encoded=True).origin()
        self._paths: dict[str, URL] = {}
        connector: aiohttp.BaseConnector
        if connection.uds:
            connector = _UnixConnector(connection.uds, limit=0, keepalive_timeout=IDLE_S)
        else:
            connector = _TCPConnector(
                limit=0, keepalive_timeout=IDLE_S, ttl_dns_cache=60, socket_factory=_socket, family=socket.AF_UNSPEC
            )
        headers = {"Accept": "*/*", "Content-Type": "application/json"}
        if connection.api_key:
            headers["Authorization"] = f"Bearer {connection.api_key}"
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, connect=None, sock_read=None),
            trust_env=False,  # reads ~/.netrc and the proxy settings anew for each request
            proxy=None if connection.uds else proxy_for(connection.base_url),
            max_line_size=_MAX_HEAD,
            max_field_size=_MAX_HEAD,
        )
        _sessions.add(self)

    @property
    def closed(self) -> bool:
        return self._session.closed

    async def request(self, method: str, path: str, body: RequestBody | None) -> aiohttp.ClientResponse:
        """Sends a request; returns when the head of the answer is there. The caller releases or closes it."""
        url = self._paths.get(path)
        if url is None:
            url = self._paths[path] = URL(self._root + path, encoded=True)
        data: Any = None
        if body is not None:
            only = body.parts[0] if len(body.parts) == 1 else None
            data = only if isinstance(only, bytes) and len(only) <= _PIECE else _Pieces(body)
            del body, only
        return await self._session.request(method, url, data=data, allow_redirects=False)

    async def open(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None
    ) -> aiohttp.ClientResponse:
        """As `request`, with the whole path and headers of the caller's, who decodes what was compressed."""
        data = _Pieces(RequestBody((body,))) if body is not None and len(body) > _PIECE else body
        url = self._origin.join(URL(path, encoded=True))
        return await self._session.request(
            method, url, data=data, headers=headers, allow_redirects=False, auto_decompress=False
        )

    def close(self) -> None:
        """Within its loop: ends every connection at once."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(self.aclose())
        _closing.add(task)
        task.add_done_callback(_closing.discard)

    async def aclose(self) -> None:
        with contextlib.suppress(Exception):
            await self._session.close()

    def drop(self) -> None:
        """Lets go, without a word to its loop: that is closed, or ends with the interpreter.

        The sockets are closed when they are garbage. aiohttp 3.14 has no public way to say so.
        """
        connector: Any = self._session.connector
        self._session.detach()
        if connector is not None:
            connector._closed = True
            connector._conns.clear()

    def forget(self) -> None:
        """In a forked child: closes its copies of the sockets, without a word to the loop, whose epoll a fork shares.

        While a child has a copy, the server does not notice that the parent hangs up.
        """
        connector: Any = self._session.connector
        if connector is None:
            return
        handlers = [*connector._acquired, *(one for idle in connector._conns.values() for one, _ in idle)]
        self.drop()
        for handler in handlers:
            transport = getattr(handler, "transport", None)
            found = None if transport is None else transport.get_extra_info("socket")
            if isinstance(copied := getattr(found, "_sock", None), socket.socket):  # asyncio's wrapper of it
                copied.close()


class _Handler(ResponseHandler):
    """Tells who reads a body that its rest is no HTTP: a bad chunk makes him wait for ever (aiohttp 3.14)."""

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)
        payload = self._payload
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(aiohttp.ClientPayloadError(f"{type(exc).__name__}: {exc}"), *cause)


class _Clean:
    """Takes no connection again on which something came that nobody had asked for: it would be the next answer.

    (aiohttp 3.14 looks when a connection becomes idle, but not when it is taken again.)
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._factory: Any = functools.partial(_Handler, loop=asyncio.get_running_loop())

    async def _get(self, *args: Any) -> Any:
        while (connection := await super()._get(*args)) is not None:  # type: ignore[misc]
            if not connection.protocol.should_close:
                break
            connection.close()
        return connection


class _TCPConnector(_Clean, aiohttp.TCPConnector):
    pass


class _UnixConnector(_Clean, aiohttp.UnixConnector):
    pass


_closing: set[asyncio.Task[None]] = set()
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """Clients that nobody closed: aiohttp would write about each of them to standard error."""
    with contextlib.suppress(RuntimeError):  # another thread makes one
        for session in list(_sessions):
            session.drop()


class _Pieces(aiohttp.payload.Payload):
    """A large body: made and written in pieces, so that the loop goes on meanwhile, and forgotten once written."""

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
            raise aiohttp.ClientPayloadError("a body is sent once only")
        for piece in body.pieces():
            view = memoryview(piece)
            for start in range(0, len(view), _PIECE):
                await writer.write(view[start : start + _PIECE])


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
    """The proxy that the environment gives for a server elsewhere; there is none for loopback."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    if not url:
        return None
    return url if "://" in url else f"http://{url}"
