"""The supervisor: one small process per server; it alone starts, restarts and ends vLLM.

It is spawned by the first user (`managed_vllm.instance.spawn`), under the instance's start lock; `main` is its entry
point. What it does, in order:

1. Detaches from the user that started it, becomes subreaper, listens on `control.sock`. `supervisor.lock` was taken by
   that user and handed on.
2. Ends what a predecessor may have left, then starts vLLM and follows its log until one token has been generated.
3. Watches: an exit that nobody asked for is a crash, whatever its code; what runs but does not work is found by
   `managed_vllm.server.hangs`. Before a restart, by `RestartPolicy`, nothing of the old server is left: no process,
   socket, shared memory, memory of a GPU.
4. Counts leases (open connections). None left for `keep_alive` seconds and not pinned: it stops the server, leaves no
   process, removes the instance's folder and ends.

One main thread with an event loop; the server is spawned from it, because the kernel ties the server's life to the
spawning thread. The loop does nothing that can block for long.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from managed_vllm.config import SupervisorOrder
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import channel, cleanup, directory
from managed_vllm.instance.directory import Instance
from managed_vllm.server import diagnosis, gpu_memory, stacks
from managed_vllm.server.process import ServerProcess
from managed_vllm.server.startup_log import StartupLog
from managed_vllm.socket_paths import short_path
from managed_vllm.status import Cause, Connection, Diagnosis, Progress, ServerState, ServerStatus, Stage, is_loopback

if TYPE_CHECKING:
    from managed_vllm.server.hangs import Stopped, Watch
    from managed_vllm.server.probe import Probe

log = logging.getLogger("managed_vllm.supervisor")

FIRST_LEASE_S = 5.0
"""The user that spawned us has this long to take its lease; it may have been killed in between."""

_POLL_S = 0.05
_LOOK_S = 1.0
_SHARED_MEMORY_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36
_PORT_RACES = 5


def main() -> None:
    """Entry point of the supervisor process: what to do comes as JSON on standard input."""
    message = json.loads(sys.stdin.buffer.read())
    if os.fork():
        os._exit(0)
    os.setsid()
    os.umask(0o077)
    for descriptor in (message["life"], message["lock"]):
        os.set_inheritable(descriptor, False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    instance = Instance(Path(message["home"]), message["id"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for number in (signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        supervisor = Supervisor(
            instance,
            SupervisorOrder.from_dict(message["order"]),
            life=message["life"],
            lock=message["lock"],
        )
        asyncio.run(supervisor.run())
    except BaseException:
        log.exception("the supervisor failed")
        with contextlib.suppress(OSError):
            instance.failed_mark.touch()
        raise


@dataclass(eq=False)
class _User:
    """One open connection. It counts as a lease once it has asked for one."""

    writer: asyncio.StreamWriter
    pid: int
    what: str = ""
    leased: bool = False
    since: float = dataclasses.field(default_factory=time.time)


class _RestartAsked:
    """A user asked for a restart: not a crash, not counted."""


class _NotLaunched(Exception):
    """The operating system refused to run the server's program."""

    def __init__(self, reason: Diagnosis) -> None:
        super().__init__(reason.summary)
        self.reason = reason


_WITHOUT_A_WORD = frozenset(
    {Cause.KILLED, Cause.ENGINE_DIED, Cause.WORKER_DIED, Cause.PROCESS_STOPPED, Cause.API_SERVER_HUNG}
)
"""Ends from outside. Where a *first* start ends otherwise, with words of its own, another one would end in the same."""

_HANGS = frozenset(
    {
        Cause.ENGINE_HUNG,
        Cause.API_SERVER_HUNG,
        Cause.PROCESS_STOPPED,
        Cause.STARTUP_SILENCE,
        Cause.STARTUP_TIMEOUT,
    }
)
"""Causes for which it helps to see where the processes are stuck."""


class Supervisor:
    """State machine of one server; see the module's docstring."""

    def __init__(self, instance: Instance, order: SupervisorOrder, *, life: int, lock: int) -> None:
        """`life` is the end of a pipe over which the user who started us learns that we listen, or that we died.

        `lock` is the descriptor of the locked `supervisor.lock`.
        """
        self._life = life
        self._lock = lock
        self._instance = instance
        self._spec = order.spec
        self._policy = order.policy
        self._address = order.address
        self._api_key = order.address.api_key or secrets.token_urlsafe(32)
        self._port = order.address.port
        self._scratch: Path | None = None
        self._predecessor: dict[str, Any] | None = None
        self._shared_memory: set[str] = set()
        self._gpu_at_first: gpu_memory.GpuMemory | None = None
        self._starts = 0
        self._users: set[_User] = set()
        self._keep_alive_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._ending = asyncio.Event()
        self._first_lease = asyncio.Event()
        self._restart_asked = asyncio.Event()
        self._process: ServerProcess | None = None
        self._status = ServerStatus(
            state=ServerState.STARTING,
            started_at=time.time(),
            log_path=str(instance.server_log),
            supervisor_pid=os.getpid(),
        )

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """From listening to the removal of the folder."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, f"signal {number.name}")
        self._predecessor = self._instance.read_record()
        with contextlib.suppress(TypeError, ValueError):
            # The record of a supervisor that was killed: its epochs go on, so that none ever comes twice.
            self._status = dataclasses.replace(self._status, epoch=int((self._predecessor or {}).get("epoch", 0)))
        listener = await self._listen()
        with contextlib.suppress(OSError):  # whoever started us may be gone
            os.write(self._life, b"1")
        os.close(self._life)
        self._idle_timer = loop.call_later(FIRST_LEASE_S, self._end, "nobody took a lease")
        self._move(ServerState.STARTING)
        serving = asyncio.create_task(self._serve())
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done() and (error := serving.exception()) is not None:
                log.error("the supervisor failed", exc_info=error)
                self._move(ServerState.FAILED, connection=None, diagnosis=diagnosis.supervisor_failed(error))
            failed = serving.done() and not serving.cancelled() and self._status.state is ServerState.FAILED
            if not failed:
                self._move(ServerState.STOPPING)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        finally:
            ending.cancel()
            await self._stop_server(0 if self._status.state is ServerState.FAILED else self._policy.stop_grace_s)
            if self._status.state is not ServerState.FAILED:
                self._move(ServerState.GONE)
            else:  # who has started us may not have got as far as asking, and must learn of it
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._first_lease.wait(), FIRST_LEASE_S)
            listener.close()
            for user in list(self._users):
                user.writer.close()
            await self._leave()
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # whoever else may have a copy

    async def _leave(self) -> None:
        """Removes the folder, unless somebody is about to start here again: then it is theirs.

        While we hold `supervisor.lock` nobody keeps `start.lock` for longer than a look.
        """
        # Names before the folder: a name must never stand for a folder of somebody else's.
        await asyncio.to_thread(directory.drop_names, self._instance.home, self._instance.id)
        if self._scratch is not None:
            await asyncio.to_thread(cleanup.remove_scratch, self._scratch)
        with contextlib.suppress(OSError):
            self._instance.socket_path.unlink()
        start_lock = self._instance.start_lock()
        with contextlib.suppress(filelock.Timeout, OSError):
            await asyncio.to_thread(start_lock.acquire, timeout=2.0, poll_interval=0.01)
            cleanup.remove_instance(self._instance)
            start_lock.release()

    async def _serve(self) -> None:
        """Starts the server, and starts it again as long as the policy says so."""
        await self._clear_leftovers()
        # One that served before its supervisor was killed is started again, as after any other crash.
        served = (self._predecessor or {}).get("state") in (ServerState.READY, ServerState.RESTARTING)
        crashes: collections.deque[float] = collections.deque()
        races = 0
        while True:
            ended = await self._one_epoch()
            if isinstance(ended, _RestartAsked):
                await self._stop_server(self._policy.stop_grace_s)
                self._move(ServerState.RESTARTING, connection=None, ready_at=None, diagnosis=None)
                continue
            served = served or self._status.ready_at is not None
            log.error("epoch %d ended: %s (%s)", self._status.epoch, ended.summary, ended.root_line)
            if ended.cause is Cause.PORT_IN_USE and self._address.port is None and races < _PORT_RACES:
                races += 1  # somebody took the free port before vLLM did: another one is found next time
                await self._stop_server(0)
                continue
            policy = self._policy.restart
            now = time.monotonic()
            while crashes and now - crashes[0] > policy.window_s:
                crashes.popleft()
            given_up = ended.permanent or ended.cause in policy.not_retried or policy.max_restarts == 0
            if given_up or not (served or ended.cause in _WITHOUT_A_WORD):
                await self._fail(ended)
                return
            if len(crashes) >= policy.max_restarts:
                await self._fail(diagnosis.crash_loop(ended, restarts=len(crashes), window_s=policy.window_s))
                return
            delay = policy.delay_s(len(crashes))
            crashes.append(now)
            self._move(
                ServerState.RESTARTING,
                connection=None,
                ready_at=None,
                diagnosis=ended,
                restarts=self._status.restarts + 1,
                detail=f"in {delay:g} s",
            )
            await self._stop_server(0)
            await asyncio.sleep(delay)

    async def _one_epoch(self) -> Diagnosis | _RestartAsked:
        """One life of the server: from the launch to its end, of which it tells the reason."""
        self._restart_asked.clear()
        state = ServerState.STARTING if self._starts == 0 else ServerState.RESTARTING
        self._starts += 1
        self._move(state, epoch=self._status.epoch + 1, stage=Stage.LAUNCHING, detail="", started_at=time.time())
        connection = self._choose_address()
        try:
            process = await self._launch(connection)
        except _NotLaunched as not_launched:
            return not_launched.reason
        # Only now, while vLLM imports as well: httpx takes a while.
        from managed_vllm.server.hangs import Stopped, Watch
        from managed_vllm.server.probe import Probe

        probe = Probe(connection, is_vllm=self._spec.command is None)
        try:
            ended = await self._until_ready(probe, process, Stopped(process, self._policy.hang))
            if ended is None:
                process.started()
                self._move(
                    ServerState.READY, stage="", detail="", connection=connection, ready_at=time.time(), diagnosis=None
                )
                ended = await self._until_it_ends(process, Watch(probe, process, self._policy.hang))
        finally:
            await probe.close()
        if isinstance(ended, Diagnosis) and ended.cause in _HANGS and process.returncode is None:
            ended = await self._with_stacks(ended, process)
        return ended

    # -- starting ------------------------------------------------------------------------------------------------------

    async def _launch(self, connection: Connection) -> ServerProcess:
        """Starts the server's process; its output is read from now on. Raises `_NotLaunched`."""
        host = self._address.host or "127.0.0.1"
        argv = self._spec.argv(host=host, port=self._port, uds=connection.uds)
        self._startup = startup = StartupLog()
        loop = asyncio.get_running_loop()

        def on_line(line: str) -> None:
            progress = startup.feed(line)
            if progress is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closing
                    loop.call_soon_threadsafe(self._progress, progress)

        if self._gpu_at_first is None:
            self._gpu_at_first = await asyncio.to_thread(gpu_memory.used_memory, self._devices)
        log.info("epoch %d: %s", self._status.epoch, " ".join(argv))
        try:
            self._process = process = ServerProcess(
                argv, env=self._environment(), cwd=self._instance.folder, instance=self._instance, on_line=on_line
            )
        except OSError as error:
            raise _NotLaunched(diagnosis.could_not_launch(argv, error)) from error
        self._status = dataclasses.replace(self._status, server_pid=process.pid)
        self._write_record()
        return process

    async def _until_ready(
        self, probe: Probe, process: ServerProcess, stopped: Stopped
    ) -> Diagnosis | _RestartAsked | None:
        """Waits until the server is ready (None), has failed, or somebody wants it started anew."""
        started = looked = time.monotonic()
        policy = self._policy
        moved, seen = started, self._startup.progress
        asking: asyncio.Task[Diagnosis | None] | None = None
        exited = asyncio.create_task(process.exited.wait())
        try:
            while True:
                if process.exited.is_set():
                    await asyncio.to_thread(process.drain)
                    return diagnosis.diagnose(list(process.lines), returncode=process.returncode)
                if self._restart_asked.is_set():
                    return _RestartAsked()
                now = time.monotonic()
                if self._startup.progress != seen:
                    moved, seen = now, self._startup.progress
                moved = max(moved, process.last_news)
                if now - started > policy.startup_timeout_s:
                    return diagnosis.timed_out(seen, limit_s=policy.startup_timeout_s, silent=False)
                if asking is None and now - moved > policy.startup_silence_s:
                    return diagnosis.timed_out(seen, limit_s=policy.startup_silence_s, silent=True)
                if now - looked > _LOOK_S:
                    looked = now
                    await process.record_descendants()
                    await self._record_shared_memory(process)
                    if found := stopped.look():
                        return found
                if asking is None and (await probe.is_up(2.0)).ok and await self._is_ours(process):
                    self._progress(Progress(Stage.WARMING_UP))
                    asking = asyncio.create_task(self._first_request(probe))
                if asking is not None and asking.done():
                    refused = asking.result()
                    if refused is None:
                        return None
                    await asyncio.wait({exited}, timeout=1.0)  # the answer may be the first sign of a death
                    if not exited.done():
                        return refused
                awaited = {exited} if asking is None else {exited, asking}
                wait_s = _POLL_S if asking is None else _LOOK_S
                await asyncio.wait(awaited, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (exited, asking):
                if task is not None:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)

    async def _first_request(self, probe: Probe) -> Diagnosis | None:
        for question in (probe.serves_model, probe.generates):
            answer = await question(self._policy.first_request_timeout_s)
            if not answer.ok:
                return diagnosis.diagnose_first_request(answer.status, answer.body)
        return None

    async def _is_ours(self, process: ServerProcess) -> bool:
        """The port is served by our process, not by somebody who took it before vLLM could."""
        if self._port is None:
            return True
        owns = await asyncio.to_thread(process.owns_port, self._port)
        # The command of `command=` may be a wrapper, with the server in a container of its own.
        return owns is True or (owns is None and self._spec.command is not None)

    def _choose_address(self) -> Connection:
        """The same address for every epoch where it can be kept."""
        model, key = self._spec.served_model_name, self._api_key
        if self._address.uds:
            path = self._instance.uds_path
            path.unlink(missing_ok=True)  # vLLM leaves it behind, and then can't bind it (0.32)
            return Connection(base_url="http://localhost/v1", api_key=key, model=model, uds=str(path))
        host = self._address.host or "127.0.0.1"
        if self._address.port is None and (self._port is None or not _is_free(host, self._port)):
            self._port = _free_port(host)
        reach = host if is_loopback(host) else {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        reach = f"[{reach}]" if ":" in reach and not reach.startswith("[") else reach
        return Connection(base_url=f"http://{reach}:{self._port}/v1", api_key=key, model=model)

    def _environment(self) -> dict[str, str]:
        """The server's environment: ours, what was asked for, and what marks and guards it."""
        if self._scratch is None:
            self._scratch = cleanup.make_scratch()
            self._write_record()
        in_server = str(Path(lifeline.__file__).parent)
        inherited = self._spec.env.get("PYTHONPATH") or os.environ.get("PYTHONPATH")
        scratch = str(self._scratch)
        return {
            # torch keeps its compiled kernels in the temp dir unless told otherwise; ours lives only as long as we do.
            "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",
            # By its default of 5 s for idle connections, a server that was too busy for some seconds to look at its
            # sockets closes those on which requests have come by then: uvloop runs timers before it reads.
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
            **{name: value for name, value in os.environ.items() if name != lifeline.ROOT},
            "PYTHONUNBUFFERED": "1",
            **self._spec.env,
            "PYTHONPATH": f"{in_server}{os.pathsep}{inherited}" if inherited else in_server,
            "TMPDIR": scratch,
            "VLLM_RPC_BASE_PATH": scratch,
            "VLLM_API_KEY": self._api_key,
            "SPT_NOENV": "1",
            lifeline.MARKER: str(self._instance.folder),
            lifeline.SUPERVISOR: f"{os.getpid()}:{lifeline.start_time(os.getpid())}",
        }

    # -- watching ------------------------------------------------------------------------------------------------------

    async def _until_it_ends(self, process: ServerProcess, watch: Watch) -> Diagnosis | _RestartAsked:
        """Waits until the server that is ready ends, does not work any more, or is to be started anew."""
        await process.record_descendants()
        exited = asyncio.create_task(process.exited.wait())
        asked = asyncio.create_task(self._restart_asked.wait())
        watching = asyncio.create_task(watch.until_unwell())
        tasks: set[asyncio.Task[Any]] = {exited, asked, watching}
        try:
            while True:
                await self._record_shared_memory(process)
                done, _ = await asyncio.wait(tasks, timeout=_SHARED_MEMORY_S, return_when=asyncio.FIRST_COMPLETED)
                if exited in done:
                    await asyncio.to_thread(process.drain)
                    return diagnosis.diagnose(list(process.lines), returncode=process.returncode)
                if watching in done:
                    return watching.result()
                if asked in done:
                    return _RestartAsked()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _record_shared_memory(self, process: ServerProcess) -> None:
        """Into the record, too: who comes after us when we are killed removes what is left of it."""
        known = await process.record_shared_memory()
        if known - self._shared_memory:
            self._shared_memory |= known
            self._write_record()

    async def _with_stacks(self, reason: Diagnosis, process: ServerProcess) -> Diagnosis:
        text = await asyncio.to_thread(stacks.dump, process.processes(), reason=reason.summary)
        kept = await asyncio.to_thread(self._instance.keep_stacks, text)
        log.error("%s; stacks in %s", reason.summary, kept)
        return dataclasses.replace(reason, facts={**reason.facts, "stacks": str(kept)}) if kept else reason

    # -- ending --------------------------------------------------------------------------------------------------------

    async def _fail(self, reason: Diagnosis) -> None:
        # The error first, the cleaning after: who waits learns of it at once.
        kept = await asyncio.to_thread(self._instance.keep_log)
        self._move(
            ServerState.FAILED,
            diagnosis=reason,
            connection=None,
            log_path=str(kept) if kept else self._status.log_path,
        )

    async def _stop_server(self, grace_s: float) -> None:
        process = self._process
        if process is not None:
            remaining = await process.stop(grace_s)
            self._process = None
            await asyncio.to_thread(process.drain, 0.5)
            if remaining:
                log.error("could not end %s", [p.pid for p in remaining])
            if self._scratch is not None:
                await asyncio.to_thread(cleanup.empty_scratch, self._scratch)
            await self._wait_for_gpu_memory(process.pids_ever)
        self._status = dataclasses.replace(self._status, server_pid=None)
        with contextlib.suppress(OSError):
            self._instance.uds_path.unlink()

    async def _wait_for_gpu_memory(self, pids: set[int]) -> None:
        limit = self._policy.gpu_release_timeout_s
        holders = await asyncio.to_thread(
            gpu_memory.wait_until_released, self._gpu_at_first, pids, self._devices, limit
        )
        if holders:
            log.warning("the GPU memory was not all released: %s", holders)

    @property
    def _devices(self) -> str | None:
        return self._spec.devices.get("CUDA_VISIBLE_DEVICES")

    async def _clear_leftovers(self) -> None:
        """Ends what a predecessor that was killed may have left, and removes what it had outside of its folder."""
        strays = await asyncio.to_thread(cleanup.marked_processes, self._instance)
        if strays:
            log.warning("ending processes left by a predecessor: %s", [p.pid for p in strays])
            await asyncio.to_thread(cleanup.end_processes, strays)
        if self._predecessor is not None:
            await asyncio.to_thread(cleanup.remove_recorded, self._predecessor)
            pid = self._predecessor.get("server_pid")
            await self._wait_for_gpu_memory({pid} if isinstance(pid, int) else set())

    def _end(self, reason: str) -> None:
        log.info("ending: %s", reason)
        self._ending.set()

    def _reap(self) -> None:
        """SIGCHLD: the server's exit, and the orphans that fall to us as subreaper."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if found is None:
                break
            if self._process is not None and found.si_pid == self._process.pid:
                self._process.reap()
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(found.si_pid, os.WNOHANG)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _move(self, state: ServerState, **changes: Any) -> None:
        """The one place where the state changes: logged, recorded, sent to every user."""
        self._status = dataclasses.replace(self._status, state=state, **changes)
        log.info("%s epoch=%d", state, self._status.epoch)
        self._write_record()
        event = {"time": time.time(), "state": state, "epoch": self._status.epoch}
        if self._status.diagnosis is not None:
            event["diagnosis"] = self._status.diagnosis.to_dict()
        with contextlib.suppress(OSError), open(self._instance.events_path, "a") as events:
            events.write(json.dumps(event) + "\n")
        self._broadcast()

    def _progress(self, progress: Progress) -> None:
        if self._status.state in (ServerState.STARTING, ServerState.RESTARTING):
            self._status = dataclasses.replace(self._status, stage=progress.stage, detail=progress.detail)
            self._broadcast(droppable=True)

    def _write_record(self) -> None:
        record = {
            "spec": self._spec.masked().to_dict(),
            "pid": os.getpid(),
            "pid_start_time": lifeline.start_time(os.getpid()),
            "state": self._status.state,
            "epoch": self._status.epoch,
            "server_pid": self._status.server_pid,
            "scratch": str(self._scratch) if self._scratch else None,
            "shared_memory": sorted(self._shared_memory),
        }
        try:
            self._instance.write_record(record)
        except OSError as error:  # a full disk must not take the server down
            log.warning("can't write the record: %s", error)

    def _broadcast(self, *, droppable: bool = False) -> None:
        line = channel.encode({"status": self._public_status()})
        for user in list(self._users):
            # A user that is stopped must not make us hoard progress for it.
            if user.leased and not (droppable and user.writer.transport.get_write_buffer_size() > 1 << 16):
                user.writer.write(line)

    def _public_status(self) -> dict[str, Any]:
        leased = [user for user in self._users if user.leased]
        return dataclasses.replace(
            self._status,
            users=len(leased),
            extra={
                "id": self._instance.id,
                "model": self._spec.served_model_name,
                "users": [{"pid": user.pid, "what": user.what, "since": user.since} for user in leased],
                "keep_alive_s": self._keep_alive_s,
            },
        ).to_dict()

    # -- users ---------------------------------------------------------------------------------------------------------

    async def _listen(self) -> asyncio.Server:
        path = self._instance.socket_path
        path.unlink(missing_ok=True)  # stale: we hold the lock
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_path(path) as name:
            listener.bind(name)  # mode 0700 by our umask
        return await asyncio.start_unix_server(self._attend, sock=listener, limit=channel.MAX_LINE, backlog=1024)

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = channel.peer(writer.get_extra_info("socket"))
        if uid != os.getuid():
            log.warning("refused pid %d of uid %d", pid, uid)
            writer.close()
            return
        user = _User(writer, pid)
        self._users.add(user)
        try:
            while line := await reader.readline():
                message = json.loads(line)
                reply = self._answer(user, message)
                writer.write(channel.encode({"id": message.get("id"), **reply}))
                await writer.drain()
        except (ConnectionError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.debug("user %d: %r", pid, error)
        finally:
            self._users.discard(user)
            writer.close()
            if user.leased:
                log.debug("lease of pid %d given back, %d left", pid, sum(u.leased for u in self._users))
                self._users_changed()

    def _answer(self, user: _User, message: Mapping[str, Any]) -> dict[str, Any]:
        match message["op"]:
            case "lease":
                if self._ending.is_set():
                    stopping = dataclasses.replace(self._status, state=ServerState.STOPPING)
                    return {"ok": False, "status": stopping.to_dict()}
                self._first_lease.set()
                user.leased, user.what = True, str(message.get("what", ""))[:200]
                self._keep_alive_s = max(self._keep_alive_s, float(message.get("keep_alive_s", 0.0)))
                log.debug("lease for pid %d", user.pid)
                self._users_changed()
                address = dataclasses.replace(self._address, api_key=self._api_key)
                order = SupervisorOrder(spec=self._spec, address=address, policy=self._policy)
                return {"ok": True, "order": order.to_dict(), "status": self._public_status()}
            case "status":
                return {"ok": True, "status": self._public_status()}
            case "pin" | "unpin" as op:
                self._status = dataclasses.replace(self._status, pinned=op == "pin")
                self._users_changed()
                return {"ok": True, "status": self._public_status()}
            case "restart":
                self._restart_asked.set()
                return {"ok": True, "epoch": self._status.epoch}
            case "stop" if message.get("unless_used") and any(user.leased for user in self._users):
                return {"ok": False, "status": self._public_status()}
            case "stop":
                self._end(f"asked by pid {user.pid}")
                return {"ok": True}
            case op:
                return {"ok": False, "error": f"unknown request {op!r}"}

    def _users_changed(self) -> None:
        wanted = self._status.pinned or any(user.leased for user in self._users)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if not wanted:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self._keep_alive_s, self._end, "the last user is gone")


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:  # not an address of this machine: vLLM says so itself
            probe.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
