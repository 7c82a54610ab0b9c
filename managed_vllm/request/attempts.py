"""Sends one request until it is answered: `Sender.send`, and `Sender.open` for the OpenAI SDK.

In this order: a place among the requests in flight (`concurrency`), the server that is ready (`endpoints`), the HTTP
request, its response. A lost response (`ResponseLostError`) leads back to the second step as often as `RetryPolicy`
allows (`retry`). One `Bound` holds over all of it: the caller's deadline, and the closing of the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import aiohttp

from managed_vllm import forks, tracing
from managed_vllm.errors import RequestTimeoutError, ServerBusyError, ServerDiedError
from managed_vllm.policies import MAX_IN_FLIGHT, RetryPolicy
from managed_vllm.request.bodies import RequestBody, encode_body
from managed_vllm.request.bounds import NOT_SENT, Bound, closed_error
from managed_vllm.request.concurrency import ConcurrencyLimiter
from managed_vllm.request.connections import SESSION_HEADER, Transport
from managed_vllm.request.deaths import Deaths, body_of, content_of
from managed_vllm.request.endpoints import Endpoint, Lookups
from managed_vllm.request.event_loops import PerLoop
from managed_vllm.request.exchange import Progress, open_response, read_response, take_response
from managed_vllm.request.health import is_healthy
from managed_vllm.request.http_errors import (
    message_of,
    repeated_error,
)
from managed_vllm.request.pending import HTTPRequest, PendingRequest, RequestStats
from managed_vllm.request.placement import Placement, Search
from managed_vllm.request.retry import ResponseLostError, Retries
from managed_vllm.request.server_images import ServerImages, is_miss
from managed_vllm.request.server_routes import ServerRoutes
from managed_vllm.status import Connection
from managed_vllm.tracing import RequestSpan

Report = Callable[[str, Sequence[int]], Sequence[int] | None]

_REFUSED = (429, 503)
_BROKEN_OFF = "the answer was cut, and can't go on where it was: see stream()"


@dataclass(frozen=True, slots=True)
class Loss:
    """An answer that was lost: which server had it, and how."""

    endpoint: Endpoint
    error: ResponseLostError


class GroupLostError(Exception):
    """The answers to a group were lost (`loss`). Callers of the library never see it."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(str(loss.error))
        self.loss = loss


class _Plan(NamedTuple):
    """How one request is to be sent, with the arguments of `Sender.send`; `size` is a group's."""

    deadline: float | None
    timeout_s: float | None
    only: Connection | None = None
    lost: Loss | None = None
    on_loss: Callable[[], None] | None = None
    size: int | None = None


@dataclass
class _LoopState:
    """What a sender has in one event loop. `epoch` is the newest that was seen."""

    limiter: ConcurrencyLimiter
    bounds: set[Bound] = field(default_factory=set)
    lookups: Lookups = field(default_factory=dict)
    bytes_sent: int = 0
    epoch: int = 0

    def close(self) -> None:
        """Ends what is in flight. In aiohttp 3.14 the reader of a body waits for ever when its connector is closed."""
        for bound in list(self.bounds):
            bound.close()


@dataclass
class _ClosedLoops:
    """What is kept of a sender's event loops that were closed.

    No method of `Sender` does that: it would be in a cycle with its own `PerLoop`, so that a client that is dropped
    gives its lease back only when the garbage collector comes.
    """

    bytes_sent: int = 0

    def add(self, state: _LoopState) -> None:
        self.bytes_sent += state.bytes_sent


class Sender:
    """Sends the requests of one client, from any number of event loops.

    Args:
        transport: its connections.
        placement: to which server each request goes.
        retry: how often a lost request is sent again.
        max_in_flight: requests in flight at once in one event loop, at most.
        media_ids: whether an image that the server has is sent as its id alone.
        report: tells the supervisor which request has deaths laid to it, and returns which of these epochs did die;
            None where there is no supervisor. May block: called in a thread.

    Attributes:
        one_by_one: whether each prompt must go by itself; set for a cassette, which knows only what was asked before.
        routes: what the servers tell of theirs.
        takes_groups: for the kinds of `groups.Shape`, whether the server takes groups, as far as is known.
    """

    def __init__(
        self,
        transport: Transport,
        placement: Placement,
        *,
        retry: RetryPolicy,
        max_in_flight: int = MAX_IN_FLIGHT,
        media_ids: bool = False,
        report: Report | None = None,
    ) -> None:
        self.retry = retry
        self._deaths = Deaths(retry.max_deaths)
        self._report = report
        self.routes = ServerRoutes()
        self.one_by_one = False
        self.takes_groups: dict[str, bool] = {}
        self.max_in_flight = max_in_flight
        self._placement = placement
        self._transport = transport
        self._images = ServerImages() if media_ids else None
        self._closed_loops = _ClosedLoops()
        self._states = PerLoop(lambda: _LoopState(ConcurrencyLimiter(max_in_flight)), self._closed_loops.add)
        self._closed = False
        forks.call_in_child(self._after_fork)

    @property
    def bytes_sent(self) -> int:
        """Bytes of all request bodies so far."""
        return self._closed_loops.bytes_sent + sum(state.bytes_sent for _, state in self._states.items())

    @property
    def in_flight(self) -> int:
        """Requests that are in flight now, in all event loops."""
        return sum(state.limiter.in_flight for _, state in self._states.items())

    @property
    def closed(self) -> bool:
        """Whether it was closed, for good."""
        return self._closed

    def close(self) -> None:
        """Ends what is in flight with `ServerDiedError`; nothing is sent again. From any thread."""
        self._closed = True
        for loop, state in self._states.items():
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(state.close)
        self._transport.close()

    async def aclose(self) -> None:
        """As `close`; the connections of the running loop are closed when it returns."""
        self.close()
        await self._transport.aclose()

    async def send(
        self,
        request: PendingRequest,
        deadline: float | None,
        on_progress: Progress | None = None,
        *,
        timeout_s: float | None = None,
        only: Connection | None = None,
        lost: Loss | None = None,
        on_loss: Callable[[], None] | None = None,
    ) -> RequestStats:
        """Sends `request` until it is complete.

        Args:
            request: what to send; it takes the responses.
            deadline: in seconds of the monotonic clock. None: there is none.
            on_progress: called whenever a part of a stream has come, and after a loss.
            timeout_s: seconds from the moment when it is admitted to those in flight.
            only: the server of several that it is for.
            lost: it was lost before, with others (`send_group`); that counts as its first attempt.
            on_loss: others wait for the answer: called when it is lost for the first time, for them to be sent.

        Raises a `RequestError`, or what the server ended with (`StartupError`, `ServerStoppedError`).
        """
        span = tracing.request_span()
        plan = _Plan(deadline, timeout_s, only, lost, on_loss)
        if span is None:
            return await self._send(request, plan, on_progress)
        with span:
            stats = await self._send(request, plan, on_progress, span)
            span.answered(request.answer(), stats.attempts, stats.epoch, stats.time_to_first_token)
            return stats

    async def send_group(
        self, request: PendingRequest, size: int, deadline: float | None, timeout_s: float | None
    ) -> RequestStats:
        """Sends a request for the answers to `size` prompts, once. It counts as so many requests in flight.

        Raises as `send`, and `GroupLostError` where the response is lost: then each of them is to be sent by itself.
        """
        return await self._send(request, _Plan(deadline, timeout_s, size=size))

    @property
    def may_group(self) -> bool:
        """Whether requests may go together: not while deaths of the server are laid to some, nor with spans of each."""
        return not (self.one_by_one or self._deaths or tracing.is_on())

    async def _send(
        self,
        request: PendingRequest,
        plan: _Plan,
        on_progress: Progress | None = None,
        span: RequestSpan | None = None,
    ) -> RequestStats:
        state, size = self._open_state(), plan.size or 1
        attempts = _RequestAttempts(self, state, request, on_progress, span, plan)
        bound = Bound(state.bounds, plan.deadline, NOT_SENT)
        try:
            async with bound:
                await state.limiter.acquire(size)
                attempts.begin()
                if plan.timeout_s is not None:
                    bound.tighten(attempts.begun + plan.timeout_s)
                try:
                    search = Search(state.lookups, bound, request.session, plan.only, size)
                    retries = Retries(self.retry)
                    if plan.lost is not None:
                        await attempts.go_on_after(plan.lost, search, retries)
                    await self._until_done(attempts, search, retries, once=plan.size is not None)
                finally:
                    state.limiter.release(size, answered=request.complete)
        except (RequestTimeoutError, ServerDiedError):
            if not request.complete or request.broken_off:
                raise  # otherwise it was over while the end of a stream was read
        return attempts.stats()

    async def open(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None, deadline: float | None
    ) -> tuple[aiohttp.ClientResponse, Callable[[], None]]:
        """Sends any HTTP request until a response begins. The caller reads and closes it, then calls the function.

        `path` is absolute, below the server's root. Raises `RequestTimeoutError`, `ServerDiedError`, or what the server
        ended with. If the rest of the response is lost, that is the caller's affair.
        """
        state = self._open_state()
        attempts = _OpenAttempts(self._transport, method, path, headers, body)
        endpoint: Endpoint | None = None
        try:
            async with Bound(state.bounds, deadline, NOT_SENT) as bound:
                search = Search(state.lookups, bound, attempts.session)
                endpoint = await self._until_done(attempts, search, Retries(self.retry), stay=True)
        except BaseException:
            if endpoint is not None and attempts.response is not None:  # in time, and yet over
                attempts.response.close()
                self._placement.leave(endpoint)
            raise
        assert attempts.response is not None
        return attempts.response, functools.partial(self._placement.leave, endpoint)

    async def servers(self, deadline: float | None) -> Sequence[Connection | None]:
        """All servers of this client, for what each of them must be told: see `only` of `send`."""
        state = self._open_state()
        async with Bound(state.bounds, deadline, _NOT_READY) as bound:
            return await self._placement.every(Search(state.lookups, bound))

    def bound(self, timeout_s: float | None) -> Bound:
        """For what a caller of `open` waits for: ends it after so many seconds, and when the client is closed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        return Bound(self._open_state().bounds, deadline, _NO_ANSWER)

    # -- attempts ------------------------------------------------------------------------------------------------------

    async def _until_done(
        self,
        attempts: _Attempts,
        search: Search,
        retries: Retries,
        *,
        stay: bool = False,
        once: bool = False,
    ) -> Endpoint:
        """Makes attempts, each with a server that is ready, until one succeeds or there are no further ones.

        Returns the server of the last one, where with `stay` the request is still in flight. With `once` there is only
        one attempt.
        """
        bound = search.bound
        content = attempts.content if self._deaths else None
        if content is not None and self._deaths.is_known(content):
            retries.deaths = self._deaths.of(content)
            raise retries.error()
        while True:
            bound.reason = _NOT_READY
            endpoint = await self._placement.get(search)
            bound.reason = NOT_SENT
            loss, done = None, False
            try:
                content = await self._met_death(search.lost, endpoint, attempts, retries) or content
                bound.check()
                bound.reason = _NO_ANSWER
                done = await attempts.make(endpoint, resend=retries.ever_lost)
            except ResponseLostError as error:
                loss = error
            finally:
                if not (done and stay):
                    self._placement.leave(endpoint, search.size)
            if loss is None:
                if done:
                    if content is not None:
                        self._deaths.clear(content)
                    return endpoint
                search.lost, search.losses, search.pause_s = None, 0, 0.0
                continue
            bound.check()
            progressed = attempts.lost(loss, first=not retries.lost)
            if attempts.done:
                return endpoint
            if once:
                raise GroupLostError(Loss(endpoint, loss))
            search.pause_s = retries.add_loss(loss, progressed=progressed)
            search.lost, search.losses = endpoint, retries.lost
            if progressed and content is not None:
                self._deaths.clear(content)
            if retries.repeated and await is_healthy(self._transport, endpoint[0]):
                attempts.refuse(loss)
                continue
            await attempts.back_off(loss, retries)
            _raise_if_too_late(loss, search.pause_s, bound)

    async def _met_death(
        self, lost: Endpoint | None, now: Endpoint, attempts: _Attempts, retries: Retries
    ) -> str | None:
        """Counts a death, if the server that lost the last answer has died. Returns the content that it was laid to."""
        if lost is None or not self._placement.is_over(lost, now):
            return None
        content = attempts.content if retries.sent else None
        if content is not None:
            await self._lay(lost[1], content, retries)
        spread_s = retries.add_epoch()
        retries.raise_if_exhausted()
        await asyncio.sleep(spread_s)
        return content

    async def _lay(self, epoch: int, content: str, retries: Retries) -> None:
        """Lays the end of an epoch to a request that was in flight then, and to others of its content."""
        self._deaths.add(content, epoch)
        retries.deaths = self._deaths.of(content)
        if not retries.exhausted or self._report is None:
            return
        crashed = await asyncio.to_thread(self._report, content, retries.deaths)
        if crashed is not None:
            self._deaths.keep(content, crashed)
            retries.deaths = self._deaths.of(content)

    async def send_once(
        self,
        endpoint: Endpoint,
        state: _LoopState,
        request: PendingRequest,
        http: HTTPRequest,
        on_progress: Progress,
        *,
        resend: bool,
    ) -> None:
        """Sends one HTTP request, and gives the response to `request`.

        `resend`: after a loss or a miss, images are sent with their data, whatever the server seems to have.

        Raises `ResponseLostError`, or a `RequestError` for good.
        """
        connection, epoch = endpoint
        pool = self._transport.pool(connection)
        server = (connection.base_url, epoch)
        body: RequestBody | None = None
        if http.body is not None:
            known: Container[str] | None = None
            if self._images is not None:
                known = () if resend else self._images.known(server)
            body = encode_body({"model": connection.model, **http.body}, known=known)
            state.bytes_sent += body.size
        try:
            response = await open_response(pool, http, body, connection)
            try:
                data = await read_response(response, http, request, on_progress, connection)
            finally:
                response.close() if response.status == 200 and not response.content.at_eof() else response.release()
        except (aiohttp.ClientError, OSError) as error:
            if request.complete:
                return
            raise ResponseLostError(f"{type(error).__name__}: {error}") from error
        if self._images is not None and body is not None and body.uuids:
            if response.status == 200:
                self._images.learn(server, body.uuids)
            elif body.as_ids and is_miss(response.status, message := message_of(data or b"")):
                self._images.missed(server, body.as_ids, message)
                return await self.send_once(endpoint, state, request, http, on_progress, resend=True)
        if data is not None:
            take_response(request, response.status, data, connection, http.body, response.headers)

    # -- event loops and forks -----------------------------------------------------------------------------------------

    def _open_state(self) -> _LoopState:
        """The state of the running loop. Raises `ServerDiedError` once the client is closed."""
        state = self._states.current()
        if self._closed:
            raise closed_error()
        return state

    def _after_fork(self) -> None:
        """In a forked child: what is in flight is the parent's."""
        self._states.after_fork()
        if self._images is not None:
            self._images = ServerImages()  # another thread may have held its lock
        self._transport.after_fork()
        self._placement.after_fork()
        self._deaths.after_fork()


_NOT_READY = "the server was not ready before the deadline"
_NO_ANSWER = "no answer before the deadline"


class _Attempts(Protocol):
    """The attempts at one request."""

    @property
    def done(self) -> bool:
        """Whether no further attempt is needed."""

    @property
    def content(self) -> str:
        """What is asked for; see `deaths.content_of`."""

    async def make(self, endpoint: Endpoint, *, resend: bool) -> bool:
        """Makes one attempt; returns whether it was the last. Raises `ResponseLostError`."""

    def lost(self, error: ResponseLostError, *, first: bool) -> bool:
        """The response was lost, for the `first` time in a row. Returns whether there was progress nevertheless."""

    def refuse(self, error: ResponseLostError) -> None:
        """A healthy server has answered twice with the same error. Raises it, unless there is another way."""

    async def back_off(self, error: ResponseLostError, retries: Retries) -> None:
        """Raises if there is no further attempt; makes way for others where the server refuses requests."""


class _RequestAttempts:
    """The attempts at a request that is in flight."""

    __slots__ = (
        *("_answered_before", "_connection", "_count", "_epoch", "_first_token_at", "_on_loss", "_on_progress"),
        *("_request", "_sender", "_size", "_span", "_started_at", "_state", "begun"),
    )  # thousands at once: without a dict each

    def __init__(
        self,
        sender: Sender,
        state: _LoopState,
        request: PendingRequest,
        on_progress: Progress | None,
        span: RequestSpan | None,
        plan: _Plan,
    ) -> None:
        self._size = plan.size or 1
        self._on_loss = plan.on_loss
        self._sender = sender
        self._span = span
        self._state = state
        self._request = request
        self._on_progress = on_progress
        self._connection: Connection | None = None
        self._epoch = 0
        self._count = 0
        self._answered_before = 0
        self._first_token_at: float | None = None
        self._started_at = 0.0
        self.begun = 0.0

    def begin(self) -> None:
        """The request has its place among those in flight: its time starts."""
        self.begun, self._started_at = time.monotonic(), time.time()

    @property
    def done(self) -> bool:
        return self._request.complete

    @property
    def content(self) -> str:
        return self._request.content

    async def make(self, endpoint: Endpoint, *, resend: bool) -> bool:
        self._connection, self._epoch = endpoint
        if self._epoch > self._state.epoch:
            self._state.epoch = self._epoch
            self._state.limiter.reset()
        http = self._request.next()
        self._count += http.stream or not self._request.optional
        if self._span is not None:
            self._span.sending(http.path, http.body, endpoint[0].model, endpoint[0].base_url)
            if self._count > 1:
                self._span.resumed(self._count, self._epoch, self._request.kept)
        await self._sender.send_once(endpoint, self._state, self._request, http, self._progressed, resend=resend)
        if self._request.broken_off:
            raise ServerDiedError(_BROKEN_OFF)
        return self._request.complete

    def lost(self, error: ResponseLostError, *, first: bool) -> bool:
        if self._on_loss is not None:  # how many the server takes, those that have waited will show
            self._on_loss()
            self._on_loss = None
        elif _is_refusal(error):
            self._state.limiter.refused(self._size)
        progressed = self._request.lost()
        if self._span is not None:
            self._span.lost(error, self._request.kept)
        if self._on_progress is not None:
            self._on_progress()
        if self._request.broken_off:
            raise ServerDiedError(_BROKEN_OFF) from error
        if first:
            self._answered_before = self._state.limiter.answered
        return progressed

    async def go_on_after(self, lost: Loss, search: Search, retries: Retries) -> None:
        """Counts an attempt that was lost together with others. Raises as `back_off`."""
        self._count, self._answered_before = 1, self._state.limiter.answered
        search.pause_s = retries.add_loss(lost.error, progressed=False)
        search.lost, search.losses = lost.endpoint, retries.lost
        await self.back_off(lost.error, retries)
        _raise_if_too_late(lost.error, search.pause_s, search.bound)

    def refuse(self, error: ResponseLostError) -> None:
        if not self._request.optional:
            raise repeated_error(error) from error
        self._request.take_json(None)

    async def back_off(self, error: ResponseLostError, retries: Retries) -> None:
        limiter, refused = self._state.limiter, _is_refusal(error)
        if refused and retries.exhausted and limiter.answered == self._answered_before:
            limiter.fail_waiting(functools.partial(retries.error, error))
        retries.raise_if_exhausted(error)
        if refused:
            await limiter.wait_again()

    def stats(self) -> RequestStats:
        assert self._connection is not None
        first = self._first_token_at
        return RequestStats(
            model=self._connection.model,
            epoch=self._epoch,
            attempts=self._count,
            resumed_tokens=self._request.kept,
            started_at=self._started_at,
            latency=time.monotonic() - self.begun,
            time_to_first_token=None if first is None else first - self.begun,
        )

    def _progressed(self) -> None:
        if self._first_token_at is None:
            self._first_token_at = time.monotonic()
        if self._on_progress is not None:
            self._on_progress()


class _OpenAttempts:
    """The attempts at an HTTP request of which only the beginning of the response is waited for."""

    done = False

    def __init__(
        self, transport: Transport, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None
    ) -> None:
        self._transport = transport
        self._request = method, path, headers, body
        self.response: aiohttp.ClientResponse | None = None

    @property
    def session(self) -> str | None:
        """The session that a header or the body names."""
        _, _, headers, body = self._request
        for name, value in headers:
            if name.lower() == SESSION_HEADER.lower():
                return value
        found = body_of(body).get("session_id") if body is not None and b'"session_id"' in body else None
        return found if isinstance(found, str) else None

    @property
    def content(self) -> str:
        _, path, _, body = self._request
        return content_of(path, None if body is None else body_of(body))

    async def make(self, endpoint: Endpoint, *, resend: bool) -> bool:
        connection, _ = endpoint
        pool = self._transport.pool(connection)
        try:
            self.response = await pool.open(*self._request)
        except (aiohttp.ClientError, OSError) as error:
            sent = not isinstance(error, aiohttp.ClientConnectorError)
            raise ResponseLostError(f"{type(error).__name__}: {error}", sent=sent) from error
        return True

    def lost(self, error: ResponseLostError, *, first: bool) -> bool:
        return False

    def refuse(self, error: ResponseLostError) -> None:
        raise repeated_error(error) from error

    async def back_off(self, error: ResponseLostError, retries: Retries) -> None:
        retries.raise_if_exhausted(error)


def _raise_if_too_late(loss: ResponseLostError, pause_s: float, bound: Bound) -> None:
    """Raises `ServerBusyError` where the server wants to be left alone for longer than the caller waits."""
    left_s = bound.left_s
    if loss.retry_after_s and left_s is not None and pause_s > left_s:
        late = ServerBusyError(
            f"the server wants {loss.retry_after_s:g} s of rest, the deadline is before that; {loss}"
        )
        late.status = loss.status
        raise late from loss


def _is_refusal(loss: ResponseLostError) -> bool:
    """Whether the server takes no more, or this process or machine has no file descriptor left for a connection."""
    cause = loss.__cause__
    exhausted = isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)
    return exhausted or loss.status in _REFUSED
