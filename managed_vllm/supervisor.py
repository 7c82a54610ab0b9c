"""The supervisor: one small process per instance; it alone starts, restarts and ends vLLM.

It is spawned by the first user (`managed_vllm.instance.spawn`), under the instance's start lock; `main` is its entry
point. What it does, in order:

1. Detaches from the user that started it, becomes subreaper, listens on `control.sock`. `supervisor.lock` was taken by
   that user and handed on.
2. Ends what a predecessor may have left, then starts vLLM, watches it, and starts it again when it ends
   (`managed_vllm.server.life`): one server, or several replicas (`managed_vllm.server.replica_set`).
3. Counts leases (`managed_vllm.instance.leases`). When there has been none for `keep_alive` seconds and the server is
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
import os
import resource
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from managed_vllm.config import PROTOCOL, SupervisorOrder
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup, names
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.folder_hold import FolderHold
from managed_vllm.instance.leases import FIRST_LEASE_S, Leases, Retention
from managed_vllm.instance.spawn import FAILED, LISTENS
from managed_vllm.masking import Secret
from managed_vllm.server import diagnosis, heap
from managed_vllm.server.life import Life
from managed_vllm.server.replica_set import ReplicaSet
from managed_vllm.server.starter import ServerStarter
from managed_vllm.server.supervisor_log import BoundedLog, write_output_to
from managed_vllm.status import ServerState

log = logging.getLogger("managed_vllm.supervisor")

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


class Supervisor:
    """What concerns the process: its users, its folder, its signals and its end; see the module's docstring."""

    def __init__(self, instance: Instance, order: SupervisorOrder, hold: FolderHold) -> None:
        key = order.address.api_key or Secret(secrets.token_urlsafe(32))
        self._instance = instance
        self._hold = hold
        self._order = dataclasses.replace(order, address=dataclasses.replace(order.address, api_key=key))
        self._ending = asyncio.Event()
        predecessor = instance.read_record()
        self.starter = ServerStarter(self._order, instance, on_progress=lambda seen: self._serving.show_progress(seen))
        kind = Life if order.spec.replicas == 1 else ReplicaSet
        self._serving: Life | ReplicaSet = kind(instance, self._order, self, predecessor=predecessor)
        self._leases = Leases(
            instance,
            self._order,
            status=lambda: self._serving.status,
            on_end=self._end,
            on_restart=self._serving.restart,
            on_use=self._serving.use,
            on_deaths=lambda epochs: self._serving.forgive(epochs),
            listens_and_serves=lambda: (self._serving.port, self._serving.files),
            engine=self._serving.engine,
            retention=Retention.from_record(predecessor),
            on_retention=self.keep_record,
        )

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self, on_listening: Callable[[], None]) -> None:
        """From listening to the removal of the folder. `on_listening` is called once users can connect."""
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, lambda: _reap(self._serving))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, f"signal {number.name}")
        await self._leases.listen()
        on_listening()
        self._serving.move(ServerState.STARTING)
        try:
            await self._serve_until_the_end()
        finally:
            failed = self._serving.status.state is ServerState.FAILED
            await self._serving.stop(0 if failed else self._order.policy.stop_grace_s)
            await self.starter.end()
            if self._serving.status.state is ServerState.STOPPING:
                self._serving.move(ServerState.GONE)
            else:  # the user that started us may not have connected yet, and must learn why it failed
                await self._leases.wait_for_first(FIRST_LEASE_S)
            self._leases.close()
            await self._serving.remove_footprint()
            await _remove_folder(self._instance, self._hold)

    async def _serve_until_the_end(self) -> None:
        """Serves until the server has failed or is not wanted any more."""
        serving = asyncio.create_task(self._serving.serve())
        ending = asyncio.create_task(self._ending.wait())
        holding = asyncio.create_task(self._hold.keep(self._folder_renewed, self._folder_lost))
        try:
            await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done() and (error := serving.exception()) is not None:
                log.error("the supervisor failed", exc_info=error)
                self._serving.move(ServerState.FAILED, connection=None, diagnosis=diagnosis.supervisor_failed(error))
            if self._serving.status.state is not ServerState.FAILED:
                self._serving.move(ServerState.STOPPING)
        finally:
            for task in (serving, ending, holding):
                task.cancel()
            await asyncio.gather(serving, ending, holding, return_exceptions=True)

    async def _folder_renewed(self) -> None:
        await self._leases.listen_anew()
        self._serving.folder_renewed()
        self.keep_record()
        write_output_to(self._instance.supervisor_log)

    def _folder_lost(self) -> None:
        self._leases.close()  # as if we had been killed: the users find the other supervisor
        self._end("the state folder was removed, and another supervisor has come up in the new one")

    def _end(self, reason: str) -> None:
        log.info("ending: %s", reason)
        self._leases.refuse_new()
        self._ending.set()

    # -- what serves ---------------------------------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """As `life.Owner` says."""
        return self._serving.status.epoch + 1

    def changed(self, *, droppable: bool = False) -> None:
        """As `life.Owner` says."""
        self._leases.publish(droppable=droppable)

    @property
    def has_folder(self) -> bool:
        """As `life.Owner` says."""
        return self._hold.is_intact

    def keep_record(self) -> None:
        """As `life.Owner` says."""
        record = {
            "protocol": PROTOCOL,
            "spec": self._order.spec.masked().to_dict(),
            "pid": os.getpid(),
            "pid_start_time": lifeline.start_time(os.getpid()),
            **self._serving.to_record(),
            **self._leases.retention.to_record(),
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


def _reap(serving: Life | ReplicaSet) -> None:
    """SIGCHLD: a server's exit, and the orphans that fall to us as subreaper."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            break
        if found is None:
            break
        # The exit code of a server must be left for `subprocess` to collect.
        if not serving.reap(found.si_pid):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(found.si_pid, os.WNOHANG)
