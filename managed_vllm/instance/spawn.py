"""Starting a supervisor, from the user's side.

The first user of an instance spawns its supervisor under the instance's start lock, gives that back, and waits until
the supervisor listens. What must hold:

1. `supervisor.lock` is taken here and passed to the supervisor as an open descriptor, so that a second user never finds
   it free in between, whichever of us is killed.
2. No user waits for a supervisor that is dead: it holds the end of a pipe, which the kernel closes when it dies.
3. A user that is stopped once it has spawned the supervisor (Ctrl-Z) holds up nobody: it holds no lock, and the
   supervisor has its order.

The process itself is `managed_vllm.supervisor`, run by its name: no user imports it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import managed_vllm
from managed_vllm.config import SupervisorOrder
from managed_vllm.errors import SupervisorError
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance.directory import Instance, above_standard

_NOT_INHERITED = (lifeline.MARKER, lifeline.SUPERVISOR, lifeline.ROOT, lifeline.REPLICA, "PYTHONHOME")
"""Variables that belong to one server's processes: the caller may itself run inside of another server."""

_LOOK_S = 0.1
"""Seconds between two looks whether a supervisor that comes up is still wanted."""

LISTENS, FAILED = b"1", b"0"
"""What a supervisor tells its starter. Nothing at all: it was killed."""


def start_supervisor(instance: Instance, order: SupervisorOrder) -> ComingUp | None:
    """Starts the supervisor of an instance; None if there is one already. The caller holds the start lock."""
    lock = instance.take_supervisor_lock()
    if lock is None:
        return None
    try:
        return _spawn(instance, order, lock)
    finally:
        instance.hand_on_lock(lock)


class ComingUp:
    """A supervisor that has been spawned and may not listen yet. `listens` must be called."""

    def __init__(self, instance: Instance, starter: subprocess.Popen[bytes], life: int, order: _OrderPipe) -> None:
        self._instance = instance
        self._starter = starter
        self._life = life
        self._order = order

    def listens(self, wanted: Callable[[], bool] = lambda: True, *, timeout_s: float = 45.0) -> bool:
        """Waits until it listens on the control socket: True.

        False: it was killed before that, and another one may be started; or it is not `wanted` any more, and will end
        by itself, for nobody takes a lease. Raises `SupervisorError` if it fails, or does not come up within
        `timeout_s` seconds.
        """
        patience = _Patience(timeout_s, wanted)
        try:
            self._order.send_rest()
            forked = self._starter_has_ended(patience)
            word = os.read(self._life, 1) if forked and _readable(self._life, patience) else FAILED
        finally:
            self._order.close()
            os.close(self._life)
            self._starter.kill()  # nothing, if it has ended
            self._starter.wait()
        if word == LISTENS:
            return True
        if not wanted() or (not word and self._starter.returncode <= 0):
            return False
        raise SupervisorError(
            f"the supervisor process did not come up; it said:\n{_said(self._instance)}", instance=self._instance.id
        )

    def _starter_has_ended(self, patience: _Patience) -> bool:
        while left_s := patience.left_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._starter.wait(left_s)
                return True
        return False


class _Patience:
    """How long somebody waits: for some seconds, and as long as it is wanted."""

    def __init__(self, seconds: float, wanted: Callable[[], bool]) -> None:
        self._until = time.monotonic() + seconds
        self.wanted = wanted

    @property
    def left_s(self) -> float:
        """Seconds for the next wait, 0 at the end."""
        return max(0.0, min(_LOOK_S, self._until - time.monotonic())) if self.wanted() else 0.0


class _OrderPipe:
    """Carries the order to the supervisor: all of it before that runs, as far as a pipe can hold it.

    So the supervisor comes up even if we are stopped (Ctrl-Z) as soon as we have spawned it.
    """

    def __init__(self, message: dict[str, Any]) -> None:
        self._data = memoryview(json.dumps(message).encode() + b"\n")
        self.theirs, self._ours = (above_standard(end) for end in os.pipe())
        with contextlib.suppress(OSError):  # more than a user may have
            fcntl.fcntl(self._ours, fcntl.F_SETPIPE_SZ, len(self._data))
        os.set_blocking(self._ours, False)
        self._sent = 0
        with contextlib.suppress(BlockingIOError):
            while self._sent < len(self._data):
                self._sent += os.write(self._ours, self._data[self._sent :])

    def send_rest(self) -> None:
        os.set_blocking(self._ours, True)
        with contextlib.suppress(BrokenPipeError):  # it was killed
            while self._sent < len(self._data):
                self._sent += os.write(self._ours, self._data[self._sent :])
        self.close()

    def close(self) -> None:
        ours, self._ours = self._ours, -1
        if ours >= 0:
            os.close(ours)


def _spawn(instance: Instance, order: SupervisorOrder, lock: int) -> ComingUp:
    life, theirs = (above_standard(end) for end in os.pipe())
    message = {"home": str(instance.home), "id": instance.id, "life": theirs, "lock": lock, "order": order.to_dict()}
    pipe = _OrderPipe(message)
    try:
        return ComingUp(instance, _run_starter(instance, pipe.theirs, (theirs, lock)), life, pipe)
    except BaseException:
        pipe.close()
        os.close(life)
        raise
    finally:
        os.close(theirs)
        os.close(pipe.theirs)


def _readable(descriptor: int, patience: _Patience) -> bool:
    """Whether there is something to read, or the end. With `poll`: `select` takes no descriptor above 1,023."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while not (found := poller.poll(1000 * patience.left_s)) and patience.left_s:
        pass
    return bool(found)


def _run_starter(instance: Instance, order: int, passed_on: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """Runs the process that forks the supervisor proper and ends, so that the supervisor is nobody's child."""
    package_parent = str(Path(managed_vllm.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {package_parent!r}); from managed_vllm.supervisor import main; main()"
    with open(os.open(instance.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, instance.id],
            stdin=order,
            stdout=output,
            stderr=output,
            cwd="/",
            env={name: value for name, value in os.environ.items() if name not in _NOT_INHERITED},
            start_new_session=True,
            pass_fds=passed_on,
        )


def _said(instance: Instance) -> str:
    """The end of the supervisor's log."""
    with contextlib.suppress(OSError):
        return instance.supervisor_log.read_text(errors="replace")[-2000:]
    return ""
