"""The guard of a server's replicas: an HTTP proxy that asks for the key, and passes on what vLLM serves to users.

What it does with a request, in this order:

1. `/health` and `/ping` are answered here: 200 while any replica is up.
2. Without the key: 401. As in each server (`managed_vllm_guard`), Basic authentication's password counts as well.
3. What changes the engine: 403. It would reach one of the replicas.
4. What vllm-router passes on as it came (`managed_vllm.server.routable`) goes through it. All else goes straight to a
   replica: of its session (`X-Session-ID`), or with the fewest requests from here. None of the router's own routes can
   be reached by that.
5. Where the router or a replica gives no answer, the next one is asked, as long as nothing has been passed back and the
   body was kept. A request that was lost three times with its server may be what kills it: 502. With no replica up for
   `PATIENCE_S` seconds: 503.
6. What empties a cache is asked of every replica. `/metrics` are those of all, each with the label `replica`.

Bodies and answers are streamed both ways. An answer that is cut is cut for the client, too; a client that hangs up ends
its request. No request has a time limit here.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from managed_vllm.in_server import managed_vllm_guard
from managed_vllm.server import routable

PATIENCE_S = 10.0
"""Seconds for which a request waits for a replica while there is none: each is back within a few, as a rule."""

_MOST_LOSSES = 3
_CONNECT_S = 5.0
_LOOK_S = 0.1
_METRICS_S = 5.0
"""Seconds for a replica's metrics; Prometheus waits for 10 in all."""
_KEPT_BYTES = 512 << 20
"""Bodies that are kept until they are answered, all together; one that is too long for that is not sent again."""
_WHOLE_BYTES = 8 << 20
"""An answer of at most this length is passed back once it is there as a whole, else as it comes."""
_PIECE_BYTES = 1 << 18
_HEADER_BYTES = 1 << 16
_SESSION = "X-Session-ID"

_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "proxy-connection"}
)
_NOT_TO_SERVERS = _HOP_BY_HOP | {"host", "expect", "content-length", "authorization"}
_OF_THE_ROUTER = frozenset(
    {"vary", "access-control-allow-origin", "access-control-expose-headers", "access-control-allow-credentials"}
)
"""It lets any web site read any answer. Requests of browsers, which have an `Origin`, never go through it."""

_EVERYWHERE = frozenset({"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"})
_METRICS = ("/metrics", "/metrics/")
_CONTROL_PATHS = frozenset(itertools.chain.from_iterable(managed_vllm_guard.CONTROL_PATHS.values()))


class NotAnsweredError(Exception):
    """Nothing came back that could be passed on; the next one may be asked.

    `was_sent` is False where there was no connection, so that it has nothing to do with the request.
    """

    def __init__(self, *, was_sent: bool = True) -> None:
        super().__init__()
        self.was_sent = was_sent


class CutError(Exception):
    """An answer ended before its end, and a part of it has been passed on."""


class Replicas:
    """The replicas that are up now, by their base URLs without `/v1`."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.changed = asyncio.Event()
        self.in_flight: Counter[str] = Counter()
        self._turn = itertools.count(1)
        self._given: dict[str, int] = {}

    @property
    def urls(self) -> tuple[str, ...]:
        """Their base URLs."""
        return tuple(self.numbers)

    def serve(self, urls: Mapping[str, str]) -> None:
        """From now on these, by their numbers, and no others."""
        self.numbers = {url.rstrip("/").removesuffix("/v1"): number for number, url in urls.items()}
        self._given = {url: self._given.get(url, 0) for url in self.numbers}
        self.changed.set()

    def in_order(self, session: str | None) -> list[str]:
        """All of them, the one first that a request should go to. A session has its own order (rendezvous hashing)."""
        if session is not None:
            return sorted(self.urls, key=lambda url: managed_vllm_guard.digest(f"{session}\n{url}".encode()))
        found = sorted(self.urls, key=lambda url: (self.in_flight[url], self._given[url]))
        for first in found[:1]:
            self._given[first] = next(self._turn)
        return found


@dataclass
class Way:
    """Through which program a request goes on: `session` has the connections, `url` is the base URL."""

    session: aiohttp.ClientSession
    url: str
    is_router: bool = False


class Guard:
    """See the module's docstring. `router` is the way through vllm-router while that is up."""

    def __init__(self, api_key: str, replicas: Replicas) -> None:
        self._bearer = f"Bearer {api_key}"
        self._expected = managed_vllm_guard.digest(api_key.encode())
        self._replicas = replicas
        self._direct = new_session(aiohttp.TCPConnector(limit=0))
        self._kept_bytes = 0
        self.router: Way | None = None

    def runner(self) -> web.AppRunner:
        """The application, ready to be set up on a socket."""
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            auto_decompress=False,
            shutdown_timeout=0.0,
            max_line_size=_HEADER_BYTES,
            max_field_size=_HEADER_BYTES,
            read_bufsize=_PIECE_BYTES,
        )

    async def close(self) -> None:
        """Closes its connections to the replicas."""
        await self._direct.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path in managed_vllm_guard.OPEN_PATHS:
            return web.Response(status=200 if self._replicas.urls else 503)
        if not self._has_key(request) and not _is_preflight(request):
            return _error(401, "Unauthorized", "this server wants its API key")
        if request.path in _CONTROL_PATHS or request.path.startswith("/adapters/"):
            return _error(403, "Forbidden", "this route would change one of several replicas: use llm.engine")
        if "upgrade" in request.headers:
            return _error(501, "NotImplementedError", "WebSockets are served by single servers only")
        if request.path in _METRICS and request.method == "GET":
            return await self._metrics()
        body = await self._kept_body(request)
        try:
            if request.path in _EVERYWHERE and body is not None:
                return await self._everywhere(request, body)
            return await self._answer(request, body)
        except CutError:
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            self._kept_bytes -= len(body or b"")

    def _has_key(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        scheme, _, token = managed_vllm_guard.as_bearer(b"authorization", given)[1].partition(b" ")
        found = managed_vllm_guard.digest(token.strip())
        return hmac.compare_digest(found, self._expected) and scheme.lower() == b"bearer"

    async def _kept_body(self, request: web.Request) -> bytes | None:
        """The body; None: it is passed on as it comes."""
        if not request.body_exists:
            return b""
        length = request.content_length
        if length is None or self._kept_bytes + length > _KEPT_BYTES:
            return None
        self._kept_bytes += length
        try:
            return await request.read()
        except BaseException:
            self._kept_bytes -= length
            raise

    # -- asking --------------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.Request, body: bytes | None) -> web.StreamResponse:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        losses = 0
        ways = self._ways(request, body)
        while True:
            for way in ways:
                try:
                    return await self._through(way, request, body)
                except NotAnsweredError as error:
                    losses += error.was_sent
                if body is None or losses == _MOST_LOSSES:
                    return _error(
                        502, "BadGatewayError", "the server was lost with this request, which is not sent again"
                    )
            if asyncio.get_running_loop().time() > deadline:
                return _error(503, "ServiceUnavailableError", "no replica is up")
            await asyncio.sleep(_LOOK_S)
            ways = self._direct_ways(request)

    async def _everywhere(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Asks every replica; the answer is the first that is an error, else that of the last."""
        answer: web.StreamResponse = _error(503, "ServiceUnavailableError", "no replica is up")
        for url in self._replicas.urls:
            try:
                answer = await self._through(Way(self._direct, url), request, body)
            except NotAnsweredError:
                continue  # with it went its caches
            if answer.status >= 400:
                break
        return answer

    async def _metrics(self) -> web.Response:
        """Without those that don't answer."""
        numbers = self._replicas.numbers  # those of now: others may be served before all have answered
        found = await asyncio.gather(*map(self._metrics_of, numbers))
        texts = [({"replica": number}, text) for number, text in zip(numbers.values(), found, strict=True) if text]
        if not texts:
            return _error(503, "ServiceUnavailableError", "no replica tells its metrics")
        return await asyncio.to_thread(_merged_metrics, texts)

    async def _metrics_of(self, url: str) -> str:
        """Empty: it does not answer."""
        try:
            async with (
                asyncio.timeout(_METRICS_S),
                self._direct.get(f"{url}/metrics", headers={"Authorization": self._bearer}) as answer,
            ):
                return await answer.text() if answer.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError, OSError):
            return ""

    def _ways(self, request: web.Request, body: bytes | None) -> list[Way]:
        direct = self._direct_ways(request)
        if not direct or self.router is None or body is None or request.method != "POST" or "Origin" in request.headers:
            return direct
        return [self.router, *direct] if routable.is_routable(request.path, body) else direct

    def _direct_ways(self, request: web.Request) -> list[Way]:
        return [Way(self._direct, url) for url in self._replicas.in_order(request.headers.get(_SESSION))]

    async def _through(self, way: Way, request: web.Request, body: bytes | None) -> web.StreamResponse:
        if not way.is_router:
            self._replicas.in_flight[way.url] += 1
        try:
            upstream = await way.session.request(
                request.method,
                URL(way.url + request.raw_path, encoded=True),
                headers=self._headers(request, body, way),
                data=_as_it_comes(request) if body is None else _as_data(body),
                allow_redirects=False,
            )
            async with upstream:
                if way.is_router and _is_its_own_refusal(upstream):
                    raise NotAnsweredError(was_sent=upstream.status >= 500)
                return await _passed_back(way, request, upstream)
        except aiohttp.ClientConnectorError as error:
            raise NotAnsweredError(was_sent=False) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise NotAnsweredError from error
        finally:
            if not way.is_router:
                self._replicas.in_flight[way.url] -= 1

    def _headers(self, request: web.Request, body: bytes | None, way: Way) -> CIMultiDict[str]:
        found = _without(_NOT_TO_SERVERS, request.headers)
        if self._has_key(request):  # else it is a preflight, which has none
            found["Authorization"] = self._bearer
        if request.content_length is not None:
            found["Content-Length"] = str(request.content_length)
        if way.is_router:
            # Under its policy, requests without a session would all go to one replica.
            found.setdefault(_SESSION, secrets.token_hex(8))
        return found


# -- passing on --------------------------------------------------------------------------------------------------------


def new_session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    """A client that changes nothing of what it passes on, and keeps no time."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        read_bufsize=_PIECE_BYTES,
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
    )


async def _passed_back(way: Way, request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = _without(_HOP_BY_HOP | _OF_THE_ROUTER if way.is_router else _HOP_BY_HOP, upstream.headers)
    length = upstream.content_length
    if request.method != "HEAD" and length is not None and length <= _WHOLE_BYTES:
        body = await upstream.read()
        headers.popall("Content-Length", None)
        return web.Response(status=upstream.status, reason=upstream.reason, headers=headers, body=body)
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
    await response.prepare(request)
    try:
        last = b""
        async for chunk in upstream.content.iter_any():
            last = (last + chunk)[-32:]
            await response.write(chunk)
    except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
        raise CutError from error
    if way.is_router and _is_a_cut_stream(upstream, last):
        raise CutError
    await response.write_eof()
    return response


def _merged_metrics(texts: Sequence[tuple[Mapping[str, str], str]]) -> web.Response:
    """For a thread: the import alone takes a tenth of a second, which no start of this process need wait for."""
    from managed_vllm import exposition

    body = exposition.exposed(exposition.merged(texts))
    return web.Response(body=body, headers={"Content-Type": exposition.CONTENT_TYPE})


def _is_a_cut_stream(upstream: aiohttp.ClientResponse, last: bytes) -> bool:
    """vllm-router 0.1.17 ends a stream in due form where its server has died."""
    return upstream.content_type == "text/event-stream" and not last.rstrip().endswith(b"data: [DONE]")


def _is_its_own_refusal(upstream: aiohttp.ClientResponse) -> bool:
    """vLLM's errors are JSON, vllm-router's own are text."""
    return upstream.status >= 400 and upstream.content_type != "application/json"


def _as_data(body: bytes) -> bytes | AsyncIterator[memoryview] | None:
    return _in_pieces(body) if len(body) > _PIECE_BYTES else body or None


async def _in_pieces(body: bytes) -> AsyncIterator[memoryview]:
    whole = memoryview(body)
    for begin in range(0, len(body), _PIECE_BYTES):
        yield whole[begin : begin + _PIECE_BYTES]


async def _as_it_comes(request: web.Request) -> AsyncIterator[bytes]:
    async for chunk in request.content.iter_any():
        yield chunk


def _without(names: frozenset[str], headers: Iterable[str]) -> CIMultiDict[str]:
    assert hasattr(headers, "items")
    listed = {name.strip().lower() for name in headers.get("Connection", "").split(",")}  # type: ignore[attr-defined]
    pairs: Sequence[tuple[str, str]] = list(headers.items())
    return CIMultiDict((name, value) for name, value in pairs if name.lower() not in names | listed)


def _is_preflight(request: web.Request) -> bool:
    """A browser's question before a request, which never carries a key: the server answers it by itself, or refuses."""
    return request.method == "OPTIONS" and {"Origin", "Access-Control-Request-Method"} <= request.headers.keys()


def _error(status: int, kind: str, message: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 503 else None
    said = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return web.json_response(said, status=status, headers=headers)
