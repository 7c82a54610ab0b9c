"""vllm-router in a process of its own, on a loopback port that answers nobody but its guard.

Run as a program by `managed_vllm.server.front`. On standard input it gets a line of JSON: the port, the key of its
socket, a descriptor on which the outcome is told. In this order:

1. It begins a process that has the same descriptors, not a copy of them, and starts the router, which binds its socket
   itself and holds the interpreter's lock for as long as it runs.
2. That process signs what listens among the descriptors (`managed_vllm.server.signed_sockets`), the router's socket
   and that of its metrics, and ends.
3. Whoever came between the two is either still connected or has been: then the kernel's table of connections has a row
   of theirs, `MET` is told, and this router is not used. Else `SIGNED`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.server import signed_sockets

SIGNED, MET = b"signed\n", b"met\n"

_CLONE_FILES = 0x400
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_LOOK_S = 0.0002
STARTS_WITHIN_S = 60.0
"""After which it is given up."""
_FOREVER_S = 10 * 365 * 86400


def main() -> None:
    """Entry point; does not return while the router runs."""
    order = json.loads(sys.stdin.buffer.readline())
    lifeline.fall_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody is left to collect the process that signs
    key, port, outcome = bytes.fromhex(order["key"]), int(order["port"]), int(order["outcome"])
    _beside(lambda: _sign_what_listens(port, key, outcome))
    _run_router(port)


def why_not() -> str:
    """Why it can't be run on this machine; empty if it can."""
    if platform.machine() not in _SYS_CLONE:
        return f"not on {platform.machine()}"
    return signed_sockets.why_unsupported()


def _run_router(port: int) -> None:
    from vllm_router.router import Router
    from vllm_router.router_args import RouterArgs

    Router.from_args(
        RouterArgs(
            host="127.0.0.1",
            port=port,
            policy="sticky_least_loaded",
            prometheus_host="127.0.0.1",
            prometheus_port=free_port(),  # can't be switched off: None means 29000 (0.1.17)
            log_level="warn",
            request_timeout_secs=_FOREVER_S,
            max_concurrent_requests=1 << 20,
            worker_startup_timeout_secs=5,
            worker_startup_check_interval=1,
            # The guard goes on with another replica by itself.
            retry_max_retries=2,
            health_check_interval_secs=1,
            health_failure_threshold=1,
            health_success_threshold=1,
            disable_circuit_breaker=True,
        )
    ).start()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _beside(work: Callable[[], None]) -> None:
    """Runs something in a process that shares our descriptors, those included that are opened later."""
    # By `PyDLL`, which keeps the interpreter's lock: the child has a copy of it in the state in which it is now.
    call = ctypes.PyDLL(None, use_errno=True).syscall
    nothing = ctypes.c_long(0)
    flags = ctypes.c_long(_CLONE_FILES | signal.SIGCHLD)
    child = call(ctypes.c_long(_SYS_CLONE[platform.machine()]), flags, nothing, nothing, nothing, nothing)
    if child < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    if child == 0:
        try:
            ctypes.PyDLL(None).PyOS_AfterFork_Child()
            lifeline.fall_with_parent()
            work()
        finally:
            os._exit(0)


def _sign_what_listens(port: int, key: bytes, outcome: int) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        # The socket of the metrics is the first that it opens.
        if port in [_signed(listening, key) for listening in _listening()]:
            os.write(outcome, MET if _was_met(port) else SIGNED)
            return
        time.sleep(_LOOK_S)


def _signed(listening: socket.socket, key: bytes) -> int:
    signed_sockets.sign(listening, key)
    return int(listening.getsockname()[1])


def _listening() -> Iterator[socket.socket]:
    """The listening sockets among our descriptors; they are not ours to close."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            one = socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=int(name))
            try:
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield one
            finally:
                one.detach()


def _was_met(port: int) -> bool:
    """Whether the kernel knows of any connection with this port of 127.0.0.1, in whatever state it is."""
    ours = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(ours in row[1:3] for row in rows) != 1  # the one that listens


if __name__ == "__main__":
    main()
