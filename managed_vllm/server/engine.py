"""The supervisor's control of its server's engine: does what users ask for, one call at a time, and remembers it.

What must hold:

1. The state is what every user sees in the status, and what is in the record. It changes only once the server has done
   what it stands for.
2. A server that was started again is not ready before its engine is in that state again. Where that can't be, it has
   failed: it never serves other weights than before in silence.
3. A pause or sleep that a user holds (`with llm.engine.paused()`) ends with that user's connection, however it dies.
   One that was asked for outright stays until somebody ends it.
4. Every call ends by its deadline: also where the server hangs, dies, or is just being started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from managed_vllm.engine_state import PAUSE_MODES, SLEEP_LEVELS, EngineState, PauseMode
from managed_vllm.errors import (
    ENGINE_ERRORS,
    CheckpointError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
    EngineUnsupportedError,
)
from managed_vllm.masking import Secret
from managed_vllm.server import diagnosis
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.server.engine_turn import Turn
from managed_vllm.server.gpu_memory import GpuMemory
from managed_vllm.server.two_phase import ALONE, AbortedError, Participant
from managed_vllm.server.weight_checks import checksum_of, faults_of
from managed_vllm.status import Connection, Diagnosis, ServerState

log = logging.getLogger("managed_vllm.supervisor")

_LONGEST_S = 86_400.0
_RESTORE_S = 600.0
"""Seconds for each step that puts the engine back; reading a large checkpoint is one."""
_RELEASE_S = 30.0
_RELEASES = 3
"""Times that an engine is asked to resume, and seconds for each; one that does not is started again."""
_RELEASE_AGAIN_S = 0.5
_DEATH_S = 10.0
"""Seconds in which the end of a server is reported that broke a connection of ours."""


@dataclass(frozen=True)
class Call:
    """One call of a user: its connection, what it asks for, until when (monotonic clock), and who else does it."""

    name: str
    user: Hashable
    arguments: Mapping[str, Any]
    deadline: float
    part: Participant = ALONE

    @classmethod
    def of(cls, user: Hashable, message: Mapping[str, Any]) -> Call:
        """A user's message on the control channel."""
        limit_s = min(max(0.0, float(message.get("budget_s", 0.0))), _LONGEST_S)
        arguments = message.get("arguments")
        return cls(
            str(message.get("call")),
            user,
            arguments if isinstance(arguments, Mapping) else {},
            time.monotonic() + limit_s,
        )

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    @property
    def is_held(self) -> bool:
        """Whether what it asks for is to end with the user's connection."""
        return self.arguments.get("held") is True

    def refused(self, why: str) -> EngineControlError:
        return EngineControlError(f"{self.name}: {why}", call=self.name)


async def answered(doing: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The reply to a call, as it goes over the control channel."""
    try:
        return {"ok": True, "result": await doing}
    except EngineControlError as error:
        kind = next((name for name, kind in ENGINE_ERRORS.items() if isinstance(error, kind)), "EngineControlError")
        found = {"checkpoint": error.to_dict()} if isinstance(error, CheckpointError) else {}
        said = {"error": error.message, "kind": kind, "call": error.call, "http_status": error.status}
        return {"ok": False, **said, **found}


@dataclass(frozen=True)
class _Hold:
    """A pause or a sleep that ends with its user's connection."""

    user: Hashable
    kind: str
    value: Any


class Watcher:
    """Does something of its own when users and servers come and go; does nothing unless it says what."""

    def user_gone(self, user: Hashable) -> None:
        """A user's connection has ended."""

    def server_came(self, routes: EngineRoutes) -> None:
        """A server is there, in the state that the last one had."""

    def server_left(self) -> None:
        """The server has ended, or is about to; what was reserved is free."""

    async def before(self, call: Call) -> None:
        """A user's call is about to be done."""


class Engine:
    """Controls the engines of one supervisor's servers, life after life; see the module's docstring."""

    def __init__(
        self,
        predecessor: Mapping[str, Any] | None,
        *,
        sleeps: bool,
        on_change: Callable[[], None],
        on_restart: Callable[[], None],
        gpu_memory: Callable[[], Awaitable[GpuMemory | None]] | None = None,
    ) -> None:
        """`predecessor` is the record of a supervisor that was killed. `sleeps`: the server has vLLM's sleep mode.

        `on_change` is called when the state has changed, `on_restart` when the server must be started again;
        `gpu_memory` measures what its GPUs have in use.
        """
        self.state = EngineState()
        self._unreadable = ""
        if predecessor is not None and predecessor.get("state") != ServerState.FAILED and "engine" in predecessor:
            try:
                self.state = EngineState.from_dict(predecessor["engine"])
            except ValueError as error:
                self._unreadable = str(error)
        self._sleeps = sleeps
        self._on_change = on_change
        self._on_restart = on_restart
        self._gpu_memory = gpu_memory
        self._asked: dict[str, Any] = {"pause": self.state.paused, "sleep": self.state.sleep_level}
        self._holds: list[_Hold] = []
        self.turn = Turn()
        self._routes: EngineRoutes | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchers: list[Watcher] = []
        self._own_turn: set[str] = set()
        self._calls: dict[str, Callable[[Call], Awaitable[dict[str, Any]]]] = {
            "pause": self._pause,
            "resume": self._resume,
            "is_paused": self._is_paused,
            "sleep": self._sleep,
            "wake": self._wake,
            "is_sleeping": self._is_sleeping,
            "reset_prefix_cache": self._reset_prefix_cache,
            "reset_mm_cache": self._reset_mm_cache,
            "weights": self._weights,
        }

    # -- for the supervisor --------------------------------------------------------------------------------------------

    @property
    def lasting(self) -> EngineState:
        """What a successor puts back: all but what users hold, whose connections end with us."""
        return replace(self.state, paused=self._asked["pause"], sleep_level=self._asked["sleep"], updating=None)

    def to_record(self) -> dict[str, Any]:
        """The lasting state, as plain JSON values."""
        return {"engine": self.lasting.to_dict()}

    @property
    def must_be_put_back(self) -> bool:
        """Whether `restore` has something to do: a server that has just come up is not yet in the state."""
        return replace(self.state, updating=None) != EngineState()

    @property
    def may_stand_still(self) -> bool:
        """Whether nothing need move in it: it is paused, sleeps, or does what a user has called for."""
        return self.turn.is_taken or not self.state.serves

    @property
    def loss(self) -> Diagnosis | None:
        """Why no server that is started now can be what the last one was; None: one can be."""
        return diagnosis.weights_lost(self.state.weight_version) if self.state.weights_unsaved else None

    async def restore(self, connection: Connection, key: Secret) -> Diagnosis | None:
        """Puts the engine of a server that has just come up into the state; the reason where that can't be."""
        if self._unreadable:
            return diagnosis.engine_not_restored(self._unreadable, permanent=True)
        routes = EngineRoutes(connection, key)
        try:
            async with self.turn:
                await self._put_back(routes)
        except (EngineLostError, EngineTimeoutError) as error:
            await routes.close()
            await asyncio.sleep(_DEATH_S)  # the reason of its end says more, and is reported meanwhile
            return diagnosis.engine_not_restored(error.message, permanent=False)
        except BaseException as error:
            await routes.close()
            if isinstance(error, EngineControlError):
                return diagnosis.engine_not_restored(error.message, permanent=True)
            raise
        self._routes = routes
        self.turn.server_came()
        for watcher in self._watchers:
            watcher.server_came(routes)
        return None

    def leave(self) -> None:
        """The server is about to end, or has ended: calls wait for the next one. One under way ends with it."""
        self.turn.server_left()
        self.state = replace(self.state, updating=None)
        for watcher in self._watchers:
            watcher.server_left()
        routes, self._routes = self._routes, None
        if routes is not None:
            self.in_background(self._close(routes))

    def restart(self) -> None:
        """Has the server started again; calls wait for the next one from now on."""
        self.leave()
        self._on_restart()

    def restart_as(self, lasting: EngineState, *, holds_of: Engine | None = None) -> None:
        """As `restart`; the next server is in that state before it is ready. What users hold they hold on.

        `holds_of`: they hold what they hold of that engine.
        """
        if holds_of is not None:
            self._holds = [hold for hold in holds_of._holds if hold.user not in holds_of._watchers]
        self._asked = {"pause": lasting.paused, "sleep": lasting.sleep_level}
        self.state = lasting
        self._become_wanted()
        if self._routes is not None or self.turn.is_taken:  # else the next one has not been told of another state yet
            self.restart()

    async def _close(self, routes: EngineRoutes) -> None:
        async with self.turn:
            await routes.close()

    async def _put_back(self, routes: EngineRoutes) -> None:
        state = self.state
        if state.weights is not None:
            await self._put_weights_back(routes, state.weights)
        if state.weight_version:
            await routes.set_weight_version(state.weight_version, timeout_s=_RESTORE_S)
        for name, path in state.loras.items():
            await routes.load_lora(name, path, timeout_s=_RESTORE_S)
        if state.sleep_level is not None:
            await routes.sleep(state.sleep_level, timeout_s=_RESTORE_S)
        elif state.paused is not None:
            await routes.pause("keep", timeout_s=_RESTORE_S)
        if state != EngineState():
            log.info("the engine is as it was before: %s", json.dumps(state.to_dict()))

    async def _put_weights_back(self, routes: EngineRoutes, folder: str) -> None:
        """The files may have changed since they were loaded: what they hold is looked at as new weights are."""
        known = await faults_of(routes, _RESTORE_S)
        await routes.reload_weights(folder, timeout_s=_RESTORE_S)
        await routes.reset_prefix_cache(running=True, timeout_s=_RESTORE_S)
        if faults := await faults_of(routes, _RESTORE_S) - known:
            raise EngineControlError(f"{folder} holds weights that can't be served: {min(faults)}", call="weights")
        if self.state.weight_checksum is not None:
            found = checksum_of(await routes.weight_checksums(timeout_s=_RESTORE_S))
            if found != self.state.weight_checksum:
                raise EngineControlError(f"{folder} holds other weights than before", call="weights")

    # -- for the users -------------------------------------------------------------------------------------------------

    async def answer(self, user: Hashable, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a user's call, which is there by the call's deadline."""
        return await answered(self.do(Call.of(user, message)))

    def add_call(self, name: str, do: Callable[[Call], Awaitable[dict[str, Any]]]) -> None:
        """One more call for the users, which takes the turn itself (`turn_for`)."""
        self._calls[name] = do
        self._own_turn.add(name)

    def add_watcher(self, watcher: Watcher) -> None:
        self._watchers.append(watcher)

    def user_gone(self, user: Hashable) -> None:
        """A user's connection has ended: what it held is released."""
        for watcher in self._watchers:
            watcher.user_gone(user)
        held = [hold for hold in self._holds if hold.user == user]
        self._holds = [hold for hold in self._holds if hold.user != user]
        if held:
            log.info("a user that held the engine (%s) is gone", ", ".join(sorted({hold.kind for hold in held})))
            self._release_soon()

    async def do(self, call: Call) -> dict[str, Any]:
        """What comes of a call. Raises `EngineControlError`."""
        do = self._calls.get(call.name)
        if do is None:
            raise EngineUnsupportedError(f"this supervisor knows no call {call.name!r}", call=call.name)
        for watcher in self._watchers:
            await watcher.before(call)
        if call.name in self._own_turn:
            return await do(call)
        async with self.turn_for(call):
            return await do(call)

    @contextlib.asynccontextmanager
    async def turn_for(self, call: Call, user: Hashable = None) -> AsyncIterator[None]:
        """The turn, while the server is there; with `user` also one that it has reserved."""
        try:
            async with asyncio.timeout(call.left_s):
                await self.turn.take(user)
        except TimeoutError:
            said = f"{call.name}: its time was up before the server could be asked"
            raise EngineTimeoutError(said, call=call.name) from None
        try:
            await call.part.started()
            yield
        finally:
            self.turn.release()

    def routes_for(self, call: Call) -> EngineRoutes:
        """The server's routes. Raises `EngineLostError` where it has ended since the call began."""
        if self._routes is None:
            raise EngineLostError(f"{call.name}: the server ended", call=call.name)
        return self._routes

    def has_left(self, routes: EngineRoutes) -> bool:
        """Whether the server of these routes has ended or is about to: the next one comes in the present state."""
        return self._routes is not routes

    def become(self, state: EngineState) -> None:
        """The engine is in this state now: recorded, and told to the users."""
        self.state = state
        self._on_change()

    # -- pause ---------------------------------------------------------------------------------------------------------

    def _wanted(self, kind: str) -> Any:
        """What is asked for outright, or else is held by the user that came first; None: neither."""
        held = next((hold.value for hold in self._holds if hold.kind == kind), None)
        return held if self._asked[kind] is None else self._asked[kind]

    def _note(self, call: Call, kind: str, value: Any) -> None:
        if call.is_held:
            self._holds.append(_Hold(call.user, kind, value))
        else:
            self._asked[kind] = value

    def _forget(self, call: Call, kind: str) -> None:
        if not call.is_held:
            self._asked[kind] = None
            return
        mine = next((hold for hold in self._holds if (hold.user, hold.kind) == (call.user, kind)), None)
        if mine is None:
            raise EngineLostError(f"{call.name}: this supervisor knows of no {kind} that you hold", call=call.name)
        self._holds.remove(mine)

    async def _pause(self, call: Call) -> dict[str, Any]:
        mode: PauseMode = call.arguments.get("mode", "keep")
        if mode not in PAUSE_MODES:
            raise call.refused(f"the mode is one of {', '.join(PAUSE_MODES)}, not {mode!r}")
        if mode == "wait" and self.state.paused == "keep":
            raise call.refused("it is paused with 'keep': what is in flight would never end; resume it first")
        if self.state.sleep_level is None:  # else it is paused once it wakes
            async with self._undone_if_it_fails():
                await self.routes_for(call).pause(mode, timeout_s=call.left_s)
                await call.part.prepared()
        self._note(call, "pause", mode)
        self.become(replace(self.state, paused=self._wanted("pause")))
        return {}

    async def _resume(self, call: Call) -> dict[str, Any]:
        self._forget(call, "pause")
        await self._release(call)
        return {"paused": self.state.paused}

    async def _is_paused(self, call: Call) -> dict[str, Any]:
        return {"is_paused": self.state.paused is not None}

    # -- sleep ---------------------------------------------------------------------------------------------------------

    async def _sleep(self, call: Call) -> dict[str, Any]:
        level, mode = call.arguments.get("level", 1), call.arguments.get("mode", "keep")
        if level not in SLEEP_LEVELS or isinstance(level, bool) or mode not in PAUSE_MODES:
            raise call.refused(f"level is 0, 1 or 2 and mode one of {', '.join(PAUSE_MODES)}, not {level!r}, {mode!r}")
        if level > 0 and not self._sleeps:
            raise EngineUnsupportedError(
                f"sleep({level}): the server was started without enable_sleep_mode=True, which vLLM has on GPUs only; "
                "sleep(0) and pause() give no memory back, but work everywhere",
                call=call.name,
            )
        before = await self._measured()
        async with self._undone_if_it_fails():
            await self.routes_for(call).sleep(level, mode=mode, timeout_s=call.left_s)
            self.become(replace(self.state, sleep_level=level))
            await call.part.prepared()
        self._note(call, "sleep", level)
        return {"gpu_memory": [before, await self._measured()]}

    async def _measured(self) -> dict[str, int] | None:
        """Bytes in use of each of the server's GPUs; None where that can't be measured."""
        found = None if self._gpu_memory is None else await self._gpu_memory()
        return None if found is None else {str(index): used for index, used in found.used.items()}

    async def _wake(self, call: Call) -> dict[str, Any]:
        tags = [str(tag) for tag in call.arguments.get("tags") or ()]
        before = await self._measured()
        if not tags or await self.routes_for(call).wake(tags, timeout_s=call.left_s):  # else until the rest is, too
            self._forget(call, "sleep")
            await self._release(call)
        return {"sleep_level": self.state.sleep_level, "gpu_memory": [before, await self._measured()]}

    async def _is_sleeping(self, call: Call) -> dict[str, Any]:
        return {"is_sleeping": self.state.sleep_level is not None}

    # -- waking and resuming -------------------------------------------------------------------------------------------

    async def _release(self, call: Call) -> None:
        """Lets the engine be as little paused and asleep as is wanted now; where that fails, goes on trying."""
        try:
            await self._settle(self.routes_for(call), call.left_s)
        except EngineControlError:
            self._release_soon()
            raise

    async def _settle(self, routes: EngineRoutes, timeout_s: float) -> None:
        """`/resume` would have a sleeping engine work, and `/wake_up` resumes a paused one (vLLM 0.32)."""
        level, paused = self._wanted("sleep"), self._wanted("pause")
        if level is None and self.state.sleep_level is not None:
            await routes.wake(timeout_s=timeout_s)
            if paused is not None:
                await routes.pause("keep", timeout_s=timeout_s)
        elif level is None and paused is None:
            await routes.resume(timeout_s=timeout_s)
        self._become_wanted()

    @contextlib.asynccontextmanager
    async def _undone_if_it_fails(self) -> AsyncIterator[None]:
        """The engine may have stopped all the same, where the answer did not come or was an error."""
        try:
            yield
        except EngineUnsupportedError:
            raise
        except AbortedError:
            await self._undo_stop()
            raise
        except EngineControlError:
            self._release_soon()
            raise

    async def _undo_stop(self) -> None:
        """Undoes a pause or sleep that other replicas could not do. Discarded weights come with another start."""
        if self._routes is None:  # another one comes
            self._become_wanted()
        elif self.state.sleep_level == 2 != self._wanted("sleep"):
            self._become_wanted()
            self.restart()
        else:
            try:
                await self._settle(self._routes, _RELEASE_S)
            except EngineControlError:
                self._release_soon()

    def _become_wanted(self) -> None:
        self.become(replace(self.state, sleep_level=self._wanted("sleep"), paused=self._wanted("pause")))

    def _release_soon(self) -> None:
        self.in_background(self._release_for_certain())

    def in_background(self, what: Coroutine[Any, Any, None]) -> None:
        """Does it beside all else."""
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release_for_certain(self) -> None:
        """Tries until it has worked, or the server ends, or is started again because it does not resume."""
        for _ in range(_RELEASES):
            await self.turn.take()
            try:
                if self._routes is not None:
                    await self._settle(self._routes, _RELEASE_S)
                return
            except EngineControlError as error:
                log.warning("the engine did not resume: %s", error)
            finally:
                self.turn.release()
            await asyncio.sleep(_RELEASE_AGAIN_S)
        log.error("the engine does not resume: it is started again")
        self._become_wanted()
        self.restart()

    # -- caches --------------------------------------------------------------------------------------------------------

    async def _reset_prefix_cache(self, call: Call) -> dict[str, Any]:
        running = call.arguments.get("running") is True
        done = await self.routes_for(call).reset_prefix_cache(running=running, timeout_s=call.left_s)
        return {"success": done}

    async def _reset_mm_cache(self, call: Call) -> dict[str, Any]:
        await self.routes_for(call).reset_mm_cache(timeout_s=call.left_s)
        return {}

    # -- weights -------------------------------------------------------------------------------------------------------

    async def _weights(self, call: Call) -> dict[str, Any]:
        """What is served: the folder it was loaded from, its name, and a checksum, as far as the server tells these."""
        found: dict[str, Any] = {"path": self.state.weights, "version": self.state.weight_version, "checksum": None}
        with contextlib.suppress(EngineUnsupportedError):
            found["checksum"] = checksum_of(await self.routes_for(call).weight_checksums(timeout_s=call.left_s))
        with contextlib.suppress(EngineUnsupportedError):
            version = await self.routes_for(call).weight_version(timeout_s=call.left_s)
            found["version"] = self.state.weight_version or version
        return found
