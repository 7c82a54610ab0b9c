"""The election: which of the users that want a server starts its supervisor.

The start lock is held for as long as it takes to see whether a supervisor lives, and to spawn one if not; neither until
that listens nor for the start of the server itself. Nobody waits for the lock for long, but looks again whether there
is a supervisor by now.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import time
from collections.abc import Callable

from managed_vllm.config import SupervisorOrder
from managed_vllm.errors import StateDirectoryError, SupervisorError
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.lock_holders import stopped_holder

_LOOK_S = 0.1
"""Seconds between two looks, while others have the start lock, whether there is a supervisor by now."""


class Election(enum.Enum):
    STARTED = enum.auto()
    """The supervisor was spawned here, and listens."""
    LEFT_TO_OTHERS = enum.auto()
    """Another process is spawning it, or the last one is still shutting down."""
    KILLED = enum.auto()
    """The supervisor that was spawned here was killed before it listened."""


def elect(instance: Instance, order: SupervisorOrder, deadline: float, wanted: Callable[[], bool]) -> Election:
    """Spawns the supervisor of an instance, unless another process does, or it is not `wanted` any more."""
    from managed_vllm.instance import spawn  # here: most processes only attach

    try:
        instance.create()
        # Not for long: whoever has the lock may be stopped, while the supervisor that it has spawned comes up.
        with instance.start_lock(min(_LOOK_S, left_s(deadline))):
            if directory.is_alive(instance):
                return Election.LEFT_TO_OTHERS
            coming_up = spawn.start_supervisor(instance, order)
        listens = coming_up is None
        try:
            listens = coming_up is None or coming_up.listens(wanted)
        finally:
            if not listens:
                _remove_if_empty(instance)
        return Election.STARTED if listens else Election.KILLED
    except (StateDirectoryError, SupervisorError):
        raise
    except TimeoutError:
        return Election.LEFT_TO_OTHERS
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise StateDirectoryError(
                f"can't start in {instance.folder}: {error}", path=str(instance.folder)
            ) from error
        return Election.LEFT_TO_OTHERS  # a supervisor that was shutting down has removed the folder: begin again


def _remove_if_empty(instance: Instance) -> None:
    """Removes a folder in which no supervisor came up or said anything: the start was given up, or it was killed."""
    with contextlib.suppress(OSError), instance.start_lock(_LOOK_S):
        said = instance.read_record() is not None or directory.tail(instance.supervisor_log, 1)
        if not said and not directory.is_alive(instance):
            instance.remove_folder()


def raise_if_starter_is_stopped(instance: Instance) -> None:
    """Raises `SupervisorError` if a process that is stopped (Ctrl-Z) has the start lock, and has spawned nothing."""
    pid = stopped_holder(instance.folder / "start.lock")
    if pid is not None and not directory.is_alive(instance):
        raise SupervisorError(
            f"pid {pid} is about to start the server, but is stopped: continue it (fg, kill -CONT {pid}) or end it",
            instance=instance.id,
        )


def left_s(deadline: float) -> float:
    """Seconds until the deadline, at least 0."""
    return max(0.0, deadline - time.monotonic())
