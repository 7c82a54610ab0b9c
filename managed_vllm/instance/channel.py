"""The control channel between users and a supervisor: JSON lines over a Unix socket; in here, the users' end.

The other end is `managed_vllm.instance.leases`. A user's open connection is its lease; the kernel closes it however the
user dies. The supervisor answers requests (`{"op": …, "id": n}` → `{"id": n, "ok": …}`) and sends a whole
`ServerStatus` whenever something changed, so that a reader needs no history. Both ends check the other's uid
(`SO_PEERCRED`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from managed_vllm.errors import SupervisorError
from managed_vllm.socket_paths import short_path
from managed_vllm.status import ServerStatus

log = logging.getLogger("managed_vllm")

MAX_LINE = 16 << 20
"""Longest line in bytes that either end accepts: the names and shapes of all weights of a large model are one."""


# -- sockets -----------------------------------------------------------------------------------------------------------


def peer(connection: socket.socket) -> tuple[int, int]:
    """`(pid, uid)` of the process at the other end, as the kernel has recorded them."""
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def encode(message: Mapping[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


# -- the user's end ----------------------------------------------------------------------------------------------------


class Channel:
    """A user's connection to a supervisor. Holding it open is the lease.

    A daemon thread reads. `status` is the newest `ServerStatus`, `closed` is true once the connection is gone, and
    `given_back` if `close` was called here. All methods may be called from any thread.
    """

    def __init__(self, connection: socket.socket, on_change: Callable[[ServerStatus], None] | None = None) -> None:
        self._socket = connection
        self._changed = threading.Condition()
        self._replies: dict[int, dict[str, Any]] = {}
        self._next_id = 0
        self._pid = os.getpid()
        self._on_change = on_change
        self.status: ServerStatus | None = None
        self.closed = False
        self.given_back = False
        threading.Thread(target=self._read, name="managed-vllm-lease", daemon=True).start()

    @classmethod
    def connect(
        cls, path: Path, *, timeout_s: float = 5.0, on_change: Callable[[ServerStatus], None] | None = None
    ) -> Channel:
        """Connects to the supervisor at `path`.

        Raises `OSError` (most often `ConnectionError`) if nothing listens there, `SupervisorError` if the process that
        listens belongs to another user.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            with short_path(path) as name:
                connection.connect(name)
            _pid, uid = peer(connection)
            if uid != os.getuid():
                raise SupervisorError(f"{path} is served by uid {uid}, not by us ({os.getuid()}): not trusted")
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return cls(connection, on_change)

    def request(self, op: str, *, timeout_s: float = 10.0, **fields: Any) -> dict[str, Any]:
        """Sends a request and waits for its reply. Raises `ConnectionError` if the supervisor ends, `TimeoutError`."""
        with self._changed:
            self._next_id += 1
            number = self._next_id
            if self.closed:
                raise ConnectionError("the supervisor closed the connection")
            try:
                self._socket.sendall(encode({"op": op, "id": number, **fields}))
            except OSError as error:
                raise ConnectionError(f"the supervisor is gone: {error}") from error
            if not self._changed.wait_for(lambda: number in self._replies or self.closed, timeout_s):
                raise TimeoutError(f"the supervisor did not answer {op!r} within {timeout_s:g} s")
            if number not in self._replies:
                raise ConnectionError("the supervisor closed the connection")
            return self._replies.pop(number)

    def wait_until(
        self, condition: Callable[[ServerStatus | None], bool], timeout_s: float | None = None
    ) -> ServerStatus | None:
        """Waits until `condition(status)` holds or the supervisor is gone; returns the newest status.

        Raises `TimeoutError`. Wakes once a second, so that Ctrl-C takes effect in the main thread.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not (self.closed or condition(self.status)):
                left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
                if left <= 0:
                    raise TimeoutError
                self._changed.wait(left)
            return self.status

    def close(self) -> None:
        """Gives the lease back. In a forked child only the child's copy of the descriptor is closed."""
        self.given_back = True
        with contextlib.suppress(OSError):
            if os.getpid() == self._pid:
                self._socket.shutdown(socket.SHUT_RDWR)
        self.closed = True
        if os.getpid() != self._pid:
            # The reader thread that owns the descriptor does not exist here.
            self._socket.close()

    def _read(self) -> None:
        buffer = b""
        try:
            while chunk := self._socket.recv(65536):
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
                if len(buffer) > MAX_LINE:
                    break
        except (OSError, ValueError, KeyError, TypeError):
            pass
        finally:
            with self._changed:
                self.closed = True
                self._changed.notify_all()
            with contextlib.suppress(OSError):
                self._socket.close()

    def _take(self, message: dict[str, Any]) -> None:
        status = ServerStatus.from_dict(message["status"]) if "status" in message else None
        with self._changed:
            if status is not None:
                self.status = status
            if "id" in message:
                self._replies[message["id"]] = message
            self._changed.notify_all()
        if status is not None and self._on_change is not None:
            try:
                self._on_change(status)
            except BaseException:  # SystemExit, too: whoever looks on must not cost the lease
                log.exception("a listener to the server's status failed")
