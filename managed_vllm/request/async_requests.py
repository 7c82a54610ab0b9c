"""What the asynchronous methods share: one request with a whole response, and the requests of one call side by side."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from managed_vllm.errors import BadRequestError, ModelNotFoundError, UnsupportedMethodError
from managed_vllm.request.adapters import LoadAdapter, with_adapters
from managed_vllm.request.arguments import ProgressBar
from managed_vllm.request.attempts import Sender
from managed_vllm.request.batches import named, run_batch
from managed_vllm.request.bounds import checked_timeout
from managed_vllm.request.pending import CommandRequest, JSONRequest, RequestStats
from managed_vllm.request.surface import WithoutTheRest

if TYPE_CHECKING:
    from managed_vllm.request.server_metrics import SupervisorMetrics

T = TypeVar("T")
AskSupervisor = Callable[[float | None], Awaitable["SupervisorMetrics | None"]]
"""What the supervisor tells within that many seconds (None: no bound); None where it does not answer."""


class AsyncRequests(WithoutTheRest):
    """Requests to one server.

    Args:
        sender: sends them.
        instance: returns the server's short id, for errors.
        load_adapter: loads adapters on their first use; None: the server must have them.
        supervisor: what the server's supervisor tells of it, within that many seconds; None: there is none.
    """

    def __init__(
        self,
        sender: Sender,
        instance: Callable[[], str | None],
        load_adapter: LoadAdapter | None = None,
        supervisor: AskSupervisor | None = None,
    ) -> None:
        self.sender = sender
        self._instance = instance
        self._load_adapter = load_adapter
        self._ask_supervisor = supervisor

    async def _with_adapters(self, fields: Mapping[str, Any], count: int, timeout_s: float | None) -> dict[str, Any]:
        """The fields of a call, with `lora_request=` as the name of a model."""
        with named(None, self._instance):
            return await with_adapters(fields, count, self._load_adapter, timeout_s)

    async def _request(
        self, path: str, body: dict[str, Any] | None, key: str, deadline: float | None
    ) -> tuple[Mapping[str, Any], RequestStats]:
        """A whole response, which has `key`, and how it was served. Without a body it is asked for by GET."""
        request = JSONRequest(path, body, key)
        stats = await self.sender.send(request, deadline)
        return request.answer(), stats

    async def _command(self, method: str, path: str, needs: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """POSTs to a route that only some servers have; of several servers, to each, and the last one's answer counts.

        Raises `UnsupportedMethodError` where it is missing.
        """
        answer: dict[str, Any] = {}
        try:
            with named(None, self._instance):
                for server in await self.sender.servers(None):
                    request = CommandRequest(path, body or {})
                    await self.sender.send(request, None, only=server)
                    answer = request.answer()
        except BadRequestError as error:
            raise_if_missing(method, path, needs, error)
            raise
        return answer

    async def _batch(
        self,
        one: Callable[[int], Awaitable[T]],
        count: int,
        single: bool,
        return_exceptions: bool,
        use_tqdm: ProgressBar,
        at_once: int | None = None,
        deadline: float | None = None,
    ) -> list[T]:
        return await run_batch(
            one,
            count,
            single=single,
            at_once=min(at_once or self.sender.max_in_flight, self.sender.max_in_flight),
            return_exceptions=return_exceptions,
            use_tqdm=use_tqdm,
            instance=self._instance,
            deadline=deadline,
        )


def raise_if_missing(method: str, path: str, needs: str, error: BadRequestError) -> None:
    """Raises `UnsupportedMethodError` where the error is that the server lacks the route."""
    if error.status == 404 and not isinstance(error, ModelNotFoundError):
        message = f"{method}() needs a server that has the route {path.partition('?')[0]}: {needs}"
        raise UnsupportedMethodError(message, method=method) from error


def deadline_of(timeout_s: float | None) -> float | None:
    """On the monotonic clock; None: there is none. Raises `BadRequestError` for what is no number of seconds."""
    checked = checked_timeout("timeout", timeout_s)
    return None if checked is None else time.monotonic() + checked
