"""`VLLMClient`: `generate` and `chat` in the shape of `vllm.LLM`, against any OpenAI-compatible server.

Requests of one call run side by side and come back in input order. A request whose answer the server lost (it died, was
restarted, answered with an "abort" that nobody asked for, or with half an answer) is sent again when the server is
back; a long generation goes on where it was cut (`resume`). The caller's deadline bounds all of it: waiting for the
server, connecting, and reading, byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpcore

from managed_vllm.config import is_loopback
from managed_vllm.control import Connection
from managed_vllm.errors import BadRequestError, RequestError, RequestTimeout, ServerDiedError, StartupError
from managed_vllm.external import normalized_url
from managed_vllm.outputs import RequestOutput
from managed_vllm.request_fields import bodies
from managed_vllm.resume import Events, Generation, Losses, Lost, RetryPolicy, Step, is_long, obstacle
from managed_vllm.sampling import SamplingParams

Message = Mapping[str, Any]
Conversation = Sequence[Message]

_AT_ONCE = 64
_LOST = (500, 502, 503, 504)
_CONNECT_S = 10.0
_IDLE_CONNECTION_S = 2.0
"""vLLM's HTTP server closes a connection after 5 s without a request (uvicorn's default)."""
_TAIL_S = 0.25
"""For what follows the last token of a stream: read to its end, the connection can be used again."""
_LEAVE_S = 2.0
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""A host that has vanished is noticed after two minutes, however long a generation may be silent."""


class VLLMClient:
    """A client of one server.

    `base_url` may end in `/v1` or not. `retry` says how often a lost request is sent again. `connection` is for servers
    that may move: it is asked before each attempt for `(Connection, epoch)`, with the epoch that was lost (None at
    first), the seconds that are left (None: no bound), and the seconds that it may wait for another epoch before it
    returns the lost one once more. It may wait for the server to come back, and raises `TimeoutError` if that takes
    longer than is left. `instance` tells the server's short id, for errors.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        model_name: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        connection: Callable[[int | None, float | None, float], tuple[Connection, int]] | None = None,
        instance: Callable[[], str | None] | None = None,
    ) -> None:
        if connection is None:
            if base_url is None or model_name is None:
                raise BadRequestError("VLLMClient needs base_url and model_name")
            fixed = Connection(base_url=normalized_url(base_url), api_key=api_key or "", model=model_name)

            def connection(lost: int | None, timeout_s: float | None, pause_s: float) -> tuple[Connection, int]:
                return fixed, 0

        self._connection = connection
        self._instance = instance or (lambda: None)
        self._retry = retry or RetryPolicy()
        self._lock = threading.Lock()
        self._wires: dict[tuple[int, str | None, str], _Wire] = {}
        self._closed = threading.Event()

    def close(self) -> None:
        """Closes all connections. What is in flight ends with `ServerDiedError` and is not sent again."""
        self._closed.set()
        with self._lock:
            wires, self._wires = self._wires, {}
        for wire in wires.values():
            wire.close()

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Any = None,
        *,
        timeout: float | None = None,
        resume: bool | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages) or many (a list of lists); one output each, in input order.

        Args:
            messages: one conversation, or a list of them.
            sampling_params: `SamplingParams`, a dict or a `vllm.SamplingParams`, for all or as a list with one each.
            timeout: seconds for the whole call; None: no bound, but for a server that fails for good.
            resume: whether tokens are kept when their server is lost, so that only the rest is generated again. None:
                if that is possible and `max_tokens` is not given or at least `resume.RESUME_FROM`; True: a
                `BadRequestError` says why where it is not possible; False: never.
            extra_body: goes into the request body unchecked: fields of another version or server, or of a plugin.
            **fields: fields of the request body (`tools=…`, `chat_template_kwargs=…`). A name that the route does not
                know is refused, as vLLM would ignore it; docs/parameters.md has all of them.

        A generation can't be resumed, and is generated as a whole once more, with several answers (`n`), images,
        tools, structured outputs, stop strings, `bad_words`, presence or frequency penalty, prompt logprobs, `echo`, a
        `seed` unless the temperature is 0, a field that this library doesn't know, or a server that parses reasoning or
        tool calls. With temperature 0 a resumed answer is what it would have been, as far as the server itself gives
        equal answers to equal requests; the `decoded_token` of logprobs is missing behind the cut.
        Without `max_tokens` a limit from the model's generation config (`max_new_tokens`) counts anew after a loss.

        Raises the first `RequestError`: `BadRequestError`, `ServerDiedError` (lost more often than `retry` allows),
        `RequestTimeout`; or the server's own `StartupError` or `ServerStoppedError` when it is given up or stopped.
        """
        if not messages:
            return []
        single = isinstance(messages[0], Mapping)
        conversations: Sequence[Conversation] = [messages] if single else messages  # type: ignore[list-item,assignment]
        asked = [{"messages": [dict(m) for m in conversation]} for conversation in conversations]
        route = "/chat/completions"
        return self._send_all(
            route, asked, sampling_params, fields, extra_body, timeout=timeout, resume=resume, single=single
        )

    def generate_with_messages(
        self, messages: Any, sampling_params: Any = None, processor: Any = None, use_tqdm: bool = False
    ) -> list[RequestOutput]:
        """As the client wrapper of the service scripts has it; `processor` is not needed, the server has its own."""
        return self.chat(messages, sampling_params)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        sampling_params: Any = None,
        *,
        timeout: float | None = None,
        resume: bool | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Completes one prompt (text or token ids) or many; as `chat` otherwise. Without `max_tokens`: 16, as vLLM."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        each: Sequence[Any] = [prompts] if single else prompts
        asked = [{"prompt": prompt} for prompt in each]
        return self._send_all(
            "/completions", asked, sampling_params, fields, extra_body, timeout=timeout, resume=resume, single=single
        )

    # -- one request ---------------------------------------------------------------------------------------------------

    def _send_all(
        self,
        route: str,
        asked: Sequence[Mapping[str, Any]],
        sampling_params: Any,
        fields: Mapping[str, Any],
        extra_body: Mapping[str, Any] | None,
        *,
        timeout: float | None,
        resume: bool | None,
        single: bool,
    ) -> list[RequestOutput]:
        chat = route.startswith("/chat")
        if isinstance(sampling_params, list | tuple):
            if len(sampling_params) != len(asked):
                raise BadRequestError(f"{len(asked)} prompts but {len(sampling_params)} sampling parameters")
            params = [SamplingParams.of(one, chat=chat) for one in sampling_params]
        else:
            params = [SamplingParams.of(sampling_params, chat=chat)] * len(asked)
        made = bodies(asked, [one.to_request(chat=chat) for one in params], fields, extra_body, chat=chat)
        deadline = None if timeout is None else time.monotonic() + timeout

        def one(index: int) -> RequestOutput:
            try:
                return self._send(route, made[index], params[index].logprobs, deadline, resume)
            except RequestError as error:
                error.index = None if single else index
                error.instance = error.instance or self._instance()
                raise

        if len(made) == 1:
            return [one(0)]
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(made)))) as pool:
            return list(pool.map(one, range(len(made))))

    def _send(
        self, route: str, body: dict[str, Any], logprobs: int | None, deadline: float | None, resume: bool | None
    ) -> RequestOutput:
        chat = route.startswith("/chat")
        generation = Generation(route, body, stream=_is_streamed(body, resume))
        try:
            answer, told = self._answer(generation, deadline)
        except BadRequestError as error:
            # For a chat one candidate more was asked for, which may be one too many (`--max-logprobs`).
            fewer = chat and logprobs and body.get("top_logprobs") == logprobs + 1 and "logprobs" in error.message
            if not fewer:
                raise
            body = {**body, "top_logprobs": logprobs}
            generation = Generation(route, body, stream=_is_streamed(body, resume))
            answer, told = self._answer(generation, deadline)
            told["attempts"] += 1
        try:
            output = RequestOutput.from_answer(answer, body, chat=chat, logprobs=logprobs)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise RequestError(f"not an answer of the route: {str(answer)[:500]}") from error
        return replace(output, **told)

    def _answer(self, generation: Generation, deadline: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The whole answer, and what the output tells of its way here."""
        losses = Losses(self._retry)
        started = time.monotonic()
        attempts = 0
        lost: int | None = None
        pause = 0.0
        while True:
            connection, epoch = self._connect(lost, deadline, pause)
            if lost is not None and epoch != lost:
                pause = losses.new_epoch()
                self._raise_if_enough(losses)
                self._sleep(pause, _left(deadline))
            step = generation.next()
            attempts += step.stream or not generation.optional
            try:
                self._exchange(connection, generation, step, deadline)
                lost, pause = None, 0.0
            except Lost as error:
                if self._closed.is_set():
                    raise ServerDiedError("the client was closed under this request") from error
                progressed = generation.lost()
                if not generation.complete:
                    pause, lost = losses.add(error, progressed=progressed), epoch
                    self._raise_if_enough(losses, error)
            if generation.complete:
                return generation.answer(), {
                    "epoch": epoch,
                    "attempts": attempts,
                    "latency": time.monotonic() - started,
                    "model": connection.model,
                    "resumed_tokens": generation.kept,
                }

    def _connect(self, lost: int | None, deadline: float | None, pause: float) -> tuple[Connection, int]:
        again = time.monotonic() + pause
        try:
            connection, epoch = self._connection(lost, _left(deadline), pause)
        except StartupError:  # a start that timed out is a TimeoutError as well, and says more
            raise
        except TimeoutError as error:
            raise RequestTimeout("the server was not ready before the deadline") from error
        if epoch == lost:
            self._sleep(max(0.0, again - time.monotonic()), _left(deadline))
        if self._closed.is_set():
            raise ServerDiedError("the client was closed under this request")
        if deadline is not None and time.monotonic() >= deadline:
            raise RequestTimeout("the deadline passed before the request was sent")
        return connection, epoch

    @staticmethod
    def _raise_if_enough(losses: Losses, cause: Lost | None = None) -> None:
        if (why := losses.too_many) is not None:
            error = ServerDiedError(why)
            error.status = losses.status
            raise error from cause

    def _sleep(self, seconds: float, left: float | None) -> None:
        self._closed.wait(seconds if left is None else min(seconds, left))

    def _exchange(self, connection: Connection, generation: Generation, step: Step, deadline: float | None) -> None:
        """Sends one step and feeds what comes back to the generation. Raises `Lost`, or a `RequestError` for good."""
        body = None
        if step.body is not None:
            try:
                body = json.dumps({"model": connection.model, **step.body}, separators=(",", ":"), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise BadRequestError(f"the request can't be written as JSON: {error}") from error
        wire = self._wire(connection)
        url = connection.base_url.removesuffix("/v1") + step.path
        try:
            with wire.request(step.method, url, connection.api_key, body, deadline) as response:
                if step.stream and response.status == 200 and _is_event_stream(response):
                    wire.feed(response, generation)
                    if not generation.complete:
                        raise Lost("the stream ended before the answer did")
                    return
                data = response.read()
        except (httpcore.ConnectTimeout, httpcore.ConnectError) as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise RequestTimeout("no connection before the deadline") from error
            raise Lost(f"can't connect to {connection.base_url}: {error}", sent=False) from error
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            if generation.complete:
                return
            if deadline is not None and time.monotonic() >= deadline:
                raise RequestTimeout("no answer before the deadline") from error
            raise Lost(f"{type(error).__name__}: {error}") from error
        except (httpcore.UnsupportedProtocol, httpcore.ProxyError, UnicodeError) as error:
            raise RequestError(f"{connection.base_url} can't be asked: {error}") from error
        self._take(generation, response.status, data)

    @staticmethod
    def _take(generation: Generation, status: int, data: bytes) -> None:
        """An answer that is no stream."""
        if status in _LOST:
            raise Lost(f"HTTP {status}: {_message(data)}", status=status)
        if status >= 400 and generation.optional:
            generation.take(None)
            return
        if status >= 400:
            raise BadRequestError(f"HTTP {status}: {_message(data)}", status=status)
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise Lost(f"the answer is not JSON: {data[:200]!r}", status=status) from error
        if status != 200 or not isinstance(answer, dict):
            raise Lost(f"HTTP {status}: {data[:500]!r}", status=status)
        try:
            generation.take(answer)
        except (KeyError, TypeError, AttributeError) as error:
            raise Lost(f"not an answer: {data[:500]!r}", status=status) from error

    def _wire(self, connection: Connection) -> _Wire:
        parts = urlsplit(connection.base_url)
        # A forked child must not share its parent's connections.
        place = (os.getpid(), connection.uds, f"{parts.scheme}://{parts.netloc}")
        with self._lock:
            if self._closed.is_set():
                raise ServerDiedError("the client was closed under this request")
            wire = self._wires.get(place)
            if wire is None:
                wire = self._wires[place] = _Wire(connection)
            return wire


def _is_event_stream(response: httpcore.Response) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in response.headers
    )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _is_streamed(body: Mapping[str, Any], resume: bool | None) -> bool:
    if body.get("stream") or body.get("stream_options"):
        raise BadRequestError("stream= is not for this client: what comes back is whole; resume=True streams inside")
    if resume is False or (resume is None and not is_long(body)):
        return False
    why = obstacle(body)
    if why is not None and resume:
        raise BadRequestError(f"this generation can't be resumed: {why}")
    return why is None


# -- connections -------------------------------------------------------------------------------------------------------


class _Wire:
    """The connections to one address. Each request has one deadline for everything; `close` ends those in flight."""

    def __init__(self, connection: Connection) -> None:
        self._backend = _Backend()
        self._inside = 0
        self._left = threading.Condition()
        self._pool = httpcore.ConnectionPool(
            max_connections=None,
            max_keepalive_connections=_AT_ONCE,
            keepalive_expiry=_IDLE_CONNECTION_S,
            uds=connection.uds,
            proxy=None if connection.uds else _proxy(connection.base_url),
            socket_options=None if connection.uds else _KEEPALIVE,
            network_backend=self._backend,
        )

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, api_key: str, body: str | None, deadline: float | None
    ) -> Iterator[httpcore.Response]:
        headers = [("Accept", "*/*")]
        if body is not None:
            headers.append(("Content-Type", "application/json"))
        if api_key:
            headers.append(("Authorization", f"Bearer {api_key}"))
        with self._left:
            self._inside += 1
        self._backend.now.deadline = deadline
        try:
            content = None if body is None else body.encode()
            extensions = {"timeout": {"connect": _CONNECT_S}}
            with self._pool.stream(method, url, headers=headers, content=content, extensions=extensions) as response:
                yield response
        finally:
            with self._left:
                self._inside -= 1
                self._left.notify_all()

    def feed(self, response: httpcore.Response, generation: Generation) -> None:
        """Reads a stream into the generation, and to its end, if that comes at once: the connection can stay then."""
        events = Events()
        ended = False
        for data in response.iter_stream():
            if ended:
                continue
            for event in events.feed(data):
                generation.feed(event)
            ended = generation.complete
            if ended:
                tail = time.monotonic() + _TAIL_S
                deadline = self._backend.now.deadline
                self._backend.now.deadline = tail if deadline is None else min(deadline, tail)

    def close(self) -> None:
        self._backend.cut()
        with self._left:
            # A descriptor that is closed while another thread reads it may be another file's by then.
            if self._left.wait_for(lambda: self._inside == 0, _LEAVE_S):
                self._pool.close()


class _Backend(httpcore.SyncBackend):
    """httpcore bounds each read; here `now.deadline` of the thread that reads bounds all of them together."""

    def __init__(self) -> None:
        self.now = threading.local()
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()
        self._cut = False

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **kwargs: Any) -> _Stream:
        return self._stream(super().connect_tcp(host, port, self.bounded(timeout), *args, **kwargs))

    def connect_unix_socket(self, path: str, timeout: float | None = None, *args: Any, **kwargs: Any) -> _Stream:
        return self._stream(super().connect_unix_socket(path, self.bounded(timeout), *args, **kwargs))

    def _stream(self, inner: httpcore.NetworkStream) -> _Stream:
        stream = _Stream(inner, self)
        self.add(stream)
        return stream

    def add(self, stream: _Stream) -> None:
        with self._lock:
            self._streams.add(stream)
            cut = self._cut
        if cut:
            stream.cut()

    def cut(self) -> None:
        """Ends every connection: who reads sees its end."""
        with self._lock:
            self._cut = True
            streams = list(self._streams)
        for stream in streams:
            stream.cut()

    def bounded(self, timeout: float | None) -> float | None:
        deadline = getattr(self.now, "deadline", None)
        if deadline is None:
            return timeout
        left = deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline passed")
        return float(left if timeout is None else min(timeout, left))


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, backend: _Backend) -> None:
        self._inner = inner
        self._backend = backend

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._backend.bounded(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._backend.bounded(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> _Stream:
        stream = _Stream(self._inner.start_tls(*args, **kwargs), self._backend)
        self._backend.add(stream)
        return stream

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _proxy(base_url: str) -> httpcore.Proxy | None:
    """The proxy that the environment gives for a server elsewhere; there is none for loopback."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    if not url:
        return None
    found = urlsplit(url if "://" in url else f"http://{url}")
    auth = (found.username, found.password or "") if found.username else None
    return httpcore.Proxy(f"{found.scheme}://{found.hostname}:{found.port or 80}", auth=auth)


VLLMClientWrapper = VLLMClient
"""The name under which the service scripts know the client: `VLLMClientWrapper(base_url, api_key, model_name)`."""


def _message(data: bytes) -> str:
    try:
        error = json.loads(data)["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, KeyError, TypeError):
        return data[:1000].decode(errors="replace")
