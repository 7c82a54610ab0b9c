"""`VLLMClient`: `generate` and `chat` in the shape of `vllm.LLM`, against any OpenAI-compatible server.

Requests of one call run side by side and come back in input order. A request that the server lost (it died, was
restarted, or answered with an "abort" that nobody asked for) is sent again when the server is back.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx

from managed_vllm.control import Connection
from managed_vllm.errors import BadRequestError, RequestError, RequestTimeout, ServerDiedError, StartupError
from managed_vllm.external import normalized_url
from managed_vllm.outputs import CompletionOutput, Logprob, RequestOutput
from managed_vllm.sampling import SamplingParams

Message = Mapping[str, Any]
Conversation = Sequence[Message]

_AT_ONCE = 64
_LOST = (500, 502, 503, 504)
_ATTEMPTS = 4


class Lost(Exception):
    """The answer was lost with the server: worth another try once it is back."""


class VLLMClient:
    """A client of one server.

    `base_url` may end in `/v1` or not. `connection` is for servers that may move: it is asked before each attempt for
    `(Connection, epoch)`, with the epoch that was lost (None at first) and the seconds that are left (None: no bound).
    It may wait for the server to come back; it raises `TimeoutError` if that takes longer.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        model_name: str | None = None,
        *,
        connection: Callable[[int | None, float | None], tuple[Connection, int]] | None = None,
    ) -> None:
        if connection is None:
            if base_url is None or model_name is None:
                raise BadRequestError("VLLMClient needs base_url and model_name")
            fixed = Connection(base_url=normalized_url(base_url), api_key=api_key or "", model=model_name)

            def connection(lost: int | None, timeout_s: float | None) -> tuple[Connection, int]:
                return fixed, 0

        self._connection = connection
        self._lock = threading.Lock()
        self._http: tuple[str | None, httpx.Client] | None = None
        self._closed = False

    def close(self) -> None:
        """Closes the pooled connections; what is in flight fails and is not sent again."""
        with self._lock:
            self._closed = True
            if self._http is not None:
                self._http[1].close()
                self._http = None

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Any = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of messages) or many (a list of lists); one output each, in input order.

        `sampling_params` is for all, or a list with one each. `timeout` bounds the whole call in seconds. `fields` go
        into the request body as they are (`tools=…`, `chat_template_kwargs=…`). Raises the first `RequestError`.
        """
        if not messages:
            return []
        conversations: Sequence[Conversation] = [messages] if isinstance(messages[0], Mapping) else messages  # type: ignore[list-item,assignment]
        bodies = [{"messages": [dict(m) for m in conversation], **fields} for conversation in conversations]
        return self._send_all("/chat/completions", bodies, sampling_params, timeout)

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
        **fields: Any,
    ) -> list[RequestOutput]:
        """Completes one prompt (text or token ids) or many; as `chat` otherwise."""
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        each: Sequence[Any] = [prompts] if single else prompts
        return self._send_all("/completions", [{"prompt": p, **fields} for p in each], sampling_params, timeout)

    # -- one request ---------------------------------------------------------------------------------------------------

    def _send_all(
        self, route: str, bodies: Sequence[dict[str, Any]], sampling_params: Any, timeout: float | None
    ) -> list[RequestOutput]:
        if isinstance(sampling_params, list | tuple):
            if len(sampling_params) != len(bodies):
                raise BadRequestError(f"{len(bodies)} prompts but {len(sampling_params)} sampling parameters")
            params = [SamplingParams.of(p) for p in sampling_params]
        else:
            params = [SamplingParams.of(sampling_params)] * len(bodies)
        deadline = None if timeout is None else time.monotonic() + timeout
        chat = route.startswith("/chat")

        def one(index: int) -> RequestOutput:
            body = {**bodies[index], **params[index].to_request(chat=chat), "return_token_ids": True}
            return self._send(route, body, index, deadline)

        if len(bodies) == 1:
            return [one(0)]
        with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(bodies)))) as pool:
            return list(pool.map(one, range(len(bodies))))

    def _send(self, route: str, body: dict[str, Any], index: int, deadline: float | None) -> RequestOutput:
        lost: int | None = None
        started = time.monotonic()
        for attempt in range(1, _ATTEMPTS + 1):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                connection, epoch = self._connection(lost, left)
            except StartupError:  # a start that timed out is a TimeoutError as well, and says more
                raise
            except TimeoutError as error:
                raise RequestTimeout("the server was not ready before the deadline", index=index) from error
            try:
                answer = self._post(connection, route, {"model": connection.model, **body}, index, deadline)
                output = _output(answer, body, chat=route.startswith("/chat"))
                return replace(
                    output, epoch=epoch, attempts=attempt, latency=time.monotonic() - started, model=connection.model
                )
            except Lost as error:
                lost = epoch
                reason = str(error)
                if self._closed:
                    raise ServerDiedError("the client was closed under this request", index=index) from error
        raise ServerDiedError(f"the server was lost {_ATTEMPTS} times under this request: {reason}", index=index)

    def _post(
        self, connection: Connection, route: str, body: dict[str, Any], index: int, deadline: float | None
    ) -> dict[str, Any]:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise RequestTimeout("the deadline passed before the request was sent", index=index)
        # No read time-out of our own: a long generation is the caller's business.
        timeout = httpx.Timeout(left, connect=10.0 if left is None else min(10.0, left))
        headers = {"Authorization": f"Bearer {connection.api_key}"} if connection.api_key else {}
        try:
            response = self._client(connection).post(
                connection.base_url + route, json=body, headers=headers, timeout=timeout
            )
        except httpx.ConnectTimeout as error:
            raise Lost(f"can't connect to {connection.base_url}") from error
        except httpx.TimeoutException as error:
            raise RequestTimeout("no answer before the deadline", index=index) from error
        except httpx.HTTPError as error:
            raise Lost(f"{type(error).__name__}: {error}") from error
        if response.status_code in _LOST:
            raise Lost(f"HTTP {response.status_code}: {response.text[:500]}")
        if response.status_code >= 400:
            raise BadRequestError(
                f"HTTP {response.status_code}: {_message(response)}", index=index, status=response.status_code
            )
        try:
            answer = response.json()
        except ValueError as error:
            raise Lost(f"the answer is not JSON: {response.text[:200]!r}") from error
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise RequestError(f"the answer has no choices: {response.text[:500]}", index=index)
        if any(choice.get("finish_reason") == "abort" for choice in answer["choices"]):
            raise Lost("the server aborted the request")  # vLLM 0.32 says so, with HTTP 200, while it goes down
        return answer

    def _client(self, connection: Connection) -> httpx.Client:
        with self._lock:
            if self._http is None or self._http[0] != connection.uds:
                transport = httpx.HTTPTransport(uds=connection.uds) if connection.uds else None
                loopback = connection.base_url.startswith(("http://127.", "http://localhost", "http://[::1]"))
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=_AT_ONCE, keepalive_expiry=2.0)
                self._http = (
                    connection.uds,
                    httpx.Client(trust_env=not loopback, transport=transport, limits=limits),
                )
            return self._http[1]


VLLMClientWrapper = VLLMClient
"""The name under which the service scripts know the client: `VLLMClientWrapper(base_url, api_key, model_name)`."""


def _message(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)
    except (ValueError, KeyError, TypeError):
        return response.text[:1000]


def _output(answer: Mapping[str, Any], body: Mapping[str, Any], *, chat: bool) -> RequestOutput:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    prompt_ids = answer.get("prompt_token_ids") or choices[0].get("prompt_token_ids") or ()
    prompt = body.get("prompt")
    return RequestOutput(
        request_id=str(answer.get("id") or uuid.uuid4()),
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=tuple(prompt_ids),
        outputs=tuple(_choice(choice, chat=chat) for choice in choices),
        raw=answer,
    )


def _choice(choice: Mapping[str, Any], *, chat: bool) -> CompletionOutput:
    text = (choice["message"].get("content") or "") if chat else choice["text"]
    token_ids = tuple(choice.get("token_ids") or ())
    sampled = _sampled_logprobs(choice.get("logprobs"), chat=chat)
    logprobs = None
    if sampled is not None and len(sampled) == len(token_ids):
        logprobs = tuple({token: value} for token, value in zip(token_ids, sampled, strict=True))
    return CompletionOutput(
        index=choice["index"],
        text=text,
        token_ids=token_ids,
        finish_reason=choice.get("finish_reason"),
        stop_reason=choice.get("stop_reason"),
        logprobs=logprobs,
        cumulative_logprob=None if sampled is None else sum(value.logprob for value in sampled),
    )


def _sampled_logprobs(logprobs: Mapping[str, Any] | None, *, chat: bool) -> list[Logprob] | None:
    if not logprobs:
        return None
    if chat:
        return [Logprob(entry["logprob"], decoded_token=entry["token"]) for entry in logprobs.get("content") or ()]
    return [
        Logprob(value, decoded_token=token)
        for value, token in zip(logprobs["token_logprobs"], logprobs["tokens"], strict=True)
    ]
