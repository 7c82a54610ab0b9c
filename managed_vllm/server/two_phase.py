"""A call that goes to several replicas as a two-phase commit: all of them do it, or none.

Each replica's server is a participant. In this order:

1. It has *started*: its turn has come, and its server is there. Nothing is done before all have started.
2. It does its part so that it can still be undone. It is *prepared* then, and says what came of it.
3. Once all are prepared and say the same, the call is committed: nobody goes back from here. Where one fails before, or
   says something else, the call is aborted, and each participant undoes its part.

A call to a single server has one participant, which waits for nobody (`ALONE`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Any, TypeVar

from managed_vllm.errors import EngineControlError

T = TypeVar("T")
Undo = Callable[[], Awaitable[None]]


class AbortedError(EngineControlError):
    """Another replica could not do its part of the call, so that this one has to undo its own."""


class Participant:
    """One server's part in a call; by itself it waits for nobody."""

    async def started(self) -> None:
        """Returns once all have started. Raises `AbortedError` where one can't."""

    async def prepared(self, result: object = None) -> None:
        """Returns once the call is committed: all are prepared, with equal results. Raises `AbortedError`."""

    def abort(self) -> None:
        """This one has failed. The others learn it now, and not only when this one has undone its part."""

    def undo_with(self, undo: Undo) -> None:
        """How to undo what is done, where a later one fails."""

    async def once(self, key: Hashable, find: Callable[[], Awaitable[T]]) -> T:
        """What `find` finds, which is the same for all participants: one of them looks for it."""
        return await find()


ALONE = Participant()


class Once:
    """What was found out for all of a call's participants, by key; an error is the same for all, too."""

    def __init__(self) -> None:
        self._found: dict[Hashable, asyncio.Future[Any]] = {}

    async def find(self, key: Hashable, find: Callable[[], Awaitable[T]]) -> T:
        """What `find` gives, the first time; the same from then on."""
        if key not in self._found:
            self._found[key] = asyncio.ensure_future(find())
        found: T = await asyncio.shield(self._found[key])
        return found


class Commit:
    """One call over several replicas, by their numbers; see the module's docstring."""

    def __init__(self, call: str, numbers: Iterable[int], on_commit: Callable[[object], None]) -> None:
        """`on_commit` is called with the result at the moment of the commit, before any participant goes on."""
        self._call = call
        self._expected = set(numbers)
        self._on_commit = on_commit
        self._started: set[int] = set()
        self._results: dict[int, object] = {}
        self._all_started = asyncio.Event()
        self._decided = asyncio.Event()
        self._once = Once()
        self._why = ""
        self.is_committed = False
        self.aborted_by: int | None = None

    def participant(self, number: int) -> Participant:
        """The part of one replica. It ends with `end`."""
        return _Member(self, number, self._once)

    @property
    def has_started(self) -> bool:
        """Whether anything may have been done."""
        return self._all_started.is_set() and self._started >= self._expected

    def is_prepared(self, number: int) -> bool:
        """Whether that replica has done its part."""
        return number in self._results

    def end(self, number: int) -> None:
        """A replica's part is over: done, failed, or left out. The others don't wait for it any more."""
        self._expected.discard(number)
        self._look()

    def abort(self, number: int) -> None:
        """A replica has failed. Too late after the commit, and of no interest from one that is left out."""
        if number in self._expected and not self._decided.is_set():
            self.aborted_by = number
            self._abort(f"replica {number} could not do it")

    async def start(self, number: int) -> None:
        """See `Participant.started`."""
        self._started.add(number)
        self._look()
        await self._all_started.wait()
        if self._why:
            raise AbortedError(f"{self._call}: {self._why}", call=self._call)

    async def prepare(self, number: int, result: object) -> None:
        """See `Participant.prepared`."""
        self._results[number] = result
        self._look()
        await self._decided.wait()
        if self._why:
            raise AbortedError(f"{self._call}: {self._why}", call=self._call)

    def _abort(self, why: str) -> None:
        self._why = why
        self._all_started.set()
        self._decided.set()

    def _look(self) -> None:
        if self._started >= self._expected:
            self._all_started.set()
        if self._decided.is_set() or not self._expected or not self._results.keys() >= self._expected:
            return
        results = {number: self._results[number] for number in sorted(self._expected)}
        first = next(iter(results.values()))
        if any(result != first for result in results.values()):
            differing = ", ".join(f"replica {number}: {result}" for number, result in results.items())
            self._abort(f"the replicas would differ ({differing})")
            return
        self.is_committed = True
        self._on_commit(first)
        self._decided.set()


class _Member(Participant):
    def __init__(self, commit: Commit, number: int, once: Once) -> None:
        self._commit = commit
        self._number = number
        self._once = once

    async def started(self) -> None:
        await self._commit.start(self._number)

    async def prepared(self, result: object = None) -> None:
        await self._commit.prepare(self._number, result)

    def abort(self) -> None:
        self._commit.abort(self._number)

    async def once(self, key: Hashable, find: Callable[[], Awaitable[T]]) -> T:
        return await self._once.find(key, find)
