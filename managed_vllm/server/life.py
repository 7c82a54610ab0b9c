"""The lives of one server, one after the other: it is started, watched, started again, and ended.

A `Life` is the supervisor's state machine for one server, whose states are those of `ServerStatus`:

1. It starts vLLM and follows it until one token has been generated (`managed_vllm.server.startup`).
2. It watches: an exit that was not requested is a crash, whatever its code; a server that runs but does not work is
   detected by `managed_vllm.server.hangs`. Whether it is started again decides `managed_vllm.server.restarts`; before
   that nothing of the old server is left: no process, socket, shared memory or GPU memory.

Must be used from the supervisor's main thread: the server is spawned from it, because the kernel ties the server's life
to the spawning thread. Nothing here blocks for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Collection, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from managed_vllm import served_files
from managed_vllm.config import ServerSpec, SupervisorOrder
from managed_vllm.instance.directory import Instance
from managed_vllm.masking import masked_words
from managed_vllm.served_files import Files
from managed_vllm.server import diagnosis, engine_parts, event_log, heap, launch, stacks
from managed_vllm.server.engine import Engine
from managed_vllm.server.footprint import Footprint
from managed_vllm.server.process import ServerProcess
from managed_vllm.server.restarts import GiveUp, Restarts
from managed_vllm.server.starter import NotForkedError, ServerStarter
from managed_vllm.server.startup_log import StartupLog
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
    ServerState.FAILED: frozenset({ServerState.RESTARTING}),  # one replica of several, when a user asks for a restart
    ServerState.GONE: frozenset(),
}
"""To which states each state may lead; docs/architecture.md says when."""

_STARTING_LOOK_S = 1.0
_READY_LOOK_S = 60.0
"""Seconds between two looks at what shared memory the server has: while it starts it takes most of it."""

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


class IllegalTransitionError(RuntimeError):
    """A server was about to enter a state that can't follow the present one: a bug of ours."""

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


class Owner(Protocol):
    """What a life needs of the supervisor that it belongs to."""

    starter: ServerStarter

    def next_epoch(self) -> int:
        """The number of the launch that is about to be made."""

    def changed(self, *, droppable: bool = False) -> None:
        """The status has changed: the users are told; if `droppable`, only those that keep up with reading."""

    def keep_record(self) -> None:
        """What a successor must know has changed: it is written at once."""

    @property
    def has_folder(self) -> bool:
        """Whether the instance's folder is there, and its supervisor's own."""


class Life:
    """State machine of one server; see the module's docstring."""

    def __init__(
        self,
        instance: Instance,
        order: SupervisorOrder,
        owner: Owner,
        *,
        predecessor: Mapping[str, Any] | None,
    ) -> None:
        """`predecessor` is what the record of a supervisor that was killed says of this server."""
        self._instance = instance
        self._order = order
        self._owner = owner
        self._predecessor = predecessor
        self._status = ServerStatus(
            state=ServerState.STARTING,
            started_at=time.time(),
            log_path=str(instance.server_log),
            supervisor_pid=os.getpid(),
        )
        with contextlib.suppress(TypeError, ValueError):
            # A supervisor that was killed has left its record: its epochs are continued, so that none occurs twice.
            self._status = dataclasses.replace(self._status, epoch=int((predecessor or {}).get("epoch", 0)))
        self._restart_requested = asyncio.Event()
        self._footprint = Footprint(order, instance, predecessor)
        self.engine = Engine(
            predecessor,
            sleeps=bool(order.spec.engine_args.get("enable_sleep_mode")) or order.spec.command is not None,
            on_change=self._engine_changed,
            on_restart=self.restart,
            gpu_memory=lambda: self._footprint.gpu_memory(),
        )
        engine_parts.add_to(self.engine, order)
        self._restarts = Restarts(order.policy.restart, chooses_port=order.address.port is None)
        self._process: ServerProcess | None = None
        self.port: int | None = None
        self.files: Files | None = None
        """The files that the server has read, as far as known."""

    # -- for the supervisor --------------------------------------------------------------------------------------------

    @property
    def status(self) -> ServerStatus:
        """What is known about the server, without its users."""
        return dataclasses.replace(self._status, image_pid=self._owner.starter.image_pid, engine=self.engine.state)

    def to_record(self) -> dict[str, Any]:
        """What a successor of the supervisor must know of the server."""
        return {
            "state": self._status.state,
            "epoch": self._status.epoch,
            "server_pid": self._status.server_pid,
            **self._footprint.to_record(),
            **self.engine.to_record(),
        }

    async def serve(self) -> None:
        """Starts the server, and starts it again as long as the policy says so. Returns once it has failed."""
        await self._footprint.clear_after_predecessor(self._instance, self._predecessor)
        if (self._predecessor or {}).get("state") in (ServerState.READY, ServerState.SLEEPING, ServerState.RESTARTING):
            self._restarts.record_ready()
        await self._serve_from(ServerState.STARTING)

    def revive(self) -> Coroutine[Any, Any, None]:
        """For a server that has failed: it is restarting now, as if it had never crashed. Returns what to run then."""
        self._restarts = Restarts(self._order.policy.restart, chooses_port=self._order.address.port is None)
        self.move(ServerState.RESTARTING, diagnosis=None, ready_at=None, log_path=str(self._instance.server_log))
        return self._serve_from(ServerState.RESTARTING)

    async def _serve_from(self, state: ServerState) -> None:
        if not await self._take_devices():
            return
        policy = self._order.policy
        while True:
            ended = self.engine.loss or await self._one_epoch(state)
            state = ServerState.RESTARTING
            if self._status.ready_at is not None:
                self._restarts.record_ready()
            if isinstance(ended, RestartRequested | GaveWay):
                await self.stop(policy.stop_grace_s)
                if isinstance(ended, GaveWay) and not await self._sleep():
                    return
                continue
            log.error("epoch %d ended: %s (%s)", self._status.epoch, ended.summary, ended.root_line)
            if self._status.ready_at is None and self._owner.starter.start_failed(ended):
                await self.stop(0)
                continue
            decision = self._restarts.decide(ended, epoch=self._status.epoch)
            if isinstance(decision, GiveUp):
                await self._fail(decision.diagnosis)
                return
            if decision.crashed:
                self.move(
                    ServerState.RESTARTING,
                    connection=None,
                    ready_at=None,
                    diagnosis=ended,
                    restarts=self._status.restarts + 1,
                    detail=f"in {decision.delay_s:g} s",
                )
            await self.stop(0)
            await asyncio.sleep(decision.delay_s)

    def reap(self, pid: int) -> bool:
        """A child of ours with this pid has ended: collects its exit code if it was the server; says whether it was."""
        process = self._process
        if process is None or process.pid != pid:
            return False
        process.reap()
        return True

    def restart(self) -> None:
        """A user wants another start of the server."""
        self._restart_requested.set()
        self._footprint.devices.asked_for.set()
        self._leave_ready(None)

    def use(self) -> None:
        """A user needs the server to serve."""
        self._footprint.devices.asked_for.set()

    def forgive(self, epochs: Collection[int]) -> list[int]:
        """These epochs ended under one request; returns those that died: `Restarts.forgive`."""
        return self._restarts.forgive(epochs)

    def folder_renewed(self) -> None:
        """The instance's folder was removed, and has been made anew."""
        self._footprint.renew()
        if self._order.address.uds:
            self.restart()  # its socket was in the folder

    async def stop(self, grace_s: float) -> None:
        """Ends the server, if there is one, so that nothing of it is left."""
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
        if self._owner.has_folder:
            self._instance.uds_path.unlink(missing_ok=True)

    async def remove_footprint(self) -> None:
        """At the very end: what the server had outside of the folder."""
        await self._footprint.remove()

    # -- epochs --------------------------------------------------------------------------------------------------------

    async def _take_devices(self) -> bool:
        """Takes what `devices="auto"` asks for; False if that can't be had, so that the server has failed."""
        if (refused := await self._footprint.devices.take(self.show_progress)) is not None:
            await self._fail(refused)
        self._status = dataclasses.replace(self._status, devices=self._footprint.devices.taken.labels)
        return refused is None

    async def _sleep(self) -> bool:
        """Leaves the devices to others until somebody uses the server; as `_take_devices`."""
        devices = self._footprint.devices
        await asyncio.to_thread(devices.give_back)
        self._status = dataclasses.replace(self._status, devices=(), ready_at=None)
        self._owner.changed()
        await devices.asked_for.wait()
        self.move(ServerState.RESTARTING, diagnosis=None, stage="", detail="")
        return await self._take_devices()

    async def _one_epoch(self, state: ServerState) -> Diagnosis | RestartRequested | GaveWay:
        """One life of the server, from the launch to its end; returns the reason of the end."""
        self._restart_requested.clear()
        self.move(
            state,
            epoch=self._owner.next_epoch(),
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
            on_progress=self.show_progress,
        )
        try:
            ended = await self._until_settled(process, startup.until_ready(), _STARTING_LOOK_S)
            if ended is None:
                restoring = self.engine.restore(launched.connection, launched.control_key)
                ended = await self._until_settled(process, restoring, _STARTING_LOOK_S)
            if ended is None:
                ended = await self._ready(launched, process, probe)
        finally:
            self.engine.leave()
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
        launched.admit()
        self.move(
            ServerState.READY,
            stage="",
            detail="",
            connection=launched.connection,
            ready_at=time.time(),
            diagnosis=None,
        )
        self._owner.starter.server_is_ready()
        await process.record_descendants()
        watch = HangWatch(
            probe, process, self._order.policy.hang, lambda: self.engine.may_stand_still, self._count_health_check
        )
        watching: list[_Watch] = [watch.until_unwell()]
        if self._order.policy.shares:
            turns = Turns(self._footprint.devices, self.engine, probe, started_at=self._status.started_at)
            watching.append(turns.until_given_way(lambda door: self._show_door(door and launched.connection)))
        ended = await self._until_settled(process, first(*watching), _READY_LOOK_S)
        assert ended is not None  # a watch over a server that works does not return
        return ended

    async def _launch(self, startup_log: StartupLog) -> tuple[launch.Launch, ServerProcess]:
        """Starts the server's process and feeds its output to `startup_log`. Raises `_NotLaunchedError`."""
        scratch = await self._footprint.prepare()
        self._owner.keep_record()  # at once: if we are killed, our successor removes it
        self.files = await asyncio.to_thread(_files_to_serve, self._order.spec, self.files)
        devices = self._footprint.devices.taken
        launched = launch.prepare(
            self._order,
            self._instance,
            scratch=scratch,
            last_port=self.port,
            devices=devices,
            held=self.engine.must_be_put_back,
        )
        self.port = launched.port
        loop = asyncio.get_running_loop()

        def on_line(line: str) -> None:  # in the thread that reads
            progress = startup_log.feed(line)
            if progress is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closing
                    loop.call_soon_threadsafe(self.show_progress, progress)

        log.info("epoch %d: %s", self._status.epoch, " ".join(masked_words(launched.argv)))
        limit_s = self._order.policy.startup_timeout_s
        starter = self._owner.starter
        try:
            async with asyncio.timeout(None if limit_s == math.inf else limit_s):
                self._process = process = await starter.start(launched, self._instance, on_line)
        except TimeoutError:
            progress = Progress(Stage(self._status.stage), self._status.detail)
            raise _NotLaunchedError(diagnosis.timed_out(progress, limit_s=limit_s, silent=False)) from None
        except NotForkedError as error:
            raise _NotLaunchedError(diagnosis.not_forked(error.reason)) from error
        except OSError as error:
            raise _NotLaunchedError(diagnosis.could_not_launch(launched.argv, error)) from error
        process.reap()  # a forked one may have ended before it was known to be the server
        self._status = dataclasses.replace(self._status, server_pid=process.pid, launch=starter.how)
        self._owner.keep_record()
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
                    self._owner.keep_record()  # a successor removes what is left of it if we are killed
                done, _ = await asyncio.wait(tasks, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
            # The exit comes first: the log gives its reason, where the watch has only seen its first symptoms.
            if process.exited.is_set():
                return await asyncio.to_thread(_reason_of_exit, process)
            return RestartRequested() if self._restart_requested.is_set() else watch.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # -- state ---------------------------------------------------------------------------------------------------------

    def move(self, state: ServerState, **changes: Any) -> None:
        """The one place where the state changes: checked, logged, recorded, sent to every user.

        Raises `IllegalTransitionError` if `TRANSITIONS` does not have it.
        """
        if state not in TRANSITIONS.get(self._status.state, frozenset()):
            raise IllegalTransitionError(self._status.state, state)
        self._status = dataclasses.replace(self._status, state=state, **changes)
        log.info("%s: %s epoch=%d", self._instance.label, state, self._status.epoch)
        self._owner.keep_record()
        event = {"time": time.time(), "state": state, "epoch": self._status.epoch}
        if self._instance.replica is not None:
            event["replica"] = self._instance.replica
        if self._status.diagnosis is not None:
            event["diagnosis"] = self._status.diagnosis.to_dict()
        events_path = self._instance.events_path if self._owner.has_folder else Path(os.devnull)
        event_log.append(events_path, event)
        self._owner.changed()

    async def _fail(self, reason: Diagnosis) -> None:
        # The error before the cleaning up: all users that wait get it at once.
        kept = await asyncio.to_thread(self._instance.keep_log)
        self.move(
            ServerState.FAILED,
            diagnosis=reason,
            connection=None,
            log_path=str(kept) if kept else self._status.log_path,
        )

    def _show_door(self, connection: Connection | Literal[False]) -> None:
        """Users find the server there, or are to wait while it finishes what it has."""
        self.move(ServerState.READY if connection else ServerState.SLEEPING, connection=connection or None)

    def _leave_ready(self, reason: Diagnosis | None) -> None:
        """At once when the epoch is to be ended: whoever comes while the server is stopped waits for the next one."""
        if self._status.state is ServerState.READY:
            self.move(ServerState.RESTARTING, connection=None, diagnosis=reason, detail="stopping")

    def _engine_changed(self) -> None:
        self._owner.keep_record()
        self._owner.changed()

    def _count_health_check(self, latency_s: float | None) -> None:
        self._status = dataclasses.replace(self._status, health=self._status.health.counting(latency_s))

    def show_progress(self, progress: Progress) -> None:
        """Shows the users how far a start is. Progress that arrives after the start is dropped."""
        if self._status.state in (ServerState.STARTING, ServerState.RESTARTING):
            self._status = dataclasses.replace(self._status, stage=progress.stage, detail=progress.detail)
            self._owner.changed(droppable=True)


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
