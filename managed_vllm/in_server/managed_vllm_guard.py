"""ASGI middleware that asks for the API key on every path but `/health` and `/ping`.

vLLM's own key guards only the prefixes /v1, /v2, /inference and /cohere; `/invocations` generates without one, and
every dev-mode route is open (vLLM 0.32, `serve/middleware/authenticate.py`; vllm#58144). The server is started with
`--middleware managed_vllm_guard.KeyGuard`. The key comes from `VLLM_API_KEY`; without one everything is refused.

A browser's preflight (`OPTIONS`, which never carries a key) goes straight to vLLM's own CORS middleware, which answers
it without any route, where the server was asked for CORS (`--allowed-origins`); else it is refused, too.

The key may come as the password of HTTP Basic authentication, too, under any user name: trainers and tools that know no
key take it in their URL, `http://managed:KEY@127.0.0.1:PORT` (TRL's `VLLMClient`, which is given a base URL only).

It also keeps the supervisor's looks at `/health` and `/metrics`, one every few seconds, out of the server's access log.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN_PATHS = frozenset({"/health", "/ping"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_MOST_LAYERS = 100
_REFUSAL = b'{"error": {"message": "this server wants its API key", "type": "Unauthorized", "code": 401}}'


class KeyGuard:
    """Passes a request on only if it carries `Authorization: Bearer <key>`; else HTTP 401, or WebSocket close 1008.

    A key that came by Basic authentication is passed on as a bearer's, for vLLM's own check behind.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._cors = _cors_of(app)
        key = os.environ.get("VLLM_API_KEY", "")
        self._expected = _digest(key.encode()) if key else None
        logging.getLogger("uvicorn.access").addFilter(_is_news)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope = {**scope, "headers": [_as_bearer(name, value) for name, value in scope["headers"]]}
        if scope["type"] == "lifespan" or self._is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif self._cors is not None and _is_preflight(scope):
            await self._cors(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})

    def _is_open(self, scope: Scope) -> bool:
        return scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS

    def _has_key(self, scope: Scope) -> bool:
        if self._expected is None:
            return False
        for name, value in scope["headers"]:
            if name.lower() == b"authorization":
                scheme, _, token = value.partition(b" ")
                return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(token.strip()), self._expected)
        return False


def _as_bearer(name: bytes, value: bytes) -> tuple[bytes, bytes]:
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


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()
