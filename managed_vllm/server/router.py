"""The router in front of a server's replicas, from the supervisor's side: for clients that are not ours.

Everybody who knows one URL only (`llm.base_url`, curl, the OpenAI SDK elsewhere) reaches the replicas through it. What
must hold:

1. The public port is this supervisor's from the start to the end, and listens all the time. The process behind it
   (`managed_vllm.server.front`) inherits the socket; while it is started again, connections wait.
2. The process ends with the supervisor, whatever ends that. The key goes to it over a socket, and is on no command
   line, in no file and in no environment.
3. The event loop is never blocked, and a process that says nothing for a minute is replaced.
4. A machine that can't have one has none, and `status.reason` says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from managed_vllm.masking import Secret
from managed_vllm.server import router_process
from managed_vllm.server.launch import reachable
from managed_vllm.status import RouterStatus

log = logging.getLogger(__name__)

EXTRA = "managed-vllm[router]"

_SILENCE_S = 60.0
_LONGEST_BACKOFF_S = 30.0
_BACKLOG = 4096
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH")
"""What of our environment the process needs; secrets and proxies are not among it."""


class Router:
    """Runs the router; see the module's docstring. Must be used from the main thread: its end is the process's end."""

    def __init__(
        self,
        *,
        host: str | None,
        port: int | None,
        api_key: Secret,
        log_path: Path,
        marks: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> None:
        """Nothing is started here; `start` does.

        Args:
            host: where it listens, None: 127.0.0.1.
            port: None: a free one.
            api_key: what it asks for, and what the replicas ask for.
            log_path: its log, which does not grow for ever.
            marks: variables that mark its processes as the instance's.
            on_change: called when `status` has changed.
        """
        self._host = host or "127.0.0.1"
        self._port = port
        self._api_key = api_key
        self._log_path = log_path
        self._marks = dict(marks)
        self._on_change = on_change
        self._status = RouterStatus(reason="it has not been started")
        self._urls: dict[int, str] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._listener: socket.socket | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def status(self) -> RouterStatus:
        """How it is now."""
        return self._status

    async def start(self) -> None:
        """Begins it, and returns at once: it comes up in the background. Raises nothing; see `status.reason`."""
        if reason := why_not():
            self._change(reason=reason)
            return
        try:
            self._listener = _listen(self._host, self._port)
        except OSError as error:
            self._change(reason=f"can't listen on {self._host} port {self._port or 'any'}: {error.strerror or error}")
            return
        host, port = reachable(self._host), self._listener.getsockname()[1]
        self._change(base_url=f"http://{host}:{port}/v1", reason="it is coming up")
        self._keeping = asyncio.create_task(self._keep(self._listener))

    def serve(self, urls: Mapping[int, str]) -> None:
        """These replicas are up now: base URLs by number. Requests go to no others from now on."""
        if urls != self._urls:
            self._urls = dict(urls)
            self._tell_urls()

    async def close(self) -> None:
        """Ends it, and frees the port."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        self._status = dataclasses.replace(self._status, pid=None, ready=False, reason="it was ended")

    async def _keep(self, listener: socket.socket) -> None:
        failures = 0
        while True:
            began = asyncio.get_running_loop().time()
            try:
                if await self._one_life(listener, stays_ready=failures <= 1):
                    listener.close()
                    return
                reason = f"its process has ended, and is started again; its log is {self._log_path}"
            except OSError as error:
                reason = f"its process can't be run: {error}"
            log.warning("the router: %s", reason)
            failures = 1 if asyncio.get_running_loop().time() - began > _LONGEST_BACKOFF_S else failures + 1
            ready = self._status.ready and failures == 1
            self._change(pid=None, ready=ready, restarts=self._status.restarts + 1, reason=reason)
            await asyncio.sleep(0 if failures == 1 else min(_LONGEST_BACKOFF_S, 0.1 * 2**failures))

    async def _one_life(self, listener: socket.socket, *, stays_ready: bool) -> bool:
        """Runs one process to its end. True: this machine can't have a router."""
        ours, theirs = socket.socketpair()
        try:
            process = self._spawn(theirs, listener)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            order = {"api_key": self._api_key.reveal(), "listener": listener.fileno(), "log_path": str(self._log_path)}
            self._writer.write(json.dumps(order).encode() + b"\n")
            self._change(pid=process.pid)
            self._tell_urls()
            return await self._follow(reader, stays_ready=stays_ready)
        finally:
            self._writer.close()
            self._writer = None
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _follow(self, reader: asyncio.StreamReader, *, stays_ready: bool) -> bool:
        """Until it ends, or says nothing for too long. Its guard serves without vllm-router while that comes up."""
        earlier = self._status.restarts
        with contextlib.suppress(TimeoutError, OSError):
            while line := await asyncio.wait_for(reader.readline(), _SILENCE_S):
                said = json.loads(line)
                ready = bool(said["ready"]) or (stays_ready and self._status.ready and not said.get("final"))
                self._change(ready=ready, restarts=earlier + int(said["restarts"]), reason=str(said["reason"]))
                if said.get("final"):
                    self._change(pid=None, base_url=None)
                    return True
        return False

    def _spawn(self, channel: socket.socket, listener: socket.socket) -> subprocess.Popen[bytes]:
        known = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        output = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "managed_vllm.server.front"],
                env={**known, **self._marks},
                cwd="/",
                stdin=channel.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=0o077,
                pass_fds=(listener.fileno(),),
            )
        finally:
            os.close(output)

    def _tell_urls(self) -> None:
        if self._writer is not None:
            self._writer.write(json.dumps({"urls": self._urls}).encode() + b"\n")

    def _change(self, **fields: object) -> None:
        changed = dataclasses.replace(self._status, **fields)  # type: ignore[arg-type]
        if changed != self._status:
            self._status = changed
            self._on_change()


def why_not() -> str:
    """Why this machine can't have a router; empty if it can."""
    if importlib.util.find_spec("vllm_router") is None:
        return f"vllm-router is not installed: pip install '{EXTRA}'"
    return router_process.why_not()


def _listen(host: str, port: int | None) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), port or 0), family=family, backlog=_BACKLOG)
