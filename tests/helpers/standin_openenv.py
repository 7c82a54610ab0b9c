"""A small server that speaks OpenEnv's protocol, as the source of `openenv-core` 0.3 has it
(`env_server/http_server.py`), with the rules of its echo and grid worlds. In this process, over real sockets.

Messages are `reset`, `step`, `state` and `close`, answers `observation`, `state` and `error`; a connection is a session
with an environment of its own; beyond `capacity` one is told `CAPACITY_REACHED` and closed. `tests/agent/
test_openenv.py` plays the same episodes on OpenEnv's own server, where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import WSMsgType, web

MOVES = {"UP": (-1, 0), "DOWN": (1, 0), "LEFT": (0, -1), "RIGHT": (0, 1)}
GOAL = 4


class InvalidActionError(Exception):
    """The message of a field."""


class World:
    """What all have: an id, a count of steps, and what the last reset was told."""

    SCHEMA: dict[str, Any] = {"type": "object"}  # noqa: RUF012 - nobody changes it

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.reset({})

    def reset(self, told: dict[str, Any]) -> dict[str, Any]:
        self.state = {"episode_id": str(uuid.uuid4()), "step_count": 0, "told": told}
        return {}

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], Any, bool]:
        self.state["step_count"] += 1
        return {}, None, False


class Echo(World):
    """Tools in place of actions: `echo_message` alone."""

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], Any, bool]:
        super().step(action)
        if action.get("type") != "call_tool":
            raise InvalidActionError("type", "Input should be 'call_tool'")
        return {"tool_name": "echo_message", "result": {"data": action["arguments"]["message"]}}, None, False


class Grid(World):
    """From [0, 0] to [4, 4]: -0.1 a step, 1 at the goal."""

    SCHEMA = {"type": "object", "properties": {"action": {"enum": list(MOVES), "type": "string"}}}  # noqa: RUF012

    def reset(self, told: dict[str, Any]) -> dict[str, Any]:
        super().reset(told)
        self.place = [0, 0]
        return {"x": 0, "y": 0, "message": "Welcome to Grid World! Goal is at [4, 4]."}

    def step(self, action: dict[str, Any]) -> tuple[dict[str, Any], Any, bool]:
        super().step(action)
        if action.get("action") not in MOVES:
            raise InvalidActionError("action", "Input should be 'UP', 'DOWN', 'LEFT' or 'RIGHT'")
        self.place = [max(0, min(a + b, GOAL)) for a, b in zip(self.place, MOVES[action["action"]], strict=True)]
        found = self.place == [GOAL, GOAL]
        return {"x": self.place[0], "y": self.place[1]}, 1.0 if found else -0.1, found


class Answers(World):
    """A step is answered by what it says: observation, reward and done, or a whole answer; `hang`, `cut`, `ping`
    (which is sent before the answer), or `long` (5 MB)."""

    def step(self, action: dict[str, Any]) -> Any:
        return action["answer"]


class OpenEnvServer:
    """`sessions` that go on, and how many were `opened`; `pongs`: one came. `kept`: over HTTP there is one environment,
    not one a request."""

    def __init__(self, world: type[World], *, capacity: int = 8, websocket: bool = True, kept: bool = True) -> None:
        self.world = world
        self.capacity = capacity
        self.websocket = websocket
        self.kept = world() if kept else None
        self.sessions = self.opened = 0
        self.pongs = asyncio.Event()
        self.headers: dict[str, str] = {}
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[OpenEnvServer]:
        app = web.Application()
        if self.websocket:
            app.router.add_get("/ws", self._session)
        app.router.add_post("/reset", self._http)
        app.router.add_post("/step", self._http)
        app.router.add_get("/state", self._http)
        app.router.add_get("/schema", self._schema)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        self.headers = dict(request.headers)
        if self.sessions >= self.capacity:
            message = f"Server at capacity: {self.sessions}/{self.capacity} sessions active."
            await socket.send_json({"type": "error", "data": {"message": message, "code": "CAPACITY_REACHED"}})
            await socket.close()
            return socket
        self.sessions += 1
        self.opened += 1
        try:
            await self._talk(request, socket, self.world())
        finally:
            self.sessions -= 1
        await socket.close()
        return socket

    async def _talk(self, request: web.Request, socket: web.WebSocketResponse, world: World) -> None:
        async for message in socket:
            if message.type is WSMsgType.PONG:
                self.pongs.set()
                continue
            said = json.loads(message.data)
            if said["type"] == "close":
                return
            answer = self._answer(world, said["type"], said.get("data", {}))
            if answer == "hang":
                continue
            if answer == "cut":
                assert request.transport is not None
                request.transport.abort()
                return
            if answer == "ping":
                await socket.ping()
                answer = {"type": "observation", "data": {"observation": {}, "reward": None, "done": False}}
            await (socket.send_str(answer) if isinstance(answer, str) else socket.send_json(answer))

    def _answer(self, world: World, kind: str, data: dict[str, Any]) -> Any:
        if kind == "state":
            return {"type": "state", "data": world.state}
        try:
            seen: Any = (world.reset(data), 0.0, False) if kind == "reset" else world.step(data)
        except InvalidActionError as error:
            place, what = error.args
            errors = [{"loc": [place], "msg": what}]
            return {
                "type": "error",
                "data": {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": errors},
            }
        except Exception as error:
            return {"type": "error", "data": {"message": str(error), "code": "EXECUTION_ERROR"}}
        if seen == "long":
            seen = {"page": "word " * 1_000_000}, 1, False
        if not isinstance(seen, list | tuple):
            return seen
        observation, reward, done = seen
        return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}

    async def _schema(self, request: web.Request) -> web.Response:
        return web.json_response({"action": self.world.SCHEMA, "observation": {}, "state": {}})

    async def _http(self, request: web.Request) -> web.Response:
        world = self.kept or self.world()
        kind = request.path.strip("/")
        body = await request.json() if request.can_read_body else {}
        answer = self._answer(world, kind, body.get("action", {}) if kind == "step" else body)
        if answer["type"] == "error":
            return web.json_response({"detail": answer["data"]["errors"]}, status=422)
        return web.json_response(answer["data"])
