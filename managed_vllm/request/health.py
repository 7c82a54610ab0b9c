"""Whether a server lives, and has the model: what a client asks when it has lost an answer."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec

from managed_vllm.request.connections import Transport
from managed_vllm.status import Connection

HEALTH_S = 5.0
"""For `/health`: a server with much to do may take a second, and is not dead."""


async def is_healthy(transport: Transport, connection: Connection, with_model: bool = False) -> bool:
    """Whether the server lives, and with `with_model` whether it serves the connection's model.

    vLLM's `/health` is 503 as soon as its engine has died; other servers may have none.
    """
    status, _ = await _get(transport, connection, "/health")
    if status >= 500:
        return False
    return not with_model or await _has_model(transport, connection)


async def _has_model(transport: Transport, connection: Connection) -> bool:
    status, data = await _get(transport, connection, "/v1/models")
    try:
        return status == 200 and any(one["id"] == connection.model for one in msgspec.json.decode(data)["data"])
    except (ValueError, KeyError, TypeError):
        return False


async def _get(transport: Transport, connection: Connection, path: str) -> tuple[int, bytes]:
    """Status and body; 599 where there is no answer."""
    try:
        async with asyncio.timeout(HEALTH_S):
            response = await transport.pool(connection).request("GET", path, None)
            try:
                return response.status, await response.read()
            finally:
                response.release()
    except (aiohttp.ClientError, OSError):  # a TimeoutError is one
        return 599, b""
