"""Weights of a running server, sent by a trainer over vLLM's own weight transfer: one update is several calls.

In this order:

1. `start_weight_update` reserves the engine for the trainer: all other calls wait. What is served is noted, the engine
   paused ("finish": once requests in flight are finished), and vLLM told that weights come.
2. `receive_weights`, any number of times. Names and shapes are compared with the checkpoint that is served, where the
   trainer tells them: what can't fit does not reach vLLM.
3. `finish_weight_update`: all weights of the checkpoint have come, vLLM uses them, and the Workers look at them as
   after an update from disk. Caches are emptied, the version is set, the state is recorded; the engine goes on.

Whatever fails, and where the trainer gives up, is killed, or needs longer than it said: the weights from before serve
again (`managed_vllm.server.good_weights`). Workers that wait for a trainer that is gone can't be told so: their server
is started again. Weights of a trainer are in no file, unless it names a checkpoint that has the same ones: a server
that ends with them has failed (`weights_lost`), and does not serve others in silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from managed_vllm.engine_state import EngineState
from managed_vllm.errors import (
    BadWeightsError,
    CheckpointError,
    EngineControlError,
    EngineLostError,
    EngineTimeoutError,
)
from managed_vllm.server import checkpoints
from managed_vllm.server.checkpoints import Checkpoint
from managed_vllm.server.engine import Call, Engine, Watcher
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.server.good_weights import (
    CHECKSUM_LIMIT,
    PAUSES,
    Before,
    GoodWeights,
    OnUpdate,
)
from managed_vllm.server.weight_checks import checksum_by, faults_of

log = logging.getLogger("managed_vllm.supervisor")

_LONGEST_S = 86_400.0
DRAIN_S = 10.0
_MOST_NAMES = 3
_NUMBERED = re.compile(r"transfer-(\d{1,15})")


@dataclass
class _Transfer:
    """One update under way. `sent`: the names that have come; `tells`: whether all of them were told.

    `before` is there once there is something to take back. `needs_user`: Workers wait for what the trainer does;
    `finishing`: nothing is needed of it any more.
    """

    user: Hashable
    routes: EngineRoutes
    before: Before | None = None
    served: Checkpoint | None = None
    limit: asyncio.TimerHandle | None = None
    began_at: float = field(default_factory=time.monotonic)
    sent: set[str] = field(default_factory=set)
    tells: bool = True
    needs_user: bool = False
    finishing: bool = False


class WeightTransfers(Watcher):
    """Does what `llm.engine.weight_sync_client()` asks for; see the module's docstring."""

    def __init__(self, engine: Engine, good: GoodWeights, *, drain_s: float = DRAIN_S) -> None:
        """Adds the calls to those of `engine`. `good` is the way back to what is served.

        `drain_s`: seconds in which Workers must have answered whose trainer is gone.
        """
        self._engine = engine
        self._good = good
        self._drain_s = drain_s
        self._current: _Transfer | None = None
        engine.add_watcher(self)
        for name, do in {
            "init_weight_transfer_engine": self._init,
            "shutdown_weight_transfer_engine": self._shutdown,
            "start_weight_update": self._start,
            "receive_weights": self._receive,
            "finish_weight_update": self._finish,
            "abort_weight_update": self._abort,
        }.items():
            engine.add_call(name, functools.partial(self._in_turn, do))

    async def _in_turn(self, do: Callable[[Call], Awaitable[dict[str, Any]]], call: Call) -> dict[str, Any]:
        async with self._engine.turn_for(call, call.user):
            return await do(call)

    # -- what ends one -------------------------------------------------------------------------------------------------

    def user_gone(self, user: Hashable) -> None:
        """Undoes the update of a trainer that is gone."""
        if self._current is not None and self._current.user == user:
            self._engine.in_background(self._give_up(self._current, "its trainer is gone"))

    def server_left(self) -> None:
        """What was under way ended with the server; the next one gets the weights from before."""
        transfer, self._current = self._current, None
        if transfer is not None and transfer.limit is not None:
            transfer.limit.cancel()

    async def _give_up(self, transfer: _Transfer, why: str) -> None:
        """Undoes an update from outside of its calls, of which one may be under way."""
        if transfer.finishing:
            return
        turn = self._engine.turn
        try:
            async with asyncio.timeout(self._drain_s if transfer.needs_user else None):
                await turn.take(transfer.user)
        except TimeoutError:
            if self._current is transfer:
                self._good.start_again(transfer.routes, f"weight update: {why}, and the workers wait for it")
            return
        try:
            if self._current is transfer:
                log.warning("weight update: %s", why)
                await self._undo(transfer, EngineControlError(why, call="start_weight_update"))
        finally:
            turn.release()

    def _mine(self, call: Call) -> _Transfer:
        """The update that the caller has begun. Raises `EngineLostError` where there is none."""
        if self._current is None or self._current.user != call.user:
            raise EngineLostError(
                f"{call.name}: no weight update of yours is under way (not started, undone, or the server ended)",
                call=call.name,
            )
        return self._current

    def _begin(self, call: Call) -> _Transfer:
        self._current = transfer = _Transfer(call.user, self._engine.routes_for(call))
        self._engine.turn.reserve(call.user)
        return transfer

    def _end(self, transfer: _Transfer) -> None:
        if transfer.limit is not None:
            transfer.limit.cancel()
        if self._current is transfer:
            self._current = None
            self._engine.turn.free()

    async def _undo(self, transfer: _Transfer, error: BaseException) -> None:
        """The weights from before, and the engine goes on, or another server with them."""
        if self._current is not transfer:
            return  # the server has ended, and another one comes with the weights from before
        try:
            if isinstance(error, EngineTimeoutError) and transfer.needs_user:
                self._good.start_again(transfer.routes, f"the workers did not answer in time ({error.message})")
            elif transfer.before is not None:
                await self._good.take_back(transfer.routes, transfer.before, error)
            await self._good.go_on(transfer.routes)
        finally:
            self._end(transfer)

    @contextlib.asynccontextmanager
    async def _undone_if_it_fails(self, call: Call, transfer: _Transfer) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            call.part.abort()
            await self._undo(transfer, error)
            if type(error) is EngineControlError and error.status is not None:
                said = f"vLLM can't take the weights: {error.message}"
                raise BadWeightsError(said, call=call.name, status=error.status) from error
            raise

    # -- the calls -----------------------------------------------------------------------------------------------------

    async def _init(self, call: Call) -> dict[str, Any]:
        """It may wait for the trainer, which must not go meanwhile: hence the reservation."""
        info = call.arguments.get("init_info")
        if not isinstance(info, Mapping):
            raise call.refused(f"init_info must be a dict, not {info!r}")
        await self._undo_mine(call)
        transfer = self._begin(call)
        transfer.needs_user = True
        try:
            await transfer.routes.init_weight_transfer(info, timeout_s=call.left_s)
        except EngineTimeoutError as error:
            await self._undo(transfer, error)
            raise
        finally:
            self._end(transfer)
        return {}

    async def _shutdown(self, call: Call) -> dict[str, Any]:
        await self._undo_mine(call)
        await self._engine.routes_for(call).shut_weight_transfer_down(timeout_s=call.left_s)
        return {}

    async def _abort(self, call: Call) -> dict[str, Any]:
        await self._undo_mine(call)
        return {}

    async def _undo_mine(self, call: Call) -> None:
        transfer = self._current
        if transfer is not None and transfer.user == call.user:
            await self._undo(transfer, EngineControlError("the trainer has given it up", call=call.name))

    async def _start(self, call: Call) -> dict[str, Any]:
        on_update, limit_s = call.arguments.get("on_update", "finish"), call.arguments.get("limit_s", _LONGEST_S)
        if on_update not in get_args(OnUpdate) or not isinstance(limit_s, int | float):
            raise call.refused(f"wrong arguments: {dict(call.arguments)}")
        await self._undo_mine(call)
        if self._engine.state.sleep_level is not None:
            raise call.refused("the engine is asleep, and has no weights to be replaced; wake it first")
        if on_update == "finish" and self._engine.state.paused == "keep":
            raise call.refused("it is paused with 'keep', so nothing finishes; use on_update='continue', or resume it")
        transfer = self._begin(call)
        async with self._undone_if_it_fails(call, transfer):
            await self._prepare(call, transfer, on_update)
            await call.part.prepared()
        transfer.limit = asyncio.get_running_loop().call_later(
            min(max(limit_s, 0.0), _LONGEST_S),
            lambda: self._engine.in_background(self._give_up(transfer, f"not finished within {limit_s:g} s")),
        )
        return {}

    async def _prepare(self, call: Call, transfer: _Transfer, on_update: OnUpdate) -> None:
        routes = transfer.routes
        transfer.served = served = await asyncio.to_thread(self._read_served)
        small = served is not None and served.nbytes <= CHECKSUM_LIMIT
        before = await self._good.note(call, routes, with_checksum=small)
        await self._good.pause(routes, PAUSES[on_update], call.left_s)
        await self._good.keep_copy(before, routes, call.left_s)
        transfer.before = before
        await routes.start_weight_transfer(timeout_s=call.left_s)

    def _read_served(self) -> Checkpoint | None:
        try:
            return checkpoints.read(self._good.served, self._good.environment)
        except CheckpointError:
            return None

    async def _receive(self, call: Call) -> dict[str, Any]:
        transfer = self._mine(call)
        transfer.needs_user = True
        async with self._undone_if_it_fails(call, transfer):
            _compare(transfer, call.arguments.get("update_info"))
            await transfer.routes.receive_weights(call.arguments.get("update_info"), timeout_s=call.left_s)
            transfer.needs_user = False
            await call.part.prepared()
        return {}

    async def _finish(self, call: Call) -> dict[str, Any]:
        transfer = self._mine(call)
        transfer.finishing = True
        async with self._undone_if_it_fails(call, transfer):
            found = await self._take(call, transfer)
            await call.part.prepared(found)
        state = replace(self._engine.state, **found)
        self._engine.become(state)
        await self._good.go_on(transfer.routes)
        if transfer.before is not None:
            await self._good.drop_copy(transfer.before, transfer.routes)
        self._end(transfer)
        took_s = time.monotonic() - transfer.began_at
        log.info("weights of a trainer: version %s, %.3f s", state.weight_version, took_s)
        return {"path": state.weights, "version": state.weight_version, "checksum": state.weight_checksum}

    async def _take(self, call: Call, transfer: _Transfer) -> dict[str, Any]:
        """What is new in the state with the weights that have come; the engine is still paused."""
        version, checkpoint = (call.arguments.get(name) for name in ("version", "checkpoint"))
        if not all(one is None or (isinstance(one, str) and one) for one in (version, checkpoint)):
            raise call.refused(f"wrong arguments: {dict(call.arguments)}")
        if missing := _missing(transfer):
            raise BadWeightsError(f"{len(missing)} weights did not come: {_listed(missing)}", call=call.name)
        folder = None
        if checkpoint is not None:
            folder = await asyncio.to_thread(checkpoints.check, checkpoint, self._good.served, self._good.environment)
        await transfer.routes.finish_weight_transfer(timeout_s=call.left_s)
        known, sums = (set(), None) if transfer.before is None else (transfer.before.faults, transfer.before.checksum)
        if faults := await faults_of(transfer.routes, call.left_s) - known:
            raise BadWeightsError(f"the weights that came can't be served: {_listed(sorted(faults))}", call=call.name)
        checksum = None if sums is None else await checksum_by(transfer.routes, call.left_s)
        name = version or _next_version(self._engine.state.weight_version)
        await self._good.make_valid(transfer.routes, name, call.left_s)
        path = None if folder is None else str(folder.folder)
        state = EngineState(weights=path, weight_version=name, weight_checksum=checksum, weights_unsaved=path is None)
        return state.weight_fields


# -- what comes --------------------------------------------------------------------------------------------------------


def _compare(transfer: _Transfer, update_info: object) -> None:
    """Raises `BadWeightsError` for a weight that has another shape than in the checkpoint that is served."""
    infos: list[Any] = update_info if isinstance(update_info, list) else [update_info]
    if not infos or not all(isinstance(info, Mapping) for info in infos):
        raise BadWeightsError("update_info must be a dict, or a list of them", call="receive_weights")
    for info in infos:
        names, shapes = info.get("names"), info.get("shapes")
        if not isinstance(names, list) or not isinstance(shapes, list):
            transfer.tells = False
            continue
        transfer.sent |= {str(name) for name in names}
        for name, shape in zip(names, shapes, strict=False):
            _compare_shape(transfer.served, str(name), shape)


def _compare_shape(served: Checkpoint | None, name: str, shape: object) -> None:
    known = None if served is None else served.tensors.get(name)
    if known is not None and list(known[1].shape) != shape:
        raise BadWeightsError(
            f"{name} has the shape {json.dumps(shape)}, served is {list(known[1].shape)}", call="receive_weights"
        )


def _missing(transfer: _Transfer) -> list[str]:
    """The weights of the checkpoint that have not come; none where the trainer names them in another way.

    vLLM would leave parts of its weights unset (0.32: of a matrix that it has fused from three, say).
    """
    if transfer.served is None or not transfer.tells:
        return []
    known = transfer.served.tensors.keys()
    return sorted(known - transfer.sent - checkpoints.may_be_missing(transfer.served)) if known & transfer.sent else []


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _next_version(version: str) -> str:
    found = _NUMBERED.fullmatch(version)
    return f"transfer-{int(found[1]) + 1 if found else 1}"
