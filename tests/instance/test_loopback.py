"""The HTTP server within this process: it listens, or says why not; whoever starts it never waits for ever."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from aiohttp import web

from managed_vllm.errors import ConfigError
from managed_vllm.loopback import LoopbackServer


async def handle(request: web.Request) -> web.StreamResponse:
    return web.Response(text=request.path)


def test_it_serves_until_it_is_closed() -> None:
    server = LoopbackServer(handle, name="test")
    server.start()
    with urllib.request.urlopen(f"{server.origin}/here", timeout=60) as response:
        assert response.read() == b"/here"
    server.close()
    server.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.origin, timeout=60)


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="can't listen") as caught:
        LoopbackServer(handle, name="test", port=taken.getsockname()[1]).start()
    assert caught.value.field == "port"


def test_what_keeps_its_thread_from_serving_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: web.AppRunner) -> None:
        raise RuntimeError("no more threads")

    monkeypatch.setattr(web.AppRunner, "setup", fails)
    with pytest.raises(RuntimeError, match="no more threads"):
        LoopbackServer(handle, name="test").start()
