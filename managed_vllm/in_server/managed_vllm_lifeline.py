"""Makes each process of a supervised server die with its parent, by the kernel's own hand (`PR_SET_PDEATHSIG`).

vLLM 0.32 leaves EngineCore and Worker alive for ever when the API server is killed (vllm#55510). With this module the
chain supervisor → API server → EngineCore → Worker falls as a whole wherever it is cut, with no signal handler that
could hang and also while a process is stopped. It is reached by two ways that complete each other:

- `sitecustomize.py` beside it, at the start of every interpreter of the server, before the seconds of imports;
- vLLM's general plugin `register`, which also covers processes that vLLM forks.

Nothing happens unless our marker is in the environment. The signal follows the parent *thread*; the processes in
question are all spawned from main threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys

MARKER = "MANAGED_VLLM_INSTANCE"
"""Environment variable that marks every process of one server: the path of its instance folder."""

SUPERVISOR = "MANAGED_VLLM_SUPERVISOR"
"""Environment variable `pid:start_time:pid_namespace` of the supervisor; the time guards against a reused pid."""

ROOT = "MANAGED_VLLM_SERVER_ROOT"
"""Environment variable set by the server's first interpreter: its pid."""

REPLICA = "MANAGED_VLLM_REPLICA"
"""Environment variable that tells the servers of one instance apart: a number of four digits."""

NO_REPLICA = "----"
"""Its value in the image, from which each of them is forked."""

_PR_SET_PDEATHSIG = 1

_TIED = ("--multiprocessing-fork", "multiprocessing.forkserver", "vllm.model_executor.models.registry")
"""Parts of the command line of the interpreters, other than the first, that fall with their parents."""


def replica_value(number: int) -> str:
    """What `REPLICA` is for the server with this number; always as long as `NO_REPLICA`."""
    return f"{number:04d}"


def replica_mark(number: int) -> bytes:
    """Its entry in the environment of a process."""
    return os.fsencode(f"{REPLICA}={replica_value(number)}")


def register() -> None:
    """Entry point of vLLM's plugin group `vllm.general_plugins`: called once in every process of the server."""
    if MARKER in os.environ:
        fall_with_parent()


def at_interpreter_start() -> None:
    """Called by `sitecustomize`: ties the server's first interpreter and multiprocessing's children to their parents.

    So is the interpreter in which vLLM 0.32 looks at a model's class that it has not met before: some ten seconds of
    imports (`model_executor/models/registry.py`, `_run_in_subprocess`). Other helpers (multiprocessing's resource
    tracker, compile workers) end by themselves when their pipes close, and the tracker must outlive the others to
    remove their shared memory.
    """
    if MARKER not in os.environ:
        return
    _show_stacks_on_request()
    if ROOT not in os.environ:
        os.environ[ROOT] = str(os.getpid())
        fall_with_parent()
    elif any(part in word for word in sys.orig_argv for part in _TIED):
        fall_with_parent()


def _show_stacks_on_request() -> None:
    """SIGUSR2, which vLLM 0.32 does not use, writes the stacks of all threads to the log, also of a hung process."""
    with contextlib.suppress(Exception):  # no standard error, or an interpreter without faulthandler
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)


def fall_with_parent() -> None:
    """Asks for SIGKILL at the parent's death, then makes sure that the chain above was not cut before we asked."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if _orphaned() or not _supervisor_lives():
        os.kill(os.getpid(), signal.SIGKILL)


def _orphaned() -> bool:
    """True if our parent died before we asked: who is orphaned falls to init, or to the supervisor, a subreaper.

    Only the server's first interpreter may be the supervisor's own child. Where `ROOT` is not set (`python -I`), the
    caller is that one.
    """
    if _is_elsewhere():
        return False
    parent = os.getppid()
    supervisor = os.environ.get(SUPERVISOR, "").partition(":")[0]
    return parent == 1 or (str(parent) == supervisor and os.environ.get(ROOT, str(os.getpid())) != str(os.getpid()))


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot, as text; None if there is no such live process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _supervisor_lives() -> bool:
    pid, _, rest = os.environ.get(SUPERVISOR, "").partition(":")
    if not pid.isdigit() or _is_elsewhere():
        return True  # a server that nobody supervises by these rules, or that can't see its supervisor
    return start_time(int(pid)) == rest.partition(":")[0]


def pid_namespace() -> str:
    """Which pid namespace this process is in; empty where the system does not say."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def _is_elsewhere() -> bool:
    """True in a pid namespace that is not the supervisor's (`unshare -p`, `apptainer --pid`): pids say nothing there.

    The kernel's signal at the parent's death comes there, too.
    """
    supervisors = os.environ.get(SUPERVISOR, "").split(":")
    return len(supervisors) > 2 and supervisors[2] not in ("", pid_namespace())
