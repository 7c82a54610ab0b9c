"""One server process tree: spawned, its output kept, its descendants recorded, and ended so that nothing is left.

Must be used from the supervisor's main thread: the kernel ties the server's life to the *thread* that spawned it (see
`managed_vllm.in_server.managed_vllm_lifeline`).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from managed_vllm import registry
from managed_vllm.registry import Instance

log = logging.getLogger(__name__)

_LOG_LIMIT = 32 << 20
"""Bytes after which server.log becomes server.log.1."""

_TAIL_LINES = 2000
"""Lines kept in memory for the diagnosis: a worker's traceback may be followed by hundreds of lines of others."""


class ServerProcess:
    """A running server. `lines` is the newest output; `exited` is set, and `returncode` known, once it has ended."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        instance: Instance,
        on_line: Callable[[str], None],
    ) -> None:
        """Spawns `argv` in a session and process group of its own.

        `on_line` is called in a reader thread for each line. Raises `OSError` if the program can't be run.
        """
        self._instance = instance
        self._on_line = on_line
        self._descendants: set[psutil.Process] = set()
        self.lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self.last_output = time.monotonic()
        self.exited = asyncio.Event()
        self._popen = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
        assert self._popen.stdout is not None
        self._reader = threading.Thread(target=self._pump, args=(self._popen.stdout,), name="server-log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess.Popen.returncode`: negative for a signal, None while it runs."""
        return self._popen.returncode

    def reap(self) -> None:
        """Called on SIGCHLD: notices the exit."""
        if self._popen.poll() is not None:
            self.exited.set()

    def drain(self, timeout_s: float = 1.0) -> None:
        """Waits for the rest of the output of a server that has ended."""
        self._reader.join(timeout_s)

    def record_descendants(self) -> set[psutil.Process]:
        """Adds the processes that now hang below the server to those ever seen; returns the live ones."""
        with contextlib.suppress(psutil.Error):
            self._descendants.update(psutil.Process(self.pid).children(recursive=True))
        self._descendants = {process for process in self._descendants if process.is_running()}
        return set(self._descendants)

    def listens_on(self, port: int) -> bool:
        """True if the server or one of its descendants owns the listening TCP socket: nobody has stolen the port."""
        with contextlib.suppress(psutil.Error):
            for process in [psutil.Process(self.pid), *self.record_descendants()]:
                with contextlib.suppress(psutil.Error):
                    for entry in process.net_connections(kind="tcp"):
                        if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port:
                            return True
        return False

    async def stop(self, grace_s: float) -> list[psutil.Process]:
        """SIGTERM, up to `grace_s` seconds, then SIGKILL for the group, every descendant and every marked process.

        Returns what could not be ended (a process in uninterruptible sleep), normally nothing. vLLM 0.32 hangs after
        SIGTERM in about half the runs in which requests are in flight; that is what the grace bounds.
        """
        self.record_descendants()
        if grace_s > 0 and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exited.wait(), grace_s)
        return await self.kill()

    async def kill(self) -> list[psutil.Process]:
        """SIGKILL for everything that belongs to the server, again until nothing of it is left (at most 15 s)."""
        deadline = time.monotonic() + 15.0
        while True:
            processes = {*self.record_descendants(), *registry.marked_processes(self._instance)}
            if self.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            remaining = await asyncio.to_thread(registry.end_processes, list(processes), timeout_s=2.0)
            self.reap()
            if self.returncode is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.exited.wait(), 0.5)
            # A process that was forked while we killed its parent shows up in the next look.
            if self.returncode is not None and not remaining and not registry.marked_processes(self._instance):
                return []
            if time.monotonic() > deadline:
                return remaining

    # -- output --------------------------------------------------------------------------------------------------------

    def _pump(self, stream: IO[bytes]) -> None:
        sink = _RotatingFile(self._instance.server_log)
        pending = b""
        with stream:
            while chunk := os.read(stream.fileno(), 65536):
                self.last_output = time.monotonic()
                sink.write(chunk)
                # tqdm redraws its line with a carriage return.
                *whole, pending = re.split(rb"[\r\n]", pending + chunk)
                if len(pending) > 1 << 20:
                    whole, pending = [*whole, pending], b""
                for raw in whole:
                    self._take(raw)
        if pending:
            self._take(pending)
        sink.close()

    def _take(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace")
        if line.strip():
            self.lines.append(line)
            self._on_line(line)


class _RotatingFile:
    """server.log, mode 0600; a disk that is full loses log lines, never the server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._size = 0

    def write(self, chunk: bytes) -> None:
        try:
            if self._file is None:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._file = os.fdopen(descriptor, "ab", buffering=0)
                self._size = os.fstat(descriptor).st_size
            self._file.write(chunk)
            self._size += len(chunk)
            if self._size > _LOG_LIMIT:
                self._file.close()
                self._file = None
                os.replace(self._path, self._path.with_suffix(".log.1"))
        except OSError as error:
            log.debug("server.log: %s", error)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
