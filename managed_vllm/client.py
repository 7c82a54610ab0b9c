"""`VLLMClient` and `AsyncVLLMClient`: what `vllm.LLM` offers, against a server, in the shape of `vllm.LLM`.

The requests of one call run side by side and return in input order. A request whose response is lost with the server
(it died, was restarted, aborted the request, or broke off) is sent again when the server is back; a long generation
goes on where it was cut. The caller's deadlines bound all of that: waiting for the server, connecting, and reading to
the last byte.

There is one implementation, the asynchronous one (`request.async_methods`). `VLLMClient` runs it in the event loop of
`request.portal`; so it works in threads, in a notebook's running event loop, and in a forked child.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

from managed_vllm.errors import BadRequestError
from managed_vllm.masking import Secret
from managed_vllm.policies import MAX_IN_FLIGHT, RetryPolicy
from managed_vllm.request.adapters import LoadAdapter
from managed_vllm.request.async_methods import AsyncRequestMethods
from managed_vllm.request.async_requests import AskSupervisor
from managed_vllm.request.attempts import Report, Sender
from managed_vllm.request.connections import Transport
from managed_vllm.request.endpoints import Endpoint, Endpoints
from managed_vllm.request.methods import RequestMethods
from managed_vllm.request.outputs import RequestOutput
from managed_vllm.request.placement import OneServer, Placement
from managed_vllm.request.watched_servers import Servers, balanced
from managed_vllm.status import Connection
from managed_vllm.urls import checked_api_key, normalized_url

MakePlacement = Callable[[Endpoints, Transport], Placement]


class AsyncVLLMClient(AsyncRequestMethods):
    """A client of one server, for asyncio. Usable from any number of event loops, one after the other or side by side.

    Args:
        base_url: with or without `/v1`. Several servers of the same model: a list of them. Requests of one `session_id`
            go to one server, others to the one with the fewest of this client in flight; one that is down is left out.
        api_key: None or empty: none is sent.
        model_name: the name under which the server has the model.
        retry: how often a lost request is sent again.
        max_in_flight: how many requests are in flight at once in one event loop, at most. Fewer while the server
            refuses some (HTTP 429, 503).
        media_ids: whether an image that the server has already is sent as its id alone. The server must be a vLLM that
            takes `uuid` (0.11 and later). For a server that `ManagedVLLM` finds this is on.
        connection: for a server that may move, in place of the first three. Called in a thread before an attempt, with
            the epoch that was lost (None at first), the seconds that are left (None: no bound), and the seconds for
            which it may wait for another epoch before it returns the lost one again. Returns `(Connection, epoch)`. It
            may wait for the server to come back, and raises `TimeoutError` if that takes longer than is left.
        ready: the same, without waiting: the connection and epoch of a server that is ready now, or None.
        instance: returns the server's short id, for errors.
        report: tells a supervisor about a request under which the server dies; see `Sender`.
        load_adapter: loads the adapters of `lora_request=` on their first use; None: the server must have them.
        supervisor: what the server's supervisor tells for `metrics()`; None: there is none.
        placement: where there may be several servers: makes what chooses among them, from what finds the first and the
            client's connections; None: `connection` finds the only one.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        model_name: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        media_ids: bool = False,
        connection: Callable[[int | None, float | None, float], Endpoint] | None = None,
        ready: Callable[[], Endpoint | None] | None = None,
        instance: Callable[[], str | None] | None = None,
        report: Report | None = None,
        load_adapter: LoadAdapter | None = None,
        supervisor: AskSupervisor | None = None,
        placement: MakePlacement | None = None,
    ) -> None:
        self.model_name = model_name
        self.fixed_connection: Connection | None = None
        if max_in_flight < 1:
            raise BadRequestError("max_in_flight must be 1 or more", field="max_in_flight")
        if connection is None:
            if base_url is None or model_name is None:
                raise BadRequestError("a client needs base_url and model_name")
            found = _fixed(base_url, api_key, model_name)
            self.fixed_connection = found[0]
            fixed = found[0], 0
            if len(found) > 1:
                placement = functools.partial(balanced, _all_up(found))

            def connection(lost_epoch: int | None, timeout_s: float | None, pause_s: float) -> Endpoint:
                return fixed

            def ready() -> Endpoint | None:
                return fixed

        transport = Transport()
        endpoints = Endpoints(connection, ready or (lambda: None))
        sender = Sender(
            transport,
            OneServer(endpoints) if placement is None else placement(endpoints, transport),
            retry=retry or RetryPolicy(),
            max_in_flight=max_in_flight,
            media_ids=media_ids,
            report=report,
        )
        super().__init__(sender, instance or (lambda: None), load_adapter, supervisor)
        weakref.finalize(self, self.sender.close).atexit = False

    @property
    def retry(self) -> RetryPolicy:
        """How often a lost request is sent again."""
        return self.sender.retry

    @property
    def bytes_sent(self) -> int:
        """Bytes of all request bodies so far."""
        return self.sender.bytes_sent

    @property
    def in_flight(self) -> int:
        """Requests in flight now, in all event loops."""
        return self.sender.in_flight

    @property
    def closed(self) -> bool:
        """Whether it was closed, for good. A handle makes a new one then."""
        return self.sender.closed

    def close(self) -> None:
        """Ends what is in flight with `ServerDiedError`; nothing is sent again. From any thread, also twice."""
        self.sender.close()

    async def aclose(self) -> None:
        """As `close`; the connections of the running loop are closed when it returns."""
        await self.sender.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _fixed(base_url: str | Sequence[str], api_key: str | None, model_name: str) -> Sequence[Connection]:
    key = checked_api_key(api_key) if api_key else Secret("")
    urls = [base_url] if isinstance(base_url, str) else base_url
    if not urls:
        raise BadRequestError("base_url has no server in it", field="base_url")
    unique = dict.fromkeys(normalized_url(url) for url in urls)
    return [Connection(base_url=url, api_key=key, model=model_name) for url in unique]


def _all_up(connections: Sequence[Connection]) -> Servers:
    return lambda: [(connection, True) for connection in connections]


class VLLMClient(RequestMethods):
    """`AsyncVLLMClient` for programs without asyncio: the same arguments and methods, with the results themselves.

    Works from many threads at once, within a running event loop (which it blocks, as any call does), and in a forked
    child. `VLLMClient(base_url, api_key, model_name)` is what the service scripts call `VLLMClientWrapper`.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        api_key: str | None = None,
        model_name: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        media_ids: bool = False,
        connection: Callable[[int | None, float | None, float], Endpoint] | None = None,
        ready: Callable[[], Endpoint | None] | None = None,
        instance: Callable[[], str | None] | None = None,
    ) -> None:
        """The arguments are those of `AsyncVLLMClient`."""
        self._client = AsyncVLLMClient(
            base_url,
            api_key,
            model_name,
            retry=retry,
            max_in_flight=max_in_flight,
            media_ids=media_ids,
            connection=connection,
            ready=ready,
            instance=instance,
        )

    @classmethod
    def of(cls, client: AsyncVLLMClient) -> Self:
        """The same client, with its connections and its bounds, without asyncio."""
        made = cls.__new__(cls)
        made._client = client
        return made

    @property
    def model_name(self) -> str | None:
        """The name under which the server has the model, as given."""
        return self._client.model_name

    @property
    def async_client(self) -> AsyncVLLMClient:
        """The same client for asyncio."""
        return self._client

    @property
    def retry(self) -> RetryPolicy:
        """How often a lost request is sent again."""
        return self._client.retry

    @property
    def bytes_sent(self) -> int:
        """Bytes of all request bodies so far."""
        return self._client.bytes_sent

    @property
    def in_flight(self) -> int:
        """Requests in flight now, in all event loops and threads."""
        return self._client.in_flight

    def close(self) -> None:
        """Closes all connections. What is in flight ends with `ServerDiedError` and is not sent again."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VLLMClientWrapper(VLLMClient):
    """`VLLMClient` under the name of the service scripts: `VLLMClientWrapper(base_url, api_key, model_name)`.

    They also ask it as the OpenAI SDK's client: `llm.chat.completions.create(…)` and `llm.models.list()`. Those
    requests go by the connections of this client, too.
    """

    @functools.cached_property
    def openai(self) -> Any:
        """The OpenAI SDK's `OpenAI` on the connections of this client."""
        from managed_vllm.request import openai_sdk

        connection = self._client.fixed_connection
        if connection is None:
            raise BadRequestError("the client of a server that may move has no such names; use ManagedVLLM.openai")
        return openai_sdk.make_client("OpenAI", connection, self._client.sender)

    @property
    def models(self) -> Any:
        """`openai.models`."""
        return self.openai.models

    @functools.cached_property
    def chat(self) -> _Chat:
        """`VLLMClient.chat`, which is called, and `openai.chat` with its `completions`."""
        return _Chat(super().chat, self)


class _Chat:
    """A method that has attributes, too: those of the SDK's `chat`."""

    def __init__(self, method: Callable[..., list[RequestOutput]], client: VLLMClientWrapper) -> None:
        self._method = method
        self._client = client
        functools.update_wrapper(self, method)

    def __call__(self, *arguments: Any, **options: Any) -> list[RequestOutput]:
        return self._method(*arguments, **options)

    @property
    def completions(self) -> Any:
        """`openai.chat.completions`."""
        return self._client.openai.chat.completions
