"""The supervisor's questions over HTTP: is a server up, does it serve its model, can it generate, is its engine moving?

`/health` alone proves little: it answers 200 while the engine is stopped, paused, asleep or poisoned (vLLM 0.32). Only
a generated token proves that the server works.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import wave
from dataclasses import dataclass
from typing import Any

from managed_vllm.in_server import managed_vllm_guard
from managed_vllm.server.lean_httpx import httpx
from managed_vllm.status import Connection

_GENERATE = (
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "temperature": 0}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}),
    ("/v1/embeddings", {"input": "Hi"}),
    ("/score", {"text_1": "Hi", "text_2": "Hi"}),
    ("/classify", {"input": "Hi"}),
    ("/pooling", {"input": "Hi"}),
    ("/v1/rerank", {"query": "Hi", "documents": ["Hi"]}),
)
"""The smallest request for each kind of model, likely kinds first; a server without the route answers 404."""

_TRANSCRIBE = "/v1/audio/transcriptions"
"""For models that only hear: a form, with a second of silence as its file."""

_ABSENT = frozenset({404, 405, 501})
_GUARDED = frozenset({401, 403})

_SIGNS_OF_LIFE = re.compile(
    r"^vllm:(?:num_requests_running|num_requests_waiting|kv_cache_usage_perc|generation_tokens|prompt_tokens"
    r"|num_preemptions|request_success|prefix_cache_queries|iteration_tokens)(?:_total)*(?:_count|_sum)?\{.*$",
    re.MULTILINE,
)
"""Metrics that only a step of the engine changes. The usage of the KV cache is the one that moves with each chunk of a
long prompt; the number of running requests stays as it was when the engine stops (vLLM 0.32)."""


@dataclass(frozen=True)
class Answer:
    """What a probe found. `status` is the HTTP status, None if there was no answer; `refused`: nothing listens."""

    ok: bool
    status: int | None = None
    body: str = ""
    refused: bool = False


class Probe:
    """Asks one server. Each method is bounded by its own time-out, in seconds, and never raises for a bad answer."""

    def __init__(self, connection: Connection, *, is_vllm: bool = True) -> None:
        """`is_vllm` is False for a server of some other kind, which may lack `/health`."""
        self.is_vllm = is_vllm
        agent = managed_vllm_guard.SUPERVISOR_AGENT.decode()
        self._key = {"Authorization": f"Bearer {connection.api_key.reveal()}", "User-Agent": agent}
        self._model = connection.model
        self._root = connection.base_url.removesuffix("/v1")
        self._base_url = connection.base_url
        # There is no TLS to be verified, and reading the certificates of all authorities would hold up the event loop.
        transport = httpx.AsyncHTTPTransport(uds=connection.uds, verify=False)
        self._client = httpx.AsyncClient(trust_env=False, transport=transport)

    async def close(self) -> None:
        await self._client.aclose()

    async def is_up(self, timeout_s: float = 5.0) -> Answer:
        """`GET /health`, without the key: another process may have taken the port before our server could.

        A server that is not vLLM may lack the route, or guard it: then `GET /v1/models`.
        """
        answer = await self._send("GET", f"{self._root}/health", None, timeout_s, key=False, new_connection=True)
        if answer.status in _ABSENT | _GUARDED and not self.is_vllm:
            return await self._send("GET", f"{self._base_url}/models", None, timeout_s)
        return answer

    async def serves_model(self, timeout_s: float = 10.0) -> Answer:
        """`GET /v1/models` lists the model."""
        answer = await self._send("GET", f"{self._base_url}/models", None, timeout_s, whole_body=True)
        if answer.ok and not _mentions(answer.body, self._model):
            return Answer(False, answer.status, f"the server does not list {self._model!r}: {answer.body[:500]}")
        return answer

    async def generates(self, timeout_s: float) -> Answer:
        """One token is really generated (for a pooling model: one short text is embedded or scored).

        A server that has none of these routes, as one that makes images, is taken to work if it lists its model.
        """
        refused: list[Answer] = []
        for route, body in (*_GENERATE, (_TRANSCRIBE, None)):
            answer = await self._ask_for_a_token(route, body, timeout_s)
            if answer.ok or answer.status is None or (answer.status >= 500 and answer.status not in _ABSENT):
                return answer
            refused.append(answer)
            if self.is_vllm and answer.status not in _ABSENT and "does not support" not in answer.body:
                return answer
        if all(one.status in _ABSENT and self._model not in one.body for one in refused):
            return Answer(True, refused[0].status, refused[0].body)
        return next((one for one in refused if one.status not in _ABSENT), refused[0])

    async def _ask_for_a_token(self, route: str, body: dict[str, Any] | None, timeout_s: float) -> Answer:
        url = self._root + route
        if body is not None:
            return await self._send("POST", url, {"model": self._model, **body}, timeout_s)
        form = {"data": {"model": self._model}, "files": {"file": ("silence.wav", _silence(), "audio/wav")}}
        return await self._send("POST", url, None, timeout_s, form=form)

    async def signs_of_life(self, timeout_s: float = 5.0) -> str | None:
        """What `/metrics` says of the engine's progress, to compare with the last time; None if it says nothing."""
        answer = await self._send("GET", f"{self._root}/metrics", None, timeout_s, whole_body=True)
        return "\n".join(_SIGNS_OF_LIFE.findall(answer.body)) or None if answer.ok else None

    async def is_paused_or_asleep(self, timeout_s: float = 5.0) -> bool:
        """True if the engine was paused or put to sleep by request (dev-mode routes; absent otherwise)."""
        for route in ("/is_paused", "/is_sleeping"):
            answer = await self._send("GET", f"{self._root}{route}", None, timeout_s)
            if answer.ok and "true" in answer.body:
                return True
        return False

    async def _send(
        self,
        method: str,
        url: str,
        body: dict[str, object] | None,
        timeout_s: float,
        *,
        key: bool = True,
        whole_body: bool = False,
        new_connection: bool = False,
        form: dict[str, Any] | None = None,
    ) -> Answer:
        headers = dict(self._key) if key else {}
        if new_connection:
            headers["Connection"] = "close"  # a connection that is kept open says nothing about new ones
        try:
            async with asyncio.timeout(timeout_s):  # httpx bounds each read only: a body may drip for hours
                content: dict[str, Any] = {"json": body} if form is None else form
                response = await self._client.request(method, url, timeout=timeout_s, headers=headers, **content)
        except (httpx.TimeoutException, TimeoutError):
            return Answer(False, None, f"no answer to {method} {url} within {timeout_s:g} s")
        except httpx.ConnectError as error:
            return Answer(False, None, f"{type(error).__name__}: {error}", refused=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return Answer(False, None, f"{type(error).__name__}: {error}")
        text = response.text
        return Answer(response.is_success, response.status_code, text if whole_body else text[:4000])


def _mentions(body: str, name: str) -> bool:
    """Whether a JSON text has the name as one of its values, however deep: lists of models have several shapes."""
    try:
        found: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while found:
        value = found.pop()
        if value == name:
            return True
        if isinstance(value, dict | list):
            found.extend(value.values() if isinstance(value, dict) else value)
    return False


def _silence() -> bytes:
    """A second of it, as 16 kHz WAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(2 * 16_000))
    return file.getvalue()
