"""An engine that nobody uses sleeps, and the next request wakes it (`idle_sleep=`): its GPU's memory is free meanwhile.

Whether it is used, the guard in the server knows, through which every request comes
(`managed_vllm.in_server.managed_vllm_guard`): vLLM's own numbers stand still while it sleeps (0.32). A request that
comes then waits in the server, and is seen within `_LOOK_ASLEEP_S`. Calls of `llm.engine` wake it as well, before they
are done. The sleep is held, as by a user of its own, and recorded nowhere: a server that is started again is awake.
"""

from __future__ import annotations

import asyncio
import logging
import time

from managed_vllm.errors import EngineControlError, EngineUnsupportedError
from managed_vllm.server.engine import Call, Engine, Watcher
from managed_vllm.server.engine_routes import EngineRoutes

log = logging.getLogger("managed_vllm.supervisor")

_LOOK_S = 1.0
_LOOK_ASLEEP_S = 0.1
"""Seconds between two looks. A request that wakes the engine waits for the second one, and for the waking."""
_CALL_S = 300.0
"""Seconds for the engine to fall asleep, or to wake: the weights go through the host's memory."""
_LEVEL = 1
_HARMLESS = frozenset({"is_paused", "is_sleeping"})
"""Calls that are answered from what is known."""


class IdleSleep(Watcher):
    """Puts one supervisor's engine to sleep, and wakes it; see the module's docstring."""

    def __init__(self, engine: Engine, idle_s: float) -> None:
        """`idle_s`: seconds without a request, or a call of `llm.engine`, after which it sleeps."""
        self._engine = engine
        self._idle_s = idle_s
        self._sleeps = False
        self._used_at = time.monotonic()
        self._watching: asyncio.Task[None] | None = None
        self._turning = asyncio.Lock()
        engine.add_watcher(self)

    # -- what the engine tells -----------------------------------------------------------------------------------------

    def server_came(self, routes: EngineRoutes) -> None:
        """Watches a server that has just come up."""
        self._used_at = time.monotonic()
        self._watching = asyncio.create_task(self._watch(routes))

    def server_left(self) -> None:
        """Another one comes, which is awake: whoever waits for it wants it."""
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
        self._sleeps = False
        self._engine.user_gone(self)

    async def before(self, call: Call) -> None:
        """Wakes it for a call of a user's."""
        if call.user is self or call.name in _HARMLESS:
            return
        self._used_at = time.monotonic()
        if self._sleeps:
            await self._wake()

    # -- watching ------------------------------------------------------------------------------------------------------

    async def _watch(self, routes: EngineRoutes) -> None:
        seen = -1
        while True:
            await asyncio.sleep(_LOOK_ASLEEP_S if self._sleeps else min(_LOOK_S, self._idle_s / 4))
            try:
                in_flight, requests = await routes.use(timeout_s=_CALL_S)
            except EngineUnsupportedError as error:
                log.warning("idle_sleep= has no effect: %s", error)
                return
            except EngineControlError:
                continue
            # Put to sleep behind a call that lasts, an engine would sleep right after it, also one that it has paused.
            if in_flight or requests != seen or self._engine.turn.is_taken:
                self._used_at, seen = time.monotonic(), requests
            if self._sleeps:
                if in_flight:
                    await self._wake()
            elif self._engine.state.serves and time.monotonic() - self._used_at >= self._idle_s:
                await self._sleep()

    async def _sleep(self) -> None:
        async with self._turning:
            self._sleeps = await self._ask("sleep", level=_LEVEL, mode="keep")
            self._used_at = time.monotonic()

    async def _wake(self) -> None:
        async with self._turning:
            if self._sleeps and (await self._ask("wake") or self._engine.state.sleep_level is None):
                self._sleeps = False

    async def _ask(self, call: str, **arguments: object) -> bool:
        asked = {"call": call, "arguments": {**arguments, "held": True}, "budget_s": _CALL_S}
        reply = await self._engine.answer(self, asked)
        if not reply["ok"]:
            log.warning("idle_sleep=: %s", reply["error"])
        return bool(reply["ok"])
