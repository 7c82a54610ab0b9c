"""Who holds a file lock, and whether that process is stopped: Ctrl-Z may come at any moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def stopped_holder(path: Path) -> int | None:
    """The pid of a stopped process (state T) that holds the `flock` of this file; None if there is none to be seen."""
    for pid in _holders(path):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return pid
    return None


def _holders(path: Path) -> Iterator[int]:
    try:
        wanted = path.stat()
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return
    for line in locks:
        # "3: FLOCK  ADVISORY  WRITE 4711 00:2d:123456 0 EOF". The device is not always that
        # of stat(), so whether it is this file is asked of the process.
        _, kind, *_, pid, file, _, _ = line.split()
        if kind == "FLOCK" and file.endswith(f":{wanted.st_ino}") and pid.isdigit() and _has_open(int(pid), wanted):
            yield int(pid)


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(entry.path), wanted):
                    return True
    return False
