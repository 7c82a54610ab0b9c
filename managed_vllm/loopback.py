"""An HTTP server of ours within this process, for programs that are given a URL: aiohttp in a thread of its own.

What must hold:

1. `start` returns when it listens, and raises what keeps it from that. `close` ends every connection, from any thread.
2. A client that hangs up cancels what is done for it.
3. A forked child serves nothing: it closes its copy of the listening socket, else clients would wait for ever once the
   parent is gone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from aiohttp import web

from managed_vllm import forks
from managed_vllm.errors import ConfigError

T = TypeVar("T")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES = 512 * 2**20
"""A request with a hundred uncompressed screenshots in it."""
_BACKLOG = 4096
_SHUTDOWN_S = 1.0
"""Seconds for what is in flight when the server is closed."""


class LoopbackServer:
    """Serves `handle` at `host` and `port` (0: a free one), until it is closed.

    `address` is where it listens, once it was started.
    """

    def __init__(self, handle: Handler, *, name: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self._handle = handle
        self._name = name
        self._asked = host, port
        self._listening: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self.address = ("", 0)

    @property
    def origin(self) -> str:
        """`http://HOST:PORT`."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Listens. Raises `ConfigError` where it can't."""
        host, port = self._asked
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise ConfigError(f"can't listen at {host}, port {port}: {error.strerror or error}", field="port") from None
        self.address = self._listening.getsockname()[:2]
        forks.call_in_child(self._after_fork)
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name=f"managed-vllm-{self._name}", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._listening.close()
            raise

    def close(self) -> None:
        """Ends it. A second time it does nothing."""
        thread, self._thread = self._thread, None
        if thread is None or self._loop is None or self._closing is None:
            return
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self._loop.call_soon_threadsafe(self._closing.set)
        if thread is not threading.current_thread():
            thread.join()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the server's event loop, from another thread, and returns what it returns."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _run(self, ready: concurrent.futures.Future[None]) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)  # else whoever starts it would wait for ever

    async def _serve(self, ready: concurrent.futures.Future[None]) -> None:
        assert self._listening is not None
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(
            application, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S, access_log=None, handle_signals=False
        )
        await runner.setup()
        await web.SockSite(runner, self._listening, backlog=_BACKLOG).start()
        ready.set_result(None)
        try:
            await self._closing.wait()
        finally:
            await runner.cleanup()

    def _after_fork(self) -> None:
        self._thread = None
        if self._listening is not None:
            self._listening.close()
