"""Attaching a process to a server: find it or start it, take a lease, follow its status until it is ready.

`AttachOptions` says which server a user asked for, and is never changed. An `Attachment` is one process's hold on it,
from the first use of a handle to its `close`:

1. A server given by URL is checked, and that is all: it is not supervised.
2. Else the instance is found: the one of this spec, of this name, the one that a parent process passed on, or the only
   one that runs.
3. Its supervisor is asked for a lease. Where none runs, one user is elected by the instance's start lock and spawns it;
   the others meanwhile find its socket.
4. The supervisor's order is kept as `KnownServer`: after the supervisor was killed, any remaining user can start the
   same server again, at the same address and with the same key.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from managed_vllm import forks, green_threads
from managed_vllm.config import PROTOCOL, Address, ServerSpec, SupervisorOrder
from managed_vllm.errors import (
    ConfigError,
    ManagedVLLMError,
    NoServerError,
    ServerStoppedError,
    SupervisorError,
    error_for,
)
from managed_vllm.instance import admission, directory, external, names
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.election import Election, elect, left_s, raise_if_starter_is_stopped
from managed_vllm.instance.startup_view import StartupProgress
from managed_vllm.masking import Secret, masked_words, reveal, without_passwords
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.status import Connection, ServerState, ServerStatus

log = logging.getLogger("managed_vllm")

ATTACH_VARIABLE = "MANAGED_VLLM_ATTACH"
"""The id of the instance to which a bare handle of a child process attaches."""

SUPERVISOR_PATIENCE_S = 60.0
_KILLED_SUPERVISORS = 5
ANSWER_S = 10.0
"""Seconds that a supervisor has to answer: one that does not is stopped or stuck."""
_INFORMED_S = 10.0
"""Seconds for a supervisor to see that a replica has ended."""
STOPPED_S = 5.0
"""Seconds that a starter may be stopped without anybody being told."""
_ELECTED_S = 0.01
"""Seconds between two looks at what another process has begun."""

_STARTED = (ServerState.READY, ServerState.FAILED)
"""A replica whose start is over, for better or worse."""
_OVER = (ServerState.FAILED, ServerState.STOPPING, ServerState.GONE)


# -- values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class KnownServer:
    """A server that was attached to: its instance, and the order with which its supervisor was started.

    A pickle holds none of the order's secrets, not even the key: another process gets them with its own lease.
    """

    instance: Instance
    order: SupervisorOrder


@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """Which server a user asks for.

    `base_url` means a server at that URL, `more_urls` others of the same model, and `api_key` is their key. Without a
    `spec`, only a server that is already running will do: the one called `name`, if a name is given. `keep_alive_s` is
    how many seconds our server outlives its last user. `progress` shows the start-up; None: on a terminal only.

    A pickle holds all of it, the user's own secrets included: without them another process can't ask for the same.
    """

    model: str | None = None
    name: str | None = None
    base_url: str | None = None
    more_urls: Sequence[str] = ()
    api_key: Secret | None = None
    keep_alive_s: float = 0.0
    progress: bool | None = None
    spec: ServerSpec | None = None
    address: Address = field(default_factory=Address)
    policy: SupervisionPolicy = field(default_factory=SupervisionPolicy)

    def __reduce__(self) -> tuple[Any, ...]:
        spec = None if self.spec is None else self.spec.to_dict()
        return _unpickled, ({**self.__dict__, "api_key": reveal(self.api_key)}, spec, self.address.to_dict())


def _unpickled(plain: dict[str, Any], spec: dict[str, Any] | None, address: dict[str, Any]) -> AttachOptions:
    key = plain["api_key"]
    return AttachOptions(
        **{
            **plain,
            "api_key": None if key is None else Secret(key),
            "spec": None if spec is None else ServerSpec.from_dict(spec),
            "address": Address.from_dict(address),
        }
    )


# -- finding and checking ----------------------------------------------------------------------------------------------


def find(options: AttachOptions, home: Path) -> Instance:
    """The instance that is meant. Raises `NoServerError` if none is running and there is no spec to start one."""
    if options.spec is not None:
        return Instance(home, options.spec.key)
    alive = [instance for instance in directory.instances(home) if directory.is_alive(instance)]
    ids = tuple(instance.id for instance in alive)
    if options.name is not None:
        holder = names.named(home, options.name)
        if holder is None or holder.id not in ids:
            raise NoServerError(
                f"no server named {options.name!r} is running{_listed(ids)}; give model= to start one", candidates=ids
            )
        return holder
    passed_on = os.environ.get(ATTACH_VARIABLE)
    if passed_on:
        return Instance(home, passed_on)
    if len(alive) != 1:
        what = "several servers are running" if alive else "no server is running"
        raise NoServerError(f"{what}{_listed(ids)}; say which one with model= or name=", candidates=ids)
    return alive[0]


def _listed(ids: Sequence[str]) -> str:
    return f" (running: {', '.join(ids)})" if ids else ""


def _command_line() -> str:
    """What this process is, for `managed-vllm status`."""
    return " ".join(masked_words(getattr(sys, "argv", [])))[:200] or sys.executable or ""


def _connected(instance: Instance, on_change: Callable[[ServerStatus], None]) -> Channel | None:
    """A channel to the instance's supervisor; None if none listens. Raises `SupervisorError` where one is stuck."""
    try:
        return Channel.connect(instance.socket_path, on_change=on_change)
    except SupervisorError:
        raise
    except TimeoutError as error:
        raise SupervisorError("the supervisor does not accept connections", instance=instance.id) from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise SupervisorError(
                f"no connection to the supervisor can be opened: {error.strerror}; raise the limit (`ulimit -n`)",
                instance=instance.id,
            ) from error
        return None


# -- the attachment ----------------------------------------------------------------------------------------------------


class Attachment:
    """One process's hold on one server, until `close`. Every method may be called from any thread.

    A forked child does not share its parent's lease: it takes one of its own on its next use.

    Args:
        options: which server.
        known: the server this handle was attached to before, here or in the process that pickled it.
        on_status: called with each new `ServerStatus`, in the thread that reads the channel.
    """

    def __init__(
        self,
        options: AttachOptions,
        known: KnownServer | None = None,
        on_status: Callable[[ServerStatus], None] | None = None,
    ) -> None:
        self.options = options
        self.known = known
        self.started_it = False
        """Whether this process started the server's supervisor."""
        self._on_status = on_status
        self._closed = False
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._asking: Channel | None = None
        """A channel on which a lease is being asked for: it may be given at any moment."""
        self._external: external.Servers = ()
        self._views: list[StartupProgress] = []
        forks.call_in_child(self._after_fork)

    def _after_fork(self) -> None:
        channels = self._channel, self._asking
        self._channel = self._asking = None
        self._lock = threading.RLock()
        self._external = ()
        self._views = []
        self.started_it = False
        for channel in channels:
            if channel is not None:
                channel.close()

    @property
    def id(self) -> str | None:
        """The instance's id, once it is known; None for a server given by URL."""
        return self.known.instance.id if self.known else None

    @property
    def replicas(self) -> int | None:
        """How many servers the instance has; None: only an attached handle knows."""
        spec = self.known.order.spec if self.known else self.options.spec
        return spec.replicas if spec is not None else None if self.options.base_url is None else 1

    def successor(self) -> Attachment:
        """A new attachment to the same server."""
        made = Attachment(self.options, self.known, self._on_status)
        made.started_it = self.started_it
        return made

    def close(self) -> None:
        """Gives the lease back, for good. Threads that wait for the server, or are attaching, get an error."""
        self._closed = True
        for channel in (self._channel, self._asking):
            if channel is not None:
                channel.close()

    # -- attaching -----------------------------------------------------------------------------------------------------

    def attach(self, deadline: float | None = None) -> Channel | None:
        """Takes a lease, if there is none. Returns its channel, or None for a server given by URL.

        Raises `ServerStoppedError` after `close`, `TimeoutError` when the deadline (monotonic clock) passes, and all
        that `ManagedVLLM` raises on entering.
        """
        green_threads.refuse()
        with self._locked(deadline):
            self._raise_if_closed()
            if self._external or (self._channel is not None and not self._channel.closed):
                return self._channel
            self._raise_if_over(self._channel)
            if self.options.base_url is not None:
                self._attach_external(self.options.base_url)
                return None
            try:
                self._channel = self._take_lease(deadline)
            finally:  # an interrupt (Ctrl-C, a cancelled task) may come when the lease is given already
                asked, self._asking = self._asking, None
                if asked is not None and (asked is not self._channel or self._closed):
                    asked.close()
            self._raise_if_closed()
            return self._channel

    @contextlib.contextmanager
    def _locked(self, deadline: float | None) -> Iterator[None]:
        """Holds the lock, which another thread may have while it starts a supervisor. Raises `TimeoutError`."""
        if not self._lock.acquire(timeout=-1 if deadline is None else left_s(deadline)):
            raise TimeoutError
        try:
            yield
        finally:
            self._lock.release()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise ServerStoppedError("closed while waiting for the server", instance=self.id)

    def _raise_if_over(self, channel: Channel | None) -> None:
        """Raises the error with which the server ended, but only once: the next use starts anew.

        Nothing is raised for a supervisor that was killed: one of its users starts the next one at once.
        """
        status = channel.status if channel is not None and not channel.given_back else None
        if status is None or status.state not in _OVER:
            return
        with self._lock:
            if self._channel is channel:
                self._channel = None
        if status.state is ServerState.FAILED and status.diagnosis is not None:
            raise error_for(status.diagnosis, instance=self.id, log_path=status.log_path)
        raise ServerStoppedError("the server was stopped", instance=self.id, log_path=status.log_path)

    def _attach_external(self, base_url: str) -> None:
        urls = (base_url, *self.options.more_urls)
        self._external = external.attach_all(urls, reveal(self.options.api_key), self.options.model)

    @property
    def servers(self) -> external.Servers:
        """All servers given by URL, once attached; whether each was up then."""
        return self._external

    @property
    def _first_external(self) -> Connection:
        return next(connection for connection, is_up in self._external if is_up)

    def _take_lease(self, deadline: float | None) -> Channel:
        home = directory.state_home()
        directory.check_locks(home)
        instance = self.known.instance if self.known else find(self.options, home)
        spec = self.options.spec or (self.known.order.spec if self.known else None)
        name = None if spec is None else self.options.name
        differences = functools.partial(admission.differences, spec)
        with names.claimed(home, name, instance, differences, deadline, self._raise_if_closed) as claim:
            channel, running = self._lease(instance, deadline)
            claim()  # again: a server of this key that has ended since has dropped its names
        self.known = KnownServer(instance=instance, order=running)
        return channel

    def _order(self) -> SupervisorOrder | None:
        """The order for the next supervisor: its predecessor's, else our own. None: there is no spec to start from."""
        last = self.known.order if self.known else None
        if last is not None and last.is_whole:
            return last
        spec = self.options.spec or (last.spec if last else None)
        if spec is None:
            return None
        return SupervisorOrder.first(spec, self.options.address, last.policy if last else self.options.policy)

    def _lease(self, instance: Instance, deadline: float | None) -> tuple[Channel, SupervisorOrder]:
        """A lease from the instance's supervisor, and its order. Starts the supervisor if none is running."""
        began = time.monotonic()
        patience = began + SUPERVISOR_PATIENCE_S
        until = patience if deadline is None else min(patience, deadline)
        killed = 0
        while not self._closed:
            channel = self._asking = self._connect(instance)
            self._raise_if_closed()
            if channel is not None:
                reply = self._ask_for_lease(channel, instance, deadline, began)
                admission.check_room(instance, reply or {})
                if reply is not None and reply["ok"]:
                    return channel, admission.check(self.options.spec, self.options.address, instance, reply)
                # One that we can't understand looks like one that has hung up.
                admission.check_protocol(reply or instance.read_record() or {}, instance)
                self._wait_until_gone(channel, until)
            elif (order := self._order()) is not None:
                killed += self._start(instance, order, until)
                if killed >= _KILLED_SUPERVISORS:
                    raise SupervisorError(
                        f"{killed} supervisors in a row were killed while they came up; `dmesg` may know by whom",
                        instance=instance.id,
                        log_path=str(instance.supervisor_log),
                    )
            elif directory.is_alive(instance):
                time.sleep(_ELECTED_S)  # it does not listen yet, or not any more
            else:
                raise NoServerError(f"the server {instance.id} is not running any more; give model= to start one")
            if time.monotonic() > began + STOPPED_S:
                raise_if_starter_is_stopped(instance)
            if time.monotonic() > until:
                if until != patience:
                    raise TimeoutError
                raise SupervisorError(
                    f"the supervisor neither answers nor ends within {SUPERVISOR_PATIENCE_S:g} s; "
                    f"its pid is {(instance.read_record() or {}).get('pid')}, its log {instance.supervisor_log}",
                    instance=instance.id,
                )
        raise ServerStoppedError("closed while waiting for the server", instance=instance.id)

    def _start(self, instance: Instance, order: SupervisorOrder, until: float) -> int:
        """Takes part in the election. Returns 1 if the supervisor was spawned here and killed at once, else 0."""
        outcome = elect(instance, order, until, lambda: not self._closed)
        if outcome is Election.LEFT_TO_OTHERS:
            time.sleep(_ELECTED_S)
        else:
            self.started_it = outcome is Election.STARTED
        return int(outcome is Election.KILLED)

    def _connect(self, instance: Instance) -> Channel | None:
        """A channel to the instance's supervisor, not yet a lease; None if none listens."""
        # Weak, like the finalizer below: a handle that is dropped without `close` gives its lease back.
        attachment = weakref.ref(self)

        def on_change(status: ServerStatus) -> None:
            follower = attachment()
            if follower is not None:
                follower._follow(status)

        channel = _connected(instance, on_change)
        if channel is not None:
            weakref.finalize(self, channel.close).atexit = False
        return channel

    def _ask_for_lease(
        self, channel: Channel, instance: Instance, deadline: float | None, began: float
    ) -> dict[str, Any] | None:
        """The supervisor's reply; None if it left at this very moment. `began`: when we began to want the server."""
        left = ANSWER_S if deadline is None else min(ANSWER_S, left_s(deadline))
        try:
            return channel.request(
                "lease",
                timeout_s=left,
                keep_alive_s=self.options.keep_alive_s,
                what=_command_line(),
                name=self.options.name,
                asking_for_s=time.monotonic() - began,
                protocol=PROTOCOL,
            )
        except ConnectionError:
            return None
        except TimeoutError as error:
            channel.close()
            if left < ANSWER_S:
                raise
            pid = (instance.read_record() or {}).get("pid")
            raise SupervisorError(
                f"the supervisor (pid {pid}) does not answer; if it is stopped or stuck, end it: kill -9 {pid}",
                instance=instance.id,
            ) from error

    def _wait_until_gone(self, channel: Channel, deadline: float) -> None:
        """Waits until a supervisor that is shutting down has ended, so that the next one never meets it."""
        with contextlib.suppress(TimeoutError):
            channel.wait_until(lambda _: self._closed, left_s(deadline))
        channel.close()

    # -- following -----------------------------------------------------------------------------------------------------

    def _follow(self, status: ServerStatus) -> None:
        for view in tuple(self._views):
            view.update(status)
        if self._on_status is not None:
            self._on_status(status)

    def wait_ready(
        self,
        timeout: float | None = None,
        *,
        after_epoch: int | None = None,
        progress: bool | None = None,
        all_replicas: bool = False,
    ) -> ServerStatus:
        """Waits until the server is ready, as `ManagedVLLM.wait_ready` does; with `all_replicas` until each is."""
        deadline = _deadline(timeout)
        while True:
            channel = self._channel
            if channel is None or channel.closed:
                with _not_ready_within(timeout):
                    channel = self.attach(deadline)
                if channel is None:
                    return self.status()
                after_epoch = None  # another supervisor counts its epochs anew
            with _not_ready_within(timeout), self._shown(channel, progress):
                left = None if deadline is None else left_s(deadline)
                status = channel.wait_until(functools.partial(_is_settled, after_epoch, all_replicas), left)
                if status is not None and status.state is ServerState.SLEEPING:
                    self._ask("use")
                    channel.wait_until(lambda now: now is None or now.state is not ServerState.SLEEPING, left)
                    continue
            if status is not None and status.state is ServerState.READY and not channel.closed:
                return status
            if channel.given_back:
                raise ServerStoppedError("closed while waiting for the server", instance=self.id)
            self._raise_if_over(channel)
            # The supervisor was killed: its server falls with it, and one of the users starts the next.

    @contextlib.contextmanager
    def _shown(self, channel: Channel, progress: bool | None) -> Iterator[None]:
        """Shows the server's status on the terminal while it starts."""
        options = self.options
        title = options.model or self.id or "vLLM"
        with StartupProgress(title, options.progress if progress is None else progress) as view:
            self._views.append(view)
            try:
                status = channel.status
                if status is not None and status.state in (ServerState.STARTING, ServerState.RESTARTING):
                    view.update(status)
                yield
            finally:
                with contextlib.suppress(ValueError):  # a forked child has no views
                    self._views.remove(view)

    def connection(
        self, lost_epoch: int | None = None, timeout_s: float | None = None, pause_s: float = 0.0
    ) -> tuple[Connection, int]:
        """The connection to a ready server, and its epoch.

        `lost_epoch` is the epoch in which the caller lost an answer. The server may have died, or only one connection
        broke. So this waits up to `pause_s` seconds for a later epoch, and longer if the supervisor has seen the server
        die; then the same epoch is returned once more.
        """
        deadline = _deadline(timeout_s)
        channel = self.attach(deadline)
        if channel is not None and lost_epoch is not None:
            with contextlib.suppress(TimeoutError):
                channel.wait_until(
                    lambda now: now is None or now.epoch > lost_epoch or now.state is not ServerState.READY,
                    pause_s if timeout_s is None else min(pause_s, timeout_s),
                )
        status = self.wait_ready(None if deadline is None else left_s(deadline))
        assert status.connection is not None
        return status.connection, status.epoch

    def ready(self) -> tuple[Connection, int] | None:
        """As `connection`, without waiting: None if the server is not ready at this moment."""
        channel = self._channel
        if self._external:
            return self._first_external, 0
        if channel is None or channel.closed:
            return None
        status = channel.status
        if status is None or status.state is not ServerState.READY or status.connection is None:
            return None
        return status.connection, status.epoch

    # -- asking --------------------------------------------------------------------------------------------------------

    def status(self) -> ServerStatus:
        """What the supervisor says now. A server given by URL is ready by definition."""
        if self.attach() is None:
            extra: dict[str, Any] = {"external": True}
            if len(self._external) > 1:
                extra["base_urls"] = [without_passwords(connection.base_url) for connection, _ in self._external]
            return ServerStatus(state=ServerState.READY, connection=self._first_external, extra=extra)
        return ServerStatus.from_dict(self._ask("status")["status"])

    def last_status(self) -> ServerStatus | None:
        """What the supervisor said last, without a question; None without a connection to it."""
        channel = self._channel
        return None if channel is None or channel.closed else channel.status

    def wait_for_news(self, known: ServerStatus | None, timeout_s: float) -> None:
        """Until `last_status` is another than `known`, or there is no connection, or the time is over."""
        channel = self._channel
        if channel is not None:
            with contextlib.suppress(TimeoutError):
                channel.wait_until(lambda now: now is not known, timeout_s)

    def request(self, op: str) -> dict[str, Any]:
        """The supervisor's reply to a request without arguments. Raises `ConfigError` for a server given by URL."""
        if self.options.base_url is not None:
            raise ConfigError(f"an external server can't be asked to {op} from here", field="base_url")
        return self._ask(op)

    def _ask(self, op: str) -> dict[str, Any]:
        """The reply, if need be of the supervisor after one that was killed.

        Raises what the server ended with, or `SupervisorError` where no reply comes.
        """
        for _ in range(_KILLED_SUPERVISORS):
            channel = self.attach()
            assert channel is not None
            try:
                return channel.request(op, timeout_s=ANSWER_S)
            except ConnectionError:
                with contextlib.suppress(TimeoutError):  # its last words are still being read
                    channel.wait_until(lambda _: False, ANSWER_S)
                self._raise_if_closed()
                self._raise_if_over(channel)
            except TimeoutError as error:
                self._raise_if_closed()
                raise SupervisorError(
                    f"the supervisor does not answer {op!r}; it may be stopped or stuck: managed-vllm status",
                    instance=self.id,
                ) from error
        raise SupervisorError(
            f"{_KILLED_SUPERVISORS} supervisors in a row were gone before they answered {op!r}", instance=self.id
        )


def restart(attachment: Attachment, timeout: float | None) -> ServerStatus:
    """Has the server started again, each replica of it, and waits until that is done; raises as `wait_ready`."""
    epoch = attachment.request("restart")["epoch"]
    status = attachment.wait_ready(timeout, after_epoch=epoch, all_replicas=True)
    for one in status.replicas:
        if one.state is ServerState.FAILED and one.diagnosis is not None:
            raise error_for(one.diagnosis, instance=attachment.id, log_path=one.log_path)
    return status


def environ(attachment: Attachment) -> dict[str, str]:
    """The environment variables with which a bare handle attaches to this very server."""
    attachment.attach()
    if servers := attachment.servers:
        found = attachment.connection()[0]
        return {
            external.URL_VARIABLE: ",".join(connection.base_url for connection, _ in servers),
            external.MODEL_VARIABLE: found.model,
            external.KEY_VARIABLE: found.api_key.reveal(),
        }
    assert attachment.known is not None
    return {
        directory.HOME_VARIABLE: str(attachment.known.instance.home),
        ATTACH_VARIABLE: attachment.known.instance.id,
        external.URL_VARIABLE: "",
    }


def _is_settled(after_epoch: int | None, all_replicas: bool, status: ServerStatus | None) -> bool:
    """Whether a user that waits for the server, or for a later epoch of it, has something to do."""
    if status is None:
        return False
    if status.state is ServerState.READY:
        least = -1 if after_epoch is None else after_epoch
        servers = status.replicas or (status,)
        if all_replicas:
            return all(one.epoch > least and one.state in _STARTED for one in servers)
        return any(one.epoch > least and one.state is ServerState.READY for one in servers)
    return status.state in _OVER or (status.state is ServerState.SLEEPING and after_epoch is None)


def report_deaths(attachment: Attachment, request: str, epochs: Sequence[int]) -> list[int] | None:
    """Tells the supervisor that these epochs died under one request; returns those that did die.

    None: it is not known. The ends of a restart on request, or with the supervisor, are no deaths. Of a replica's end a
    request may know before the supervisor, which is given the time to learn of it.
    """
    with contextlib.suppress(ManagedVLLMError, OSError):
        channel = attachment.attach()
        if channel is not None:
            with contextlib.suppress(TimeoutError):
                channel.wait_until(functools.partial(_is_informed, frozenset(epochs)), _INFORMED_S)
        reply = {} if channel is None else channel.request("deaths", request=request, epochs=list(epochs))
        if reply.get("ok"):
            return [int(epoch) for epoch in reply["died"]]
    return None


def _is_informed(lost: frozenset[int], status: ServerStatus | None) -> bool:
    """Whether the supervisor knows of these epochs of replicas that they are over."""
    return status is None or not any(one.epoch in lost and one.state is ServerState.READY for one in status.replicas)


@contextlib.contextmanager
def _not_ready_within(timeout: float | None) -> Iterator[None]:
    """Gives a bare `TimeoutError` its message. The server's own `StartupTimeoutError` passes unchanged."""
    try:
        yield
    except TimeoutError as error:
        if timeout is None or isinstance(error, ManagedVLLMError):
            raise
        raise TimeoutError(f"the server was not ready within {timeout:g} s") from None


def _deadline(timeout_s: float | None) -> float | None:
    """A time of the monotonic clock; None: never."""
    return None if timeout_s is None else time.monotonic() + timeout_s
