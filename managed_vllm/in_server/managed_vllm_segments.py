"""Names Python's shared memory and semaphores after the server, so that they are found however its processes die.

Whose a segment in /dev/shm is can otherwise be told only while a process has it mapped, and Python's resource tracker
removes it only where that is not killed as well. The names are CPython's private matter, and the same from 3.8 to 3.14.
Where they are not, or this module does not run, they stay as they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys


def name_after_server(marker: str | None, replica: str | None) -> None:
    """Has this process, and what is forked from it, name what it makes after its server; not without a marker.

    The arguments are the values of `managed_vllm_lifeline.MARKER` and `REPLICA` in its environment.
    """
    if marker is None or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(Exception):
        import secrets
        from multiprocessing import process, shared_memory

        segment, semaphore = prefixes(marker, replica)
        shared_memory._make_filename = lambda: f"/{segment}{secrets.token_hex(8)}"  # type: ignore[attr-defined]
        # Python puts "/sem." before, and "-" and random text behind.
        configuration = process.current_process()._config  # type: ignore[attr-defined]
        configuration["semprefix"] = "/" + semaphore[len("sem.") : -1]


def prefixes(marker: str, replica: str | None) -> tuple[str, str]:
    """How the names below /dev/shm begin of segments and semaphores; without a replica, those of all replicas."""
    server = hashlib.sha256(os.fsencode(marker)).hexdigest()[:16] + (f"-{replica}" if replica else "")
    return f"psm_{server}-", f"sem.mp-{server}-"
