"""Notices that somebody has paused the engine of a run's server, or has put it to sleep, and holds the run up.

An update of the weights is such a pause (`llm.engine.update_weights`), whichever process asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from managed_vllm.agent.gate import Gate
from managed_vllm.engine_state import EngineState

_EVERY_S = 0.05
_NOTICED_S = 0.3
"""The longest that a pause is taken to go unnoticed, on a busy machine."""


class EngineWatch:
    """Keeps a gate closed while the engine does not serve, for as long as the block lasts.

    Of a server that no supervisor tells of, nothing is noticed.
    """

    def __init__(self, llm: Any, gate: Gate) -> None:
        self._engine = getattr(llm, "engine", None)
        self._gate = gate
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EngineWatch:
        if self._engine is not None:
            self._task = asyncio.create_task(self._watch(), name="managed-vllm-engine-watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            state = known_state(self._engine)
            if state.serves:
                self._gate.open(self)
            else:  # with "wait" what is in flight is finished first
                finishes = "wait" in (state.paused, state.updating)
                self._gate.close(self, freezes=not finishes, noticed_s=_NOTICED_S)
            await asyncio.sleep(_EVERY_S)


def known_state(engine: Any) -> EngineState:
    """What the supervisor said last of the engine; that of a fresh one where none is known."""
    found = None if engine is None else engine.last_state()
    return found if isinstance(found, EngineState) else EngineState()
