"""Where the processes of a server that hangs are stuck: kept in a file before they are killed.

With py-spy (`pip install 'managed-vllm[debug]'`, or on the path) for each process from outside. Without it
`faulthandler` inside, by SIGUSR2 (see `managed_vllm.in_server.managed_vllm_lifeline`): that one goes to the server's
log and can't reach a stopped process.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_PER_PROCESS_S = 10.0
_FAULTHANDLER_S = 1.0


def dump(processes: Sequence[psutil.Process], *, reason: str, limit_s: float = 30.0) -> str:
    """The stacks of the processes as text; at most `limit_s` seconds, and never an exception."""
    deadline = time.monotonic() + limit_s
    spy = _py_spy()
    parts = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}"]
    for process in processes:
        parts.append(_describe(process))
        left = min(_PER_PROCESS_S, deadline - time.monotonic())
        if spy is not None and left > 0:
            parts.append(_spy(spy, process, left))
    if spy is None:
        parts.append("py-spy is not installed: the stacks of those that are not stopped are in the server's log")
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGUSR2)
        time.sleep(_FAULTHANDLER_S)  # it is written by the other process, which tells nobody
    return "\n\n".join(parts) + "\n"


def _py_spy() -> str | None:
    beside = Path(sys.executable).parent / "py-spy"
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _describe(process: psutil.Process) -> str:
    try:
        line = f"pid {process.pid} {process.status()} {' '.join(process.cmdline())[:200]}"
    except psutil.Error as error:
        return f"pid {process.pid}: {error}"
    with contextlib.suppress(OSError):
        line += f"\nwaits in the kernel in: {Path(f'/proc/{process.pid}/wchan').read_text() or '-'}"
    return line


def _spy(spy: str, process: psutil.Process, limit_s: float) -> str:
    # Nonblocking: a process that is stopped already can't be stopped for the reading.
    try:
        done = subprocess.run(
            [spy, "dump", "--nonblocking", "--pid", str(process.pid)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    return (done.stdout + done.stderr).strip()
