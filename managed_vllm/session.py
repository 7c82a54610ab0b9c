"""`ManagedVLLM`: attach to a server or start one, hold the lease, hand out clients.

The order in which a server is found:

1. A URL (`base_url=`, or `VLLM_SERVER_URL`): checked, not supervised.
2. A live instance: of this key, of this `name`, the one a parent passed on by `environ()`, or the only one there is.
3. A new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import filelock

from managed_vllm import forks
from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.errors import (
    ConfigError,
    ConfigMismatchError,
    ManagedVLLMError,
    NoServerError,
    ServerStoppedError,
    StateDirectoryError,
    SupervisorError,
    error_for,
)
from managed_vllm.instance import directory, external
from managed_vllm.instance.channel import Channel
from managed_vllm.instance.directory import Instance
from managed_vllm.instance.startup_view import StartupProgress
from managed_vllm.policies import HangPolicy, RestartPolicy, RetryPolicy, SupervisionPolicy
from managed_vllm.request.methods import RequestMethods
from managed_vllm.status import Connection, ServerState, ServerStatus

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from managed_vllm.client import AsyncVLLMClient, VLLMClient

log = logging.getLogger("managed_vllm")

ATTACH_VARIABLE = "MANAGED_VLLM_ATTACH"
"""Set by `environ()`: the instance to which a bare `ManagedVLLM()` of a child process attaches."""

KEEP_ALIVE_S = 5.0
"""Default of `keep_alive`: the next test, script or cell often comes at once, and a start costs half a minute."""

_SUPERVISOR_PATIENCE_S = 60.0
_KILLED_SUPERVISORS = 5
_ANSWER_S = 10.0


class ManagedVLLM(RequestMethods):
    """One vLLM server, shared by every process of this user that asks for the same thing.

    Enter it (`with` or `async with`, as often as you like, from any thread), or just use it: the first use starts.

    Args:
        model: Hugging Face id, local folder, or `"demo"` for the embedded model. None: attach to what runs already.
        name: a readable handle. The same name with other arguments is a `ConfigMismatchError`.
        base_url: a server that somebody else runs, with or without `/v1`; it is checked, not supervised.
        api_key: the key the server wants; for a server of ours the default is a random one.
        host, port: where our server listens; default loopback and a free port. Another host needs an `api_key`.
        uds: listen on a Unix socket instead, no TCP at all.
        keep_alive: seconds that the server outlives its last user. With several users the longest one holds.
        startup_timeout: seconds until a start has failed in any case; `startup_silence` without any sign of life.
        first_request_timeout: seconds for the one-token request that proves readiness; it may compile kernels.
        stop_grace: seconds between SIGTERM and SIGKILL when the server is stopped.
        gpu_release_timeout: longest wait, in seconds, until the driver has given an ended server's GPU memory back.
        env: environment variables for the server; part of what is shared.
        python: another interpreter whose vLLM to run.
        command: any other way to launch an OpenAI-compatible server, as a list of words with `{port}`, `{host}`,
            `{model}`, `{name}`, `{uds}`, or the word `{args}` for all of vLLM's flags. The key is in `VLLM_API_KEY`.
        wait: False: return from entering at once; the first use waits.
        progress: show the start-up; None: only on a terminal.
        retry: how often a request whose answer was lost is sent again (`RetryPolicy`).
        media_ids: whether an image that the server has already is sent as its id alone; not for a server by URL.
        restart: when to start again a server that crashed or hung.
        hang: when a server that does nothing counts as hung; `HangPolicy.never()` for debugging it.
        on_status: called with the new `ServerStatus` at each change of state (ready, restarting, failed, …), one after
            the other in a thread of its own; it may use this handle. What it raises is logged.
        **engine_args: vLLM's engine arguments by their names in `vllm.LLM` (`tensor_parallel_size=2`, …).

    Raises on entering: `ConfigError`, `ConfigMismatchError`, `NoServerError`, `StateDirectoryError`,
    `ExternalServerError`, `AuthenticationError`, `StartupError` (with `diagnosis`), `SupervisorError`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        host: str | None = None,
        port: int | None = None,
        uds: bool = False,
        keep_alive: float | None = None,
        startup_timeout: float = 3600.0,
        startup_silence: float = 600.0,
        first_request_timeout: float = 300.0,
        stop_grace: float = 5.0,
        gpu_release_timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
        python: str | os.PathLike[str] | None = None,
        command: Sequence[str] | None = None,
        wait: bool = True,
        progress: bool | None = None,
        restart: RestartPolicy | None = None,
        retry: RetryPolicy | None = None,
        media_ids: bool = True,
        hang: HangPolicy | None = None,
        on_status: Callable[[ServerStatus], None] | None = None,
        **engine_args: Any,
    ) -> None:
        if name is not None:
            directory.check_name(name)
        if keep_alive is None:
            keep_alive = float(os.environ.get("MANAGED_VLLM_KEEP_ALIVE") or KEEP_ALIVE_S)
        if keep_alive < 0:
            raise ConfigError(f"keep_alive is a duration in seconds, not {keep_alive}", field="keep_alive")
        self._name = name
        self._keep_alive_s = float(keep_alive)
        self._wait = wait
        self._progress = progress
        self._base_url = base_url or (None if name else external.url_from_environment())
        self._api_key = api_key or (os.environ.get(external.KEY_VARIABLE) if self._base_url else None)
        self._asked_model = None if model is None else str(model)
        self._address = Address(host=host, port=port, api_key=None if self._base_url else api_key, uds=uds)
        self._asked_address = self._address
        self._policy = SupervisionPolicy(
            startup_timeout_s=startup_timeout,
            startup_silence_s=startup_silence,
            first_request_timeout_s=first_request_timeout,
            stop_grace_s=stop_grace,
            gpu_release_timeout_s=gpu_release_timeout,
            restart=restart or RestartPolicy(),
            hang=hang or HangPolicy(),
        )
        self._retry = retry
        self._media_ids = media_ids and self._base_url is None
        self._on_status = on_status
        self._spec: ServerSpec | None = None
        self._target: Instance | None = None
        if self._base_url is None and model is not None:
            self._spec = ServerSpec.of(str(model), engine_args=engine_args, env=env, python=python, command=command)
        elif self._base_url is None and (engine_args or command or python or env):
            raise ConfigError("engine arguments, env=, python= and command= need a model=", field="model")
        self._prepare()

    def _prepare(self) -> None:
        """What is new in every process: nothing attached, no locks held."""
        self._lock = threading.RLock()
        self._depth = 0
        self._started_it = False
        self._channel: Channel | None = None
        self._external: Connection | None = None
        self._client: VLLMClient | None = None
        self._async_client: AsyncVLLMClient | None = None
        self._use: object | None = None
        self._sdk: dict[str, tuple[Connection, Any]] = {}
        self._progress_view: StartupProgress | None = None
        self._notifier = None if self._on_status is None else _Notifier(self._on_status)
        if self._notifier is not None:
            weakref.finalize(self, self._notifier.close).atexit = False
        _live.add(self)

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Attaches or starts, and waits until the server is ready (unless `wait=False`). Safe to call again."""
        with self._lock:
            self._attach()
        if self._wait:
            self.wait_ready()
        return self

    def close(self) -> None:
        """Gives the lease back. The server stays for others, and for `keep_alive` seconds."""
        with self._lock:
            channel, self._channel = self._channel, None
            client, self._async_client, self._client = self._async_client, None, None
            sdk, self._sdk = self._sdk, {}
            self._external = self._use = None
        if client is not None:
            client.close()
        for _, handle in sdk.values():
            if not hasattr(handle, "__aenter__"):
                with contextlib.suppress(Exception):
                    handle.close()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        with self._lock:
            self._depth += 1
        try:
            return self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth <= 0:
                self._depth = 0
                self.close()

    async def __aenter__(self) -> Self:
        entering = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            # The thread can't be cancelled, but without a lease its waiting ends at once.
            self._abandon()
            with contextlib.suppress(BaseException):
                await entering
                await asyncio.to_thread(self.__exit__, None, None, None)
            raise

    async def __aexit__(self, *details: Any) -> None:
        await asyncio.to_thread(self.__exit__, *details)

    def _abandon(self) -> None:
        channel = self._channel
        if channel is not None:
            channel.close()

    # -- attaching -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self, deadline: float | None) -> Iterator[None]:
        """The lock; another thread may hold it for as long as it starts a supervisor. Raises `TimeoutError`."""
        if not self._lock.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        try:
            yield
        finally:
            self._lock.release()

    def _attach(self, deadline: float | None = None, use: object | None = None) -> None:
        """Takes a lease, if there is none. Raises `TimeoutError` where the deadline (monotonic clock) passes before.

        `use` is what `_use` was when the caller began: what was closed since must not be attached again.
        """
        if use is not None and use is not self._use:
            raise ServerStoppedError("closed while waiting for the server", instance=self._id)
        if self._external is not None or (self._channel is not None and not self._channel.closed):
            return
        self._raise_if_over(self._channel)
        if self._base_url is not None:
            model = os.environ.get(external.MODEL_VARIABLE) or self._asked_model
            self._external = external.attach(self._base_url, self._api_key, model)
            log.info("attached to %s, which somebody else runs: not supervised", self._external.base_url)
            return
        home = directory.state_home()
        instance = self._target or self._find(home)
        if self._name is not None and self._spec is not None:
            directory.claim_name(home, self._name, instance.id, self._differences)
        self._channel = self._lease(instance, deadline)
        self._target = instance

    def _find(self, home: Path) -> Instance:
        """The instance that is meant."""
        if self._spec is not None:
            return Instance(home, self._spec.key)
        alive = [instance for instance in directory.instances(home) if directory.is_alive(instance)]
        names = tuple(instance.id for instance in alive)
        if self._name is not None:
            holder = directory.named(home, self._name)
            if holder is None or holder.id not in names:
                raise NoServerError(
                    f"no server named {self._name!r} is running{_listed(names)}; give model= to start one",
                    candidates=names,
                )
            return holder
        passed_on = os.environ.get(ATTACH_VARIABLE)
        if passed_on:
            return Instance(home, passed_on)
        if len(alive) != 1:
            what = "several servers are running" if alive else "no server is running"
            raise NoServerError(f"{what}{_listed(names)}; say which one with model= or name=", candidates=names)
        return alive[0]

    def _lease(self, instance: Instance, deadline: float | None) -> Channel:
        """Connects to the instance's supervisor, or becomes the one who starts it."""
        patience = time.monotonic() + _SUPERVISOR_PATIENCE_S
        until = patience if deadline is None else min(patience, deadline)
        killed = 0
        while True:
            channel = self._knock(instance)
            if channel is None and self._spec is None:
                raise NoServerError(f"the server {instance.id} is not running any more; give model= to start one")
            if channel is not None:
                reply = self._ask_for_lease(channel, instance, deadline)
                if reply is not None and reply["ok"]:
                    return self._admitted(channel, reply, instance)
                self._wait_for_the_end(channel, until)
            elif self._spec is not None and not self._elect(instance, self._spec, until):
                killed += 1
                if killed >= _KILLED_SUPERVISORS:
                    raise SupervisorError(
                        f"{killed} supervisors in a row were killed while they came up; `dmesg` may know by whom",
                        instance=instance.id,
                        log_path=str(instance.supervisor_log),
                    )
            if time.monotonic() > until:
                if until != patience:
                    raise TimeoutError
                raise SupervisorError(
                    f"the supervisor neither answers nor ends within {_SUPERVISOR_PATIENCE_S:g} s; "
                    f"its pid is {(instance.read_record() or {}).get('pid')}, its log {instance.supervisor_log}",
                    instance=instance.id,
                )

    def _knock(self, instance: Instance) -> Channel | None:
        try:
            # Weak, as is the finalizer: a handle that is dropped without `close` gives its lease back.
            session = weakref.ref(self)

            def on_change(status: ServerStatus) -> None:
                handle = session()
                if handle is None:
                    return
                if handle._progress_view is not None:
                    handle._progress_view.update(status)
                if handle._notifier is not None:
                    handle._notifier.put(status)

            channel = Channel.connect(instance.socket_path, on_change=on_change)
            weakref.finalize(self, channel.close).atexit = False
            return channel
        except SupervisorError:
            raise
        except TimeoutError as error:
            raise SupervisorError("the supervisor does not accept connections", instance=instance.id) from error
        except OSError:
            return None

    def _ask_for_lease(self, channel: Channel, instance: Instance, deadline: float | None) -> dict[str, Any] | None:
        """The supervisor's reply; None if it left in this very moment."""
        left = _ANSWER_S if deadline is None else max(0.0, min(_ANSWER_S, deadline - time.monotonic()))
        try:
            return channel.request("lease", timeout_s=left, keep_alive_s=self._keep_alive_s, what=_who())
        except ConnectionError:
            return None
        except TimeoutError as error:
            channel.close()
            if left < _ANSWER_S:
                raise
            pid = (instance.read_record() or {}).get("pid")
            raise SupervisorError(
                f"the supervisor (pid {pid}) does not answer; if it is stopped or stuck, end it: kill -9 {pid}",
                instance=instance.id,
            ) from error

    def _elect(self, instance: Instance, spec: ServerSpec, until: float) -> bool:
        """Spawns the supervisor, unless another user does or the last one is still on its way out.

        False: the one that was spawned was killed at once.
        """
        from managed_vllm.instance import spawn  # here: import time

        spec.check()
        try:
            instance.create()
            left = max(0.0, until - time.monotonic())
            with instance.start_lock().acquire(timeout=left, poll_interval=0.01):
                if directory.is_alive(instance):
                    time.sleep(0.01)
                    return True
                order = SupervisorOrder(spec=spec, address=self._address, policy=self._policy)
                self._started_it = spawn.start_supervisor(instance, order)
                return self._started_it
        except (StateDirectoryError, SupervisorError):
            raise
        except filelock.Timeout:
            return True  # somebody else has been at it all the time; the caller's patience decides
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise StateDirectoryError(
                    f"can't start in {instance.folder}: {error}", path=str(instance.folder)
                ) from error
            return True  # the folder was removed by a supervisor that has just left: start over

    def _wait_for_the_end(self, channel: Channel, deadline: float) -> None:
        with contextlib.suppress(TimeoutError):
            channel.wait_until(lambda status: False, max(0.0, deadline - time.monotonic()))
        channel.close()

    def _admitted(self, channel: Channel, reply: dict[str, Any], instance: Instance) -> Channel:
        order = SupervisorOrder.from_dict(reply["order"])
        running = order.spec
        try:
            if self._spec is not None and self._spec.identity != running.identity:
                raise ConfigMismatchError(
                    "another server holds this id", differences=self._spec.differences(running), instance=instance.id
                )
            self._check_address(asdict(order.address), reply["status"], instance)
        except BaseException:
            channel.close()
            raise
        # With these anybody who is left can start the same server again, at the same address and with the same key.
        self._spec = running
        self._address = order.address
        self._policy = order.policy
        return channel

    def _check_address(self, running: Mapping[str, Any], status: Mapping[str, Any], instance: Instance) -> None:
        """An explicit address must be the running server's; it is no reason for a second one on the same devices."""
        wish = self._asked_address  # not what an earlier server of ours happened to have
        asked = {"host": wish.host, "port": wish.port, "api_key": wish.api_key}
        actual = dict(running)
        differences = {
            field: ("***", "***") if field == "api_key" else (value, actual[field])
            for field, value in asked.items()
            if value is not None and value != actual[field]
        }
        if wish.uds and not actual["uds"]:
            differences["uds"] = (True, False)
        if differences:
            raise ConfigMismatchError(
                "the same server is running already, at another address; leave the address out to share it, "
                f"or end it first: managed-vllm down {instance.id}",
                differences=differences,
                instance=instance.id,
            )

    def _differences(self, record: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        assert self._spec is not None
        try:
            return self._spec.differences(ServerSpec.from_dict(record["spec"]))
        except (KeyError, TypeError):
            return {}

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout: float | None = None, *, after_epoch: int | None = None) -> ServerStatus:
        """Waits until the server is ready; with `after_epoch` until a later life of it is.

        Raises the server's `StartupError` if it has failed, `ServerStoppedError` if somebody stopped it, `TimeoutError`
        after `timeout` seconds. An external server is ready by definition.
        """
        return self._wait_ready(timeout, after_epoch, None)

    def _wait_ready(self, timeout: float | None, after_epoch: int | None, use: object | None) -> ServerStatus:
        if self._external is not None:
            return self._external_status(self._external)
        deadline = None if timeout is None else time.monotonic() + timeout

        def settled(status: ServerStatus | None) -> bool:
            if status is None:
                return False
            if status.state is ServerState.READY:
                return after_epoch is None or status.epoch > after_epoch
            return status.state in (ServerState.FAILED, ServerState.STOPPING, ServerState.GONE)

        title = self._asked_model or (self._target.id if self._target else "vLLM")
        while True:
            channel = self._channel
            if channel is None or channel.closed:
                try:
                    with self._locked(deadline):
                        self._attach(deadline, use)
                except TimeoutError as error:
                    if isinstance(error, ManagedVLLMError):
                        raise
                    raise TimeoutError(f"the server was not ready within {timeout:g} s") from None
                channel = self._channel
                if channel is None:
                    return self.wait_ready(timeout)
                after_epoch = None  # another supervisor counts anew
            with StartupProgress(title, self._progress) as view:
                self._progress_view = view
                try:
                    if channel.status is not None and not settled(channel.status):
                        view.update(channel.status)
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    status = channel.wait_until(settled, left)
                except TimeoutError:
                    raise TimeoutError(f"the server was not ready within {timeout:g} s") from None
                finally:
                    self._progress_view = None
            if status is not None and status.state is ServerState.READY and not channel.closed:
                return status
            if channel.given_back:
                raise ServerStoppedError("closed while waiting for the server", instance=self._id)
            self._raise_if_over(channel)
            # The supervisor was killed: its server falls with it, and one of the users starts the next.

    def _raise_if_over(self, channel: Channel | None) -> None:
        """Raises, once, what a server of ours ended with; the next use starts anew.

        A supervisor that was killed has said nothing, and nothing is raised: somebody starts the next at once.
        """
        status = channel.status if channel is not None and not channel.given_back else None
        if status is None or status.state not in (ServerState.FAILED, ServerState.STOPPING, ServerState.GONE):
            return
        with self._lock:
            if self._channel is channel:
                self._channel = None
        if status.state is ServerState.FAILED and status.diagnosis is not None:
            raise error_for(status.diagnosis, instance=self._id, log_path=status.log_path)
        raise ServerStoppedError("the server was stopped", instance=self._id, log_path=status.log_path)

    def _connection(
        self,
        lost_epoch: int | None = None,
        timeout_s: float | None = None,
        pause_s: float = 0.0,
        use: object | None = None,
    ) -> tuple[Connection, int]:
        """The connection to a ready server; after `lost_epoch` was lost, a later one, or the same if it is well.

        What was lost may have been one connection only: a later epoch is waited for `pause_s` seconds, unless the
        supervisor has noticed a death.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._locked(deadline):
            self._attach(deadline, use)
        if self._external is not None:
            return self._external, 0
        if lost_epoch is not None:
            with contextlib.suppress(TimeoutError):
                assert self._channel is not None
                self._channel.wait_until(
                    lambda now: now is None or now.epoch > lost_epoch or now.state is not ServerState.READY,
                    pause_s if timeout_s is None else min(pause_s, timeout_s),
                )
        status = self._wait_ready(None if deadline is None else max(0.0, deadline - time.monotonic()), None, use)
        assert status.connection is not None
        return status.connection, status.epoch

    def _ready(self) -> tuple[Connection, int] | None:
        """The connection to a server that is ready now, at once; None: `_connection` may have to wait for it."""
        channel, known = self._channel, self._external
        if known is not None:
            return known, 0
        if channel is None or channel.closed:
            return None
        status = channel.status
        if status is None or status.state is not ServerState.READY or status.connection is None:
            return None
        return status.connection, status.epoch

    # -- handles -------------------------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """The API's base URL, ending in `/v1`. Waits until the server is ready, as every handle does."""
        return self._connection()[0].base_url

    @property
    def api_key(self) -> str:
        """The key that every route but `/health` and `/ping` wants; empty for an external server without one."""
        return self._connection()[0].api_key

    @property
    def model(self) -> str:
        """The name under which the model is served: what goes into `model=` of a request."""
        return self._connection()[0].model

    @property
    def client(self) -> VLLMClient:
        """The client behind `chat` and `generate`; it follows restarts."""
        with self._lock:
            if self._client is None:
                from managed_vllm.client import VLLMClient

                self._client = VLLMClient.of(self.async_client)
            return self._client

    @property
    def async_client(self) -> AsyncVLLMClient:
        """The same client for asyncio: `await llm.async_client.chat(…)`."""
        with self._lock:
            if self._async_client is None:
                from managed_vllm.client import AsyncVLLMClient

                use = self._use = object()
                self._async_client = AsyncVLLMClient(
                    connection=lambda lost, left, pause: self._connection(lost, left, pause, use),
                    ready=self._ready,
                    retry=self._retry,
                    media_ids=self._media_ids,
                    instance=lambda: self._id,
                )
            return self._async_client

    @property
    def openai(self) -> OpenAI:
        """The OpenAI SDK's client, set up for this server, without a time-out of its own."""
        return self._sdk_client("OpenAI", "DefaultHttpxClient")  # type: ignore[no-any-return]

    @property
    def async_openai(self) -> AsyncOpenAI:
        """The OpenAI SDK's asynchronous client; the same otherwise."""
        return self._sdk_client("AsyncOpenAI", "DefaultAsyncHttpxClient")  # type: ignore[no-any-return]

    def _sdk_client(self, kind: str, http: str) -> Any:
        connection, _ = self._connection()
        with self._lock:
            kept = self._sdk.get(kind)
            if kept is not None and kept[0] == connection:
                return kept[1]
            import importlib

            from managed_vllm.request import openai_sdk

            sdk = importlib.import_module("openai")
            make_http = getattr(sdk, http)
            # The SDK moved from httpx to httpx2: the transport must be of the one it uses.
            module = importlib.import_module(make_http.__mro__[1].__module__.partition(".")[0])
            make = openai_sdk.async_transport if kind.startswith("Async") else openai_sdk.transport
            client = getattr(sdk, kind)(
                base_url=connection.base_url,
                api_key=connection.api_key or "none",
                timeout=None,
                http_client=make_http(transport=make(module, self.async_client._exchange), trust_env=False),
            )
            self._sdk[kind] = (connection, client)
            return client

    @property
    def supervised(self) -> bool:
        """False for a server given by URL."""
        return self._base_url is None

    @property
    def id(self) -> str | None:
        """The instance's short id, as the command line shows it; None for an external server."""
        with self._lock:
            self._attach()
        return self._id

    @property
    def _id(self) -> str | None:
        return self._target.id if self._target else None

    def status(self) -> ServerStatus:
        """What the supervisor says now: state, stage, epoch, users, pids."""
        with self._lock:
            self._attach()
            if self._external is not None:
                return self._external_status(self._external)
            assert self._channel is not None
            return ServerStatus.from_dict(self._channel.request("status")["status"])

    @staticmethod
    def _external_status(connection: Connection) -> ServerStatus:
        return ServerStatus(state=ServerState.READY, connection=connection, extra={"external": True})

    def logs(self, lines: int = 100) -> str:
        """The last lines of the server's log. Raises `ConfigError` for an external server: its log is not ours."""
        path = self.status().log_path
        if path is None:
            raise ConfigError("an external server's log is not here", field="base_url")
        return directory.tail(Path(path), lines)

    def restart(self, timeout: float | None = None) -> ServerStatus:
        """Stops the server and starts it again, for all its users; waits until it is ready."""
        epoch = self._request("restart")["epoch"]
        return self.wait_ready(timeout, after_epoch=epoch)

    def pin(self) -> None:
        """Lets the server run without users, until `unpin` or `managed-vllm down`."""
        self._request("pin")

    def unpin(self) -> None:
        """Takes `pin` back: the server goes with its last user again."""
        self._request("unpin")

    def stop_server(self) -> None:
        """Stops the server for all its users; they get `ServerStoppedError`. Returns at once."""
        self._request("stop")

    def _request(self, op: str) -> dict[str, Any]:
        if self._base_url is not None:
            raise ConfigError(f"an external server can't be asked to {op} from here", field="base_url")
        with self._lock:
            self._attach()
            assert self._channel is not None
            return self._channel.request(op)

    @property
    def started_it(self) -> bool:
        """True if this handle's process was the one that started the server it uses."""
        return self._started_it

    # -- passing it on -------------------------------------------------------------------------------------------------

    def environ(self) -> dict[str, str]:
        """Environment variables with which a bare `ManagedVLLM()` in a child process attaches to this very server."""
        with self._lock:
            self._attach()
        if self._external is not None:
            found = self._external
            return {
                external.URL_VARIABLE: found.base_url,
                external.MODEL_VARIABLE: found.model,
                external.KEY_VARIABLE: found.api_key,
            }
        assert self._target is not None
        return {
            directory.HOME_VARIABLE: str(self._target.home),
            ATTACH_VARIABLE: self._target.id,
            external.URL_VARIABLE: "",
        }

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            if self._spec is None and self._base_url is None:
                self._attach()
        kept = ("_name", "_keep_alive_s", "_wait", "_progress", "_base_url", "_api_key", "_asked_model", "_address")
        return {
            name: getattr(self, name)
            for name in (*kept, "_asked_address", "_policy", "_retry", "_media_ids", "_spec", "_target")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._on_status = None  # a function of the other process
        self._prepare()

    def __repr__(self) -> str:
        where = self._base_url or (self._target.id if self._target else self._name or "not attached")
        return f"<ManagedVLLM {self._asked_model or ''} {where}>"


class _Notifier:
    """Calls the user's function for each change of state, in order, outside of the thread that holds the lease."""

    def __init__(self, function: Callable[[ServerStatus], None]) -> None:
        self._function = function
        self._last: tuple[ServerState, int] | None = None
        self._queue: queue.SimpleQueue[ServerStatus | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def put(self, status: ServerStatus) -> None:
        """Only called by the one thread that reads the channel."""
        if (status.state, status.epoch) == self._last:
            return
        self._last = (status.state, status.epoch)
        self._queue.put(status)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="managed-vllm-status", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Ends the thread after what has been put."""
        self._queue.put(None)

    def _run(self) -> None:
        while (status := self._queue.get()) is not None:
            try:
                self._function(status)
            except Exception:
                log.exception("on_status failed")


def _who() -> str:
    """What the user is, for `managed-vllm status`: its command."""
    return " ".join(sys.argv)[:200] or sys.executable


def _listed(names: Sequence[str]) -> str:
    return f" (running: {', '.join(names)})" if names else ""


_live: weakref.WeakSet[ManagedVLLM] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """A forked child must not hold its parent's lease open; it takes one of its own when it uses the handle."""
    for session in list(_live):
        channel = session._channel
        kept = session._depth, session._client, session._async_client, session._use  # they know of the fork themselves
        session._prepare()
        session._depth, session._client, session._async_client, session._use = kept
        if channel is not None:
            channel.close()


forks.call_in_child(_after_fork_in_child)
