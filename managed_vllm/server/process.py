"""One server process tree: spawned or forked, its output kept, its descendants followed, ended so that nothing is left.

Must be used from the supervisor's main thread: the kernel ties the server's life to the *thread* that spawned it (see
`managed_vllm.in_server.managed_vllm_lifeline`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, Self

import psutil

from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.server.output import ServerOutput
from managed_vllm.server.pidfd import pidfd_open

log = logging.getLogger(__name__)

TRACKER_S = 2.0
"""Seconds in which Python's resource trackers may end by themselves."""


class Child(Protocol):
    """A child process of ours, as `subprocess.Popen` and `ForkedChild` are."""

    pid: int

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...


class ForkedChild:
    """A child that another process forked for us: what of `subprocess.Popen` is needed to see its end."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._returncode: int | None = None

    @property
    def returncode(self) -> int | None:
        return self._returncode

    def poll(self) -> int | None:
        """Collects the exit code if it has ended; as `subprocess.Popen.poll`."""
        if self._returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # it ended, and was collected, before it was known to be the server
                self._returncode = -signal.SIGKILL
            else:
                self._returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self._returncode


class ServerProcess:
    """A running server. `exited` is set, and `returncode` known, once it has ended.

    `child_ended` is set when a process below the server ends; the reader clears it. `ended_names` are the kernel's
    names of those that have ended, `pids_ever` the pids of all its processes, ended ones included.
    """

    def __init__(
        self,
        child: Child,
        output: IO[bytes],
        *,
        instance: Instance,
        shared_memory: cleanup.NewSharedMemory,
        on_line: Callable[[str], None],
        spared: Callable[[], int | None] = lambda: None,
        secrets: Collection[str] = (),
    ) -> None:
        """Takes over a child that has just been started, in a session of its own; see `spawn`, too.

        `shared_memory` was made before it was started. `on_line` is called in a reader thread for each line of
        `output`, without the `secrets`. `spared` tells the pid of a process that carries the instance's marker and is
        not the server's: its image.
        """
        self.output = ServerOutput(output, instance.server_log, on_line, secrets=secrets)
        self._child = child
        self._instance = instance
        self._spared = spared
        self._loop = asyncio.get_running_loop()
        self._descendants: dict[psutil.Process, int | None] = {}
        self._names: dict[psutil.Process, str] = {}
        self._ended: set[psutil.Process] = set()
        self._marker = instance.marker
        self._shared_memory = shared_memory
        self.pids_ever: set[int] = set()
        self.exited = asyncio.Event()
        self.child_ended = asyncio.Event()
        self.ended_names: set[str] = set()

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        instance: Instance,
        on_line: Callable[[str], None],
        spared: Callable[[], int | None] = lambda: None,
        secrets: Collection[str] = (),
        inherited: Collection[int] = (),
    ) -> Self:
        """Runs `argv` in a session and process group of its own. Raises `OSError` if the program can't be run.

        It inherits the descriptors `inherited`, and no others.
        """
        shared_memory = cleanup.NewSharedMemory()
        popen = subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
            pass_fds=tuple(inherited),
        )
        assert popen.stdout is not None
        return cls(
            popen,
            popen.stdout,
            instance=instance,
            shared_memory=shared_memory,
            on_line=on_line,
            spared=spared,
            secrets=secrets,
        )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        """As `subprocess.Popen.returncode`: negative for a signal, None while it runs."""
        return self._child.returncode

    def reap(self) -> None:
        """Called on SIGCHLD: notices the exit."""
        if self._child.poll() is not None:
            self.exited.set()

    def processes(self) -> list[psutil.Process]:
        """The server and those below it that were last seen, the oldest first; some may have ended since."""
        with contextlib.suppress(psutil.Error):
            return [psutil.Process(self.pid), *sorted(self._descendants, key=lambda process: process.pid)]
        return sorted(self._descendants, key=lambda process: process.pid)

    async def record_descendants(self) -> None:
        """Finds the processes that are now below the server, and follows each of them to its end from here on."""
        self._follow(await asyncio.to_thread(self._list_descendants))
        # vLLM's processes name themselves some time after their start, and nobody can ask them after their end.
        self._names.update((process, name) for process in self._descendants if (name := _own_name(process)))

    async def record_shared_memory(self) -> set[str]:
        """Adds what the server's processes have mapped below /dev/shm to what it ever had; returns all of it."""
        pids = [self.pid, *(process.pid for process in self._descendants)]
        return await asyncio.to_thread(self._shared_memory.look, pids)

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
                descriptor = pidfd_open(process.pid)
                self._descendants[process] = descriptor
                self._loop.add_reader(descriptor, self._descendant_ended, process)

    def _descendant_ended(self, process: psutil.Process) -> None:
        name = self._names.pop(process, "")
        log.info("process %d of the server has ended: %s", process.pid, name or "?")
        self._unfollow(process)
        self._ended.add(process)
        self.ended_names.add(name)
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
        listeners = _listeners(port)
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
        shared_memory = await self.record_shared_memory()
        spared_until = time.monotonic() + TRACKER_S
        while True:
            processes = {*self._descendants, *await self._marked()}
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
            left = await self._marked()
            if self.returncode is not None and not remaining and not left:
                break
            if time.monotonic() > deadline:
                return remaining
            if trackers:
                await asyncio.sleep(0.02)
        for process in list(self._descendants):
            self._unfollow(process)
        shared_memory |= await asyncio.to_thread(cleanup.named_shared_memory, self._instance, self._marker)
        removed = await asyncio.to_thread(cleanup.remove_shared_memory, shared_memory)
        if removed:
            log.info("removed shared memory %s", removed)
        return []

    async def _marked(self) -> set[psutil.Process]:
        """Every process with the instance's marker that is the server's."""
        found = await asyncio.to_thread(cleanup.marked_processes, self._instance, self._marker)
        return {process for process in found if process.pid != self._spared()}


def _listeners(port: int) -> set[int]:
    """The pids of the processes that are seen to listen on a TCP port."""
    with contextlib.suppress(psutil.Error, OSError, RuntimeError, ValueError):  # no such table, or none that is known
        return {
            entry.pid
            for entry in psutil.net_connections(kind="tcp")
            if entry.status == psutil.CONN_LISTEN and entry.laddr and entry.laddr.port == port and entry.pid
        }
    return set()


def listeners_can_be_seen() -> bool:
    """Whether this system tells who listens on which port: gVisor's `/proc/net/tcp` may be empty or not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
        return os.getpid() in _listeners(probe.getsockname()[1])


def _name(process: psutil.Process) -> str:
    """The kernel's name of a process, of at most 15 characters; empty if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process.pid}/comm").read_text().rstrip("\n")
    return ""


def _own_name(process: psutil.Process) -> str:
    """As `_name`; empty as long as the process is what its parent is: a child that has yet to run its program.

    An EngineCore or Worker that runs a program for a moment would else seem to end with that.
    """
    name = _name(process)
    with contextlib.suppress(psutil.Error):
        parent = process.parent()
        is_copy = parent is not None and _name(parent) == name and parent.cmdline() == process.cmdline()
        return "" if is_copy else name
    return ""


def _is_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
