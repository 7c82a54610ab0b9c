"""Weights of a running server, taken from another checkpoint: an update is safe, or it did not happen.

In this order:

1. The checkpoint is looked at (`managed_vllm.server.checkpoints`). Nothing has happened yet.
2. The engine is paused: requests in flight are finished first ("finish") or frozen ("continue"); new ones wait.
3. vLLM loads the weights in place. That it answers 200 proves nothing (0.32: weights of NaN are taken without a word).
4. The Workers look at what they have: all weights there and finite, finite logits of a forward pass, their checksum. No
   token is generated until that is done.
5. The caches are emptied, the version is set, the state is recorded; the engine goes on.

Whatever fails after 2: the weights from before are loaded again and looked at in the same way. Where that does not
succeed, vLLM is poisoned (0.32: after a reload of other shapes a good one fails as well, and the next token ends the
engine): the server is started again, and gets the weights from before ahead of being ready. The engine is paused until
either is done, so no token of broken weights reaches anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from managed_vllm.config import SupervisorOrder
from managed_vllm.engine_state import EngineState, PauseMode
from managed_vllm.errors import (
    CheckpointError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
    EngineUnsupportedError,
)
from managed_vllm.server import checkpoints
from managed_vllm.server.checkpoints import Checkpoint
from managed_vllm.server.engine import Call, Engine, checksum_of
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.status import CheckpointFault as Fault

log = logging.getLogger("managed_vllm.supervisor")

OnUpdate = Literal["finish", "continue"]
_PAUSES: Mapping[str, PauseMode] = {"finish": "wait", "continue": "keep"}

_RECOVERY_S = 600.0
"""Seconds for each step that brings the weights from before back, whatever is left of the call's time."""
_RESUME_S = 30.0
_CHECKSUM_LIMIT = 4 << 30
"""Bytes of weights above which no checksum is made unless one is expected: vLLM makes it on a CPU, at 1-2 GB/s."""

_NOT_WRITTEN = "write each checkpoint into a folder of its own, and update when that is finished"
_MOST_FAULTS = 5
_DAMAGED = "the files pass for good ones, but this model is not what they were saved from: save them again"


@dataclass(frozen=True)
class _Asked:
    path: str
    version: str | None
    checksum: str | None
    on_update: OnUpdate

    @classmethod
    def of(cls, call: Call) -> _Asked:
        """Raises `EngineControlError`."""
        given = {name: call.arguments.get(name) for name in ("path", "version", "checksum")}
        on_update = call.arguments.get("on_update", "finish")
        texts = [value for value in given.values() if value is not None]
        if on_update not in get_args(OnUpdate) or not given["path"] or not all(isinstance(one, str) for one in texts):
            raise call.refused(f"no path, or wrong arguments: {dict(call.arguments)}")
        return cls(given["path"], given["version"], given["checksum"], on_update)


@dataclass(frozen=True)
class _Before:
    """The weights before the update. `faults`: a model may have weights that nobody fills, and that are never used."""

    source: str
    version: str
    checksum: str | None
    faults: frozenset[str]


class WeightUpdates:
    """Does `llm.engine.update_weights` for one supervisor's servers; see the module's docstring."""

    def __init__(self, engine: Engine, order: SupervisorOrder) -> None:
        """Adds the call to those of `engine`. `order` says what is served first, and where the hub's cache is."""
        revision = order.spec.engine_args.get("revision")
        self._first = f"{order.spec.model}@{revision}" if revision else order.spec.model
        self._environment = {**order.environment.reveal(), **order.spec.variables()}
        self._engine = engine
        self._poisoned: EngineRoutes | None = None
        engine.add_call("update_weights", self.update)

    async def update(self, call: Call) -> dict[str, Any]:
        """Does one update; returns path, version and checksum of the weights that are served then."""
        asked = _Asked.of(call)
        if self._engine.state.sleep_level is not None:
            raise call.refused("the engine is asleep, and has no weights to be replaced; wake it first")
        if asked.on_update == "finish" and self._engine.state.paused == "keep":
            raise call.refused("it is paused with 'keep', so nothing finishes; use on_update='continue', or resume it")
        routes = self._engine.routes_for(call)
        checkpoint = await self._checked(call, asked)
        before = await self._before(call, asked, routes, checkpoint)
        async with self._paused(call, routes, _PAUSES[asked.on_update]):
            try:
                state = await self._load(call, asked, routes, checkpoint, before)
            except BaseException as error:
                await self._take_back(routes, before, error)
                raise
            self._engine.become(state)
        log.info("weights: %s, version %s", state.weights, state.weight_version)
        return {"path": state.weights, "version": state.weight_version, "checksum": state.weight_checksum}

    # -- before --------------------------------------------------------------------------------------------------------

    @property
    def _served(self) -> str:
        return self._engine.state.weights or self._first

    async def _checked(self, call: Call, asked: _Asked) -> Checkpoint:
        try:
            async with asyncio.timeout(call.left_s):
                return await asyncio.to_thread(checkpoints.check, asked.path, self._served, self._environment)
        except TimeoutError:
            said = f"{call.name}: its time was up before {asked.path} was looked at"
            raise EngineTimeoutError(said, call=call.name) from None

    async def _before(self, call: Call, asked: _Asked, routes: EngineRoutes, checkpoint: Checkpoint) -> _Before:
        """What to come back to. Raises `EngineUnsupportedError` where the Workers can't look at their weights."""
        state = self._engine.state
        faults = await _faults(routes, call.left_s)
        checksum = state.weight_checksum
        if checksum is None and (asked.checksum or checkpoint.nbytes <= _CHECKSUM_LIMIT):
            checksum = await _checksum(routes, call.left_s)
        return _Before(state.weights or self._first, state.weight_version or "default", checksum, faults)

    @contextlib.asynccontextmanager
    async def _paused(self, call: Call, routes: EngineRoutes, mode: PauseMode) -> AsyncIterator[None]:
        """Paused, unless a user has it paused already; then it stays so. What is poisoned does not go on."""
        if self._engine.state.paused is not None:
            yield
            return
        try:
            await routes.pause(mode, timeout_s=call.left_s)
            yield
        finally:
            if self._poisoned is not routes:
                await self._resume(routes)

    async def _resume(self, routes: EngineRoutes) -> None:
        try:
            await routes.resume(timeout_s=_RESUME_S)
        except EngineControlError as error:
            self._start_again(routes, f"the engine does not resume: {error}")

    def _start_again(self, routes: EngineRoutes, why: str) -> None:
        """Another server, which gets the weights that are remembered before it is ready."""
        log.error("%s: the server is started again", why)
        self._poisoned = routes
        self._engine.restart()

    # -- the update ----------------------------------------------------------------------------------------------------

    async def _load(
        self, call: Call, asked: _Asked, routes: EngineRoutes, checkpoint: Checkpoint, before: _Before
    ) -> EngineState:
        """The state after it; the engine is still paused."""
        began_at = time.monotonic()
        if checkpoint.has_changed():
            raise _bad(asked, "its files have changed since they were looked at", _NOT_WRITTEN)
        try:
            await routes.reload_weights(str(checkpoint.folder), timeout_s=call.left_s)
        except EngineControlError as error:
            if error.status is None or isinstance(error, EngineUnsupportedError):
                raise
            raise _bad(asked, f"vLLM can't load it: {error.message}", _DAMAGED) from error
        if checkpoint.has_changed():
            raise _bad(asked, "its files changed while they were loaded", _NOT_WRITTEN)
        if faults := await _faults(routes, call.left_s) - before.faults:
            raise CheckpointError(asked.path, tuple(Fault(fault, _DAMAGED) for fault in sorted(faults)[:_MOST_FAULTS]))
        checksum = None
        if before.checksum is not None:
            checksum = await _checksum(routes, call.left_s)
            await self._compare(asked, checkpoint, checksum, before)
        version = checkpoint.folder.name if asked.version is None else asked.version
        await self._make_valid(call, routes, version)
        log.info("weights loaded in %.3f s", time.monotonic() - began_at)
        state = self._engine.state
        return replace(state, weights=str(checkpoint.folder), weight_version=version, weight_checksum=checksum)

    async def _compare(self, asked: _Asked, checkpoint: Checkpoint, checksum: str, before: _Before) -> None:
        if asked.checksum is not None and checksum != asked.checksum:
            raise _bad(asked, f"its checksum is {checksum}, expected is {asked.checksum}", "find out which one it is")
        if asked.checksum is not None or checksum != before.checksum:
            return
        if not await asyncio.to_thread(checkpoints.may_be_equal, checkpoint, before.source, self._environment):
            raise _bad(asked, "vLLM has loaded it, and has the weights from before all the same", "see vLLM's log")

    async def _make_valid(self, call: Call, routes: EngineRoutes, version: str) -> None:
        """What was computed with the weights from before is computed anew. vLLM keeps it (0.32)."""
        if not await routes.reset_prefix_cache(running=True, timeout_s=call.left_s):
            raise call.refused("the prefix cache, which is of the weights from before, could not be emptied")
        await routes.set_weight_version(version, timeout_s=call.left_s)

    # -- back ----------------------------------------------------------------------------------------------------------

    async def _take_back(self, routes: EngineRoutes, before: _Before, error: BaseException) -> None:
        """The weights from before, in place or with another start. The engine is paused until then.

        A connection that was lost may mean that the server has ended, or not.
        """
        began_at = time.monotonic()
        try:
            if isinstance(error, EngineLostError):
                raise error
            await self._load_again(routes, before)
        except (EngineControlError, asyncio.CancelledError) as reason:
            self._start_again(routes, f"the weights from before can't be loaded in place ({reason})")
        else:
            log.warning("the weights from before serve again, after %.3f s", time.monotonic() - began_at)

    async def _load_again(self, routes: EngineRoutes, before: _Before) -> None:
        # By its name in any case: vLLM takes "the model's own" for what it was last told to load (0.32).
        folder = await asyncio.to_thread(checkpoints.resolve, before.source, self._environment)
        await routes.reload_weights(str(folder), timeout_s=_RECOVERY_S)
        if faults := await _faults(routes, _RECOVERY_S) - before.faults:
            raise EngineControlError(min(faults), call="update_weights")
        if before.checksum is not None and await _checksum(routes, _RECOVERY_S) != before.checksum:
            raise EngineControlError("their checksum is another one", call="update_weights")
        if not await routes.reset_prefix_cache(running=True, timeout_s=_RECOVERY_S):
            raise EngineControlError("the prefix cache could not be emptied", call="update_weights")
        await routes.set_weight_version(before.version, timeout_s=_RECOVERY_S)


async def _faults(routes: EngineRoutes, timeout_s: float) -> frozenset[str]:
    """What the Workers find wrong with their weights."""
    found = await routes.canary(timeout_s=timeout_s)
    broken = {f"{name} is not finite, or not there" for one in found for name in one.get("broken", ())}
    if any(one.get("logits") == "broken" for one in found):
        broken.add("the model computes NaN or infinity")
    return frozenset(broken)


async def _checksum(routes: EngineRoutes, timeout_s: float) -> str:
    return checksum_of(await routes.weight_checksums(timeout_s=timeout_s))


def _bad(asked: _Asked, text: str, remedy: str) -> CheckpointError:
    return CheckpointError(asked.path, (Fault(text, remedy),))
