"""One server process tree: spawned, its output kept, its descendants followed, and ended so that nothing is left.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.server import startup_log

log = logging.getLogger(__name__)

_LOG_LIMIT = 32 << 20
"""Bytes after which server.log becomes server.log.1."""

_LONGEST_LINE = 1 << 20

_TRACKER_S = 2.0
"""Seconds in which Python's resource trackers may end by themselves."""

_TAIL_LINES = 2000
"""Lines kept in memory for the diagnosis: a worker's traceback may be followed by hundreds of lines of others."""


class ServerProcess:
    """A running server. `exited` is set, and `returncode` known, once it has ended.

    `lines` is the newest output, `last_new_line_at` the time of the last line that was no repetition (monotonic clock).
    `child_ended` is set when a process below the server ends; the reader clears it. `pids_ever` are the pids of all its
    processes, ended ones included.
    """

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
        self._loop = asyncio.get_running_loop()
        self._descendants: dict[psutil.Process, int | None] = {}
        self._ended: set[psutil.Process] = set()
        self._shared_memory: set[str] = set()
        self._messages_seen: set[int] = set()
        self._starting = True
        self.pids_ever: set[int] = set()
        self.lines: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self.last_new_line_at = time.monotonic()
        self.exited = asyncio.Event()
        self.child_ended = asyncio.Event()
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

    def end_of_startup(self) -> None:
        """From now on the output is only kept: `on_line` is not called any more."""
        self._starting = False
        self._messages_seen.clear()

    def drain(self, timeout_s: float = 1.0) -> None:
        """Waits for the rest of the output of a server that has ended."""
        self._reader.join(timeout_s)

    def processes(self) -> list[psutil.Process]:
        """The server and those below it that were last seen, the oldest first; some may have ended since."""
        with contextlib.suppress(psutil.Error):
            return [psutil.Process(self.pid), *sorted(self._descendants, key=lambda process: process.pid)]
        return sorted(self._descendants, key=lambda process: process.pid)

    async def record_descendants(self) -> None:
        """Finds the processes that are now below the server, and follows each of them to its end from here on."""
        self._follow(await asyncio.to_thread(self._list_descendants))

    async def record_shared_memory(self) -> set[str]:
        """Adds what the server's processes have mapped below /dev/shm to what it ever had; returns all of it."""
        pids = [self.pid, *(process.pid for process in self._descendants)]
        self._shared_memory |= await asyncio.to_thread(cleanup.shared_memory_of, pids)
        return set(self._shared_memory)

    def _list_descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def _follow(self, found: Iterable[psutil.Process]) -> None:
        """Has the kernel report the end of each process that is new."""
        self.pids_ever.add(self.pid)
        for process in found:
            # One that has ended may be found for as long as its parent leaves it a zombie.
            if process in self._descendants or process in self._ended:
                continue
            self.pids_ever.add(process.pid)
            self._descendants[process] = None
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(process.pid)
                self._descendants[process] = descriptor
                self._loop.add_reader(descriptor, self._descendant_ended, process)

    def _descendant_ended(self, process: psutil.Process) -> None:
        log.info("process %d of the server has ended", process.pid)
        self._unfollow(process)
        self._ended.add(process)
        self.child_ended.set()

    def _unfollow(self, process: psutil.Process) -> None:
        descriptor = self._descendants.pop(process, None)
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def owns_port(self, port: int) -> bool | None:
        """True if the server or one of its descendants listens on the TCP port, False if a stranger does.

        None if the listener can't be seen: it belongs to another user, or lives in another network namespace.
        """
        ours = {self.pid, *(process.pid for process in self._list_descendants())}
        listeners = set()
        with contextlib.suppress(psutil.Error):
            for entry in psutil.net_connections(kind="tcp"):
                if entry.status == psutil.CONN_LISTEN and entry.laddr and entry.laddr.port == port and entry.pid:
                    listeners.add(entry.pid)
        if listeners & ours:
            return True
        return False if listeners else None

    async def stop(self, grace_s: float) -> list[psutil.Process]:
        """SIGTERM, up to `grace_s` seconds, then SIGKILL for the group, every descendant and every marked process.

        Returns what could not be ended (a process in uninterruptible sleep), normally nothing. vLLM 0.32 hangs after
        SIGTERM in about half the runs in which requests are in flight; that is what the grace bounds.
        """
        if grace_s > 0 and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.exited.wait(), grace_s)
        return await self.kill()

    async def kill(self) -> list[psutil.Process]:
        """SIGKILL for everything that belongs to the server, again until nothing of it is left (at most 15 s).

        Python's resource trackers come last: once the others are gone they remove shared memory and semaphores, and end
        by themselves. What is left of the shared memory then is removed here.
        """
        deadline = time.monotonic() + 15.0
        await self.record_descendants()
        await self.record_shared_memory()
        spared_until = time.monotonic() + _TRACKER_S
        while True:
            processes = {*self._descendants, *await asyncio.to_thread(cleanup.marked_processes, self._instance)}
            if self.returncode is None:
                with contextlib.suppress(psutil.Error):
                    processes.add(psutil.Process(self.pid))
            self._follow(process for process in processes if process.pid != self.pid)  # new ones may have been forked
            trackers = {process for process in processes if _is_tracker(process)}
            if time.monotonic() < spared_until:
                processes -= trackers
            else:
                trackers = set()
                if self.returncode is None or not psutil.pid_exists(self.pid):  # the number was not given away again
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(self.pid, signal.SIGKILL)
            remaining = await asyncio.to_thread(cleanup.end_processes, list(processes), timeout_s=2.0)
            self.reap()
            if self.returncode is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.exited.wait(), 0.5)
            # A process that was forked while we killed its parent shows up in the next look.
            left = await asyncio.to_thread(cleanup.marked_processes, self._instance)
            if self.returncode is not None and not remaining and not left:
                break
            if time.monotonic() > deadline:
                return remaining
            if trackers:
                await asyncio.sleep(0.02)
        for process in list(self._descendants):
            self._unfollow(process)
        removed = await asyncio.to_thread(cleanup.remove_shared_memory, self._shared_memory)
        if removed:
            log.info("removed shared memory %s", removed)
        return []

    # -- output --------------------------------------------------------------------------------------------------------

    def _pump(self, stream: IO[bytes]) -> None:
        sink = _RotatingFile(self._instance.server_log)
        pending = b""
        with stream:
            while chunk := os.read(stream.fileno(), 65536):
                sink.write(chunk)
                # tqdm redraws its line with a carriage return.
                *whole, pending = re.split(rb"[\r\n]", pending + chunk)
                if len(pending) > _LONGEST_LINE:  # it may never end
                    whole, pending = [*whole, pending], b""
                for raw in whole:
                    self._take_line(raw)
        if pending:
            self._take_line(pending)
        sink.close()

    def _take_line(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace")
        if line.strip():
            self.lines.append(line)
            if self._starting:
                # vLLM repeats that it is waiting, with a new time in front: that is no sign of life.
                message = hash(startup_log.message_of(line))
                if message not in self._messages_seen:
                    self.last_new_line_at = time.monotonic()
                    self._messages_seen.add(message)
                self._on_line(line)


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


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
