"""The election: which of the users that want a server starts its supervisor.

The start lock is held for as long as it takes to see whether a supervisor lives, and to spawn one if not; never for the
start of the server itself.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import time
from collections.abc import Callable
from typing import Any

import filelock

from managed_vllm.config import SupervisorOrder
from managed_vllm.errors import StateDirectoryError, SupervisorError
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance

_LOOK_S = 0.1
"""Seconds between two looks, while others start a supervisor, whether it is still wanted here."""


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
        with _start_lock(instance, deadline, wanted):
            if directory.is_alive(instance):
                return Election.LEFT_TO_OTHERS
            try:
                listens = spawn.start_supervisor(instance, order, wanted)
            finally:
                _remove_if_empty(instance)
            return Election.STARTED if listens else Election.KILLED
    except (StateDirectoryError, SupervisorError):
        raise
    except filelock.Timeout:
        return Election.LEFT_TO_OTHERS
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise StateDirectoryError(
                f"can't start in {instance.folder}: {error}", path=str(instance.folder)
            ) from error
        return Election.LEFT_TO_OTHERS  # a supervisor that was shutting down has removed the folder: begin again


def _remove_if_empty(instance: Instance) -> None:
    """Removes a folder in which no supervisor came up or said anything: the start was given up, or it was killed.

    For the holder of the start lock.
    """
    if directory.is_alive(instance) or instance.read_record() is not None or directory.tail(instance.supervisor_log, 1):
        return
    instance.remove_folder()


def _start_lock(
    instance: Instance, deadline: float, wanted: Callable[[], bool]
) -> contextlib.AbstractContextManager[Any]:
    """Holds the start lock. Raises `filelock.Timeout`, soon if it is not `wanted` any more."""
    lock = instance.start_lock()
    while True:
        try:
            return lock.acquire(timeout=min(_LOOK_S, left_s(deadline)), poll_interval=0.01)
        except filelock.Timeout:
            if not wanted() or not left_s(deadline):
                raise


def left_s(deadline: float) -> float:
    """Seconds until the deadline, at least 0."""
    return max(0.0, deadline - time.monotonic())
