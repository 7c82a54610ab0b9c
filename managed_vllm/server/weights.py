"""Weights of a running server, taken from another checkpoint: an update is safe, or it did not happen.

In this order:

1. The checkpoint is looked at (`managed_vllm.server.checkpoints`). Nothing has happened yet.
2. The engine is paused: requests in flight are finished first ("finish") or frozen ("continue"); new ones wait.
3. vLLM loads the weights in place. That it answers 200 proves nothing (0.32: weights of NaN are taken without a word).
4. The Workers look at what they have: all weights there and finite, finite logits of a forward pass, their checksum. No
   token is generated until that is done.
5. The caches are emptied, the version is set, the state is recorded; the engine goes on.

Whatever fails after 2: the weights from before serve again (`managed_vllm.server.good_weights`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from dataclasses import dataclass, replace
from typing import Any, get_args

from managed_vllm.engine_state import EngineState
from managed_vllm.errors import CheckpointError, EngineControlError, EngineTimeoutError, EngineUnsupportedError
from managed_vllm.server import checkpoints
from managed_vllm.server.checkpoints import Checkpoint
from managed_vllm.server.engine import Call, Engine
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.server.good_weights import (
    CHECKSUM_LIMIT,
    PAUSES,
    Before,
    GoodWeights,
    OnUpdate,
)
from managed_vllm.server.two_phase import ALONE
from managed_vllm.server.weight_checks import checksum_by, faults_of
from managed_vllm.status import CheckpointFault as Fault

log = logging.getLogger("managed_vllm.supervisor")

_NOT_WRITTEN = "write each checkpoint into a folder of its own, and update when that is finished"
_MOST_FAULTS = 5
_UNDO_S = 600.0
"""Seconds in which an update that is done has begun to be undone, where a later replica could not do it."""
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


class WeightUpdates:
    """Does `llm.engine.update_weights` for one supervisor's servers; see the module's docstring."""

    def __init__(self, engine: Engine, good: GoodWeights) -> None:
        """Adds the call to those of `engine`. `good` is the way back to what is served."""
        self._engine = engine
        self._good = good
        engine.add_call("update_weights", self.update)

    async def update(self, call: Call) -> dict[str, Any]:
        """Does one update; returns path, version and checksum of the weights that are served then.

        The checkpoint is looked at before it is the call's turn, so that nobody waits for its files to be read.
        """
        asked = _Asked.of(call)
        compared_with = self._good.served
        checkpoint = await self._checked(call, asked)
        async with self._engine.turn_for(call):
            if self._good.served != compared_with:
                checkpoint = await self._checked(call, asked)
            return await self._update(call, asked, checkpoint)

    async def _update(self, call: Call, asked: _Asked, checkpoint: Checkpoint) -> dict[str, Any]:
        if self._engine.state.sleep_level is not None:
            raise call.refused("the engine is asleep, and has no weights to be replaced; wake it first")
        if asked.on_update == "finish" and self._engine.state.paused == "keep":
            raise call.refused("it is paused with 'keep', so nothing finishes; use on_update='continue', or resume it")
        routes = self._engine.routes_for(call)
        with_checksum = bool(asked.checksum) or checkpoint.nbytes <= CHECKSUM_LIMIT
        before = await self._good.note(call, routes, with_checksum=with_checksum)
        async with self._good.paused(call, routes, PAUSES[asked.on_update]):
            await self._good.keep_copy(before, routes, call.left_s)
            known = self._engine.state
            try:
                found = await self._load(call, asked, routes, checkpoint, before)
                await call.part.prepared(found)
            except BaseException as error:
                call.part.abort()
                await self._good.take_back(routes, before, error)
                raise
            state = replace(self._engine.state, **found)
            self._engine.become(state)
        call.part.undo_with(functools.partial(self._undo, call, asked, before, known))
        await self._good.drop_copy(before, routes)
        log.info("weights: %s, version %s", state.weights, state.weight_version)
        return {"path": state.weights, "version": state.weight_version, "checksum": state.weight_checksum}

    async def _undo(self, call: Call, asked: _Asked, before: Before, known: EngineState) -> None:
        """After an update: the weights from before it, in place or with another start."""
        call = replace(call, part=ALONE, deadline=time.monotonic() + _UNDO_S)
        async with self._engine.turn_for(call):
            routes = self._engine.routes_for(call)
            async with self._good.paused(call, routes, PAUSES[asked.on_update]):
                await self._good.take_back(routes, before, call.refused("another replica could not do it"))
                self._engine.become(replace(self._engine.state, **known.weight_fields))

    # -- before --------------------------------------------------------------------------------------------------------

    async def _checked(self, call: Call, asked: _Asked) -> Checkpoint:
        served = self._good.served
        check = functools.partial(asyncio.to_thread, checkpoints.check, asked.path, served, self._good.environment)
        try:
            async with asyncio.timeout(call.left_s):
                return await call.part.once((asked.path, served), check)
        except TimeoutError:
            said = f"{call.name}: its time was up before {asked.path} was looked at"
            raise EngineTimeoutError(said, call=call.name) from None

    # -- the update ----------------------------------------------------------------------------------------------------

    async def _load(
        self, call: Call, asked: _Asked, routes: EngineRoutes, checkpoint: Checkpoint, before: Before
    ) -> dict[str, Any]:
        """What is new in the state after it; the engine is still paused."""
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
        if faults := await faults_of(routes, call.left_s) - before.faults:
            raise CheckpointError(asked.path, tuple(Fault(fault, _DAMAGED) for fault in sorted(faults)[:_MOST_FAULTS]))
        checksum = None
        if before.checksum is not None:
            checksum = await checksum_by(routes, call.left_s)
            await self._compare(asked, checkpoint, checksum, before)
        version = checkpoint.folder.name if asked.version is None else asked.version
        await self._good.make_valid(routes, version, call.left_s)
        log.info("weights loaded in %.3f s", time.monotonic() - began_at)
        state = EngineState(weights=str(checkpoint.folder), weight_version=version, weight_checksum=checksum)
        return state.weight_fields

    async def _compare(self, asked: _Asked, checkpoint: Checkpoint, checksum: str, before: Before) -> None:
        if asked.checksum is not None and checksum != asked.checksum:
            raise _bad(asked, f"its checksum is {checksum}, expected is {asked.checksum}", "find out which one it is")
        if asked.checksum is not None or checksum != before.checksum:
            return
        served, environment = before.source, self._good.environment
        if served is not None and not await asyncio.to_thread(
            checkpoints.may_be_equal, checkpoint, served, environment
        ):
            raise _bad(asked, "vLLM has loaded it, and has the weights from before all the same", "see vLLM's log")


def _bad(asked: _Asked, text: str, remedy: str) -> CheckpointError:
    return CheckpointError(asked.path, (Fault(text, remedy),))
