"""What limits everything that a client does: the caller's deadline, and the closing of the client."""

from __future__ import annotations

import asyncio
import math
import numbers
import time
from types import TracebackType
from typing import Self

from managed_vllm.errors import BadRequestError, RequestTimeoutError, ServerDiedError

NOT_SENT = "the deadline passed before the request was sent"


def checked_timeout(name: str, value: object) -> float | None:
    """Seconds as callers give them; None: no bound, as `math.inf`. Raises `BadRequestError` for what is no number."""
    if value is None or value == math.inf:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise BadRequestError(f"{name} is a number of seconds, not {value!r:.80}", field=name)
    return float(value)


def closed_error() -> ServerDiedError:
    """The error of a request whose client was closed."""
    return ServerDiedError("the client was closed under this request")


class Bound:
    """Ends what runs within it: at its deadline with `RequestTimeoutError`, or with the client by `ServerDiedError`.

    Args:
        bounds: those of the client in the running event loop; this one is among them while it is entered.
        deadline: in seconds of the monotonic clock. None: there is none.
        reason: what the `RequestTimeoutError` says; may change while it runs.
    """

    __slots__ = ("_bounds", "_closed", "_timeout", "deadline", "reason")

    def __init__(self, bounds: set[Bound], deadline: float | None, reason: str) -> None:
        self._bounds = bounds
        self._closed = False
        self._timeout = asyncio.timeout(_left_s(deadline))
        self.deadline = deadline
        self.reason = reason

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline; None if there is none."""
        return _left_s(self.deadline)

    def tighten(self, deadline: float) -> None:
        """Moves the deadline there, if it is sooner."""
        if self.deadline is None or deadline < self.deadline:
            self.deadline = deadline
            self._reschedule(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Ends what runs within it now. To be called within its event loop."""
        self._closed = True
        self._reschedule(0.0)

    def check(self) -> None:
        """Raises at once if it is over, without waiting for what runs within it to be interrupted."""
        if self._closed or (self.deadline is not None and time.monotonic() >= self.deadline):
            raise self._error()

    async def __aenter__(self) -> Self:
        self._bounds.add(self)
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bounds.discard(self)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as caught:
            raise self._error() from caught

    def _error(self) -> RequestTimeoutError | ServerDiedError:
        return closed_error() if self._closed else RequestTimeoutError(self.reason)

    def _reschedule(self, delay_s: float) -> None:
        if not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time() + delay_s)


def _left_s(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
