"""Control of all replicas' engines: a user's call goes to every one of them, all or nothing, one call at a time.

What must hold:

1. A call returns once every replica has done it. Where one fails, those that had done it go back, in place or with
   another start, and the error of the one that failed is raised, which says which it was. A replica that is being
   started again is waited for; one that has failed for good is left out.
2. An update of the weights is a two-phase commit (`managed_vllm.server.two_phase`): each replica loads them, looks at
   them, and stays paused. Once all have the same checksum they are committed, and all go on with the new weights; where
   one fails, all go on with those from before. Users see the version from before, then a pause of all replicas that is
   as long as the slowest one needs, then the new version: never one after the other has begun to answer.
3. With `rolling=True` the replicas are updated one after the other, each once all others are there: while one is paused
   the others answer, and both versions answer until the call has returned. Where one fails, those that were updated go
   back, one after the other.
4. What all of them are is *agreed*: that is in the record. A supervisor that is killed at whatever moment leaves one
   state, which its successor gives to every replica; of an update under way the one from before it, until its commit.
5. What a user holds ends with the user's connection, on each replica.

A trainer's weights go to every replica's Workers, step by step as above, where they can read the same memory
(`WeightSyncClient.send`). vLLM's own ways of transfer connect a trainer with one server's Workers, and are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from managed_vllm.engine_state import EngineState
from managed_vllm.errors import (
    CheckpointError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
    EngineUnsupportedError,
)
from managed_vllm.server.engine import Call, Engine, answered
from managed_vllm.server.two_phase import AbortedError, Commit, Once, Participant, Undo
from managed_vllm.status import CheckpointFault

log = logging.getLogger("managed_vllm.supervisor")

_BACK_S = 600.0
"""Seconds for which an update that goes back, one replica after the other, waits for the others to be there."""
_OF_A_TRANSFER = frozenset(
    {
        "shutdown_weight_transfer_engine",
        "start_weight_update",
        "receive_weights",
        "finish_weight_update",
        "abort_weight_update",
    }
)
_CONNECTS_ONE_SERVER = "init_weight_transfer_engine"
_OF_ADAPTERS = frozenset({"load_lora", "unload_lora"})


class EveryEngine:
    """Does what users ask for with the engines of all replicas; see the module's docstring."""

    def __init__(self, engines: Sequence[Engine], *, on_change: Callable[[], None]) -> None:
        """`engines` are those of the replicas 0, 1, …, all made from the same record.

        `on_change` is called when something else is agreed, which is to be recorded then.
        """
        self._engines = tuple(engines)
        self._on_change = on_change
        self._agreed = self._engines[0].lasting
        self._gone = [asyncio.Event() for _ in self._engines]
        self._calling = asyncio.Lock()
        self._commit: Commit | None = None
        self._parts: dict[int, asyncio.Task[dict[str, Any]]] = {}

    # -- for the supervisor --------------------------------------------------------------------------------------------

    @property
    def state(self) -> EngineState:
        """What all replicas have made of them. Where they differ: what is agreed, and what every one of them has.

        The instance is paused, asleep or being updated only while all of its replicas are.
        """
        states = [self._engines[number].state for number in self._live]
        if not states:
            return self._agreed
        first, rest = states[0], states[1:]
        served = first if all(one.weight_fields == first.weight_fields for one in rest) else self._agreed
        return EngineState(
            sleep_level=None if any(one.sleep_level is None for one in rest) else first.sleep_level,
            paused=None if any(one.paused is None for one in rest) else first.paused,
            updating=None if any(one.updating is None for one in rest) else first.updating,
            loras={
                name: path for name, path in first.loras.items() if all(one.loras.get(name) == path for one in rest)
            },
            **served.weight_fields,
        )

    def to_record(self) -> dict[str, Any]:
        """The agreed state: a successor makes the engine of each replica from it."""
        return {"engine": self._agreed.to_dict()}

    def leave_out(self, number: int) -> None:
        """A replica has failed for good: calls go on without it, also the one under way."""
        if self._gone[number].is_set():
            return
        self._gone[number].set()
        if self._commit is not None:
            self._commit.end(number)
        if number in self._parts:
            self._parts[number].cancel()

    def take_in(self, number: int) -> None:
        """A replica that had failed for good is begun again: its engine is to become what is agreed, and is held."""
        others = [self._engines[other] for other in self._live]
        self._gone[number].clear()
        self._engines[number].restart_as(self._agreed, holds_of=others[0] if others else None)

    # -- for the users -------------------------------------------------------------------------------------------------

    async def answer(self, user: Hashable, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a user's call, which is there by the call's deadline."""
        return await answered(self._do(Call.of(user, message)))

    def user_gone(self, user: Hashable) -> None:
        """A user's connection has ended: what it held is released."""
        for engine in self._engines:
            engine.user_gone(user)

    async def _do(self, call: Call) -> dict[str, Any]:
        if call.name == _CONNECTS_ONE_SERVER:
            raise EngineUnsupportedError(
                "vLLM's weight transfer connects a trainer with one server, and there are several replicas: use "
                "llm.engine.update_weights with checkpoints, weight_sync_client().send, or replicas=1",
                call=call.name,
            )
        async with self._turn_for(call):
            asked = self._live
            try:
                if call.name == "update_weights" and call.arguments.get("rolling") is True:
                    return await self._one_by_one(call)
                return await self._all_at_once(call)
            finally:
                self._settle(asked)

    @contextlib.asynccontextmanager
    async def _turn_for(self, call: Call) -> AsyncIterator[None]:
        """One call at a time: two that each had some replicas' turns would wait for each other for ever."""
        try:
            async with asyncio.timeout(call.left_s):
                await self._take_turn(call.user if call.name in _OF_A_TRANSFER else None)
        except TimeoutError:
            said = f"{call.name}: its time was up before the replicas could be asked"
            raise EngineTimeoutError(said, call=call.name) from None
        try:
            yield
        finally:
            self._calling.release()

    async def _take_turn(self, user: Hashable) -> None:
        """Returns with the turn, while no replica is reserved for a trainer, or all are for this one."""
        while True:
            for engine in self._engines:
                await engine.turn.until_free(user)
            await self._calling.acquire()
            if all(engine.turn.is_free(user) for engine in self._engines):
                return
            self._calling.release()

    @property
    def _live(self) -> list[int]:
        return [number for number, gone in enumerate(self._gone) if not gone.is_set()]

    # -- all at once ---------------------------------------------------------------------------------------------------

    async def _all_at_once(self, call: Call) -> dict[str, Any]:
        self._commit = commit = Commit(call.name, self._live, self._commit_weights)
        self._parts = {number: asyncio.create_task(self._part(commit, number, call)) for number in self._live}
        try:
            ended = await asyncio.gather(*self._parts.values(), return_exceptions=True)
        finally:
            numbers, self._commit, self._parts = list(self._parts), None, {}
        found = {n: one for n, one in zip(numbers, ended, strict=True) if not self._gone[n].is_set()}
        errors = {number: one for number, one in found.items() if isinstance(one, BaseException)}
        if errors:
            self._restart_uncertain(call, commit, errors)
            if call.name in _OF_A_TRANSFER:
                await self._end_transfer(call)
            raise _the_error(commit, errors, len(found))
        return _combined(call, {number: one for number, one in found.items() if isinstance(one, dict)})

    async def _part(self, commit: Commit, number: int, call: Call) -> dict[str, Any]:
        try:
            return await self._engines[number].do(replace(call, part=commit.participant(number)))
        except BaseException:
            commit.abort(number)
            raise
        finally:
            commit.end(number)

    async def _end_transfer(self, call: Call) -> None:
        """What a trainer has begun on all is over on all where a step failed on one: the weights from before serve."""
        call = replace(call, name="abort_weight_update", deadline=time.monotonic() + _BACK_S)
        for number in self._live:
            turn = self._engines[number].turn
            if turn.is_serving and not turn.is_free():
                with contextlib.suppress(EngineControlError):
                    await self._engines[number].do(call)

    def _commit_weights(self, result: object) -> None:
        """At the moment of the commit of an update: from now on a successor serves the new weights."""
        if isinstance(result, Mapping):
            self._agreed = replace(self._agreed, **result)

    def _restart_uncertain(self, call: Call, commit: Commit, errors: Mapping[int, BaseException]) -> None:
        """Starts those again of whose adapters nobody knows what they are: no answer came, or others replaced theirs.

        An adapter that was replaced from the same folder can't be put back: only another start makes all equal.
        """
        if call.name not in _OF_ADAPTERS or not commit.has_started:
            return
        same = call.arguments.get("path") == self._agreed.loras.get(str(call.arguments.get("name")))
        replaced = same and any(commit.is_prepared(number) for number in errors)
        for number, error in errors.items():
            unanswered = isinstance(error, EngineTimeoutError | EngineLostError)
            if unanswered or (replaced and not commit.is_prepared(number)):
                log.error("replica %d is started again: %s", number, error)
                self._engines[number].restart_as(self._agreed)

    def _settle(self, asked: Sequence[int]) -> None:
        """After a call: what all of those that were asked have is agreed; one that has something else is started again.

        That is also one that was taken in meanwhile.
        """
        lasting = {number: self._engines[number].lasting for number in self._live}
        states = [lasting[number] for number in asked if number in lasting]
        if states and all(one == states[0] for one in states):
            self._agree(states[0])
        for number, state in lasting.items():
            if state != self._agreed:
                log.error("replica %d is started again: its engine is %s, agreed is %s", number, state, self._agreed)
                self._engines[number].restart_as(self._agreed)

    def _agree(self, state: EngineState) -> None:
        if state != self._agreed:
            self._agreed = state
            self._on_change()

    # -- one by one ----------------------------------------------------------------------------------------------------

    async def _one_by_one(self, call: Call) -> dict[str, Any]:
        numbers = self._live
        if self._agreed.weights_unsaved and len(numbers) > 1:
            raise EngineUnsupportedError(
                "rolling=True: the weights that are served now are a trainer's, and no checkpoint has them, so that an "
                "update that fails could not go back; leave rolling=True away, or name the trainer's checkpoint",
                call=call.name,
            )
        once, done, found = Once(), list[tuple[int, _Rolled]](), dict[int, dict[str, Any]]()
        for number in numbers:
            part = _Rolled(once)
            try:
                await self._others_there(number, call)
                if (result := await self._roll(number, replace(call, part=part))) is not None:
                    done.append((number, part))
                    found[number] = result
                    _combined(call, found)
            except EngineControlError as error:
                await self._roll_back(call, done)
                raise _named(error, number) from None
        return _combined(call, found)

    async def _roll(self, number: int, call: Call) -> dict[str, Any] | None:
        """The update of one replica; None where it has failed for good meanwhile."""
        if self._gone[number].is_set():
            return None
        self._parts = {number: asyncio.create_task(self._engines[number].do(call))}
        try:
            ended = (await asyncio.gather(*self._parts.values(), return_exceptions=True))[0]
        finally:
            self._parts = {}
        if self._gone[number].is_set():
            return None
        if isinstance(ended, BaseException):
            raise ended
        return ended

    async def _others_there(self, number: int, call: Call) -> None:
        """Returns while the servers of all other replicas are there. Raises `EngineTimeoutError`."""
        try:
            async with asyncio.timeout(call.left_s):
                for other in self._live:
                    if other != number:
                        await self._until_there(other)
        except TimeoutError:
            said = f"{call.name}: its time was up before all other replicas were there, of which one has to answer"
            raise EngineTimeoutError(said, call=call.name) from None

    async def _until_there(self, number: int) -> None:
        """Returns while its server is there, or once it has failed for good."""
        waiting = [self._engines[number].turn.until_serving(), self._gone[number].wait()]
        tasks = [asyncio.ensure_future(one) for one in waiting]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _roll_back(self, call: Call, done: Sequence[tuple[int, _Rolled]]) -> None:
        """The weights from before, on one replica after the other; where that fails, `_settle` does it."""
        for number, part in reversed(done):
            engine = self._engines[number]
            with contextlib.suppress(EngineControlError):
                await self._others_there(number, replace(call, deadline=time.monotonic() + _BACK_S))
            if part.undo is None or not engine.turn.is_serving:
                engine.restart_as(self._agreed)
                continue
            with contextlib.suppress(EngineControlError):
                await part.undo()


class _Rolled(Participant):
    """The part of one replica in a rolling update; what is done can be undone later."""

    def __init__(self, once: Once) -> None:
        self._once = once
        self.undo: Undo | None = None

    def undo_with(self, undo: Undo) -> None:
        self.undo = undo

    async def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        return await self._once.find(key, find)


# -- one answer of several ---------------------------------------------------------------------------------------------


def _combined(call: Call, found: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What all of them say; of yes and no: whether all say yes; memory of all their GPUs.

    Raises `EngineControlError` where they say different things, and `EngineLostError` where there is none.
    """
    if not found:
        raise EngineLostError(f"{call.name}: no replica is left", call=call.name)
    results = list(found.values())
    return {name: _common(call, name, {n: one.get(name) for n, one in found.items()}) for name in results[0]}


def _common(call: Call, name: str, values: Mapping[int, Any]) -> Any:
    first = next(iter(values.values()))
    if name == "gpu_memory":
        return _memory_of_all(list(values.values()))
    if all(value == first for value in values.values()):
        return first
    if all(isinstance(value, bool) for value in values.values()):
        return all(values.values())
    differing = ", ".join(f"replica {number}: {value}" for number, value in values.items())
    raise call.refused(f"the replicas differ in their {name} ({differing})")


def _memory_of_all(values: Sequence[Sequence[Mapping[str, int] | None]]) -> list[dict[str, int] | None]:
    """Before and after, by GPU; None where one could not measure."""
    found: list[dict[str, int] | None] = []
    for each in zip(*values, strict=True):
        known = [one for one in each if one is not None]
        found.append({gpu: used for one in known for gpu, used in one.items()} if len(known) == len(each) else None)
    return found


def _the_error(commit: Commit, errors: Mapping[int, BaseException], participants: int) -> BaseException:
    """Of the one that failed, by its number; where all failed with the same, that, by no number."""
    for error in errors.values():
        if not isinstance(error, EngineControlError):
            return error
    number = commit.aborted_by
    if number is None or number not in errors:
        own = [n for n, error in errors.items() if not isinstance(error, AbortedError)]
        number = own[0] if own else None
    if number is None:
        return next(iter(errors.values()))
    error = errors[number]
    assert isinstance(error, EngineControlError)
    alike = [one for one in errors.values() if type(one) is type(error) and str(one) == str(error)]
    return error if len(alike) == participants else _named(error, number)


def _named(error: EngineControlError, number: int) -> EngineControlError:
    """The same error, saying of which replica."""
    who = f"replica {number}: "
    if isinstance(error, CheckpointError):
        faults = tuple(CheckpointFault(who + fault.text, fault.remedy) for fault in error.faults)
        return CheckpointError(error.path, faults)
    return type(error)(who + error.message, call=error.call, status=error.status)
