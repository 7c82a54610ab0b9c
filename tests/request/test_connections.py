"""The transport: a pool for each loop and address; nothing is reused or waited for that should not be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from processes import HANG_S

from managed_vllm.errors import ServerDiedError
from managed_vllm.masking import Secret
from managed_vllm.request.bodies import encode_body
from managed_vllm.request.connections import Transport, proxy_for
from managed_vllm.status import Connection

pytestmark = pytest.mark.usefixtures("unhurried")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Server:
    """Answers each request with the next of its responses, the last one again and again; in the test's own loop."""

    def __init__(self, *responses: bytes) -> None:
        self.responses = list(responses)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self.hung_up = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
                headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in head if one)}
                body = await self.body(reader, headers)
                self.requests.append((line.decode().split()[1], headers, body))
                writer.write(self.responses.pop(0) if len(self.responses) > 1 else self.responses[0])
        self.hung_up.set()
        writer.close()

    @staticmethod
    async def body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await reader.readexactly(int(headers["content-length"]))
        pieces = []
        while headers.get("transfer-encoding") == "chunked" and (size := int(await reader.readline(), 16)):
            pieces.append(await reader.readexactly(size))
            await reader.readline()
        return b"".join(pieces)


@contextlib.asynccontextmanager
async def serving(*responses: bytes, uds: Path | None = None) -> AsyncIterator[tuple[Server, Connection]]:
    server = Server(*responses or [OK])
    if uds is None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        base_url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    else:
        listening = await asyncio.start_unix_server(server.serve, uds)
        base_url = "http://localhost/v1"
    connection = Connection(
        base_url=base_url, api_key=Secret("secret"), model="m", uds=None if uds is None else str(uds)
    )
    try:
        yield server, connection
    finally:
        listening.close()


def run(body: Callable[[Transport], Awaitable[None]]) -> None:
    async def main() -> None:
        transport = Transport()
        async with asyncio.timeout(HANG_S):
            await body(transport)
            await transport.aclose()

    asyncio.run(main())


async def ask(transport: Transport, connection: Connection, body: Any = None) -> bytes:
    response = await transport.pool(connection).request("POST", "/v1/x", encode_body(body or {}))
    async with response:
        return await response.read()


def test_requests_one_after_the_other_use_one_connection_and_have_the_key() -> None:
    async def body(transport: Transport) -> None:
        async with serving() as (server, connection):
            for _ in range(5):
                assert await ask(transport, connection) == b"{}"
            assert server.connections == 1
            path, headers, _ = server.requests[0]
            assert (path, headers["authorization"]) == ("/v1/x", "Bearer secret")
            assert transport.pool(connection) is transport.pool(connection)

    run(body)


def test_a_unix_socket_carries_requests_too(tmp_path: Path) -> None:
    async def body(transport: Transport) -> None:
        async with serving(uds=tmp_path / "api.sock") as (server, connection):
            assert await ask(transport, connection) == b"{}"
            assert server.connections == 1

    run(body)


def test_a_large_body_arrives_whole() -> None:
    async def body(transport: Transport) -> None:
        async with serving() as (server, connection):
            sent = {"prompt": "x" * 3_000_000}
            await ask(transport, connection, sent)
            assert json.loads(server.requests[0][2]) == sent

    run(body)


def test_a_redirect_is_not_followed() -> None:
    async def body(transport: Transport) -> None:
        moved = b"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
        async with serving(moved) as (_, connection):
            response = await transport.pool(connection).request("POST", "/v1/x", encode_body({}))
            assert response.status == 307
            response.release()

    run(body)


def test_a_connection_with_data_that_nobody_requested_is_not_used_again() -> None:
    async def body(transport: Transport) -> None:
        async with serving(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong", OK) as (server, connection):
            assert await ask(transport, connection) == b"{}"
            assert await ask(transport, connection) == b"{}"
            assert server.connections == 2

    run(body)


def test_a_bad_chunk_fails_the_reader() -> None:
    async def body(transport: Transport) -> None:
        bad = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nno chunk\r\n"
        async with serving(bad) as (_, connection):
            with pytest.raises(aiohttp.ClientError):
                await ask(transport, connection)

    run(body)


def test_closing_from_another_thread_fails_what_is_in_flight_and_what_comes_later() -> None:
    async def body(transport: Transport) -> None:
        async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n") as (server, connection):
            response = await transport.pool(connection).request("POST", "/v1/x", encode_body({}))
            threading.Thread(target=transport.close).start()
            await server.hung_up.wait()
            assert response.connection is None or response.connection.transport is None
            with pytest.raises(ServerDiedError, match="the client was closed"):
                transport.pool(connection)

    run(body)


def test_each_loop_has_connections_of_its_own() -> None:
    transport = Transport()
    connection = Connection(base_url="http://127.0.0.1:9/v1", api_key=Secret(""), model="m")

    async def pool() -> object:
        return transport.pool(connection)

    assert asyncio.run(pool()) is not asyncio.run(pool())
    transport.close()


def test_a_proxy_is_taken_from_the_environment_but_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert proxy_for("http://gpu.example/v1") is None
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    assert proxy_for("http://gpu.example/v1") == "http://proxy.example:3128"
    assert proxy_for("http://127.0.0.1:8000/v1") is None
    monkeypatch.setenv("no_proxy", "gpu.example")
    assert proxy_for("http://gpu.example/v1") is None
