"""What is ours on this machine: the state directory, servers whose supervisor is gone, what they have left."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from managed_vllm.doctor.findings import Finding, error, ok, warning
from managed_vllm.errors import StateDirectoryError
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup, directory
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.namespaces import is_elsewhere

_YOUNG_S = 60.0
"""A scratch folder that is not older may belong to a server that is just being started."""


def state_directory() -> Iterator[Finding]:
    """Whether it can be made, is ours alone and has locks; and others of ours, in which servers may be forgotten."""
    try:
        home = directory.state_home()
        directory.check_locks(home)
    except StateDirectoryError as failure:
        yield error("state directory", failure.message, f"set {directory.HOME_VARIABLE} to a directory of yours")
        return
    running = [instance for instance in directory.instances(home) if directory.is_alive(instance)]
    yield ok("state directory", f"{home}, {len(running)} servers running")
    for other in directory.other_homes(home):
        alive = [instance.id for instance in directory.instances(other) if directory.is_alive(instance)]
        if alive:
            text = f"{other} has {len(alive)} more, which are not shared with those of {home}: {', '.join(alive)}"
            yield warning(
                "state directory", text, f"look at them: {directory.HOME_VARIABLE}={other} managed-vllm status"
            )


def dead_servers() -> Iterator[Finding]:
    """Folders whose supervisor is gone: it was killed, and nobody has come since."""
    for instance in _instances():
        if not directory.is_alive(instance):
            text = f"{instance.id}: its supervisor is gone, its folder is left"
            remedy = "managed-vllm doctor --fix, managed-vllm down --all, or the next start of it"
            yield warning("dead servers", text, remedy, functools.partial(_remove, instance))


def _instances() -> list[Instance]:
    with contextlib.suppress(StateDirectoryError):
        return directory.instances(directory.state_home())
    return []


def _remove(instance: Instance) -> str:
    if directory.is_alive(instance):
        return f"{instance.id} has been started meanwhile: left alone"
    cleanup.remove_instance(instance)
    return f"removed {instance.folder}"


def strays() -> Iterator[Finding]:
    """Processes of servers whose supervisor is gone. They end by themselves; one that does not is a fault of ours."""
    for process, instance in _marked():
        if not directory.is_alive(instance):
            with contextlib.suppress(psutil.Error):
                text = f"pid {process.pid} ({' '.join(process.cmdline())[:80]}) is left of {instance.id}"
                yield warning("strays", text, f"managed-vllm doctor --fix, or kill {process.pid}", _killer(process))


def others_strays() -> Iterator[Finding]:
    """EngineCores and Workers of vLLMs that are not ours, whose API server is gone: they keep their memory."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            is_engine = process.name().startswith(("VLLM::EngineCor", "VLLM::Worker"))
            if is_engine and _is_adopted(process) and not is_elsewhere(process.pid) and not _is_ours(process):
                text = (
                    f"pid {process.pid} ({process.name()}, of {process.username()}) is left of a vLLM that is not ours"
                )
                yield warning("strays", text, f"it holds memory: kill {process.pid}, if nobody needs it")


def _is_adopted(process: psutil.Process) -> bool:
    """Whether its parent has died: init, or another that adopts orphans, has a session of its own."""
    return os.getsid(process.pid) != os.getsid(process.ppid())


def _is_ours(process: psutil.Process) -> bool:
    return process.uids().real == os.getuid() and _marker_of(process) is not None


def _marker_of(process: psutil.Process) -> str | None:
    """The instance that started it, as its environment has it; None for what is not ours."""
    prefix = os.fsencode(f"{lifeline.MARKER}=")
    environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    return next((os.fsdecode(each[len(prefix) :]) for each in environ if each.startswith(prefix)), None)


def _marked() -> Iterator[tuple[psutil.Process, Instance]]:
    """Processes of this user that carry the marker of an instance whose state directory is there."""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error, ValueError, StateDirectoryError):
            marker = _marker_of(process)
            if marker is None or process.uids().real != os.getuid() or is_elsewhere(process.pid):
                continue
            folder = Path(marker.rpartition("#")[0])
            instance = Instance(folder.parent, folder.name)
            if folder.parent.is_dir() and instance.marker == marker:
                yield process, instance


def _killer(process: psutil.Process) -> functools.partial[str]:
    return functools.partial(_kill, process)


def _kill(process: psutil.Process) -> str:
    left = cleanup.end_processes([process])
    return f"pid {process.pid} does not end" if left else f"ended pid {process.pid}"


def scratch_folders() -> Iterator[Finding]:
    """Temporary folders of servers that nobody uses: their state directory was removed, and the supervisor killed."""
    for folder in cleanup.unused_scratch_folders():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _YOUNG_S:
                remedy = f"managed-vllm doctor --fix, or rm -r {folder}"
                yield warning("scratch folders", f"{folder} is left of a server", remedy, _remover(folder))


def _remover(folder: Path) -> functools.partial[str]:
    return functools.partial(_remove_scratch, folder)


def _remove_scratch(folder: Path) -> str:
    cleanup.remove_scratch(folder)
    return f"removed {folder}"
