"""LoRA adapters of a running server: loaded and unloaded at run time, and remembered by its engine's state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from managed_vllm.errors import EngineControlError
from managed_vllm.server.engine import Call, Engine
from managed_vllm.server.engine_routes import EngineRoutes
from managed_vllm.server.two_phase import AbortedError

_UNDO_S = 30.0
"""Seconds for a step that undoes what other replicas could not do."""


class Adapters:
    """Does `llm.engine.load_lora`, `unload_lora` and `loras` for one supervisor's servers."""

    def __init__(self, engine: Engine) -> None:
        """Adds the calls to those of `engine`."""
        self._engine = engine
        for name, do in {"load_lora": self.load, "unload_lora": self.unload, "loras": self.listed}.items():
            engine.add_call(name, do)

    async def load(self, call: Call) -> dict[str, Any]:
        """Loads one; the same name with the same path again does nothing: several users may ask for it."""
        async with self._engine.turn_for(call):
            return await self._load(call)

    async def _load(self, call: Call) -> dict[str, Any]:
        name, path = (str(call.arguments.get(field, "")) for field in ("name", "path"))
        again, before = call.arguments.get("replace") is True, self._engine.state.loras.get(name)
        if not again and before == path:
            return {}
        routes = self._engine.routes_for(call)
        await routes.load_lora(name, path, replace=again, timeout_s=call.left_s)
        try:
            if again:  # what the cache has of it was made with the old one
                await routes.reset_prefix_cache(running=True, timeout_s=max(call.left_s, 1.0))
            await call.part.prepared()
        except AbortedError:
            await self._put_back(routes, name, before, is_loaded=True)
            raise
        self._become({**self._engine.state.loras, name: path})
        return {}

    async def unload(self, call: Call) -> dict[str, Any]:
        """Takes one away."""
        async with self._engine.turn_for(call):
            return await self._unload(call)

    async def _unload(self, call: Call) -> dict[str, Any]:
        name, loras = str(call.arguments.get("name", "")), self._engine.state.loras
        routes = self._engine.routes_for(call)
        await routes.unload_lora(name, timeout_s=call.left_s)
        try:
            await call.part.prepared()
        except AbortedError:
            await self._put_back(routes, name, loras.get(name), is_loaded=False)
            raise
        self._become({other: path for other, path in loras.items() if other != name})
        return {}

    async def listed(self, call: Call) -> dict[str, Any]:
        """All that the server has, by name."""
        async with self._engine.turn_for(call):
            return {"loras": await self._engine.routes_for(call).loras(timeout_s=call.left_s)}

    def _become(self, loras: dict[str, str]) -> None:
        self._engine.become(replace(self._engine.state, loras=loras))

    async def _put_back(self, routes: EngineRoutes, name: str, path: str | None, *, is_loaded: bool) -> None:
        """The adapter of that name as it was, None: there was none that we know of; else with another start."""
        try:
            if path is not None:
                await routes.load_lora(name, path, replace=is_loaded, timeout_s=_UNDO_S)
                await routes.reset_prefix_cache(running=True, timeout_s=_UNDO_S)
            elif is_loaded:
                await routes.unload_lora(name, timeout_s=_UNDO_S)
            else:  # one of the command line
                self._engine.restart()
        except EngineControlError:
            self._engine.restart()
