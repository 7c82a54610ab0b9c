"""The supervisor's questions over HTTP: is a server up, does it serve its model, can it generate, is its engine moving?

`/health` alone proves little: it answers 200 while the engine is stopped, paused, asleep or poisoned (vLLM 0.32). Only
a generated token proves that the server works.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

import httpx

from managed_vllm.status import Connection

_GENERATE = (
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "temperature": 0}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}),
    ("/v1/embeddings", {"input": "Hi"}),
    ("/score", {"text_1": "Hi", "text_2": "Hi"}),
    ("/classify", {"input": "Hi"}),
    ("/pooling", {"input": "Hi"}),
)
"""The smallest request for each kind of model, likely kinds first; a server without the route answers 404."""

_ABSENT = frozenset({404, 405, 501})

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
        self._is_vllm = is_vllm
        self._key = {"Authorization": f"Bearer {connection.api_key.reveal()}"}
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

        A server that is not vLLM may lack the route: then `GET /v1/models`.
        """
        answer = await self._send("GET", f"{self._root}/health", None, timeout_s, key=False, new_connection=True)
        if answer.status in _ABSENT and not self._is_vllm:
            return await self._send("GET", f"{self._base_url}/models", None, timeout_s)
        return answer

    async def serves_model(self, timeout_s: float = 10.0) -> Answer:
        """`GET /v1/models` lists the model."""
        answer = await self._send("GET", f"{self._base_url}/models", None, timeout_s)
        if answer.ok and f'"{self._model}"' not in answer.body:
            return Answer(False, answer.status, f"the server does not list {self._model!r}: {answer.body[:500]}")
        return answer

    async def generates(self, timeout_s: float) -> Answer:
        """One token is really generated (for a pooling model: one short text is embedded or scored)."""
        first: Answer | None = None
        for route, body in _GENERATE:
            answer = await self._send("POST", self._root + route, {"model": self._model, **body}, timeout_s)
            if answer.ok or answer.status is None or answer.status >= 500:
                return answer
            first = first or answer
            if answer.status not in _ABSENT and "does not support" not in answer.body:
                return answer
        return first or Answer(False)

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
    ) -> Answer:
        headers = dict(self._key) if key else {}
        if new_connection:
            headers["Connection"] = "close"  # a connection that is kept open says nothing about new ones
        try:
            async with asyncio.timeout(timeout_s):  # httpx bounds each read only: a body may drip for hours
                response = await self._client.request(method, url, json=body, timeout=timeout_s, headers=headers)
        except (httpx.TimeoutException, TimeoutError):
            return Answer(False, None, f"no answer to {method} {url} within {timeout_s:g} s")
        except httpx.ConnectError as error:
            return Answer(False, None, f"{type(error).__name__}: {error}", refused=True)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return Answer(False, None, f"{type(error).__name__}: {error}")
        text = response.text
        return Answer(response.is_success, response.status_code, text if whole_body else text[:4000])
