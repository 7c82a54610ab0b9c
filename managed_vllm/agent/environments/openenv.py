"""Environments behind an OpenEnv server: its WebSocket, one session for each environment here.

    env = OpenEnvEnvironment("http://127.0.0.1:8000")
    await env.reset(Task("maze", seed=3))                          # the server is sent {"seed": 3}
    await env.step(Custom("move", {"action": "RIGHT"}))            # … and {"action": "RIGHT"}

The protocol is that of `openenv-core` 0.3, whose package is not needed. What its server does becomes:

- `reset`: is sent the task's seed and what is in `Task.data["reset"]`; an `Observation`, made by `to_observation`.
- `step`: is sent `to_action(action)`, by default the arguments of a `Custom`. A `StepResult` with its reward; `done`
  is `terminated`. `Finished` and `CallUser` are not the server's: they change nothing, and their reward is None.
- `evaluate()`: None, so that the sum of the rewards counts, unless `evaluate=` makes one of the server's state.
- `close`: says so to the server, and waits until it has ended the session, so that the next one has room.

A session lives as long as its connection. One that is lost is an `EnvironmentFailedError`; nothing connects anew behind
an episode's back. The server's pings are answered while the model thinks.

`transport="http"` is for servers without `/ws`, which keep one environment between requests: one episode at a time. A
server that makes an environment for each request (0.2 and newer do) is told by its episode ids, and refused.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

import aiohttp
from yarl import URL

from managed_vllm.agent.actions import Action, CallUser, Custom, Finished
from managed_vllm.agent.environments.gymnasium import as_png
from managed_vllm.agent.environments.synchronous import check_call, type_name
from managed_vllm.agent.types import Limits, Observation, StepResult, Task
from managed_vllm.errors import ConfigError, EnvironmentFailedError, EnvironmentRaisedError, EnvironmentTimeoutError

MAX_MESSAGE_BYTES = 100 * 2**20
"""Of one answer, as OpenEnv's own client has it."""

_LARGE = 2**18
"""Characters of an answer from which on it is read in a thread."""
_SHOWN = 500
"""Characters of what a server says, in a message."""

Transport = Literal["websocket", "http"]
OnInvalid = Literal["fail", "tell"]


class OpenEnvEnvironment:
    """An `Environment` on an OpenEnv server: see the module. Used from one event loop.

    Attributes:
        limits: seconds of each call; may be changed between two of them.
    """

    patience_s = 1.0

    def __init__(
        self,
        url: str,
        *,
        to_action: Callable[[Action], Mapping[str, Any]] | None = None,
        to_observation: Callable[[Mapping[str, Any]], Observation] | None = None,
        evaluate: Callable[[Mapping[str, Any]], float | None] | None = None,
        on_invalid: OnInvalid = "fail",
        transport: Transport = "websocket",
        headers: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        name: str | None = None,
    ) -> None:
        """Nothing is connected before the first `reset`.

        Args:
            url: where the server is, `http://…` or `ws://…`; `/ws` and the like come from here.
            to_action: the server's action for a typed one. What it raises fails the attempt. Default: the arguments of
                a `Custom`; other actions are refused.
            to_observation: called with the server's observation. Default: all of it in `extras["observation"]`, and
                as JSON in `text`; but a `screenshot` (base64, or rows of pixels, for which there must be
                numpy and Pillow) becomes the screenshot.
            evaluate: called with the server's state at the end; returns the reward of the episode.
            on_invalid: of an action that the server finds invalid: `"fail"`: the attempt fails. `"tell"`: nothing was
                done, and what the server says is the last line of the text that is seen, and in `info["invalid"]`.
            transport: `"http"` for servers without a WebSocket: see the module.
            headers: of all requests, for one that wants a token.
            limits: its `reset_timeout_s` (connecting included), `step_timeout_s`, `evaluate_timeout_s` and
                `close_timeout_s` bound the calls.
            name: for messages; default: the address, without its credentials.

        Raises `ConfigError`: the address has no host or another scheme; no such `transport` or `on_invalid`.
        """
        self._url = server_url(url)
        for option, value, known in (("transport", transport, Transport), ("on_invalid", on_invalid, OnInvalid)):
            if value not in get_args(known):
                raise ConfigError(
                    f"{option}={value!r} is not known; it may be {', '.join(get_args(known))}", field=option
                )
        self.limits = limits or Limits()
        self._to_action = to_action or _arguments
        self._to_observation = to_observation or observation_of
        self._evaluate = evaluate
        self._on_invalid = on_invalid
        self._transport = transport
        self._headers = dict(headers or {})
        self._name = name or f"OpenEnv at {self._url.with_user(None)}"
        self._channel: _Channel | None = None
        self._life = _Life()
        self._last = Observation()

    # -- the protocol --------------------------------------------------------------------------------------------------

    async def reset(self, task: Task) -> Observation:
        """See `Environment.reset`. The first one connects, within the same limit."""
        given = task.data.get("reset") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"task {task.id}: data['reset'] must be a mapping, not {given!r:.100}", field="data")
        data = {**({} if task.seed is None else {"seed": task.seed}), **given}
        answer = await self._call("reset", "reset", data, self.limits.reset_timeout_s)
        self._last = (await self._understood(answer)).observation
        return self._last

    async def step(self, action: Action) -> StepResult:
        """See `Environment.step`."""
        if isinstance(action, Finished | CallUser):
            return StepResult(self._last)
        try:
            answer = await self._call("step", "step", dict(self._to_action(action)), self.limits.step_timeout_s)
        except EnvironmentRaisedError as error:
            if error.error_type != "VALIDATION_ERROR" or self._on_invalid == "fail":
                raise
            return self._invalid(error.error_message)
        result = await self._understood(answer)
        self._last = result.observation
        return result

    async def evaluate(self) -> float | None:
        """See `Environment.evaluate`."""
        if self._evaluate is None:
            return None
        reward = self._evaluate(await self._state("evaluate"))
        return None if reward is None else float(reward)

    async def state(self) -> dict[str, Any]:
        """The server's state of the session: `episode_id`, `step_count`, and what else its environment has."""
        return await self._state("state")

    async def close(self) -> None:
        """Has the server end the session, within `close_timeout_s`, and disconnects. A second time it does nothing."""
        if self._life.closed:
            return
        self._life.closed = True
        channel = self._channel
        if channel is None:
            return
        limit_s = self.limits.close_timeout_s
        try:
            if self._life.calling is None and self._life.unusable is None:
                async with asyncio.timeout(limit_s):
                    await channel.leave()
        except TimeoutError:
            raise EnvironmentTimeoutError(
                f"{self._name}: the server did not end the session within {limit_s:g} s; disconnected"
            ) from None
        finally:
            await channel.cut()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name}: {self._life}>"

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def _state(self, method: str) -> dict[str, Any]:
        return await self._call(method, "state", None, self.limits.evaluate_timeout_s)

    async def _call(self, method: str, kind: str, data: dict[str, Any] | None, limit_s: float) -> dict[str, Any]:
        """What the server answers to a message. Raises `EnvironmentFailedError`, after which it is only closed; an
        invalid action alone leaves it as it is."""
        life = self._life
        life.check(self._name, method, begun=self._channel is not None)
        life.calling = method
        try:
            async with asyncio.timeout(limit_s):
                if self._channel is None:
                    await self._connect()
                assert self._channel is not None
                return await self._channel.ask(method, kind, data)
        except TimeoutError:
            life.unusable = f"{method} was not over within {limit_s:g} s"
            raise EnvironmentTimeoutError(f"{self._name}: {life.unusable}; it is disconnected") from None
        except EnvironmentRaisedError as error:
            if error.error_type != "VALIDATION_ERROR":
                life.unusable = f"{method} failed ({error.error_type})"
            raise
        except (aiohttp.ClientError, OSError, EOFError) as error:
            life.unusable = f"its connection failed during {method}"
            raise EnvironmentFailedError(f"{self._name}: {life.unusable}: {_said(error)}") from error
        except BaseException as error:
            life.unusable = f"{method} was cancelled or failed ({type_name(error)})"
            raise
        finally:
            life.calling = None
            if life.unusable is not None and self._channel is not None:
                await self._channel.cut()

    async def _connect(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None)
        session = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        if self._transport == "http":
            self._channel = _Http(session, self._url, self._name)
            return
        try:
            socket = await session.ws_connect(self._url / "ws", max_msg_size=MAX_MESSAGE_BYTES)
        except BaseException as error:
            await session.close()
            if isinstance(error, aiohttp.WSServerHandshakeError) and error.status in (404, 405):
                raise EnvironmentFailedError(
                    f"{self._name} has no WebSocket at /ws (status {error.status}); a server that keeps one "
                    "environment between requests is used with transport='http'"
                ) from error
            raise
        self._channel = _Socket(session, socket, self._name)

    # -- what it says --------------------------------------------------------------------------------------------------

    async def _understood(self, answer: Mapping[str, Any]) -> StepResult:
        observation = answer.get("observation")
        if not isinstance(observation, Mapping):
            raise self._wrong(f"an answer without an observation: {answer!r:.200}")
        reward = answer.get("reward")
        if reward is not None and not (isinstance(reward, int | float) and math.isfinite(reward)):
            raise self._wrong(f"a reward that is no number: {reward!r:.100}")
        if self._to_observation is observation_of and isinstance(observation.get("screenshot"), list):
            seen = await asyncio.to_thread(observation_of, observation)
        else:
            seen = self._to_observation(observation)
        if not isinstance(seen, Observation):
            raise TypeError(f"to_observation must return an Observation, not {type(seen).__name__}")
        return StepResult(seen, None if reward is None else float(reward), bool(answer.get("done")))

    def _invalid(self, said: str) -> StepResult:
        text = said if self._last.text is None else f"{self._last.text}\n{said}"
        seen = Observation(self._last.screenshot, text, self._last.instruction, self._last.extras)
        return StepResult(seen, info={"invalid": said})

    def _wrong(self, what: str) -> EnvironmentFailedError:
        self._life.unusable = "it does not speak OpenEnv's protocol"
        return EnvironmentFailedError(f"{self._name}: the server sent {what}")


class _Life:
    """Whether an environment can be called."""

    def __init__(self) -> None:
        self.closed = False
        self.unusable: str | None = None
        self.calling: str | None = None

    def check(self, name: str, method: str, *, begun: bool) -> None:
        check_call(name, method, closed=self.closed, unusable=self.unusable, calling=self.calling, begun=begun)

    def __str__(self) -> str:
        return "closed" if self.closed else self.unusable or self.calling or "ready"


# -- ways to a server --------------------------------------------------------------------------------------------------


class _Channel(Protocol):
    async def ask(self, method: str, kind: str, data: dict[str, Any] | None) -> dict[str, Any]: ...

    async def leave(self) -> None:
        """Ends the session, and returns when the server has."""
        ...

    async def cut(self) -> None:
        """Disconnects at once."""
        ...


class _Socket:
    """One session. A task reads all the time, since that is what answers the server's pings."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, name: str) -> None:
        self._session = session
        self._socket = socket
        self._name = name
        self._heard: asyncio.Queue[str] = asyncio.Queue(maxsize=1)
        self._reader = asyncio.create_task(self._read(), name=f"reads what {name} says")

    async def _read(self) -> None:
        """Ends with the connection."""
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                return
            await self._heard.put(message.data)

    async def ask(self, method: str, kind: str, data: dict[str, Any] | None) -> dict[str, Any]:
        message = {"type": kind} if data is None else {"type": kind, "data": data}
        with contextlib.suppress(ConnectionError):  # it was refused: the answer says why
            await self._socket.send_str(json.dumps(message))
        answer = await _parsed(await self._answer(), self._name)
        if not isinstance(answer.get("data"), dict):
            raise EnvironmentFailedError(f"{self._name}: the server sent no message of OpenEnv's: {answer!r:.200}")
        if answer.get("type") == "error":
            raise _server_error(self._name, method, answer["data"])
        if answer.get("type") != ("state" if kind == "state" else "observation"):
            raise EnvironmentFailedError(f"{self._name}: {method} was answered by {answer.get('type')!r:.100}")
        found: dict[str, Any] = answer["data"]
        return found

    async def _answer(self) -> str:
        getting = asyncio.ensure_future(self._heard.get())
        try:
            await asyncio.wait({getting, self._reader}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            if not self._heard.empty():
                return self._heard.get_nowait()
        finally:
            getting.cancel()
        why = self._socket.exception()
        raise EOFError(
            f"closed with code {self._socket.close_code}{f', {_said(why)}' if why else ''}; its session is lost"
        )

    async def leave(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._socket.send_str('{"type": "close"}')
        await asyncio.wait({self._reader})

    async def cut(self) -> None:
        self._reader.cancel()
        await asyncio.wait({self._reader})
        await self._session.close()


class _Http:
    """A server with one environment, which it keeps between requests."""

    def __init__(self, session: aiohttp.ClientSession, url: URL, name: str) -> None:
        self._session = session
        self._url = url
        self._name = name

    async def ask(self, method: str, kind: str, data: dict[str, Any] | None) -> dict[str, Any]:
        if kind == "state":
            return await self._request(method, "GET", "state", None)
        answer = await self._request(method, "POST", kind, {"action": data} if kind == "step" else data)
        if kind == "reset":
            await self._check_kept()
        return answer

    async def _check_kept(self) -> None:
        first, second = [await self._request("reset", "GET", "state", None) for _ in range(2)]
        if first.get("episode_id") != second.get("episode_id"):
            raise EnvironmentFailedError(
                f"{self._name} makes an environment for each request, so that no episode can be played over HTTP; "
                "it has a WebSocket: leave transport= out"
            )

    async def _request(self, method: str, verb: str, path: str, body: Any) -> dict[str, Any]:
        async with self._session.request(verb, self._url / path, json=body) as response:
            text = (await response.content.read(MAX_MESSAGE_BYTES)).decode(errors="replace")
        if response.status >= 400:
            code = "VALIDATION_ERROR" if response.status == 422 else f"status {response.status}"
            raise _server_error(self._name, method, {"code": code, "message": text})
        return await _parsed(text, self._name)

    async def leave(self) -> None: ...

    async def cut(self) -> None:
        await self._session.close()


async def _parsed(text: str, name: str) -> dict[str, Any]:
    """A message of the server. Raises `EnvironmentFailedError`: it is none."""
    try:
        message = await asyncio.to_thread(json.loads, text) if len(text) > _LARGE else json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise EnvironmentFailedError(f"{name}: the server sent no message of OpenEnv's: {text[:200]}")
    return message


def _server_error(name: str, method: str, data: Mapping[str, Any]) -> EnvironmentRaisedError:
    code, said = str(data.get("code", "UNKNOWN")), str(data.get("message", ""))[:_SHOWN]
    errors = data.get("errors")
    if isinstance(errors, list):
        said += ": " + "; ".join(_one_error(each) for each in errors[:5])
    if code == "CAPACITY_REACHED":
        said += " (the server's max_concurrent_envs is the most that max_concurrency can be)"
    return EnvironmentRaisedError(
        f"{name}: {method}: the server says {code}: {said}",
        call=method,
        error_type=code,
        error_message=said,
        error_traceback="",
    )


def _one_error(error: Any) -> str:
    """One of pydantic's."""
    if not isinstance(error, Mapping):
        return str(error)[:_SHOWN]
    return f"{'.'.join(map(str, error.get('loc') or ()))}: {error.get('msg', '')}"[:_SHOWN]


def _said(error: BaseException) -> str:
    return f"{type_name(error)}: {error}"[:_SHOWN] if not isinstance(error, EOFError) else str(error)


# -- values ------------------------------------------------------------------------------------------------------------


def observation_of(observation: Mapping[str, Any]) -> Observation:
    """The default of `to_observation`. Raises `ValueError`: its screenshot is none."""
    seen = {key: value for key, value in observation.items() if key != "screenshot"}
    text = json.dumps(seen, ensure_ascii=False, default=str)
    return Observation(_image(observation.get("screenshot")), text, extras={"observation": dict(observation)})


def _image(given: Any) -> bytes | None:
    if not given:
        return None
    if isinstance(given, str):
        try:
            return base64.b64decode(given.partition(",")[2] if given.startswith("data:") else given, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the observation's screenshot is no base64: {given[:40]!r}") from error
    import numpy

    return as_png(numpy.asarray(given, dtype=numpy.uint8))


def _arguments(action: Action) -> Mapping[str, Any]:
    if isinstance(action, Custom):
        return action.arguments
    raise EnvironmentFailedError(
        f"an OpenEnv server has no {type(action).__name__} that is known here: give to_action=, or a parser that makes "
        "Custom(name, arguments)"
    )


def server_url(url: str) -> URL:
    """Where a server's paths begin. Raises `ConfigError`: it is no address."""
    try:
        base = URL(url)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"url is no address: {error}", field="url") from error
    scheme = {"ws": "http", "wss": "https"}.get(base.scheme, base.scheme)
    if scheme not in ("http", "https") or not base.host:
        raise ConfigError("url must be http://HOST:PORT (or ws://, https://, wss://)", field="url")
    path = base.path.rstrip("/")
    return base.with_scheme(scheme).with_path(path.removesuffix("/ws"))
