"""Starting a supervisor, from the user's side.

The first user of an instance spawns its supervisor under the instance's start lock and waits until it listens. What
must hold:

1. `supervisor.lock` is taken here and passed to the supervisor as an open descriptor, so that a second user never finds
   it free in between, whichever of us is killed.
2. No user waits for a supervisor that is dead: it holds the end of a pipe, which the kernel closes when it dies.

The process itself is `managed_vllm.supervisor`, run by its name: no user imports it.
"""

from __future__ import annotations

import contextlib
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

_NOT_INHERITED = (lifeline.MARKER, lifeline.SUPERVISOR, lifeline.ROOT, "PYTHONHOME")
"""Variables that belong to one server's processes: the caller may itself run inside of another server."""


_LOOK_S = 0.1
"""Seconds between two looks whether a supervisor that comes up is still wanted."""


def start_supervisor(
    instance: Instance, order: SupervisorOrder, wanted: Callable[[], bool] = lambda: True, *, timeout_s: float = 45.0
) -> bool:
    """Starts the supervisor of an instance; returns True as soon as it listens on the control socket.

    True, too, if there is one already. False: it was killed before that, and another one may be started; or it is not
    `wanted` any more, and will end by itself, for nobody takes a lease. The caller holds the instance's start lock.
    Raises `SupervisorError` if it fails, or does not come up within `timeout_s` seconds.
    """
    lock = instance.take_supervisor_lock()
    if lock is None:
        return True
    try:
        return _spawn(instance, order, lock, _Patience(timeout_s, wanted))
    finally:
        instance.hand_on_lock(lock)


class _Patience:
    """How long somebody waits: for some seconds, and as long as it is wanted."""

    def __init__(self, seconds: float, wanted: Callable[[], bool]) -> None:
        self._until = time.monotonic() + seconds
        self.wanted = wanted

    @property
    def left_s(self) -> float:
        """Seconds for the next wait, 0 at the end."""
        return max(0.0, min(_LOOK_S, self._until - time.monotonic())) if self.wanted() else 0.0


def _spawn(instance: Instance, order: SupervisorOrder, lock: int, patience: _Patience) -> bool:
    instance.failed_mark.unlink(missing_ok=True)
    life, theirs = (above_standard(end) for end in os.pipe())
    try:
        message = {
            "home": str(instance.home),
            "id": instance.id,
            "life": theirs,
            "lock": lock,
            "order": order.to_dict(),
        }
        try:
            starter = _run_starter(instance, message, patience)
        finally:
            os.close(theirs)
        listens_or_ended = starter is not None and _readable(life, patience)
        if listens_or_ended and os.read(life, 1):
            return True
        if not patience.wanted():
            return False
        if starter is not None and listens_or_ended and starter.returncode <= 0 and not instance.failed_mark.exists():
            return False  # killed, by no fault of its own
    finally:
        os.close(life)
    raise SupervisorError(f"the supervisor process did not come up; it said:\n{_said(instance)}", instance=instance.id)


def _readable(descriptor: int, patience: _Patience) -> bool:
    """Whether there is something to read, or the end. With `poll`: `select` takes no descriptor above 1,023."""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while not (found := poller.poll(1000 * patience.left_s)) and patience.left_s:
        pass
    return bool(found)


def _run_starter(instance: Instance, message: dict[str, Any], patience: _Patience) -> subprocess.Popen[bytes] | None:
    """Runs the process that forks the supervisor proper and ends, so that the supervisor is nobody's child.

    None: it was not wanted any more before that.
    """
    package_parent = str(Path(managed_vllm.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {package_parent!r}); from managed_vllm.supervisor import main; main()"
    with open(os.open(instance.supervisor_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
        starter = subprocess.Popen(
            [sys.executable, "-P", "-c", code, instance.id],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd="/",
            env={name: value for name, value in os.environ.items() if name not in _NOT_INHERITED},
            start_new_session=True,
            pass_fds=(message["life"], message["lock"]),
        )
    try:
        if _has_ended(starter, json.dumps(message).encode(), patience):
            return starter
    finally:
        starter.kill()  # nothing, if it has ended
        starter.wait()
        assert starter.stdin is not None
        with contextlib.suppress(OSError):
            starter.stdin.close()
    if patience.wanted():
        raise SupervisorError("the supervisor process did not start", instance=instance.id)
    return None


def _has_ended(process: subprocess.Popen[bytes], message: bytes, patience: _Patience) -> bool:
    """Whether a process reads its message and ends in time."""
    given: bytes | None = message
    while left_s := patience.left_s:
        try:
            process.communicate(given, timeout=left_s)
        except subprocess.TimeoutExpired:
            given = None  # `communicate` has kept what is left of it
        else:
            return True
    return False


def _said(instance: Instance) -> str:
    """The end of the supervisor's log."""
    with contextlib.suppress(OSError):
        return instance.supervisor_log.read_text(errors="replace")[-2000:]
    return ""
