"""A keeper: a small process that ends a server when its supervisor is killed, whatever program the server is.

vLLM's own processes fall by themselves (`managed_vllm.in_server.managed_vllm_lifeline`): each is a Python interpreter
that has our `sitecustomize`. A `command=`, or a `python=` that is a wrapper, may be anything: `sh -c`, `uv run`, a
binary. For those the supervisor runs this file as a program of its own. It holds the end of a pipe, which the kernel
closes when the supervisor dies; then it kills what the supervisor had launched: everything below the processes that it
was told of, and everything that carries the supervisor's marks in its environment. A server of the next supervisor
carries others.

Standard library only: as a program it is run without anybody's packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

_SWEEP_S = 30.0
_LOOK_S = 0.05
_CLEAN_LOOKS = 3
"""As many looks in a row must find nothing: a process that was forked meanwhile shows up in the next one."""


class Keeper:
    """The supervisor's side of it."""

    def __init__(self, marks: Mapping[str, str]) -> None:
        """`marks`: variables that only processes of this supervisor's servers have, all of them."""
        self._marks = dict(marks)
        self._told: list[tuple[int, str | None]] = []
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts the process, unless it runs. A machine that can't run it leaves us where we are without it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
            self._tell(self._marks)
            for pid, started in self._told:
                self._tell([pid, started])

    def watch(self, pid: int) -> None:
        """What is below this process is the server's, whatever its environment says."""
        self._told = [(pid, _stat(pid)[1])]
        self._tell(self._told[0])

    def close(self) -> None:
        """The servers have ended: it finds nothing, and ends."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _tell(self, value: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it was killed
                self._process.stdin.write(json.dumps(value).encode() + b"\n")
                self._process.stdin.flush()


# -- the program -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Waits until the supervisor has ended, then ends what it has left."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a whole job may be told to stop: we go last
        signal.signal(number, signal.SIG_IGN)
    marks = {os.fsencode(f"{name}={value}") for name, value in json.loads(sys.stdin.buffer.readline() or b"{}").items()}
    roots = [(pid, started) for pid, started in map(json.loads, sys.stdin.buffer)]
    if marks:
        sweep(marks, roots)


def sweep(marks: set[bytes], roots: Iterable[tuple[int, str | None]]) -> None:
    """Kills every process that has all the marks, and all below the roots, until there are none (at most 30 s)."""
    clean = 0
    deadline = time.monotonic() + _SWEEP_S
    known = dict(roots)
    while clean < _CLEAN_LOOKS and time.monotonic() < deadline:
        stats = {int(entry.name): _stat(int(entry.name)) for entry in os.scandir("/proc") if entry.name.isdigit()}
        found = {pid for pid in stats if _has(pid, marks)}
        below = {pid for pid, started in known.items() if started and stats.get(pid, (0, None))[1] == started}
        while more := {pid for pid, (parent, _) in stats.items() if parent in below} - below:
            below |= more
        known |= {pid: stats[pid][1] for pid in below}  # what is orphaned now is no longer below
        for pid in (found | below) - {os.getpid()}:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        clean = 0 if found | below else clean + 1
        time.sleep(_LOOK_S)


def _stat(pid: int) -> tuple[int, str | None]:
    """The parent and the start time of a process; the latter is None if there is no such live one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0, None
    return int(fields[1]), None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _has(pid: int, marks: set[bytes]) -> bool:
    try:
        return marks <= set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return False


if __name__ == "__main__":
    main()
