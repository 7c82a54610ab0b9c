"""When a request whose response was lost is sent again, and when it is given up: `RetryPolicy`, applied."""

from __future__ import annotations

import random
import re

from managed_vllm.errors import DeadlyRequestError, RequestError, ServerBusyError, ServerDiedError
from managed_vllm.policies import RetryPolicy

_MAX_RETRY_AFTER_S = 60.0
"""The longest wait that a server may ask for. Beyond it the header rather says "not today"; we ask again."""
MOST_ABORTS = 1000
"""Aborts in a row. They are no failures: each update of the weights may abort what is in flight, again and again."""
_VARYING = re.compile(r"0x[0-9a-fA-F]+|[0-9a-fA-F]{8,}|\d+")
"""What differs between two tellings of the same error: addresses of objects, ids of requests, numbers."""


class ResponseLostError(Exception):
    """A response was lost, perhaps with its server: worth another attempt. Callers of the library never see it.

    `status` is the HTTP status, if one came. `sent`: the request may have reached the server; one that did not can't be
    what kills it. `retry_after_s`: how many seconds to wait, if the server says so (429, 503).
    """

    def __init__(
        self, message: str, *, status: int | None = None, sent: bool = True, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.sent = sent
        self.retry_after_s = retry_after_s


class ServerFaultError(ResponseLostError):
    """The server answered, but with an error of its own: HTTP 500, an error in a stream, JSON that is no answer.

    Once, that may come from its death. The same again, from a server that lives, comes from the request.
    """

    @property
    def words(self) -> str:
        """What it said, without what differs each time."""
        return _VARYING.sub("#", str(self))


class AbortedError(ResponseLostError):
    """The server has aborted the answer: it goes down, or its weights are being replaced (`on_update="restart"`)."""


class Retries:
    """Counts the losses of one request.

    Attributes:
        ever_lost: whether any response was lost.
        aborted: responses that were aborted, in a row.
        lost: responses lost in a row, without progress, since the last epoch began.
        deaths: the epochs that died under the request without progress.
        sent: whether it may have reached the server in this epoch.
        repeated: whether the last two losses of this epoch were the same `ServerFaultError`.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.ever_lost = False
        self.aborted = 0
        self.lost = 0
        self.deaths: tuple[int, ...] = ()
        self.repeated = False
        self._words: str | None = None
        self.sent = False
        self._status: int | None = None
        self._reason = ""

    def add_loss(self, loss: ResponseLostError, *, progressed: bool) -> float:
        """Counts a lost response; returns the seconds to wait for another epoch, at most.

        `progressed`: new tokens were kept.
        """
        if progressed:
            self.deaths, self.lost = (), 0
            self._words = None
        words = loss.words if isinstance(loss, ServerFaultError) else None
        self.repeated, self._words = words is not None and words == self._words, words
        self.ever_lost = True
        if isinstance(loss, AbortedError):
            self.aborted += 1
        else:
            self.lost, self.aborted = self.lost + 1, 0
        self.sent = self.sent or loss.sent
        self._status = loss.status
        self._reason = str(loss)
        doublings = min(max(self.lost - 1, 0), 60)
        longest = min(self._policy.backoff_max_s, self._policy.backoff_initial_s * 2.0**doublings)
        asked_s = min(loss.retry_after_s or 0.0, _MAX_RETRY_AFTER_S)
        return asked_s + random.uniform(0, longest)

    def add_epoch(self) -> float:
        """The last loss was a death, and another epoch is ready. Returns the seconds to wait before sending."""
        self.lost, self.sent = 0, False
        self._words = None
        return random.uniform(0, self._policy.spread_s)

    @property
    def exhausted(self) -> bool:
        """Whether the policy allows no further attempt."""
        lost = self.lost >= self._policy.max_lost or self.aborted >= MOST_ABORTS
        return lost or len(self.deaths) >= self._policy.max_deaths

    def error(self, cause: ResponseLostError | None = None) -> RequestError:
        """What to tell the caller once there is no further attempt."""
        if len(self.deaths) >= self._policy.max_deaths:
            return self._deadly(cause)
        count = max(self.lost, self.aborted)
        times = "once" if count == 1 else f"{count} times in a row"
        why = f"the answer was lost {times}, without a new epoch of the server. At last: {self._reason}"
        busy = self._status == 429
        error: RequestError = ServerBusyError(f"the server is busy: {why}") if busy else ServerDiedError(why)
        error.status = self._status
        error.__cause__ = cause
        return error

    def _deadly(self, cause: ResponseLostError | None) -> DeadlyRequestError:
        times = "once" if len(self.deaths) == 1 else f"{len(self.deaths)} times"
        last = f" At last: {self._reason}" if self._reason else ""
        why = f"the server died {times} under this request; it may be what kills it, and is not sent again.{last}"
        error = DeadlyRequestError(why, epochs=self.deaths)
        error.status, error.__cause__ = self._status, cause
        return error

    def raise_if_exhausted(self, cause: ResponseLostError | None = None) -> None:
        """Raises `error` if there is no further attempt."""
        if self.exhausted:
            raise self.error(cause)
