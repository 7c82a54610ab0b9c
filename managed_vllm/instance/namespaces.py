"""Linux namespaces: whether another process sees the same processes, files and network as we do.

Jobs of one user on one machine may have their own (`PrivateTmp=`, a /tmp per Slurm job, containers): the same path is
then another folder, the same pid another process, and 127.0.0.1 another host.
"""

from __future__ import annotations

import os


def network_namespace() -> str | None:
    """Which network this process is in, as text to be compared; None where the system does not say."""
    return _namespace("self", "net")


def is_elsewhere(pid: int) -> bool:
    """True if a process sees other files or other pids than we do. False, too, where the system does not say."""
    return any(
        (theirs := _namespace(str(pid), kind)) is not None and theirs != _namespace("self", kind)
        for kind in ("mnt", "pid")
    )


def _namespace(process: str, kind: str) -> str | None:
    try:
        status = os.stat(f"/proc/{process}/ns/{kind}")
    except OSError:
        return None
    return f"{status.st_dev}:{status.st_ino}"
