"""One request until it is answered: find the server, send, read, and begin again where the answer was lost.

In order: a place among those in flight (`in_flight`), the connection to a server that is ready, the sending, the
answer. A loss (`ResponseLostError`) leads back to the second, after a pause. The caller's deadline bounds all of it.
Whoever waits for the same server to come back waits together: one thread asks for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Container, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import msgspec

from managed_vllm import forks
from managed_vllm.errors import (
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    ManagedVLLMError,
    ModelNotFoundError,
    RequestError,
    RequestTimeoutError,
    ServerBusyError,
    ServerDiedError,
)
from managed_vllm.policies import RetryPolicy
from managed_vllm.request.bodies import RequestBody, encode_body
from managed_vllm.request.concurrency import MOST, InFlight
from managed_vllm.request.connections import Session, Transport
from managed_vllm.request.resume import Events, Losses, ResponseLostError, Step
from managed_vllm.request.server_images import ServerImages, is_miss
from managed_vllm.status import Connection

Found = tuple[Connection, int]

_LOST = (408, 429, 500, 502, 503, 504)
_REFUSED = (429, 503)
_TAIL_S = 0.25
"""For what follows the last token of a stream: read to its end, the connection can be used again."""
_TORN = "the answer was cut, and can't go on where it was: see stream()"
_MAX_ANSWER = 1 << 30
"""Bytes. All logprobs of a long answer, of a vocabulary of 150,000, have some hundred million."""
_NOT_AN_ANSWER = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


class Work(Protocol):
    """What is to be done, step by step: `resume.Generation`, or `Question`."""

    @property
    def complete(self) -> bool:
        """Whether `answer` has it."""

    @property
    def optional(self) -> bool:
        """Whether there is another way without the last step."""

    @property
    def kept(self) -> int:
        """Tokens that were not generated again."""

    @property
    def torn(self) -> bool:
        """Whether the caller has been given something that is lost."""

    def next(self) -> Step:
        """What to send now."""

    def take_json(self, data: bytes | None) -> None:
        """The answer to a step; None: refused. Raises `ResponseLostError`, or `ValueError` for what is none."""

    def feed(self, data: bytes) -> None:
        """One event of a stream."""

    def lost(self) -> bool:
        """The answer was lost. Returns whether there was progress nevertheless."""

    def answer(self) -> Mapping[str, Any]:
        """The complete answer."""


class Question:
    """One request that has a whole answer, and can be asked again: `keys` must be in it, for it to be one."""

    optional = False
    torn = False
    kept = 0

    def __init__(self, path: str, body: dict[str, Any] | None, *keys: str) -> None:
        self._step = Step("GET" if body is None else "POST", path, body)
        self._keys = keys
        self._answer: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        return self._answer is not None

    def next(self) -> Step:
        return self._step

    def take_json(self, data: bytes | None) -> None:
        answer = msgspec.json.decode(data or b"")
        if not isinstance(answer, dict) or any(key not in answer for key in self._keys):
            raise ValueError(f"no {', '.join(self._keys)} in it")
        self._answer = answer

    def feed(self, data: bytes) -> None:
        raise ResponseLostError("a stream that nobody asked for")

    def lost(self) -> bool:
        return False

    def answer(self) -> dict[str, Any]:
        assert self._answer is not None
        return self._answer


@dataclass(frozen=True, slots=True)
class Told:
    """What is to tell of a request's way. Times are seconds; `started_at` is Unix time."""

    model: str
    epoch: int
    attempts: int
    resumed_tokens: int
    started_at: float
    latency: float
    time_to_first_token: float | None


@dataclass
class _Here:
    """What belongs to one event loop."""

    in_flight: InFlight
    ended: asyncio.Future[None]
    joint: dict[int | None, asyncio.Future[Found]] = field(default_factory=dict)
    bounds: set[asyncio.Timeout] = field(default_factory=set)
    bytes_sent: int = 0
    epoch: int = 0

    def end(self) -> None:
        """Ends what waits or reads. aiohttp 3.14 lets who reads a body wait for ever when its connector is closed."""
        if not self.ended.done():
            self.ended.set_result(None)
        for bound in list(self.bounds):
            if not bound.expired():
                bound.reschedule(self.ended.get_loop().time())


class Exchange:
    """Everything a client has in flight. `find` may block; it is `VLLMClient`'s argument `connection`.

    `ready` is asked before it and never blocks: the connection to a server that is ready now, or None.
    """

    def __init__(
        self,
        find: Callable[[int | None, float | None, float], Found],
        ready: Callable[[], Found | None],
        *,
        retry: RetryPolicy,
        max_in_flight: int = MOST,
        media_ids: bool = False,
    ) -> None:
        self._find = find
        self._ready = ready
        self.retry = retry
        self._most = max_in_flight
        self._transport = Transport()
        self._lock = threading.Lock()
        self._closed = False
        self._bytes_sent = 0
        self._here: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Here] = weakref.WeakKeyDictionary()
        self._images = ServerImages() if media_ids else None
        _live.add(self)

    @property
    def bytes_sent(self) -> int:
        """Bytes of all request bodies so far."""
        with self._lock:
            return self._bytes_sent + sum(here.bytes_sent for here in self._here.values())

    # -- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """What is in flight ends with `ServerDiedError` and is not sent again. From any thread."""
        with self._lock:
            self._closed = True
            heres = list(self._here.items())
        for loop, here in heres:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(here.end)
        self._transport.close()

    async def aclose(self) -> None:
        """As `close`; the connections of the running loop are closed when it returns."""
        self.close()
        await self._transport.aclose()

    def forget(self) -> None:
        """In a forked child: what is in flight is the parent's."""
        self._lock = threading.Lock()
        self._here = weakref.WeakKeyDictionary()
        if self._images is not None:
            self._images = ServerImages()  # another thread may have held its lock
        self._transport.forget()

    def here(self) -> _Here:
        """The state of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._here.get(loop)
        if found is None:
            with self._lock:
                for ended in [one for one in self._here if one.is_closed()]:  # its future keeps it alive
                    self._bytes_sent += self._here.pop(ended).bytes_sent
                found = self._here.setdefault(loop, _Here(InFlight(self._most), loop.create_future()))
        if self._closed:
            raise ServerDiedError("the client was closed under this request")
        return found

    # -- one request ---------------------------------------------------------------------------------------------------

    async def ask(
        self,
        work: Work,
        deadline: float | None,
        news: Callable[[], None] | None = None,
        *,
        within: float | None = None,
    ) -> Told:
        """Works until `work` is complete; `deadline` is of the monotonic clock. `news` is called as a stream comes in.

        `within` are seconds from when it has its place among those in flight.

        Raises a `RequestError`, or what the server ended with (`StartupError`, `ServerStoppedError`).
        """
        here = self.here()
        await _before(deadline, here.in_flight.enter())
        started, started_at = time.monotonic(), time.time()
        if within is not None:
            deadline = started + within if deadline is None else min(deadline, started + within)
        answered = False
        try:
            connection, epoch, attempts, first = await self._until_complete(here, work, deadline, news)
            answered = True
        finally:
            here.in_flight.leave(answered=answered)
        return Told(
            model=connection.model,
            epoch=epoch,
            attempts=attempts,
            resumed_tokens=work.kept,
            started_at=started_at,
            latency=time.monotonic() - started,
            time_to_first_token=None if first is None else first - started,
        )

    async def _until_complete(
        self, here: _Here, work: Work, deadline: float | None, news: Callable[[], None] | None
    ) -> tuple[Connection, int, int, float | None]:
        losses = Losses(self.retry)
        attempts = answered = 0
        lost: int | None = None
        pause = 0.0
        first: float | None = None

        def told() -> None:
            nonlocal first
            if first is None:
                first = time.monotonic()
            if news is not None:
                news()

        while True:
            connection, epoch = await self._next(here, losses, lost, deadline, pause)
            if epoch > here.epoch:
                here.epoch = epoch
                here.in_flight.renew()
            step = work.next()
            attempts += step.stream or not work.optional
            try:
                await self._exchange(here, connection, epoch, work, step, deadline, told, again=losses.ever)
                lost, pause = None, 0.0
                if work.torn:
                    raise ServerDiedError(_TORN)
            except ResponseLostError as error:
                if self._closed:
                    raise ServerDiedError("the client was closed under this request") from error
                refused = error.status in _REFUSED or _exhausted(error)
                if refused:
                    here.in_flight.refused()
                progressed = work.lost()
                if news is not None:
                    news()
                if work.torn:
                    raise ServerDiedError(_TORN) from error
                if not work.complete:
                    if losses.lost == 0:
                        answered = here.in_flight.answered
                    pause, lost = losses.add(error, progressed=progressed), epoch
                    if refused and losses.too_many is not None and answered == here.in_flight.answered:
                        here.in_flight.give_up(functools.partial(_enough, losses, error))
                    _raise_if_enough(losses, error)
                    if refused:
                        await _before(deadline, here.in_flight.give_way())
            if work.complete:
                return connection, epoch, attempts, first

    async def open(
        self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None, deadline: float | None
    ) -> aiohttp.ClientResponse:
        """Sends any request to where the server is, until an answer begins; the caller reads it, and closes it.

        `path` is absolute, below the server's root. Raises `RequestTimeoutError`, `ServerDiedError`, or what the server
        ended with. Losses of the answer's rest are the caller's.
        """
        here = self.here()
        losses = Losses(self.retry)
        lost: int | None = None
        pause = 0.0
        while True:
            connection, epoch = await self._next(here, losses, lost, deadline, pause)
            session = self._transport.session(connection)
            if session is None:
                raise ServerDiedError("the client was closed under this request")
            try:
                async with self.bounded(None if deadline is None else _left(deadline)):
                    return await session.open(method, path, headers, body)
            except TimeoutError as error:
                if not isinstance(error, aiohttp.ClientError):
                    raise RequestTimeoutError("no answer before the deadline") from error
                cause: Exception = error
            except (aiohttp.ClientError, OSError) as error:
                cause = error
            if self._closed:
                raise ServerDiedError("the client was closed under this request") from cause
            loss = ResponseLostError(
                f"{type(cause).__name__}: {cause}", sent=not isinstance(cause, aiohttp.ClientConnectorError)
            )
            pause, lost = losses.add(loss, progressed=False), epoch
            _raise_if_enough(losses, loss)

    @contextlib.asynccontextmanager
    async def bounded(self, seconds: float | None) -> AsyncIterator[None]:
        """What is within ends after so many seconds (`TimeoutError`), and with the client (`ServerDiedError`)."""
        here = self.here()
        bound = asyncio.timeout(seconds)
        here.bounds.add(bound)
        try:
            async with bound:
                yield
        except TimeoutError as error:
            if self._closed:
                raise ServerDiedError("the client was closed under this request") from error
            raise
        finally:
            here.bounds.discard(bound)

    # -- the server ----------------------------------------------------------------------------------------------------

    async def _next(self, here: _Here, losses: Losses, lost: int | None, deadline: float | None, pause: float) -> Found:
        """The connection for the next attempt, after a pause if another was lost. Raises when `losses` are enough."""
        connection, epoch = await self._connect(here, lost, deadline, pause)
        if lost is not None and epoch != lost:
            spread = losses.new_epoch()
            _raise_if_enough(losses)
            await _sleep(here, spread, deadline)
        return connection, epoch

    async def _connect(self, here: _Here, lost: int | None, deadline: float | None, pause: float) -> Found:
        if lost is None:
            ready = self._ready()
            if ready is not None:
                _raise_if_late(deadline)
                return ready
        again = time.monotonic() + pause
        while True:
            mine = lost not in here.joint
            connection, epoch = await self._joint(here, lost, deadline, max(0.0, again - time.monotonic()))
            if epoch != lost or time.monotonic() >= again:
                break
            if mine:
                await _sleep(here, again - time.monotonic(), deadline)
                break
        if self._closed:
            raise ServerDiedError("the client was closed under this request")
        _raise_if_late(deadline)
        return connection, epoch

    async def _joint(self, here: _Here, lost: int | None, deadline: float | None, pause: float) -> Found:
        """What `find` says, asked once for all who wait for the same."""
        while True:
            found = here.joint.get(lost)
            if found is None:
                left = None if deadline is None else _left(deadline)
                found = here.joint[lost] = _in_thread(lambda: self._find(lost, left, pause))  # noqa: B023
                found.add_done_callback(lambda _: here.joint.pop(lost, None))
            waiting: set[asyncio.Future[Any]] = {found, here.ended}
            await asyncio.wait(
                waiting,
                timeout=None if deadline is None else _left(deadline),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if here.ended.done() and not found.done():
                raise ServerDiedError("the client was closed under this request")
            if not found.done():
                raise RequestTimeoutError("the server was not ready before the deadline")
            try:
                return found.result()
            except ManagedVLLMError as error:  # a start that timed out is a TimeoutError as well
                raise _copy(error) from error
            except TimeoutError as error:  # of the one who asked for all
                if deadline is not None and time.monotonic() >= deadline:
                    raise RequestTimeoutError("the server was not ready before the deadline") from error

    # -- sending and reading -------------------------------------------------------------------------------------------

    async def _exchange(
        self,
        here: _Here,
        connection: Connection,
        epoch: int,
        work: Work,
        step: Step,
        deadline: float | None,
        news: Callable[[], None],
        *,
        again: bool,
    ) -> None:
        """Sends one step and feeds what comes back to the work. Raises `ResponseLostError` or a `RequestError`."""
        bound = asyncio.timeout(None if deadline is None else _left(deadline))
        here.bounds.add(bound)
        try:
            async with bound:
                await self._send(here, connection, epoch, work, step, news, again=again)
        except TimeoutError as error:
            if work.complete:
                return
            if self._closed:
                raise ServerDiedError("the client was closed under this request") from error
            raise RequestTimeoutError("no answer before the deadline") from error
        finally:
            here.bounds.discard(bound)

    async def _send(
        self,
        here: _Here,
        connection: Connection,
        epoch: int,
        work: Work,
        step: Step,
        news: Callable[[], None],
        *,
        again: bool,
    ) -> None:
        """`again`: after a loss, or a miss: images are sent with their data, whatever the server seems to have."""
        session = self._transport.session(connection)
        if session is None:
            raise ServerDiedError("the client was closed under this request")
        life = (connection.base_url, epoch)
        encoded: RequestBody | None = None
        if step.body is not None:
            known: Container[str] | None = None
            if self._images is not None:
                known = () if again else self._images.known(life)
            encoded = encode_body({"model": connection.model, **step.body}, known=known)
            here.bytes_sent += encoded.size
        try:
            response = await _open(session, step, encoded, connection)
            try:
                if step.stream and response.status == 200 and response.content_type == "text/event-stream":
                    await _feed(response, work, news)
                    if not work.complete:
                        raise ResponseLostError("the stream ended before the answer did")
                    data = None
                else:
                    data = await _read(response)
            finally:
                response.close() if response.status == 200 and not response.content.at_eof() else response.release()
        except (aiohttp.ClientError, OSError) as error:
            if work.complete:
                return
            raise ResponseLostError(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:
            if self._closed:
                raise ServerDiedError("the client was closed under this request") from error
            raise
        if self._images is not None and encoded is not None and encoded.uuids:
            if response.status == 200:
                self._images.learn(life, encoded.uuids)
            elif encoded.as_ids and is_miss(response.status, said := _message(data or b"")):
                self._images.missed(life, encoded.as_ids, said)
                return await self._send(here, connection, epoch, work, step, news, again=True)
        if data is not None:
            take(work, response.status, data, connection, step.body)


async def _open(
    session: Session, step: Step, body: RequestBody | None, connection: Connection
) -> aiohttp.ClientResponse:
    try:
        return await session.request(step.method, step.path, body)
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise ResponseLostError(f"can't connect to {connection.base_url}: {error}", sent=False) from error
    except (aiohttp.InvalidURL, UnicodeError) as error:
        raise RequestError(f"{connection.base_url} can't be asked: {error}") from error


async def _read(response: aiohttp.ClientResponse) -> bytes:
    if response.content_length is not None and response.content_length <= _MAX_ANSWER:
        return await response.read()
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > _MAX_ANSWER:
            response.close()
            raise RequestError(f"the answer is longer than {_MAX_ANSWER} bytes", status=response.status)
    return b"".join(pieces)


async def _feed(response: aiohttp.ClientResponse, work: Work, news: Callable[[], None]) -> None:
    """Reads a stream into the work, and to its end, if that comes at once: the connection can stay then."""
    events = Events()
    content = response.content
    while not work.complete:
        data = await content.readany()
        if not data and content.at_eof():
            return
        for event in events.feed(data):
            work.feed(event)
        news()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_TAIL_S):
            while not content.at_eof():
                await content.readany()


def take(work: Work, status: int, data: bytes, connection: Connection, body: Mapping[str, Any] | None = None) -> None:
    """Gives a whole answer to the work. Raises `ResponseLostError`, or a `RequestError` that says why it is none."""
    if status in _LOST:
        raise ResponseLostError(f"HTTP {status}: {_message(data)}", status=status)
    if status >= 400:
        if work.optional:
            return work.take_json(None)
        raise refusal(status, _message(data), connection, body)
    if status != 200:
        raise ResponseLostError(f"HTTP {status}: {data[:500]!r}", status=status)
    try:
        work.take_json(data)
    except (*_NOT_AN_ANSWER, RecursionError) as error:
        raise ResponseLostError(f"not an answer ({error}): {data[:500]!r}", status=status) from error


# -- errors ------------------------------------------------------------------------------------------------------------

_LONGEST = re.compile(
    r"maximum context length (?:is|of) (\d+)|(?:maximum )?model length(?: of|:)? (\d+)|context length \((\d+)\)"
    r"|max_(?:model_len|total_tokens)[= ]+(\d+)"
)
_PROMPT = re.compile(
    r"contains (?:at least )?(\d+) (?:input tokens|characters)|prompt \(length (\d+)\)|\((\d+) in the messages"
    r"|request has (\d+) input tokens|Input length \((\d+)\)|prompt length (\d+)"
)
_WANTED = re.compile(
    r"requested (\d+) output tokens|max(?:_completion|_output)?_tokens'? ?(?:is too large: |=)(\d+)"
    r"|(\d+) in the completion"
)

_FULL = "max_tokens must be at least 1, got 0"
"""What is said of a prompt that leaves no place for a single token, whatever was asked for."""


def refusal(status: int, message: str, connection: Connection, body: Mapping[str, Any] | None = None) -> RequestError:
    """The error for HTTP 4xx to a request. The messages are those of vLLM 0.32 (`renderers/params.py`, `v1/engine`)."""
    body = body or {}
    said = f"HTTP {status}: {message}"
    if status in (401, 403):
        return AuthenticationError(said, base_url=connection.base_url, status=status)
    if status == 404 and "model" in message.lower():
        return ModelNotFoundError(said, model=str(body.get("model") or connection.model), status=status)
    if (longest := _number(_LONGEST, message)) is not None:
        prompt = None if "characters" in message else _number(_PROMPT, message)
        return ContextLengthError(
            said,
            max_model_len=longest,
            prompt_tokens=prompt,
            max_tokens=_number(_WANTED, message),
            status=status,
        )
    wanted = body.get("max_tokens", body.get("max_completion_tokens"))
    if _FULL in message and body and wanted != 0:
        return ContextLengthError(f"the prompt leaves no place for an answer; {said}", max_tokens=wanted, status=status)
    return BadRequestError(said, status=status)


def _number(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    digits = "" if found is None else next(group for group in found.groups() if group is not None)
    return int(digits) if 0 < len(digits) < 20 else None


def _message(data: bytes) -> str:
    try:
        error = msgspec.json.decode(data)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (*_NOT_AN_ANSWER, RecursionError):
        return data[:1000].decode(errors="replace")


def _raise_if_enough(losses: Losses, cause: ResponseLostError | None = None) -> None:
    if losses.too_many is not None:
        raise _enough(losses, cause)


def _enough(losses: Losses, cause: ResponseLostError | None) -> RequestError:
    why = str(losses.too_many)
    busy = losses.status == 429
    error: RequestError = ServerBusyError(f"the server is busy: {why}") if busy else ServerDiedError(why)
    error.status = losses.status
    error.__cause__ = cause
    return error


def _raise_if_late(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise RequestTimeoutError("the deadline passed before the request was sent")


def _exhausted(loss: ResponseLostError) -> bool:
    """Whether no connection could be made since this process, or this machine, has no file descriptor left."""
    error = loss.__cause__
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _copy(error: ManagedVLLMError) -> ManagedVLLMError:
    """One each for all who waited together: each is raised, and told of, in another place."""
    rebuild, arguments = error.__reduce__()
    copied: ManagedVLLMError = rebuild(*arguments)
    return copied


# -- waiting -----------------------------------------------------------------------------------------------------------


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


async def _before(deadline: float | None, place: Coroutine[Any, Any, None]) -> None:
    """Waits for a place among those in flight."""
    if deadline is None:
        return await place
    try:
        async with asyncio.timeout(_left(deadline)):
            await place
    except TimeoutError:
        raise RequestTimeoutError("the deadline passed before the request was sent") from None


async def _sleep(here: _Here, seconds: float, deadline: float | None) -> None:
    """Sleeps, but not beyond the deadline or the client's end."""
    if deadline is not None:
        seconds = min(seconds, _left(deadline))
    if seconds > 0:
        await asyncio.wait({here.ended}, timeout=seconds)


def _in_thread(function: Callable[[], Found]) -> asyncio.Future[Found]:
    """The function's result, from a thread of its own: a loop that ends must not wait for one that is stuck."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Found] = loop.create_future()

    def settle(result: Found | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            assert result is not None
            future.set_result(result)
        else:
            future.set_exception(error)
            future.exception()  # perhaps nobody waits any more

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="managed-vllm-find", daemon=True).start()
    return future


_live: weakref.WeakSet[Exchange] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for exchange in _everybody():
        exchange.forget()


def _everybody() -> Iterator[Exchange]:
    with contextlib.suppress(RuntimeError):  # changed by another thread in the moment of the fork
        yield from list(_live)


forks.call_in_child(_after_fork_in_child)
