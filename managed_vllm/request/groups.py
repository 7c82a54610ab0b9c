"""Several prompts of one call in one HTTP request, where nobody can tell the answers from those of single requests.

vLLM's routes take lists of prompts, and an HTTP request costs its API server more than a few tokens do
(benchmarks/throughput.py). In this order:

1. Prompts that become ready in the same turn of the event loop wait for each other (`Groups.answer`).
2. Until the server is known, one of them goes alone, as a scout: its answer shows whether the server tells of each
   request what it can't tell of each prompt (`Shape.is_plain`): its times, its cached tokens. If the answer is lost,
   does not show it, or takes longer than `SCOUT_S`, those that have waited for it go alone, too.
3. The others are divided into groups of at most `MOST`, small enough that there are `FEWEST` of them: so several
   servers, and several processes of one server, share them. A group counts as its size among the requests in flight.
4. A group is sent once. If it is refused (4xx) or lost, each of its prompts goes on alone: refused, so that each gets
   an answer or an error of its own; lost, with that as its first loss (`Sender.send`), so that retries, and deaths of
   the server, count as if it had been alone.

What a group fails with besides, its deadline or the end of the server, each of its prompts fails with.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from managed_vllm.errors import BadRequestError, ManagedVLLMError, RequestError
from managed_vllm.request.attempts import GroupLostError, Loss, Sender
from managed_vllm.request.pending import JSONRequest, RequestStats

MOST = 32
"""Prompts in one request, at most. Between 16 and 32 little is left to be saved (benchmarks/README.md)."""
FEWEST = 8
"""Groups that a call is divided into, at least: so many servers, or processes of one, have something to do."""
MOST_WORK = 1 << 13
"""The work in one group, at most, in tokens and logprobs, read and written: the API server writes a response in one go,
and lets everything else wait meanwhile. A token with one logprob counts three, and takes it up to 0.06 ms in all."""

SCOUT_S = 1.0
"""Seconds that prompts wait for their scout, at most: once in the life of a client, as a rule."""

CHARACTERS = 4
"""Of a text for each token, roughly."""

Body = Mapping[str, Any]
Answered = tuple[Any, RequestStats]
"""The response for one prompt, and how it was served."""
SendAlone = Callable[[Loss | None, Callable[[], None] | None], Awaitable[Answered]]
"""Sends one prompt by itself, given how it was lost in a group, and what to call when it is lost."""


class Shape(Protocol):
    """How the requests of one route are put together, and the responses taken apart."""

    @property
    def path(self) -> str:
        """The route's."""

    @property
    def kind(self) -> str:
        """Of requests that the server tells the same of; see `Sender.takes_groups`."""

    def key(self, body: Body) -> Hashable | None:
        """Equal for requests that can go together; None for one that must go alone."""

    def work(self, body: Body) -> int:
        """Tokens and logprobs of one request, at most."""

    def joined(self, bodies: Sequence[Body]) -> dict[str, Any]:
        """One body for all."""

    def split(self, data: bytes, bodies: Sequence[Body], headers: Mapping[str, str]) -> list[Any]:
        """A response for each. Raises `ResponseLostError`, or a `ValueError` for another shape."""

    def is_plain(self, response: Any) -> bool | None:
        """Whether the response to a single request tells nothing that a group's could not. None: it does not show."""


def size_for(count: int, max_in_flight: int) -> int:
    """How many of the `count` prompts of a call go together."""
    return min(MOST, count // FEWEST, max_in_flight)


class _GroupRequest(JSONRequest):
    """A group's request; `parts` are the responses."""

    def __init__(self, shape: Shape, bodies: Sequence[Body]) -> None:
        super().__init__(shape.path, shape.joined(bodies))
        self._shape = shape
        self._bodies = bodies
        self.parts: list[Any] = []

    def take_json(self, data: bytes | None) -> None:
        self.parts = self._shape.split(data or b"", self._bodies, self.headers)
        self._answer = {}


class _Group:
    """Prompts that are sent together; the first leads. `answered` counts those that were answered alone."""

    def __init__(self, members: Sequence[_Member]) -> None:
        self.members = members
        self.answered = 0


@dataclass(frozen=True, slots=True)
class _Lead:
    """Send this group, and tell the others what became of them."""

    group: _Group


@dataclass(frozen=True, slots=True)
class _Scout:
    """Go alone: it shows whether the server takes groups."""


@dataclass(frozen=True, slots=True)
class _Alone:
    """Go alone, after the group was lost or refused, if it was."""

    lost: Loss | None = None
    refused: _Group | None = None


_Role = _Lead | _Scout | _Alone | Answered


class _Member:
    """One prompt that waits for its role."""

    __slots__ = ("body", "key", "role", "work")

    def __init__(self, body: Body, key: Hashable, work: int) -> None:
        self.body = body
        self.key = key
        self.work = work
        self.role: asyncio.Future[_Role] = asyncio.get_running_loop().create_future()

    def settle(self, role: _Role | ManagedVLLMError) -> None:
        if self.role.done():
            return  # cancelled
        if isinstance(role, ManagedVLLMError):
            self.role.set_exception(role)
        else:
            self.role.set_result(role)


class Groups:
    """The prompts of one call.

    Args:
        sender: sends them.
        shape: that of their route.
        size: how many go together, at most.
        deadline: the call's, on the monotonic clock.
        timeout_s: seconds for each request from the moment when it is sent.
    """

    def __init__(
        self, sender: Sender, shape: Shape, size: int, deadline: float | None, timeout_s: float | None
    ) -> None:
        self._sender = sender
        self._shape = shape
        self._size = size
        self.deadline = deadline
        self._timeout_s = timeout_s
        self._ready: list[_Member] = []
        self._held: list[_Member] | None = None  # while a scout is out
        self._patience: asyncio.TimerHandle | None = None
        self._refused = False

    async def answer(self, body: Body, alone: SendAlone) -> Answered:
        """The answer to one prompt, in a group if there is one for it, else by `alone`."""
        key = self._shape.key(body)
        if key is None or self._refused or self._size < 2:
            return await self._by_itself(alone, _Alone())
        member = _Member(body, key, self._shape.work(body))
        self._ready.append(member)
        if len(self._ready) == 1:
            asyncio.get_running_loop().call_soon(self._divide)
        role = await member.role
        match role:
            case _Lead(group):
                role = await self._lead(group)
            case _Scout():
                try:
                    return await self._by_itself(alone, _Alone(), self._end_scouting)
                finally:
                    self._end_scouting()
        return await self._by_itself(alone, role) if isinstance(role, _Alone) else role

    async def _by_itself(self, alone: SendAlone, role: _Alone, on_loss: Callable[[], None] | None = None) -> Answered:
        response, stats = await alone(role.lost, on_loss)
        known, plain = self._sender.takes_groups, self._shape.is_plain(response)
        if role.refused is not None:
            role.refused.answered += 1
            stats = replace(stats, attempts=stats.attempts + 1)
        if plain is False or (role.refused is not None and role.refused.answered == len(role.refused.members)):
            known[self._shape.kind] = False  # it tells more, or none of the group was to blame for its refusal
        elif plain:
            known.setdefault(self._shape.kind, True)
        return response, stats

    # -- who goes with whom --------------------------------------------------------------------------------------------

    def _divide(self) -> None:
        ready, self._ready = self._ready, []
        known = self._sender.takes_groups.get(self._shape.kind)
        if known is None and self._patience is None and self._sender.may_group and not self._refused:
            self._held = []
            self._patience = asyncio.get_running_loop().call_later(SCOUT_S, self._end_scouting)
            ready.pop(0).settle(_Scout())
        if self._held is not None:
            self._held += ready
            return
        grouped = known and self._sender.may_group and not self._refused
        for members in self._groups(ready) if grouped else ([member] for member in ready):
            members[0].settle(_Lead(_Group(members)) if len(members) > 1 else _Alone())

    def _end_scouting(self) -> None:
        held, self._held = self._held, None
        assert self._patience is not None
        self._patience.cancel()
        if held:
            self._ready = held + self._ready
            self._divide()

    def _groups(self, ready: Sequence[_Member]) -> Iterator[list[_Member]]:
        by_key: dict[Hashable, list[_Member]] = {}
        for member in ready:
            by_key.setdefault(member.key, []).append(member)
        for alike in by_key.values():
            members: list[_Member] = []
            work = 0
            for member in alike:
                if members and (len(members) >= self._size or work + member.work > MOST_WORK):
                    yield members
                    members, work = [], 0
                members.append(member)
                work += member.work
            yield members

    # -- one group -----------------------------------------------------------------------------------------------------

    async def _lead(self, group: _Group) -> _Alone | Answered:
        """Sends a group, and tells its other members what became of them. Returns that of the first."""
        roles: Sequence[_Alone | Answered | ManagedVLLMError] = [_Alone()] * len(group.members)
        try:
            roles = await self._sent(group)
        finally:  # also where this task is cancelled
            for member, role in zip(group.members[1:], roles[1:], strict=True):
                member.settle(role)
        if isinstance(roles[0], ManagedVLLMError):
            raise roles[0]
        return roles[0]

    async def _sent(self, group: _Group) -> Sequence[_Alone | Answered | ManagedVLLMError]:
        request = _GroupRequest(self._shape, [member.body for member in group.members])
        count = len(group.members)
        try:
            stats = await self._sender.send_group(request, count, self.deadline, self._timeout_s)
        except GroupLostError as error:
            status = error.loss.error.status
            self._refused = self._refused or status in _REFUSED
            if status == 200:  # an answer, but not to all of them
                self._sender.takes_groups[self._shape.kind] = False
            return [_Alone(error.loss)] * count
        except ManagedVLLMError as error:
            if isinstance(error, RequestError) and _is_refusal(error):
                return [_Alone(refused=group)] * count
            return [error, *(_copy(error) for _ in range(count - 1))]
        return [(part, stats) for part in request.parts]


_REFUSED = (429, 503)


def _is_refusal(error: RequestError) -> bool:
    return isinstance(error, BadRequestError) or (error.status is not None and 400 <= error.status < 500)


def _copy(error: ManagedVLLMError) -> ManagedVLLMError:
    """An error of its own for each prompt: it carries the prompt's index."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied
