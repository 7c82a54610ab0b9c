"""Whether a server's processes do something, whatever their log says: a download without a line, a long compilation.

Per process, from the kernel: CPU time (of children that have ended, too) and bytes read and written. What a process
does that only waits, say to look every now and then whether something has come, stays below the limits.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import psutil

from managed_vllm.server.process import ServerProcess

_CPU = 0.05
"""Share of one core above which a process does something."""

_BYTES_PER_S = 4096
"""Bytes above which it does; the slowest download is faster, and a wakeup over a pipe is a few bytes."""


@dataclass(frozen=True)
class _Used:
    cpu_s: float = 0.0
    bytes: int = 0


class Activity:
    """Compares what the processes of a server have used from one look to the next."""

    def __init__(self, process: ServerProcess) -> None:
        self._process = process
        self._used: dict[psutil.Process, _Used] | None = None
        self._looked_at = time.monotonic()

    def moved(self) -> bool:
        """True if they have done something since the last look; the first one only looks."""
        now = time.monotonic()
        used = {process: _used(process) for process in self._process.processes()}
        before, self._used = self._used, used
        elapsed_s, self._looked_at = max(now - self._looked_at, 1e-3), now
        if before is None:
            return False
        cpu_s = sum(has.cpu_s - before.get(process, _Used()).cpu_s for process, has in used.items())
        moved = sum(has.bytes - before.get(process, _Used()).bytes for process, has in used.items())
        return cpu_s > _CPU * elapsed_s or moved > _BYTES_PER_S * elapsed_s


def _used(process: psutil.Process) -> _Used:
    cpu_s, moved = 0.0, 0
    with contextlib.suppress(psutil.Error, OSError, NotImplementedError):
        cpu_s = sum(process.cpu_times()[:4])
        io = process.io_counters()
        # Those of calls and those of disks: what is mapped is read without a call, a socket is no disk.
        moved = io.read_chars + io.write_chars + io.read_bytes + io.write_bytes
    return _Used(cpu_s, moved)
