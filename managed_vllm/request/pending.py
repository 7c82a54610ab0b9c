"""A request that waits for its answer: what `attempts.Sender` drives, and the values that pass between the two.

One `PendingRequest` takes one or more HTTP requests: more after a loss, and where a generation is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from managed_vllm.request.deaths import content_of
from managed_vllm.request.retry import ResponseLostError


@dataclass(frozen=True)
class HTTPRequest:
    """One HTTP request: `path` is below the server's root, `body` goes as JSON, `stream` says what may come back."""

    method: str
    path: str
    body: dict[str, Any] | None
    stream: bool = False

    @property
    def session(self) -> str | None:
        """The session that the body names."""
        found = None if self.body is None else self.body.get("session_id")
        return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class RequestStats:
    """How a request was served. Times are in seconds; `started_at` is Unix time."""

    model: str
    epoch: int
    attempts: int
    resumed_tokens: int
    started_at: float
    latency: float
    time_to_first_token: float | None


class PendingRequest(Protocol):
    """One request until it is `complete`: `JSONRequest`, or `resume.Generation`."""

    @property
    def complete(self) -> bool:
        """Whether `answer` has it."""

    @property
    def optional(self) -> bool:
        """Whether the last HTTP request may be refused: there is another way without it."""

    @property
    def kept(self) -> int:
        """Tokens that were received before the last loss, and are not generated again."""

    @property
    def broken_off(self) -> bool:
        """Whether the caller has been given something that was lost since: then the answer can't go on."""

    @property
    def content(self) -> str:
        """What is asked for, as a short text; see `deaths.content_of`."""

    @property
    def session(self) -> str | None:
        """The session that it belongs to."""

    def next(self) -> HTTPRequest:
        """The HTTP request to send now."""

    def take_json(self, data: bytes | None) -> None:
        """Takes a whole response; None: the server refused an optional request.

        Raises `ResponseLostError`, or what `responses.MALFORMED` lists, for what is no answer.
        """

    def take_headers(self, headers: Mapping[str, str]) -> None:
        """Takes the headers of a whole response, before the response itself."""

    def feed(self, event: bytes) -> None:
        """Takes one event of a stream. Raises `ResponseLostError`."""

    def lost(self) -> bool:
        """The response was lost. Returns whether there was progress nevertheless; may be `complete` then."""

    def answer(self) -> Mapping[str, Any]:
        """The complete answer, as the route gives it."""


class JSONRequest:
    """A request with one whole JSON response, in which `keys` must be present. It can always be sent again."""

    optional = False
    broken_off = False
    kept = 0

    def __init__(self, path: str, body: dict[str, Any] | None, *keys: str) -> None:
        self._request = HTTPRequest("GET" if body is None else "POST", path, body)
        self._keys = keys
        self._answer: dict[str, Any] | None = None
        self.headers: Mapping[str, str] = {}

    @property
    def complete(self) -> bool:
        return self._answer is not None

    @property
    def content(self) -> str:
        return content_of(self._request.path, self._request.body)

    @property
    def session(self) -> str | None:
        return self._request.session

    def next(self) -> HTTPRequest:
        return self._request

    def take_json(self, data: bytes | None) -> None:
        answer = msgspec.json.decode(data or b"")
        if not isinstance(answer, dict) or any(key not in answer for key in self._keys):
            raise ValueError(f"no {', '.join(self._keys)} in it")
        self._answer = answer

    def take_headers(self, headers: Mapping[str, str]) -> None:
        self.headers = headers

    def feed(self, event: bytes) -> None:
        raise ResponseLostError("a stream in place of a whole response")

    def lost(self) -> bool:
        return False

    def answer(self) -> dict[str, Any]:
        assert self._answer is not None
        return self._answer


class TextRequest(JSONRequest):
    """A GET whose response is text."""

    def __init__(self, path: str) -> None:
        super().__init__(path, None)

    def take_json(self, data: bytes | None) -> None:
        self._answer = {"text": (data or b"").decode(errors="replace")}

    @property
    def text(self) -> str:
        """The response."""
        return str(self.answer()["text"])


class CommandRequest(JSONRequest):
    """A command to the server, whose response may be empty."""

    def take_json(self, data: bytes | None) -> None:
        super().take_json(data or b"{}")
