"""Which deaths of the server are laid to which requests: those in flight at each of them, by their content.

In this order:

1. A request whose answer was lost with an epoch of the server is laid to it (`add`); its content counts, so that the
   second of four rollouts of one task does not start the count anew.
2. One that is answered, or makes progress, is cleared (`clear`).
3. What was in flight at `RetryPolicy.max_deaths` deaths is not sent again. The supervisor is told, which leaves these
   deaths out of its count of crashes, and says which of them were none: a requested restart, its own death (`keep`).
4. What alone was in flight at all of them is known from then on (`is_known`), and is not sent at all.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Container, Iterable, Mapping
from typing import Any

import msgspec

from managed_vllm.request.bodies import encode_body

_MOST_EPOCHS = 64
_INCIDENTAL = frozenset(
    {"seed", "request_id", "user", "session_id", "priority", "cache_salt", "stream", "stream_interval"}
)
"""Fields in which two requests of the same content may differ."""


class _Everything(Container[str]):
    def __contains__(self, _: object) -> bool:
        return True


def content_of(path: str, body: Mapping[str, Any] | None) -> str:
    """A request's content as a short text: equal for requests that ask for the same. Images count by their ids."""
    kept = {name: value for name, value in (body or {}).items() if name not in _INCIDENTAL}
    hashed = hashlib.blake2b(path.encode(), digest_size=16)
    for part in encode_body(kept, known=_Everything()).parts:
        hashed.update(part if isinstance(part, bytes) else b"")
    return hashed.hexdigest()


def body_of(data: bytes) -> dict[str, Any]:
    """A body as `content_of` takes it: the object that the JSON is, or one that stands for another body."""
    try:
        found = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"": data.decode("latin-1")}


class Deaths:
    """What is laid to the requests of one client. Thread-safe.

    Args:
        limit: at how many deaths a request may be in flight.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._laid: dict[int, set[str]] = {}

    def add(self, content: str, epoch: int) -> None:
        """The request was in flight when this epoch died."""
        with self._lock:
            self._laid.setdefault(epoch, set()).add(content)
            while len(self._laid) > _MOST_EPOCHS:
                del self._laid[min(self._laid)]

    def clear(self, content: str) -> None:
        """The request was answered, or has made progress: none of the deaths is its doing."""
        self.keep(content, ())

    def keep(self, content: str, epochs: Iterable[int]) -> None:
        """Of what is laid to the request, only the ends of these epochs were deaths."""
        kept = set(epochs)
        with self._lock:
            for epoch in list(self._laid):
                if epoch not in kept:
                    self._laid[epoch].discard(content)
                    if not self._laid[epoch]:
                        del self._laid[epoch]

    def of(self, content: str) -> tuple[int, ...]:
        """The epochs that died under the request."""
        with self._lock:
            return tuple(epoch for epoch, contents in self._laid.items() if content in contents)

    def is_known(self, content: str) -> bool:
        """Whether the request is what kills the server: it alone was in flight at all of its deaths."""
        with self._lock:
            suspects = [contents for contents in self._laid.values() if content in contents]
            return len(suspects) >= self._limit and set.intersection(*suspects) == {content}

    def __bool__(self) -> bool:
        """Whether anything is laid to anybody. Without the lock: asked before each request."""
        return bool(self._laid)

    def after_fork(self) -> None:
        """In a forked child: another thread may have held the lock."""
        self._lock = threading.Lock()
