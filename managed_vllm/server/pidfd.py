"""Descriptors of processes, by which the kernel reports their end."""

from __future__ import annotations

import ctypes
import os

_SYS_PIDFD_OPEN = 434
"""On every architecture that vLLM runs on."""


def pidfd_open(pid: int) -> int:
    """As `os.pidfd_open`, which Pythons built against old kernel headers lack (those that uv installs, for example).

    Raises `OSError` where there is no such process, or the kernel has no such call (before 5.3, some sandboxes).
    """
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    descriptor = int(ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_OPEN, pid, 0))
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return descriptor
