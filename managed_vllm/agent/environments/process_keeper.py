"""The process between a rollout and a synchronous environment: it sees to it that nothing of the latter is left.

Run as a program of its own by `environments.process_environment`, with the standard library only: 15 ms and 9 MB. In
this order:

1. It becomes a *subreaper*: whatever is started below it, and however it is detached, falls to it in the end.
2. It forks the worker, which has one thread and no event loop at that moment, in a session of its own. The worker dies
   with the keeper by the kernel's hand (`PR_SET_PDEATHSIG`).
3. It keeps the last of the worker's output, and waits: for a byte on the control socket or its end, for the end of the
   rollout's process (by pidfd, and by its own parent: sockets may live on in children that the rollout forked), for
   the end of the worker, or for a signal to itself.
4. Then it kills all that is below it until the kernel says that there is none, removes the environment's folder, and
   reports how the worker ended.

What it can't do: if it is itself killed, the rollout kills what carries the environment's marker. Only if both are
killed at once, by name for example, grandchildren such as a browser may stay.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_OUTPUT_BYTES = 64 * 1024
"""Of the worker's output that are kept."""

_KILL_S = 10.0
"""After which the keeper gives up killing: a process in the kernel's uninterruptible sleep does not end."""

END = b"K"
"""On the control socket: end everything, now or after the grace."""
STACKS = b"T"
"""The same, but the worker writes its stacks first: it did not return in time."""


class Keeper:
    """See above."""

    def __init__(self, message: int, control: int, owner: int, grace_s: float, folder: str) -> None:
        self._control = socket.socket(fileno=control)
        self._control.setblocking(False)
        self._owner = owner
        self._grace_s = grace_s
        self._folder = folder
        self._status: int | None = None
        self._told = b""
        self._signalled = False
        self._orphaned = False
        self._output = bytearray()
        self._wake, self._waker = socket.socketpair()
        for end in (self._wake, self._waker):
            end.setblocking(False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _nothing)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._reading, writing = os.pipe()
        keeper = os.getpid()
        self._worker = os.fork()
        if self._worker == 0:
            self._control.close()
            self._wake.close()
            signal.set_wakeup_fd(-1)
            self._waker.close()
            os.close(self._reading)
            _work(message, writing, keeper)
        os.close(message)
        os.close(writing)
        os.set_blocking(self._reading, False)
        self._poll = select.poll()
        for descriptor in (self._control.fileno(), self._wake.fileno(), self._reading):
            self._poll.register(descriptor, select.POLLIN)
        self._pidfd: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # an old kernel: then a look at the parent each second
            self._pidfd = os.pidfd_open(owner)
            self._poll.register(self._pidfd, select.POLLIN)

    def run(self, stacks_s: float) -> None:
        """`stacks_s`: in which a hung worker may write its stacks."""
        reason = self._wait()
        if reason == "stacks":
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker, signal.SIGUSR2)
            self._look(stacks_s, until=self._worker_ended, quiet_s=0.1)
        if reason != "ended" and self._grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._worker, signal.SIGTERM)
            self._look(self._grace_s, until=self._worker_ended)
        left = self._kill()
        self._look(0.5, until=lambda: self._reading < 0)
        _remove(self._folder)
        self._report(reason, left)

    def _worker_ended(self) -> bool:
        return self._status is not None

    def _wait(self) -> str:
        """Until there is a reason to end."""
        while True:
            self._look(1.0, until=lambda: bool(self._told) or self._worker_ended() or self._signalled or self._orphaned)
            if self._told:
                return "stacks" if STACKS in self._told else "told"
            if self._worker_ended():
                return "ended"
            if self._signalled:
                return "signal"
            if self._orphaned or os.getppid() != self._owner:
                return "owner"

    def _look(self, timeout_s: float, *, until: Callable[[], bool], quiet_s: float | None = None) -> None:
        """Takes what comes until the condition holds, or nothing was written for `quiet_s` after something was.

        It is not quiet where the worker only waits for a processor, on a busy machine: there may be more.
        """
        deadline = time.monotonic() + timeout_s
        written = False
        while not until():
            wait = max(0.0, deadline - time.monotonic())
            if quiet_s is not None and written:
                wait = min(wait, quiet_s)
            events = self._poll.poll(wait * 1000)
            for descriptor, _ in events:
                written |= self._take(descriptor)
            quiet = quiet_s is not None and written and not events and not _is_running(self._worker)
            if time.monotonic() >= deadline or quiet:
                return

    def _take(self, descriptor: int) -> bool:
        if descriptor == self._reading:
            try:
                chunk = os.read(descriptor, 65536)
            except BlockingIOError:
                return False
            if not chunk:
                self._poll.unregister(descriptor)
                os.close(descriptor)
                self._reading = -1
                return False
            self._output += chunk
            del self._output[:-_OUTPUT_BYTES]
            return True
        if descriptor == self._wake.fileno():
            with contextlib.suppress(BlockingIOError):
                numbers = self._wake.recv(4096)
                self._signalled |= any(number != signal.SIGCHLD for number in numbers)
            self._reap()
        elif descriptor == self._control.fileno():
            try:
                told = self._control.recv(16)
            except BlockingIOError:
                return False
            except OSError:
                told = b""
            self._told += told or END
            if not told:
                self._poll.unregister(descriptor)
        elif descriptor == self._pidfd:
            self._orphaned = True
            self._poll.unregister(descriptor)
        return False

    def _reap(self) -> bool:
        """Takes what has ended; returns whether anything is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._worker:
                self._status = os.waitstatus_to_exitcode(status)

    def _kill(self) -> list[int]:
        """Again and again, since what is being killed may have just forked: until no child is left, so none below."""
        deadline = time.monotonic() + _KILL_S
        pause = 0.001
        while self._reap():
            below = _below(os.getpid())
            for pid in below:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return below
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        return []

    def _report(self, reason: str, left: list[int]) -> None:
        report = {
            "reason": reason,
            "exit_code": self._status,
            "left": left,
            "output": bytes(self._output).decode("utf-8", "replace"),
        }
        with contextlib.suppress(OSError):
            self._control.setblocking(True)
            self._control.settimeout(2.0)
            self._control.sendall(json.dumps(report).encode())


def _is_running(pid: int) -> bool:
    """Whether it is on a processor, or waits for one."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] == b"R"
    except OSError:
        return False


def _below(pid: int) -> list[int]:
    """All live processes below one, by one look at /proc."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{name}/stat", "rb") as stat:
                    state, parent = stat.read().rpartition(b")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(name) if state not in (b"Z", b"X") else -int(name))
    found = []
    heads = [pid]
    while heads:
        for child in children.get(heads.pop(), ()):
            heads.append(abs(child))
            if child > 0:
                found.append(child)
    return found


def _remove(folder: str) -> None:
    import shutil

    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def _nothing(number: int, frame: object) -> None:
    """Makes the signal wake the poll."""


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _work(message: int, output: int, keeper: int) -> NoReturn:
    """The worker's life, in the forked process. What it raises ends it as it would any program."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = _stream(1)
    sys.stderr = _stream(2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR2, file=2)
    os.set_inheritable(message, False)
    connection = socket.socket(fileno=message)
    size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    if not size:  # the rollout has gone
        sys.exit()
    start = json.loads(connection.recv(size, socket.MSG_WAITALL))
    if start["sys_path"] is not None:
        sys.path[:] = start["sys_path"]
    sys.argv[:] = start["argv"]
    try:
        from managed_vllm.agent.environments.process_worker import serve
    except ModuleNotFoundError as error:
        sys.exit(f"{sys.executable} has no {error.name}: install managed-vllm there, too (python=)")

    serve(connection)
    sys.exit()


def _stream(descriptor: int) -> io.TextIOWrapper:
    """Line by line, so that nothing is lost when the process dies."""
    return open(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)


def main(arguments: list[str]) -> None:
    message, control, owner, grace_s, stacks_s, folder = arguments
    Keeper(int(message), int(control), int(owner), float(grace_s), folder).run(float(stacks_s))


if __name__ == "__main__":
    main(sys.argv[1:])
