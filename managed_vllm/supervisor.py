"""The supervisor: one small process per server; it alone starts, restarts and ends vLLM.

It is spawned by the first user (`managed_vllm.instance.spawn`), under the instance's start lock; `main` is its entry
point. What it does, in order:

1. Detaches from the user that started it, becomes subreaper, listens on `control.sock`. `supervisor.lock` was taken by
   that user and handed on.
2. Ends what a predecessor may have left, then starts vLLM and follows it until one token has been generated
   (`managed_vllm.server.startup`).
3. Watches: an exit that was not requested is a crash, whatever its code; a server that runs but does not work is
   detected by `managed_vllm.server.hangs`. Whether it is restarted decides `managed_vllm.server.restarts`; before that
   nothing of the old server is left: no process, socket, shared memory or GPU memory.
4. Counts leases (`managed_vllm.instance.leases`). When there has been none for `keep_alive` seconds and the server is
   not pinned, it stops the server, leaves no process, removes the instance's folder and ends.

One main thread with an event loop; the server is spawned from it, because the kernel ties the server's life to the
spawning thread. The loop does nothing that can block for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import json
import logging
import math
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from managed_vllm import served_files
from managed_vllm.config import PROTOCOL, ServerSpec, SupervisorOrder
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup, names
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.folder_hold import FolderHold
from managed_vllm.instance.leases import FIRST_LEASE_S, Leases, Retention
from managed_vllm.instance.spawn import FAILED, LISTENS
from managed_vllm.masking import Secret, masked_words
from managed_vllm.served_files import Files
from managed_vllm.server import diagnosis, engine_parts, event_log, heap, launch, stacks
from managed_vllm.server.engine import Engine
from managed_vllm.server.footprint import Footprint
from managed_vllm.server.process import ServerProcess
from managed_vllm.server.restarts import GiveUp, Restarts
from managed_vllm.server.starter import NotForkedError, ServerStarter
from managed_vllm.server.startup_log import StartupLog
from managed_vllm.server.supervisor_log import BoundedLog, write_output_to
from managed_vllm.server.turns import GaveWay, Turns, first
from managed_vllm.status import Cause, Connection, Diagnosis, Progress, ServerState, ServerStatus, Stage

if TYPE_CHECKING:
    from managed_vllm.server.probe import Probe

log = logging.getLogger("managed_vllm.supervisor")

TRANSITIONS: Mapping[ServerState, frozenset[ServerState]] = {
    ServerState.STARTING: frozenset(
        {
            ServerState.STARTING,
            ServerState.READY,
            ServerState.RESTARTING,
            ServerState.FAILED,
            ServerState.STOPPING,
        }
    ),
    ServerState.READY: frozenset(
        {ServerState.SLEEPING, ServerState.RESTARTING, ServerState.FAILED, ServerState.STOPPING}
    ),
    ServerState.SLEEPING: frozenset(
        {ServerState.READY, ServerState.RESTARTING, ServerState.FAILED, ServerState.STOPPING}
    ),
    ServerState.RESTARTING: frozenset(
        {ServerState.READY, ServerState.RESTARTING, ServerState.FAILED, ServerState.STOPPING}
    ),
    ServerState.STOPPING: frozenset({ServerState.GONE}),
    ServerState.FAILED: frozenset(),
    ServerState.GONE: frozenset(),
}
"""To which states each state may lead; docs/architecture.md says when."""

_STARTING_LOOK_S = 1.0
_READY_LOOK_S = 60.0
"""Seconds between two looks at what shared memory the server has: while it starts it takes most of it."""

_PR_SET_CHILD_SUBREAPER = 36

_NOT_FOR_US = frozenset(
    {
        signal.SIGHUP,
        signal.SIGPIPE,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGVTALRM,
        signal.SIGPROF,
        signal.SIGXCPU,
        signal.SIGIO,
        signal.SIGPWR,
        signal.SIGQUIT,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
    }
)
"""Signals that end or stop a process by default, and that batch systems and terminals send to all of a job's."""

_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
"""Soft limits that are raised to the hard ones: `ulimit -Sn 256` in a user's shell is no wish for the server."""

_STUCK_SOMEWHERE = frozenset(
    {
        Cause.ENGINE_HUNG,
        Cause.API_SERVER_HUNG,
        Cause.PROCESS_STOPPED,
        Cause.STARTUP_SILENCE,
        Cause.STARTUP_TIMEOUT,
    }
)
"""Causes for which it helps to see where the processes are stuck."""


def main() -> None:
    """Entry point of the supervisor process. Its orders come as a line of JSON on standard input."""
    message = json.loads(sys.stdin.buffer.readline())
    if os.fork():
        os._exit(0)
    os.setsid()
    heap.use_one_arena()
    _forget_starter()
    for descriptor in (message["life"], message["lock"]):
        os.set_inheritable(descriptor, False)
    instance = Instance(Path(message["home"]), message["id"])
    handlers = [BoundedLog(instance.supervisor_log)]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=handlers)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    life = [message["life"]]

    def tell_starter(word: bytes) -> None:
        """Once; where we fail before we listen, it must not simply start another one of us."""
        while life:
            with contextlib.suppress(OSError):  # it may be gone
                os.write(life[0], word)
            os.close(life.pop())

    try:
        order = SupervisorOrder.from_dict(message["order"])
        asyncio.run(_supervise(instance, order, lock=message["lock"], on_listening=lambda: tell_starter(LISTENS)))
    except BaseException:
        log.exception("the supervisor failed")
        tell_starter(FAILED)
        raise


def _forget_starter() -> None:
    """Nothing of how our starter runs is ours, nor the server's: masks, dispositions, limits, priority, umask.

    A batch system warns all processes of a job by signals whose meaning is the program's (`--signal=USR1@120`):
    neither we nor the server take notice of them.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN if number in _NOT_FOR_US else signal.SIG_DFL)
    os.umask(0o077)
    os.chdir("/")
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # a higher one may be refused
    for limit in _LIMITS:
        _, hard = resource.getrlimit(limit)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (hard, hard))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if null > 2:
        os.close(null)


async def _supervise(
    instance: Instance, order: SupervisorOrder, *, lock: int, on_listening: Callable[[], None]
) -> None:
    """Runs the supervisor; `lock` is the descriptor of the locked `supervisor.lock`."""
    hold = FolderHold(instance, lock)
    await Supervisor(instance, order, hold).run(on_listening)
    hold.release()


class IllegalTransitionError(RuntimeError):
    """The supervisor was about to enter a state that can't follow the present one: a bug of ours."""

    def __init__(self, old: ServerState, new: ServerState) -> None:
        super().__init__(f"{new} can't follow {old}")
        self.old = old
        self.new = new


class RestartRequested:
    """How an epoch ended: a user asked for a restart. That is no crash, and is not counted as one."""


_Watch = Coroutine[Any, Any, Diagnosis | GaveWay | None]
"""Runs until it has seen something, and returns that."""


class _NotLaunchedError(Exception):
    """The operating system refused to run the server's program."""

    def __init__(self, reason: Diagnosis) -> None:
        super().__init__(reason.summary)
        self.reason = reason


class Supervisor:
    """State machine of one server; see the module's docstring."""

    def __init__(self, instance: Instance, order: SupervisorOrder, hold: FolderHold) -> None:
        key = order.address.api_key or Secret(secrets.token_urlsafe(32))
        self._instance = instance
        self._hold = hold
        self._order = dataclasses.replace(order, address=dataclasses.replace(order.address, api_key=key))
        self._status = ServerStatus(
            state=ServerState.STARTING,
            started_at=time.time(),
            log_path=str(instance.server_log),
            supervisor_pid=os.getpid(),
        )
        self._ending = asyncio.Event()
        self._restart_requested = asyncio.Event()
        self._predecessor = instance.read_record()
        self._footprint = Footprint(order, instance.id, self._predecessor)
        self._engine = Engine(
            self._predecessor,
            sleeps=bool(order.spec.engine_args.get("enable_sleep_mode")) or order.spec.command is not None,
            on_change=self._engine_changed,
            on_restart=self._restart,
            gpu_memory=lambda: self._footprint.gpu_memory(),
        )
        engine_parts.add_to(self._engine, order)
        self._leases = Leases(
            instance,
            self._order,
            status=lambda: dataclasses.replace(
                self._status, image_pid=self._starter.image_pid, engine=self._engine.state
            ),
            on_end=self._end,
            on_restart=self._restart,
            on_use=self._footprint.devices.asked_for.set,
            on_deaths=lambda epochs: self._restarts.forgive(epochs),
            listens_and_serves=lambda: (self._port, self._files),
            engine=self._engine,
            retention=Retention.from_record(self._predecessor),
            on_retention=self._write_record,
        )
        self._restarts = Restarts(order.policy.restart, chooses_port=order.address.port is None)
        self._starter = ServerStarter(self._order, instance, on_progress=self._show_progress)
        self._process: ServerProcess | None = None
        self._port: int | None = None
        self._files: Files | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self, on_listening: Callable[[], None]) -> None:
        """From listening to the removal of the folder. `on_listening` is called once users can connect."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, lambda: _reap(self._process))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, f"signal {number.name}")
        with contextlib.suppress(TypeError, ValueError):
            # A supervisor that was killed has left its record: its epochs are continued, so that none occurs twice.
            self._status = dataclasses.replace(self._status, epoch=int((self._predecessor or {}).get("epoch", 0)))
        await self._leases.listen()
        on_listening()
        self._move(ServerState.STARTING)
        try:
            await self._serve_until_the_end()
        finally:
            await self._stop_server(0 if self._status.state is ServerState.FAILED else self._order.policy.stop_grace_s)
            await self._starter.end()
            if self._status.state is ServerState.STOPPING:
                self._move(ServerState.GONE)
            else:  # the user that started us may not have connected yet, and must learn why it failed
                await self._leases.wait_for_first(FIRST_LEASE_S)
            self._leases.close()
            await self._footprint.remove()
            await _remove_folder(self._instance, self._hold)

    async def _serve_until_the_end(self) -> None:
        """Serves until the server has failed or is not wanted any more."""
        serving = asyncio.create_task(self._serve())
        ending = asyncio.create_task(self._ending.wait())
        holding = asyncio.create_task(self._hold.keep(self._folder_renewed, self._folder_lost))
        try:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done() and (error := serving.exception()) is not None:
                log.error("the supervisor failed", exc_info=error)
                self._move(ServerState.FAILED, connection=None, diagnosis=diagnosis.supervisor_failed(error))
            if self._status.state is not ServerState.FAILED:
                self._move(ServerState.STOPPING)
        finally:
            for task in (serving, ending, holding):
                task.cancel()
            await asyncio.gather(serving, ending, holding, return_exceptions=True)

    async def _folder_renewed(self) -> None:
        await self._leases.listen_anew()
        self._footprint.renew()
        if self._order.address.uds:
            self._restart()  # its socket was in the folder
        self._write_record()
        write_output_to(self._instance.supervisor_log)

    def _folder_lost(self) -> None:
        self._leases.close()  # as if we had been killed: the users find the other supervisor
        self._end("the state folder was removed, and another supervisor has come up in the new one")

    async def _serve(self) -> None:
        """Starts the server, and starts it again as long as the policy says so. Returns once it has failed."""
        await self._footprint.clear_after_predecessor(self._instance, self._predecessor)
        if not await self._take_devices():
            return
        policy = self._order.policy
        if (self._predecessor or {}).get("state") in (ServerState.READY, ServerState.SLEEPING, ServerState.RESTARTING):
            self._restarts.record_ready()
        state = ServerState.STARTING
        while True:
            ended = self._engine.loss or await self._one_epoch(state)
            state = ServerState.RESTARTING
            if self._status.ready_at is not None:
                self._restarts.record_ready()
            if isinstance(ended, RestartRequested | GaveWay):
                await self._stop_server(policy.stop_grace_s)
                if isinstance(ended, GaveWay) and not await self._sleep():
                    return
                continue
            log.error("epoch %d ended: %s (%s)", self._status.epoch, ended.summary, ended.root_line)
            if self._status.ready_at is None and self._starter.start_failed(ended):
                await self._stop_server(0)
                continue
            decision = self._restarts.decide(ended, epoch=self._status.epoch)
            if isinstance(decision, GiveUp):
                await self._fail(decision.diagnosis)
                return
            if decision.crashed:
                self._move(
                    ServerState.RESTARTING,
                    connection=None,
                    ready_at=None,
                    diagnosis=ended,
                    restarts=self._status.restarts + 1,
                    detail=f"in {decision.delay_s:g} s",
                )
            await self._stop_server(0)
            await asyncio.sleep(decision.delay_s)

    async def _take_devices(self) -> bool:
        """Takes what `devices="auto"` asks for; False if that can't be had, so that the server has failed."""
        if (refused := await self._footprint.devices.take(self._show_progress)) is not None:
            await self._fail(refused)
        self._status = dataclasses.replace(self._status, devices=self._footprint.devices.taken.labels)
        return refused is None

    async def _sleep(self) -> bool:
        """Leaves the devices to others until somebody uses the server; as `_take_devices`."""
        devices = self._footprint.devices
        await asyncio.to_thread(devices.give_back)
        self._status = dataclasses.replace(self._status, devices=(), ready_at=None)
        self._leases.publish()
        await devices.asked_for.wait()
        self._move(ServerState.RESTARTING, diagnosis=None, stage="", detail="")
        return await self._take_devices()

    async def _one_epoch(self, state: ServerState) -> Diagnosis | RestartRequested | GaveWay:
        """One life of the server, from the launch to its end; returns the reason of the end."""
        self._restart_requested.clear()
        self._move(
            state,
            epoch=self._status.epoch + 1,
            stage=Stage.LAUNCHING,
            detail="",
            started_at=time.time(),
            ready_at=None,
        )
        began_at = time.monotonic()
        startup_log = StartupLog()
        try:
            launched, process = await self._launch(startup_log)
        except _NotLaunchedError as not_launched:
            return not_launched.reason
        is_vllm = self._order.spec.command is None
        # Only now, while vLLM is importing too, and in a thread: the first time this takes a while.
        probe = await asyncio.to_thread(_make_probe, launched.connection, is_vllm)
        from managed_vllm.server.startup import StartupWatch

        startup = StartupWatch(
            probe,
            process,
            startup_log,
            self._order.policy,
            port=launched.port,
            may_listen_elsewhere=not is_vllm,
            began_at=began_at,
            on_progress=self._show_progress,
        )
        try:
            ended = await self._until_settled(process, startup.until_ready(), _STARTING_LOOK_S)
            if ended is None:
                restoring = self._engine.restore(launched.connection, launched.control_key)
                ended = await self._until_settled(process, restoring, _STARTING_LOOK_S)
            if ended is None:
                ended = await self._ready(launched, process, probe)
        finally:
            self._engine.leave()
            await probe.close()
        if isinstance(ended, Diagnosis) and ended.cause in _STUCK_SOMEWHERE and process.returncode is None:
            self._leave_ready(ended)
            ended = await _with_stacks(ended, process, self._instance)
        return ended

    async def _ready(
        self, launched: launch.Launch, process: ServerProcess, probe: Probe
    ) -> Diagnosis | RestartRequested | GaveWay:
        """Serves until the server ends, stops working, gives way or is to be restarted; returns which of these."""
        from managed_vllm.server.hangs import HangWatch

        if self._restart_requested.is_set():  # since it has generated its token
            return RestartRequested()
        process.output.end_of_startup()
        self._move(
            ServerState.READY,
            stage="",
            detail="",
            connection=launched.connection,
            ready_at=time.time(),
            diagnosis=None,
        )
        self._starter.server_is_ready()
        await process.record_descendants()
        watch = HangWatch(
            probe, process, self._order.policy.hang, lambda: self._engine.may_stand_still, self._count_health_check
        )
        watching: list[_Watch] = [watch.until_unwell()]
        if self._order.policy.shares:
            turns = Turns(self._footprint.devices, self._engine, probe, started_at=self._status.started_at)
            watching.append(turns.until_given_way(lambda door: self._show_door(door and launched.connection)))
        ended = await self._until_settled(process, first(*watching), _READY_LOOK_S)
        assert ended is not None  # a watch over a server that works does not return
        return ended

    # -- starting and watching -----------------------------------------------------------------------------------------

    async def _launch(self, startup_log: StartupLog) -> tuple[launch.Launch, ServerProcess]:
        """Starts the server's process and feeds its output to `startup_log`. Raises `_NotLaunchedError`."""
        scratch = await self._footprint.prepare()
        self._write_record()  # at once: if we are killed, our successor removes it
        self._files = await asyncio.to_thread(_files_to_serve, self._order.spec, self._files)
        devices = self._footprint.devices.taken
        launched = launch.prepare(self._order, self._instance, scratch=scratch, last_port=self._port, devices=devices)
        self._port = launched.port
        loop = asyncio.get_running_loop()

        def on_line(line: str) -> None:  # in the thread that reads
            progress = startup_log.feed(line)
            if progress is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closing
                    loop.call_soon_threadsafe(self._show_progress, progress)

        log.info("epoch %d: %s", self._status.epoch, " ".join(masked_words(launched.argv)))
        limit_s = self._order.policy.startup_timeout_s
        try:
            async with asyncio.timeout(None if limit_s == math.inf else limit_s):
                self._process = process = await self._starter.start(launched, on_line)
        except TimeoutError:
            progress = Progress(Stage(self._status.stage), self._status.detail)
            raise _NotLaunchedError(diagnosis.timed_out(progress, limit_s=limit_s, silent=False)) from None
        except NotForkedError as error:
            raise _NotLaunchedError(diagnosis.not_forked(error.reason)) from error
        except OSError as error:
            raise _NotLaunchedError(diagnosis.could_not_launch(launched.argv, error)) from error
        process.reap()  # a forked one may have ended before it was known to be the server
        self._status = dataclasses.replace(self._status, server_pid=process.pid, launch=self._starter.how)
        self._write_record()
        return launched, process

    async def _until_settled(
        self, process: ServerProcess, watching: _Watch, look_s: float
    ) -> Diagnosis | RestartRequested | GaveWay | None:
        """Runs a watch until it returns, which is our result, the server ends, or a user asks for a restart.

        The shared memory of the server is recorded every `look_s` seconds meanwhile.
        """
        watch = asyncio.create_task(watching)
        tasks: set[asyncio.Task[Any]] = {
            watch,
            asyncio.create_task(process.exited.wait()),
            asyncio.create_task(self._restart_requested.wait()),
        }
        try:
            done: set[asyncio.Task[Any]] = set()
            while not done:
                if await self._footprint.look(process):
                    self._write_record()  # a successor removes what is left of it if we are killed
                done, _ = await asyncio.wait(tasks, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
            # The exit comes first: the log gives its reason, where the watch has only seen its first symptoms.
            if process.exited.is_set():
                return await asyncio.to_thread(_reason_of_exit, process)
            return RestartRequested() if self._restart_requested.is_set() else watch.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- ending --------------------------------------------------------------------------------------------------------

    async def _fail(self, reason: Diagnosis) -> None:
        # The error before the cleaning up: all users that wait get it at once.
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
            await asyncio.to_thread(process.output.drain, 0.5)
            if remaining:
                log.error("could not end %s", [p.pid for p in remaining])
            await self._footprint.clear(process.pids_ever)
            heap.trim()
        self._status = dataclasses.replace(self._status, server_pid=None)
        if self._hold.is_intact:
            self._instance.uds_path.unlink(missing_ok=True)

    def _restart(self) -> None:
        self._restart_requested.set()
        self._footprint.devices.asked_for.set()
        self._leave_ready(None)

    def _show_door(self, connection: Connection | Literal[False]) -> None:
        """Users find the server there, or are to wait while it finishes what it has."""
        self._move(ServerState.READY if connection else ServerState.SLEEPING, connection=connection or None)

    def _leave_ready(self, reason: Diagnosis | None) -> None:
        """At once when the epoch is to be ended: whoever comes while the server is stopped waits for the next one."""
        if self._status.state is ServerState.READY:
            self._move(ServerState.RESTARTING, connection=None, diagnosis=reason, detail="stopping")

    def _end(self, reason: str) -> None:
        log.info("ending: %s", reason)
        self._leases.refuse_new()
        self._ending.set()

    # -- state ---------------------------------------------------------------------------------------------------------

    def _move(self, state: ServerState, **changes: Any) -> None:
        """The one place where the state changes: checked, logged, recorded, sent to every user.

        Raises `IllegalTransitionError` if `TRANSITIONS` does not have it.
        """
        if state not in TRANSITIONS.get(self._status.state, frozenset()):
            raise IllegalTransitionError(self._status.state, state)
        self._status = dataclasses.replace(self._status, state=state, **changes)
        log.info("%s epoch=%d", state, self._status.epoch)
        self._write_record()
        event = {"time": time.time(), "state": state, "epoch": self._status.epoch}
        if self._status.diagnosis is not None:
            event["diagnosis"] = self._status.diagnosis.to_dict()
        events_path = self._instance.events_path if self._hold.is_intact else Path(os.devnull)
        event_log.append(events_path, event)
        self._leases.publish()

    def _engine_changed(self) -> None:
        self._write_record()
        self._leases.publish()

    def _count_health_check(self, latency_s: float | None) -> None:
        self._status = dataclasses.replace(self._status, health=self._status.health.counting(latency_s))

    def _show_progress(self, progress: Progress) -> None:
        """Shows the users how far a start is. Progress that arrives after the start is dropped."""
        if self._status.state in (ServerState.STARTING, ServerState.RESTARTING):
            self._status = dataclasses.replace(self._status, stage=progress.stage, detail=progress.detail)
            self._leases.publish(droppable=True)

    def _write_record(self) -> None:
        record = {
            "protocol": PROTOCOL,
            "spec": self._order.spec.masked().to_dict(),
            "pid": os.getpid(),
            "pid_start_time": lifeline.start_time(os.getpid()),
            "state": self._status.state,
            "epoch": self._status.epoch,
            "server_pid": self._status.server_pid,
            **self._footprint.to_record(),
            **self._leases.retention.to_record(),
            **self._engine.to_record(),
        }
        try:
            if self._hold.is_intact:  # else there is no folder, or it is another supervisor's
                self._instance.write_record(record)
        except OSError as error:  # a full disk must not take the server down
            log.warning("can't write the record: %s", error)


async def _remove_folder(instance: Instance, hold: FolderHold) -> None:
    """Removes the folder, unless another user is about to start a server in it: then it is theirs.

    While we hold `supervisor.lock`, `start.lock` is never kept for longer than it takes to see that we do.
    """
    if not hold.regain():
        return
    # Names before the folder: a name must never stand for a folder of somebody else's.
    await asyncio.to_thread(names.drop_names, instance.home, instance.id)
    with contextlib.suppress(OSError):
        instance.socket_path.unlink()
    with contextlib.suppress(OSError):
        await asyncio.to_thread(cleanup.remove_own_instance, instance)


def _reap(server: ServerProcess | None) -> None:
    """SIGCHLD: the server's exit, and the orphans that fall to us as subreaper."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            break
        if found is None:
            break
        # The exit code of the server must be left for `subprocess` to collect.
        if server is not None and found.si_pid == server.pid:
            server.reap()
        else:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(found.si_pid, os.WNOHANG)


def _make_probe(connection: Connection, is_vllm: bool) -> Probe:
    """A probe, with all imported that it and the watches need, down to what httpx imports at its first request."""
    import anyio.lowlevel

    from managed_vllm.server import hangs, startup  # noqa: F401
    from managed_vllm.server.probe import Probe

    anyio.run(anyio.lowlevel.checkpoint)
    return Probe(connection, is_vllm=is_vllm)


def _files_to_serve(spec: ServerSpec, before: Files | None) -> Files:
    """The files that the server is about to read. What has changed since the last epoch is logged."""
    now = served_files.snapshot(spec)
    if before is not None and (changed := served_files.changes(before, now)):
        log.warning("files of the model have changed since the last epoch: %s", ", ".join(changed))
    return now


async def _with_stacks(reason: Diagnosis, process: ServerProcess, instance: Instance) -> Diagnosis:
    text = await asyncio.to_thread(stacks.dump, process.processes(), reason=reason.summary)
    kept = await asyncio.to_thread(instance.keep_stacks, text)
    log.error("%s; stacks in %s", reason.summary, kept)
    return dataclasses.replace(reason, facts={**reason.facts, "stacks": str(kept)}) if kept else reason


def _reason_of_exit(process: ServerProcess) -> Diagnosis:
    """Reads the rest of the output, then searches the log. Runs in a thread, because both may take a while."""
    process.output.drain()
    return diagnosis.diagnose(list(process.output.lines), returncode=process.returncode)
