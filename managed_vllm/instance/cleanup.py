"""What an instance may leave, and how it is removed: processes, a scratch folder, shared memory, its own folder.

What must hold: nothing is touched that is not ours. A process is known by the marker in its environment, which has a
token of the state directory in it, and by its namespaces: the same path elsewhere is another instance. A reused pid is
known by its start time; a scratch folder and a shared memory segment by name, kind and owner: their paths come from a
record, or the segment's name is its server's (`managed_vllm.in_server.managed_vllm_segments`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.in_server import managed_vllm_segments as segments
from managed_vllm.instance.directory import Instance, is_own_directory
from managed_vllm.instance.namespaces import is_elsewhere
from managed_vllm.socket_paths import short_temporary_folder

# -- processes -------------------------------------------------------------------------------------------------------


def marked_processes(instance: Instance, marker: str | None = None) -> list[psutil.Process]:
    """Every live process that carries the instance's marker in its environment, and is in our namespaces.

    Of one replica's where the instance is one. `marker` is the one that a server was started with, where the state
    directory was wiped since. vLLM's setproctitle would wipe the environment of EngineCore and Worker (vLLM 0.32); the
    supervisor sets `SPT_NOENV=1` against that.
    """
    marks = {os.fsencode(f"{lifeline.MARKER}={marker or instance.marker}")}
    if instance.replica is not None:
        marks.add(lifeline.replica_mark(instance.replica))
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry.name}/environ", "rb") as environ:
                if marks <= set(environ.read().split(b"\0")) and not is_elsewhere(int(entry.name)):
                    found.append(psutil.Process(int(entry.name)))
        except (OSError, psutil.Error):
            continue
    return found


def recorded_supervisor(instance: Instance) -> psutil.Process | None:
    """The process that the record names as the supervisor; None if that has ended, even if its pid was reused."""
    record = instance.read_record() or {}
    pid = record.get("pid")
    if not isinstance(pid, int) or pid <= 1 or lifeline.start_time(pid) != record.get("pid_start_time"):
        return None
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid)
    return None


def end_processes(processes: list[psutil.Process], *, timeout_s: float = 10.0) -> list[psutil.Process]:
    """SIGKILLs the processes and waits until they are gone; returns those that are still there after the time-out.

    psutil compares start times, so a pid that was reused in the meantime is not touched.
    """
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + timeout_s
    remaining = list(processes)
    while True:
        remaining = [process for process in remaining if _is_running(process)]
        if not remaining or time.monotonic() > deadline:
            return remaining
        time.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# -- scratch folders ---------------------------------------------------------------------------------------------------


def make_scratch() -> Path:
    """Makes a server's folder for TMPDIR and ZeroMQ's sockets; its path is short, as those of sockets have to be."""
    return Path(tempfile.mkdtemp(prefix="mvllm-", dir=short_temporary_folder()))


def hold_scratch(folder: Path) -> int:
    """Marks the folder as in use, for whoever looks from any namespace, until the descriptor is closed or we end."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def unused_scratch_folders() -> list[Path]:
    """Those of this user that no supervisor holds: the record that named them was removed."""
    found = sorted(Path(short_temporary_folder()).glob("mvllm-*"))
    return [folder for folder in found if _is_scratch(folder) and not _is_held(folder)]


def _is_held(folder: Path) -> bool:
    """True as well where that can't be told."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def remove_scratch(folder: Path) -> None:
    """Removes a folder made by `make_scratch`, and nothing else: the path comes from a record."""
    if _is_scratch(folder):
        shutil.rmtree(folder, ignore_errors=True)


def empty_scratch(folder: Path) -> None:
    """Removes what an ended server left in its scratch folder: sockets of ZeroMQ, rendezvous files."""
    if _is_scratch(folder):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_scratch(folder: Path) -> bool:
    return (
        folder.parent == Path(short_temporary_folder())
        and folder.name.startswith("mvllm-")
        and is_own_directory(folder)
    )


# -- shared memory -----------------------------------------------------------------------------------------------------


SHARED_MEMORY = "/dev/shm/"

_SEGMENT = re.compile(r"(psm_|wnsm_|torch_|vllm|VLLM_|nccl-|sem\.mp-|sem\.loky-|\w*SHM_BUFFER)[\w.:-]*")
"""How Python (`multiprocessing`), torch, NCCL and vLLM 0.32 name what they make there. Anything else that a server has
mapped, say weights that its user put there for fast loading, is not the server's."""


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Paths of the segments below /dev/shm that these processes have mapped now."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:
            found.update(
                line.split(None, 5)[5].rstrip(b"\n").decode("utf-8", "surrogateescape")
                for line in maps
                if b" /dev/shm/" in line and not line.endswith(b" (deleted)\n")
            )
    return found


def named_shared_memory(instance: Instance, marker: str | None = None) -> set[str]:
    """Paths of the segments and semaphores that Python named after the instance's server, also if nobody has seen them.

    Of one replica's where the instance is one. `marker` as for `marked_processes`.
    """
    replica = None if instance.replica is None else lifeline.replica_value(instance.replica)
    with contextlib.suppress(OSError):  # also from the state directory, which may be gone
        names = segments.prefixes(marker or instance.marker, replica)
        return {SHARED_MEMORY + name for name in os.listdir(SHARED_MEMORY) if name.startswith(names)}
    return set()


class NewSharedMemory:
    """What processes have mapped below /dev/shm, less what was there before: made just before they are started."""

    def __init__(self) -> None:
        self._before: frozenset[str] = frozenset()
        self._seen: set[str] = set()
        with contextlib.suppress(OSError):
            self._before = frozenset(SHARED_MEMORY + name for name in os.listdir(SHARED_MEMORY))

    def look(self, pids: Iterable[int]) -> set[str]:
        """Adds what these processes have mapped now; returns all that was ever seen."""
        self._seen |= shared_memory_of(pids) - self._before
        return set(self._seen)


def remove_shared_memory(paths: Iterable[str]) -> list[str]:
    """Removes those segments that are ours and not mapped by any process; returns them.

    Nothing outside of /dev/shm is touched, whatever the paths say: they may come from a record.
    """
    ours = [path for path in paths if _is_own_segment(path)]
    if not ours:
        return []
    mapped = shared_memory_of(psutil.pids())
    removed = []
    for path in ours:
        if path not in mapped:
            with contextlib.suppress(OSError):
                os.unlink(path)
                removed.append(path)
    return removed


def _is_own_segment(path: str) -> bool:
    name = path.removeprefix(SHARED_MEMORY)
    if not path.startswith(SHARED_MEMORY) or _SEGMENT.fullmatch(name) is None:
        return False
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


# -- an instance -------------------------------------------------------------------------------------------------------


def remove_recorded(record: Mapping[str, Any]) -> None:
    """Removes what a record says that its server, now ended, had outside of its folder."""
    if isinstance(record.get("scratch"), str):
        remove_scratch(Path(record["scratch"]))
    paths = record.get("shared_memory")
    if isinstance(paths, list):
        remove_shared_memory(path for path in paths if isinstance(path, str))
    for replica in replicas_in(record):
        remove_recorded(replica)


def replicas_in(record: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What a record says of each replica; empty for a single server."""
    found = (record or {}).get("replicas")
    return [replica for replica in found if isinstance(replica, dict)] if isinstance(found, list) else []


def remove_instance(instance: Instance) -> None:
    """Removes the folder, and what its record and its server's names tell of outside of it.

    Only for the holder of the instance's start lock, when no process of it is left.
    """
    record = instance.read_record()
    if record is not None:
        remove_recorded(record)
    remove_shared_memory(named_shared_memory(instance))
    instance.remove_folder()


def remove_own_instance(instance: Instance, timeout_s: float = 2.0) -> None:
    """`remove_instance` for a supervisor that leaves. Raises `TimeoutError` if somebody is about to start one there."""
    with instance.start_lock(timeout_s):
        remove_instance(instance)
