"""The users of one server, as its supervisor sees them: the other end of `managed_vllm.instance.channel`.

What must hold:

1. A lease is an open connection that has asked for one. The kernel closes it however the user dies.
2. Every lease is sent each status as a whole, and learns of a failure before anything is cleaned up.
3. The server is wanted as long as there is a lease or it is pinned. When it is not, it stays for `keep_alive_s`, the
   longest that any user so far has asked for; then `on_end` is called.
4. Once the end is decided no new lease is given: a user that asks waits until this server is gone, then starts another.
   Where that is a failure, it is told to everybody who had begun to ask before it.
5. Users of other uids are refused, and those for whom this process has no descriptor left: never the server's.
6. A user that reads nothing (a stopped process) costs a bounded amount of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from managed_vllm.config import PROTOCOL, SupervisorOrder
from managed_vllm.errors import ManagedVLLMError
from managed_vllm.instance import channel, names
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.namespaces import network_namespace
from managed_vllm.policies import seconds
from managed_vllm.served_files import Files
from managed_vllm.socket_paths import short_path
from managed_vllm.status import ServerState, ServerStatus

log = logging.getLogger("managed_vllm.supervisor")

FIRST_LEASE_S = 5.0
"""The user that started the supervisor has this long to take its lease; it may have been killed in between."""

_PROGRESS_BACKLOG = 1 << 16
"""Unread bytes above which a user gets no progress any more, which would pile up here if its process is stopped."""

_BACKLOG = 1 << 20
"""Unread bytes above which a user gets nothing more until it has read them; then the newest status, and no other."""

_LAST = (ServerState.FAILED, ServerState.STOPPING, ServerState.GONE)
"""What a user must learn whether it reads or not: after these the connection ends."""

_MOST_CALLS = 1000
"""Calls of the engine that wait at once, of all users."""

_RESERVE = 256
"""Descriptors of ours that no user gets: for the server's pipes, processes and log, and whoever only asks."""


@dataclass(eq=False)
class _User:
    """One open connection. It counts as a lease once it has asked for one."""

    writer: asyncio.StreamWriter
    pid: int
    what: str = ""
    has_lease: bool = False
    catching_up: asyncio.Task[None] | None = None
    since: float = dataclasses.field(default_factory=time.time)


@dataclass
class Retention:
    """What users have asked for that outlives them. It is in the record, so that it outlives a killed supervisor, too.

    `keep_alive_s` is the longest that any user has asked for, `names` are those by which users knew the server.
    """

    pinned: bool = False
    keep_alive_s: float = 0.0
    names: set[str] = dataclasses.field(default_factory=set)

    def to_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"pinned": self.pinned, "keep_alive_s": self.keep_alive_s, "names": sorted(self.names)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any] | None) -> Retention:
        """What a predecessor has left; nothing, where its record does not say it."""
        found = record or {}
        with contextlib.suppress(TypeError, ValueError):
            return cls(
                found.get("pinned") is True,
                seconds("keep_alive_s", found.get("keep_alive_s", 0.0)),
                {str(name) for name in found.get("names", ())},
            )
        return cls()


def most_leases() -> int:
    """How many users this process has descriptors for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft - min(_RESERVE, soft // 2))


class EngineCalls(Protocol):
    """What does the users' calls of `llm.engine`."""

    async def answer(self, user: Hashable, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a call, by the call's own deadline."""

    def user_gone(self, user: Hashable) -> None:
        """A user's connection has ended, and with it what it held."""


@dataclass(frozen=True)
class _Asked:
    """What the supervisor does when users ask for it."""

    end: Callable[[str], None]
    restart: Callable[[], None]
    use: Callable[[], None]
    deaths: Callable[[Sequence[int]], list[int]]
    engine: EngineCalls | None


class Leases:
    """Listens on the control socket, counts leases, answers requests; see the module's docstring."""

    def __init__(
        self,
        instance: Instance,
        order: SupervisorOrder,
        *,
        status: Callable[[], ServerStatus],
        on_end: Callable[[str], None],
        on_restart: Callable[[], None],
        on_use: Callable[[], None] = lambda: None,
        on_deaths: Callable[[Sequence[int]], list[int]] = list,
        listens_and_serves: Callable[[], tuple[int | None, Files | None]] = lambda: (None, None),
        engine: EngineCalls | None = None,
        retention: Retention | None = None,
        on_retention: Callable[[], None] = lambda: None,
    ) -> None:
        """`status` returns the server's present status; what concerns the users is filled in here.

        `on_end` is called with the reason when the server is to end, `on_restart` when a user asks for a restart,
        `on_use` when one needs the server to serve.
        `on_deaths` is called with the epochs that ended under one request, and returns those that died.
        `listens_and_serves` tells the port on which the server listens, and which files it has read, as far as known.
        `engine` does what users call for; such a call may take a while, and holds nobody up.
        `retention` is what a predecessor has left, and `on_retention` is called when it has changed.
        """
        self._instance = instance
        self._order = order
        self._status = status
        self._asked = _Asked(on_end, on_restart, on_use, on_deaths, engine)
        self._listens_and_serves = listens_and_serves
        self._users: set[_User] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self.retention = Retention() if retention is None else retention
        self._on_retention = on_retention
        self._open = True
        self._failed_at: float | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        self._first_lease = asyncio.Event()
        self._listener: asyncio.Server | None = None

    # -- for the supervisor --------------------------------------------------------------------------------------------

    async def listen(self) -> None:
        """From now on users can connect. Ends by itself if none takes a lease within `FIRST_LEASE_S`."""
        await self._bind()
        self._end_in(FIRST_LEASE_S, "nobody took a lease")

    async def listen_anew(self) -> None:
        """As `listen`, in a folder that was removed and made anew; leases that are held are not touched.

        The names by which users knew the server are given back to it, unless they were taken meanwhile.
        """
        if self._listener is not None:
            self._listener.close()
        await self._bind()
        for name in self.retention.names:
            with contextlib.suppress(ManagedVLLMError):
                names.take(self._instance.home, name, self._instance)

    async def _bind(self) -> None:
        path = self._instance.socket_path
        path.unlink(missing_ok=True)  # stale: the caller holds the supervisor's lock
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_path(path) as name:
            listener.bind(name)  # mode 0700 by our umask
        self._listener = await asyncio.start_unix_server(
            self._serve_user, sock=listener, limit=channel.MAX_LINE, backlog=1024
        )

    def publish(self, *, droppable: bool = False) -> None:
        """Sends the status to every lease; if `droppable`, not to those that are behind with reading."""
        if self._failed_at is None and self._status().state is ServerState.FAILED:
            self._failed_at = time.monotonic()
        status = self.status()
        line = channel.encode({"status": status.to_dict()})
        for user in [one for one in self._users if one.has_lease]:
            unread = user.writer.transport.get_write_buffer_size()
            if unread <= (_PROGRESS_BACKLOG if droppable else _BACKLOG) or status.state in _LAST:
                user.writer.write(line)
            elif not droppable and user.catching_up is None:
                user.catching_up = asyncio.create_task(self._catch_up(user))

    async def _catch_up(self, user: _User) -> None:
        with contextlib.suppress(ConnectionError):
            await user.writer.drain()
            user.writer.write(channel.encode({"status": self.status().to_dict()}))
        user.catching_up = None

    def refuse_new(self) -> None:
        """Gives no new lease from now on, because the end is decided. Existing ones last until `close`."""
        self._open = False

    async def wait_for_first(self, timeout_s: float) -> None:
        """Waits until a lease has been taken, at most `timeout_s` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first_lease.wait(), timeout_s)

    def close(self) -> None:
        """Closes the listening socket and every connection: all users learn that the supervisor is gone."""
        if self._listener is not None:
            self._listener.close()
        for call in self._calls:
            call.cancel()
        for user in list(self._users):
            user.writer.close()

    def status(self) -> ServerStatus:
        """The present status, complete with what concerns the users."""
        leases = [user for user in self._users if user.has_lease]
        return dataclasses.replace(
            self._status(),
            users=len(leases),
            pinned=self.retention.pinned,
            extra={
                "id": self._instance.id,
                "model": self._order.spec.served_model_name,
                "users": [{"pid": user.pid, "what": user.what, "since": user.since} for user in leases],
                "keep_alive_s": self.retention.keep_alive_s,
            },
        )

    @property
    def unsent_bytes(self) -> int:
        """What waits for users that do not read."""
        return sum(user.writer.transport.get_write_buffer_size() for user in self._users)

    # -- for the users -------------------------------------------------------------------------------------------------

    async def _serve_user(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = channel.peer(writer.get_extra_info("socket"))
        if uid != os.getuid():
            log.warning("refused pid %d of uid %d", pid, uid)
            writer.close()
            return
        if len(self._users) >= most_leases() + _RESERVE // 2:
            log.warning("refused pid %d: no descriptor left", pid)
            writer.close()
            return
        user = _User(writer, pid)
        self._users.add(user)
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["op"] == "engine":
                    self._begin_call(user, message)
                    continue
                reply = self._answer(user, message)
                writer.write(channel.encode({"id": message.get("id"), **reply}))
                await writer.drain()
        except (ConnectionError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.debug("user %d: %r", pid, error)  # it is gone or sent garbage: this connection is over either way
        finally:
            self._users.discard(user)
            if user.catching_up is not None:
                user.catching_up.cancel()
            writer.close()
            if self._asked.engine is not None:
                self._asked.engine.user_gone(user)
            if user.has_lease:
                log.debug("lease of pid %d given back, %d left", pid, sum(user.has_lease for user in self._users))
                self._users_changed()

    def _begin_call(self, user: _User, message: Mapping[str, Any]) -> None:
        """A call of the engine goes on beside all else, and to its end if its user goes: half an update is none."""
        self._asked.use()
        task = asyncio.create_task(self._call_engine(user, message))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call_engine(self, user: _User, message: Mapping[str, Any]) -> None:
        engine = self._asked.engine
        if engine is None or len(self._calls) > _MOST_CALLS:
            reply = {"ok": False, "error": "the supervisor takes no more calls of the engine", "kind": "refused"}
        else:
            reply = await engine.answer(user, message)
            if user not in self._users:
                engine.user_gone(user)  # it may hold something only since now
        if not user.writer.is_closing():
            user.writer.write(channel.encode({"id": message.get("id"), **reply}))

    def _answer(self, user: _User, message: Mapping[str, Any]) -> dict[str, Any]:
        match message["op"]:
            case "lease":
                return self._give_lease(user, message)
            case "status":
                return {"ok": True, "status": self.status().to_dict()}
            case "pin" | "unpin" as op:
                self.retention.pinned = op == "pin"
                self._on_retention()
                self._users_changed()
                return {"ok": True, "status": self.status().to_dict()}
            case "use":
                self._asked.use()
                return {"ok": True}
            case "restart":
                self._asked.restart()
                return {"ok": True, "epoch": self._status().epoch}
            case "give_way" if self._open and self._is_wanted:
                return {"ok": False, "status": self.status().to_dict()}
            case "give_way":
                self._asked.end(f"pid {user.pid} wants its name for another server")
                return {"ok": True}
            case "deaths":
                return {"ok": True, "died": self._asked.deaths([int(epoch) for epoch in message["epochs"]])}
            case "stop" if message.get("unless_used") and any(user.has_lease for user in self._users):
                return {"ok": False, "status": self.status().to_dict()}
            case "stop":
                self._asked.end(f"asked by pid {user.pid}")
                return {"ok": True}
            case op:
                return {"ok": False, "error": f"unknown request {op!r}"}

    def _give_lease(self, user: _User, message: Mapping[str, Any]) -> dict[str, Any]:
        if message.get("protocol", PROTOCOL) != PROTOCOL:
            return {"ok": False, "protocol": PROTOCOL}
        asked_at = time.monotonic() - float(message.get("asking_for_s", math.inf))
        if not self._open or (self._failed_at is not None and asked_at > self._failed_at):
            stopping = dataclasses.replace(self._status(), state=ServerState.STOPPING)
            return {"ok": False, "status": stopping.to_dict()}
        if sum(one.has_lease for one in self._users) >= most_leases():
            return {"ok": False, "full": most_leases()}
        self._first_lease.set()
        user.has_lease, user.what = True, str(message.get("what", ""))[:200]
        self._retain(float(message.get("keep_alive_s", 0.0)), message.get("name"))
        log.debug("lease for pid %d", user.pid)
        self._users_changed()
        port, files = self._listens_and_serves()
        return {
            "ok": True,
            "protocol": PROTOCOL,
            "order": self._order.to_dict(),
            "status": self.status().to_dict(),
            "network": network_namespace(),
            "port": port,
            "files": files,
        }

    def _retain(self, keep_alive_s: float, name: str | None) -> None:
        before = self.retention.to_record()
        self.retention.keep_alive_s = max(self.retention.keep_alive_s, keep_alive_s)
        if name:
            self.retention.names.add(str(name))
        if self.retention.to_record() != before:
            self._on_retention()

    @property
    def _is_wanted(self) -> bool:
        """Somebody uses or has pinned it, or has only just started it and is about to come."""
        return self.retention.pinned or not self._first_lease.is_set() or any(user.has_lease for user in self._users)

    def _users_changed(self) -> None:
        if self._end_timer is not None:
            self._end_timer.cancel()
            self._end_timer = None
        if not self.retention.pinned and not any(user.has_lease for user in self._users):
            self._end_in(self.retention.keep_alive_s, "the last user is gone")

    def _end_in(self, seconds: float, reason: str) -> None:
        self._end_timer = asyncio.get_running_loop().call_later(seconds, self._asked.end, reason)
