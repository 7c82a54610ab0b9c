"""The weights that are served, while others are tried: what they are, and the way back to them.

Whatever fails, they are loaded again, in place: from their checkpoint, or, where a trainer sent them and no checkpoint
has them, from a copy in the Workers' memory, which is made before anything else is tried. They are looked at as new
ones are. Where that does not succeed, vLLM is poisoned (0.32: after a reload of other shapes a good one may fail as
well, and the next token ends the engine): the server is started again, and gets them before it is ready, or has failed.
The engine is paused until either is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from managed_vllm.config import SupervisorOrder
from managed_vllm.engine_state import PauseMode
from managed_vllm.errors import EngineControlError, EngineLostError
from managed_vllm.server import checkpoints
from managed_vllm.server.engine import Call, Engine
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.server.weight_checks import checksum_by, faults_of

log = logging.getLogger("managed_vllm.supervisor")

OnUpdate = Literal["finish", "restart", "continue"]
PAUSES: Mapping[str, PauseMode] = {"finish": "wait", "restart": "abort", "continue": "keep"}

CHECKSUM_LIMIT = 4 << 30
"""Bytes of weights above which no checksum is made unless one is expected: vLLM makes it on a CPU, at 1-2 GB/s."""
_RECOVERY_S = 600.0
"""Seconds for each step that brings the weights from before back, whatever is left of the call's time."""
_RESUME_S = 30.0


@dataclass(frozen=True)
class Before:
    """The weights before an update. `faults`: a model may have weights that nobody fills, and that are never used.

    `source` is the folder or id of their checkpoint; None: the Workers have a copy in memory.
    """

    source: str | None
    version: str
    checksum: str | None
    faults: frozenset[str]


class GoodWeights:
    """What is served by one supervisor's servers, and the way back to it; see the module's docstring."""

    def __init__(self, engine: Engine, order: SupervisorOrder) -> None:
        """`order` says what is served first, and where the hub's cache is."""
        revision = order.spec.engine_args.get("revision")
        self._first = f"{order.spec.model}@{revision}" if revision else order.spec.model
        self.environment = {**order.environment.reveal(), **order.spec.variables()}
        self._engine = engine
        self._poisoned: EngineRoutes | None = None

    @property
    def served(self) -> str:
        """The checkpoint that is served, or one of the same model: its folder or id."""
        return self._engine.state.weights or self._first

    async def note(self, call: Call, routes: EngineRoutes, *, with_checksum: bool) -> Before:
        """What to come back to. Raises `EngineUnsupportedError` where the Workers can't look at their weights."""
        state = self._engine.state
        faults = await faults_of(routes, call.left_s)
        checksum = state.weight_checksum
        if checksum is None and with_checksum:
            checksum = await checksum_by(routes, call.left_s)
        source = None if state.weights_unsaved else self.served
        return Before(source, state.weight_version or "default", checksum, faults)

    async def keep_copy(self, before: Before, routes: EngineRoutes, timeout_s: float) -> None:
        """Has the Workers copy what no checkpoint has. Called while nothing is generated, before anything is tried."""
        if before.source is None:
            await routes.keep_weights(timeout_s=timeout_s)

    async def drop_copy(self, before: Before, routes: EngineRoutes) -> None:
        """The copy is not needed any more. One that stays is overwritten by the next."""
        if before.source is None:
            with contextlib.suppress(EngineControlError):
                await routes.drop_kept_weights(timeout_s=_RESUME_S)

    @contextlib.asynccontextmanager
    async def paused(self, call: Call, routes: EngineRoutes, mode: PauseMode) -> AsyncIterator[None]:
        """Paused, unless a user has it paused already; then it stays so. What is poisoned does not go on."""
        try:
            await self.pause(routes, mode, call.left_s)
            yield
        finally:
            await self.go_on(routes)

    async def pause(self, routes: EngineRoutes, mode: PauseMode, timeout_s: float) -> None:
        """Pauses, unless a user has it paused already. All users see it: the clocks of rollouts stand still."""
        is_paused = self._engine.state.paused is not None
        if not is_paused:
            self._engine.become(replace(self._engine.state, updating=mode))
        if not is_paused or mode == "abort":
            await routes.pause(mode, timeout_s=timeout_s)

    async def go_on(self, routes: EngineRoutes) -> None:
        """Ends `pause`. An engine that does not resume is started again."""
        if self._engine.state.paused is not None or self._poisoned is routes:
            return
        try:
            if not self._engine.has_left(routes):
                await routes.resume(timeout_s=_RESUME_S)
        except EngineControlError as error:
            self.start_again(routes, f"the engine does not resume: {error}")
        self._engine.become(replace(self._engine.state, updating=None))

    def start_again(self, routes: EngineRoutes, why: str) -> None:
        """Another server, which gets the weights that are remembered before it is ready."""
        self._poisoned = routes
        if not self._engine.has_left(routes):  # else it comes anyway
            log.error("%s: the server is started again", why)
            self._engine.restart()

    async def make_valid(self, routes: EngineRoutes, version: str, timeout_s: float) -> None:
        """Has all computed anew that was computed with other weights (vLLM 0.32 keeps it), and sets the version."""
        if not await routes.reset_prefix_cache(running=True, timeout_s=timeout_s):
            raise EngineControlError(
                "the prefix cache, which is of other weights, could not be emptied", call="update_weights"
            )
        await routes.set_weight_version(version, timeout_s=timeout_s)

    async def take_back(self, routes: EngineRoutes, before: Before, error: BaseException) -> None:
        """The weights from before, in place or with another start. The engine is paused until then.

        A connection that was lost may mean that the server has ended, or not.
        """
        if self._engine.has_left(routes):
            return
        began_at = time.monotonic()
        try:
            if isinstance(error, EngineLostError):
                raise error
            await self._load_again(routes, before)
        except (EngineControlError, asyncio.CancelledError) as reason:
            self.start_again(routes, f"the weights from before can't be loaded in place ({reason})")
        else:
            log.warning("the weights from before serve again, after %.3f s", time.monotonic() - began_at)

    async def _load_again(self, routes: EngineRoutes, before: Before) -> None:
        if before.source is None:
            await routes.put_kept_weights_back(timeout_s=_RECOVERY_S)
        else:
            # By its name in any case: vLLM takes "the model's own" for what it was last told to load (0.32).
            folder = await asyncio.to_thread(checkpoints.resolve, before.source, self.environment)
            await routes.reload_weights(str(folder), timeout_s=_RECOVERY_S)
        if faults := await faults_of(routes, _RECOVERY_S) - before.faults:
            raise EngineControlError(min(faults), call="update_weights")
        if before.checksum is not None and await checksum_by(routes, _RECOVERY_S) != before.checksum:
            raise EngineControlError("their checksum is another one", call="update_weights")
        await self.make_valid(routes, before.version, _RECOVERY_S)
