"""ASGI middleware that asks for the API key on every path but `/health` and `/ping`.

vLLM's own key guards only the prefixes /v1, /v2, /inference and /cohere; `/invocations` generates without one, and
every dev-mode route is open (vLLM 0.32, `serve/middleware/authenticate.py`; vllm#58144). The server is started with
`--middleware managed_vllm_guard.KeyGuard`. The key comes from `VLLM_API_KEY`; without one everything is refused.

A browser's preflight (`OPTIONS`, which never carries a key) goes straight to vLLM's own CORS middleware, which answers
it without any route, where the server was asked for CORS (`--allowed-origins`); else it is refused, too.

The key may come as the password of HTTP Basic authentication, too, under any user name: trainers and tools that know no
key take it in their URL, `http://managed:KEY@127.0.0.1:PORT` (TRL's `VLLMClient`, which is given a base URL only).

Routes that change the engine for all its users (pause, sleep, weights, adapters, calls of its workers) want the
supervisor's own key, `MANAGED_VLLM_CONTROL_KEY`, where the supervisor and not the user has switched them on
(`MANAGED_VLLM_CONTROLLED`, the variables that it has set): so whatever changes the engine goes through the supervisor,
which remembers it. That key opens everything.

The same holds for what vLLM's `--enable-scale-out` opens besides `/inference/v1/generate`, for whose sake our servers
have it: the renderers of prompts, and a way to abort anybody's requests. With a user's own `enable_scale_out=True` the
ordinary key opens all of it.

Its first request finds vLLM's routes imported: then it has them say which weights made an answer
(`managed_vllm_weight_versions`), and what each of several prompts has used (`managed_vllm_each_prompt`).

While the file `MANAGED_VLLM_HELD` exists, requests of users get a 503: the supervisor puts weights, adapters
or a pause back that the last server had, and an answer before that would be another model's.

It counts the requests of users, by which the supervisor knows whether the engine is used (`idle_sleep=`).

It also keeps the supervisor's looks at `/health` and `/metrics`, one every few seconds, out of the server's access log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import importlib
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

USE = "/managed_vllm/use"
"""For the supervisor: how many requests of users are in this process, and how many have come."""
SUPERVISOR_AGENT = b"managed-vllm-supervisor"
"""The user agent of the supervisor's own requests for a token, which are no use of the server."""

OPEN_PATHS = frozenset({"/health", "/ping"})

CONTROL_KEY = "MANAGED_VLLM_CONTROL_KEY"
CONTROLLED = "MANAGED_VLLM_CONTROLLED"
HELD = "MANAGED_VLLM_HELD"
DEV_MODE = "VLLM_SERVER_DEV_MODE"
LORA_UPDATING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
SCALE_OUT = "enable_scale_out"
"""An argument of the server, which stands among the variables of `CONTROLLED` where it is ours."""

_HARMLESS = frozenset(
    {"/is_paused", "/is_sleeping", "/weight_info", "/get_world_size"}
    | {"/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"}
)
"""Routes of the dev mode that only look, or empty a cache: the ordinary key is enough for them."""

CONTROL_PATHS = {
    DEV_MODE: frozenset(
        {"/sleep", "/wake_up", "/release_kv_cache_memory", "/pause", "/resume", "/abort_requests", "/collective_rpc"}
        | {"/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"}
        | {"/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"}
        | {"/weight_checker", "/server_info"}
    ),
    LORA_UPDATING: frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"}),
    SCALE_OUT: frozenset({"/inference/v1/abort_requests"}),
}
"""Which routes each variable switches on (vLLM 0.32), by exact path; `/adapters` has paths below it, too.

`SCALE_OUT` also has whatever ends like `_RENDERERS`.
"""

_RENDERERS = ("/render", "/derender")

_DEV_MODULES = (".serve.dev.", ".entrypoints.rl.")
"""Parts of the names of vLLM's modules with such routes: for those that a later version adds."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_MOST_LAYERS = 100
_NOT_FOR_USERS = (
    b'{"error": {"message": "this route changes the engine for all users of the server: use llm.engine or '
    b"`managed-vllm engine`, or start the server with env={'VLLM_SERVER_DEV_MODE': '1'}\", "
    b'"type": "Forbidden", "code": 403}}'
)
_SWITCHED_OFF = (
    b'{"error": {"message": "this route is open in servers that are started with enable_scale_out=True", '
    b'"type": "Forbidden", "code": 403}}'
)
_NOT_YET = (
    b'{"error": {"message": "the server was started again and gets its weights back: ask again", '
    b'"type": "ServiceUnavailableError", "code": 503}}'
)
_REFUSAL = b'{"error": {"message": "this server wants its API key", "type": "Unauthorized", "code": 401}}'


class KeyGuard:
    """Passes a request on only if it carries `Authorization: Bearer <key>`; else HTTP 401, or WebSocket close 1008.

    A key that came by Basic authentication is passed on as a bearer's, for vLLM's own check behind.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._cors = _cors_of(app)
        key = os.environ.get("VLLM_API_KEY", "")
        self._expected = digest(key.encode()) if key else None
        control_key = os.environ.get(CONTROL_KEY, "")
        self._control = digest(control_key.encode()) if key and control_key else None
        self._dev_paths: frozenset[str] | None = None
        self._in_flight = self._requests = 0
        self._bearer = b"Bearer " + key.encode()
        self._controlled = frozenset(os.environ.get(CONTROLLED, "").split()) if control_key else frozenset()
        self._hold = os.environ.get(HELD)
        logging.getLogger("uvicorn.access").addFilter(_is_news)
        _install_patches()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope = {**scope, "headers": [as_bearer(name, value) for name, value in scope["headers"]]}
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and _path_of(scope) == USE and self._has_a_key(scope):
            await _answer(send, 200, self._use())
        elif self._has_key(scope, self._control):
            headers = [(name, self._bearer if _is_authorization(name) else value) for name, value in scope["headers"]]
            await self._app({**scope, "headers": headers}, receive, send)
        elif self._has_key(scope, self._expected):
            if self._is_controlled(scope):
                await _refuse(send, 403, _NOT_FOR_USERS)
            elif self._is_switched_off(scope):
                await _refuse(send, 403, _SWITCHED_OFF)
            elif self._is_held(scope):
                await _not_yet(scope, send)
            else:
                await self._pass_on(scope, receive, send)
        elif self._cors is not None and _is_preflight(scope):
            await self._cors(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send, 401, _REFUSAL)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Counts what may need the engine."""
        if scope["type"] == "http" and (scope["method"] != "POST" or _is_the_supervisors(scope)):
            await self._app(scope, receive, send)
            return
        self._in_flight += 1
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight -= 1

    def _use(self) -> bytes:
        return b'{"in_flight": %d, "requests": %d}' % (self._in_flight, self._requests)

    def _is_held(self, scope: Scope) -> bool:
        """Once it is not, it never is again."""
        if self._hold is None or scope.get("method") in ("GET", "HEAD", "OPTIONS") or _is_the_supervisors(scope):
            return False
        if not os.path.exists(self._hold):
            self._hold = None
        return self._hold is not None

    def _is_controlled(self, scope: Scope) -> bool:
        if scope["type"] != "http" or not self._controlled:
            return False
        path = _path_of(scope)
        for variable in self._controlled - {SCALE_OUT}:
            if path in CONTROL_PATHS.get(variable, ()):
                return True
        if LORA_UPDATING in self._controlled and path.startswith("/adapters/"):
            return True
        return DEV_MODE in self._controlled and path not in _HARMLESS and path in self._dev_routes(scope)

    def _is_switched_off(self, scope: Scope) -> bool:
        if scope["type"] != "http" or SCALE_OUT not in self._controlled:
            return False
        path = _path_of(scope)
        return path in CONTROL_PATHS[SCALE_OUT] or path.endswith(_RENDERERS)

    def _dev_routes(self, scope: Scope) -> frozenset[str]:
        """The paths of vLLM's development routes, by where their code is."""
        if self._dev_paths is None:
            routes = getattr(scope.get("app"), "routes", ())
            self._dev_paths = frozenset(
                str(getattr(route, "path", ""))
                for route in routes
                if any(part in getattr(getattr(route, "endpoint", None), "__module__", "") for part in _DEV_MODULES)
            )
        return self._dev_paths

    def _is_open(self, scope: Scope) -> bool:
        return scope["type"] == "http" and _path_of(scope) in OPEN_PATHS

    def _has_a_key(self, scope: Scope) -> bool:
        return self._has_key(scope, self._control) or self._has_key(scope, self._expected)

    def _has_key(self, scope: Scope, expected: bytes | None) -> bool:
        if expected is None:
            return False
        for name, value in scope["headers"]:
            if _is_authorization(name):
                scheme, _, token = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(digest(token.strip()), expected)
        return False


def _install_patches() -> None:
    """Whatever keeps it from one of them keeps nobody from being served."""
    for name in ("managed_vllm_weight_versions", "managed_vllm_each_prompt"):  # beside this file, in a server
        try:
            importlib.import_module(name).install()
        except Exception as error:
            logging.getLogger(__name__).debug("no %s: %s", name, error)


async def _not_yet(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1013})
    else:
        await _refuse(send, 503, _NOT_YET)


async def _refuse(send: Send, status: int, body: bytes) -> None:
    await _answer(send, status, body)


async def _answer(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_the_supervisors(scope: Scope) -> bool:
    return any(name.lower() == b"user-agent" and value == SUPERVISOR_AGENT for name, value in scope["headers"])


def _path_of(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def _is_authorization(name: bytes) -> bool:
    return name.lower() == b"authorization"


def as_bearer(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """A header; one of Basic authentication becomes that of a bearer of the password."""
    scheme, _, token = value.partition(b" ")
    if name.lower() != b"authorization" or scheme.lower() != b"basic":
        return name, value
    try:
        password = base64.b64decode(token.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return name, value
    return name, b"Bearer " + password


def _cors_of(app: App | None) -> App | None:
    """vLLM's CORS middleware, if it allows any origin. (0.32 adds it in any case: `serve/middleware/register.py`.)"""
    for _ in range(_MOST_LAYERS):
        if app is None:
            break
        if type(app).__name__ == "CORSMiddleware":
            allows = getattr(app, "allow_origins", ()) or getattr(app, "allow_origin_regex", None)
            return app if allows else None
        app = getattr(app, "app", None)
    return None


def _is_preflight(scope: Scope) -> bool:
    """As the CORS middleware tells them (starlette, `middleware/cors.py`): these it answers itself, always."""
    if scope["type"] != "http" or scope["method"] != "OPTIONS":
        return False
    return {b"origin", b"access-control-request-method"} <= {name.lower() for name, _ in scope["headers"]}


def _is_news(record: logging.LogRecord) -> bool:
    """False for a look at the server's state that was answered with 200."""
    said = record.args  # uvicorn: (address, method, path, HTTP version, status)
    if not isinstance(said, tuple) or len(said) != 5:
        return True
    return not (said[1] == "GET" and said[2] in ("/health", "/metrics") and said[4] == 200)


def digest(value: bytes) -> bytes:
    """What secrets are compared by: its length says nothing of theirs."""
    return hashlib.sha256(value).digest()
