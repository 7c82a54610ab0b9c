"""`ManagedVLLM`: the handle that attaches to a server or starts one, holds the lease, and hands out clients.

A handle is what was asked for (`_Settings`, frozen), and what it has in this process: an `Attachment`
(`managed_vllm.instance.attach`: how the server is found or started) and the clients made for that. `close` ends both;
the next use begins with new ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from managed_vllm import forks, training
from managed_vllm.config import Address, ServerSpec, installed_vllm, set_in_arguments, set_in_engine_args, vllm_folder
from managed_vllm.engine_state import PauseMode
from managed_vllm.errors import ConfigError, ManagedVLLMError
from managed_vllm.instance import external, names
from managed_vllm.instance.attach import Attachment, AttachOptions, KnownServer, environ, report_deaths, restart
from managed_vllm.instance.engine_control import AsyncEngineControl, EngineControl
from managed_vllm.instance.event_history import restarts_by_cause
from managed_vllm.instance.public_address import public_connection
from managed_vllm.instance.server_logs import newest_lines
from managed_vllm.instance.status_listener import StatusListener
from managed_vllm.masking import without_passwords
from managed_vllm.policies import MAX_IN_FLIGHT, HangPolicy, RestartPolicy, RetryPolicy, SupervisionPolicy, seconds
from managed_vllm.request.event_loops import in_thread
from managed_vllm.request.methods import RequestMethods
from managed_vllm.status import Connection, ServerStatus
from managed_vllm.urls import checked_api_key, url_with_key

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from managed_vllm.client import AsyncVLLMClient, MakePlacement, VLLMClient
    from managed_vllm.request.server_metrics import SupervisorMetrics

KEEP_ALIVE_VARIABLE = "MANAGED_VLLM_KEEP_ALIVE"
WARM_VARIABLE = "MANAGED_VLLM_WARM"
WARM_WORDS: Mapping[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False, "1": "auto", "0": False}
"""The values of `MANAGED_VLLM_WARM`."""
KEEP_ALIVE_S = 5.0
"""Default of `keep_alive`: the next test, script or cell often comes at once, and a start costs half a minute."""
_UNBOUNDED_S = 86_400.0
"""Seconds for what a call without a time limit of its own has to wait for: the start of a large server is among it."""
_CANCEL_S = 2.0
"""Seconds for which a cancelled `async with` waits until all is given back. What takes longer goes on without it."""


class ManagedVLLM(RequestMethods):
    """One vLLM server, shared by every process of this user that asks for the same thing.

    Enter it (`with` or `async with`, as often as you like, from any thread), or just use it: the first use starts the
    server.

    Args:
        model: Hugging Face id, local folder, or `"demo"` for the embedded model. None: attach to a server that is
            already running.
        name: a readable handle. The same name with other arguments is a `ConfigMismatchError`.
        base_url: a server that somebody else runs, with or without `/v1`; it is checked, not supervised. What can only
            be said of a server of ours (engine arguments, `command`, `restart`, …) is a `ConfigError` then.
        base_urls: several such servers of the same model, with the same key: each request goes to the one with the
            fewest of this handle in flight, those of one `session_id` to one server. One that is down is left out until
            it is back.
        api_key: the key the server wants; for a server of ours the default is a random one.
        host, port: where our server listens; default loopback and a free port. Another host needs an `api_key`.
        uds: listen on a Unix socket instead, no TCP at all.
        keep_alive: seconds that the server outlives its last user. With several users the longest one holds.
        startup_timeout: seconds until a start has failed in any case; `startup_silence` without any sign of life.
        first_request_timeout: seconds for the one-token request that proves readiness; it may compile kernels.
        stop_grace: seconds between SIGTERM and SIGKILL when the server is stopped. What it has beyond 5 is left to the
            requests in flight, by vLLM's `shutdown_timeout`, unless that is given.
        gpu_release_timeout: longest wait, in seconds, until the driver has given an ended server's GPU memory back.
        env: environment variables for the server; part of what is shared.
        python: another interpreter whose vLLM to run.
        command: any other way to launch an OpenAI-compatible server, as a list of words with `{port}`, `{host}`,
            `{model}`, `{name}`, `{uds}`, or the word `{args}` for all of vLLM's flags. The key is in `VLLM_API_KEY`.
        devices: `"auto"`: the server takes as many free GPUs as it needs (tensor × pipeline × data parallel size), or
            cores where vLLM runs on a CPU, for as long as it lives, and waits in line while others have them. None:
            all that it sees.
        cores: how many cores each Worker of a server on a CPU takes with `devices="auto"`; None: all there are.
        wait_for_devices: seconds to wait in that line; 0: not at all, `math.inf`: for ever.
        share: `"sleep"`: servers with `devices="auto"` take turns. One that nobody uses gives its devices to those that
            wait for them, and takes some again when it is used.
        replicas: so many servers of the model on this machine, as one, with the devices divided among them. A request
            goes to the one with the fewest in flight, those of a `session_id` to one; one that dies is left at once.
        wait: whether entering waits until the server is ready; if not, the first use does.
        progress: whether to show the start-up; None: only on a terminal.
        retry: how often a request whose answer was lost is sent again (`RetryPolicy`).
        max_in_flight: requests of this handle in flight at once in one event loop, at most; the others wait here.
        media_ids: whether an image that the server already has is sent as its id alone; never for a server by URL.
        restart: when to start again a server that crashed or hung.
        hang: when a server that does nothing counts as hung; `HangPolicy.never()` for debugging it.
        warm: whether the server is forked from an image, a process with vLLM's imports done, so that it starts faster
            and is back sooner after a crash. `"auto"`: where that is safe, else it is launched plainly, as always with
            `command=`; True: a start that can't be forked fails; False: never. None: what `MANAGED_VLLM_WARM` says
            (`auto`, `on`, `off`), else "auto".
        idle_sleep: seconds without a request after which the engine sleeps (`llm.engine.sleep`), until the next one
            wakes it; None: it does not. On GPUs only.
        for_training: a server that a trainer drives by vLLM's own routes: development mode, `processed_logprobs`, any
            number of logprobs, weight transfer by NCCL where there are GPUs; what you give yourself stays as it is.
        on_status: called with the new `ServerStatus` at each change of state (ready, restarting, failed, …): one call
            after the other, in a thread of its own, so that it may use this handle. What it raises is logged.
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
        base_urls: Sequence[str] | None = None,
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
        idle_sleep: float | None = None,
        env: Mapping[str, str] | None = None,
        python: str | os.PathLike[str] | None = None,
        command: Sequence[str] | None = None,
        devices: Literal["auto"] | None = None,
        cores: int | None = None,
        wait_for_devices: float = 3600.0,
        share: Literal["sleep"] | None = None,
        replicas: int = 1,
        wait: bool = True,
        progress: bool | None = None,
        restart: RestartPolicy | None = None,
        retry: RetryPolicy | None = None,
        media_ids: bool = True,
        max_in_flight: int | None = None,
        hang: HangPolicy | None = None,
        warm: bool | Literal["auto"] | None = None,
        for_training: bool = False,
        on_status: Callable[[ServerStatus], None] | None = None,
        **engine_args: Any,
    ) -> None:
        if name is not None:
            names.check_name(name)
        if base_url is not None and base_urls is not None:
            raise ConfigError("give either base_url= or base_urls=", field="base_urls")
        given = (base_url,) if base_url else external.checked_urls(base_urls)
        urls = given or (() if name else external.urls_from_environment())
        asked = None if model is None else str(model)
        spec: ServerSpec | None = None
        if urls:
            where = {"name": name, "host": host, "port": port, "uds": uds or None}
            how = {"env": env or None, "python": python, "command": command, "warm": warm or None}
            how["for_training"] = for_training or None
            which = {"devices": devices, "cores": cores, "share": share}
            which["replicas"] = None if replicas == 1 else replicas
            kept = {"restart": restart, "hang": hang, "idle_sleep": idle_sleep}
            external.check_applicable(
                {**set_in_arguments(engine_args), **where, **how, **which, **kept}, explicit=bool(given)
            )
        elif model is not None:
            spec = spec_of(
                model,
                engine_args,
                for_training=for_training,
                idle_sleep=idle_sleep,
                env=env,
                python=python,
                command=command,
                devices=devices,
                cores=cores,
                replicas=replicas,
            )
        elif engine_args or command or python or env or for_training or devices or cores or replicas != 1:
            raise ConfigError(
                "engine arguments, env=, python=, command=, devices=, replicas= and for_training= need a model=",
                field="model",
            )
        options = AttachOptions(
            model=external.model_for(urls, asked) if urls else asked,
            name=name,
            base_url=urls[0] if urls else None,
            more_urls=urls[1:],
            api_key=external.key_for(urls, api_key) if urls else None,
            keep_alive_s=_keep_alive_s(keep_alive),
            progress=progress,
            spec=spec,
            address=Address(
                host=host, port=port, api_key=None if urls or api_key is None else checked_api_key(api_key), uds=uds
            ),
            policy=SupervisionPolicy(
                startup_timeout_s=startup_timeout,
                startup_silence_s=startup_silence,
                first_request_timeout_s=first_request_timeout,
                stop_grace_s=stop_grace,
                gpu_release_timeout_s=gpu_release_timeout,
                wait_for_devices_s=wait_for_devices,
                shares=_shares(share, devices),
                idle_sleep_s=math.inf if idle_sleep is None else idle_sleep,
                restart=restart or RestartPolicy(),
                hang=hang or HangPolicy(),
                warm=_warm(warm, command),
            ),
        )
        settings = _Settings(
            attach=options,
            wait=wait,
            retry=retry,
            media_ids=media_ids and not urls,
            max_in_flight=_checked_max_in_flight(max_in_flight),
        )
        self._set_up(settings, None, on_status)

    @classmethod
    def from_engine_args(cls, engine_args: Any, **options: Any) -> Self:
        """From a `vllm.EngineArgs`: what differs from its defaults. `options` are other arguments of this class."""
        return cls(**{**set_in_engine_args(engine_args), **options})

    def _set_up(
        self, settings: _Settings, known: KnownServer | None, on_status: Callable[[ServerStatus], None] | None
    ) -> None:
        listener = None if on_status is None else StatusListener(on_status)
        self._settings = settings
        self._lock = threading.RLock()
        self._depth = 0
        self._attachment = Attachment(settings.attach, known, None if listener is None else listener.put)
        self._clients = _Clients(self._attachment, settings)
        forks.call_in_child(self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._clients.forget_openai()

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Attaches or starts, and waits until the server is ready (unless `wait=False`). Safe to call again."""
        self._start(self._attachment)
        return self

    def _start(self, attachment: Attachment) -> None:
        attachment.attach()
        if self._settings.wait:
            attachment.wait_ready()

    def close(self) -> None:
        """Gives the lease back. The server stays for others, and for `keep_alive` seconds."""
        with self._lock:
            attachment, clients = self._attachment, self._clients
            self._attachment = attachment.successor()
            self._clients = _Clients(self._attachment, self._settings)
        clients.close()
        attachment.close()

    def __enter__(self) -> Self:
        attachment = self._enter()
        try:
            self._start(attachment)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _enter(self) -> Attachment:
        with self._lock:
            self._depth += 1
            return self._attachment

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._depth = max(0, self._depth - 1)
            if self._depth == 0:
                self.close()

    async def __aenter__(self) -> Self:
        attachment = self._enter()  # here and not in the thread, which may not have begun when the task is cancelled
        entering = asyncio.wrap_future(in_thread(lambda: self._start(attachment), "managed-vllm-start"))
        try:
            await asyncio.shield(entering)
        except BaseException:
            # The thread can't be cancelled, but closing ends its waiting, unless others use the attachment.
            self.__exit__(None, None, None)
            if self._attachment is not attachment:
                await asyncio.wait({entering}, timeout=_CANCEL_S)
            entering.add_done_callback(lambda done: done.exception())  # asyncio would report it
            raise
        return self

    async def __aexit__(self, *details: Any) -> None:
        await asyncio.to_thread(self.__exit__, *details)

    def wait_ready(
        self, timeout: float | None = None, *, after_epoch: int | None = None, progress: bool | None = None
    ) -> ServerStatus:
        """Waits until the server is ready; with `after_epoch` until a later life of it is.

        `progress` overrides the handle's own for this call.

        Raises the server's `StartupError` if it has failed, `ServerStoppedError` if somebody stopped it, `TimeoutError`
        after `timeout` seconds. An external server is ready by definition.
        """
        return self._attachment.wait_ready(timeout, after_epoch=after_epoch, progress=progress)

    # -- handles -------------------------------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """The API's base URL, ending in `/v1`; with `replicas=` the router's. Waits until the server is ready.

        Raises `ConfigError` for replicas without a router; none of our clients needs it.
        """
        return public_connection(self._attachment).base_url

    @property
    def api_key(self) -> str:
        """The key that every route but `/health` and `/ping` wants; empty for an external server without one."""
        return str(self._attachment.connection()[0].api_key.reveal())

    @property
    def url_with_key(self) -> str:
        """The server's URL, without `/v1`, with the key in it: `http://managed:KEY@127.0.0.1:PORT`.

        For trainers and tools that take a URL and know of no key. Whoever sees it may use the server. Raises
        `ConfigError` for a server on a Unix socket, which no URL reaches, and as `base_url`.
        """
        return url_with_key(public_connection(self._attachment))

    @property
    def model(self) -> str:
        """The name under which the model is served: what goes into `model=` of a request."""
        return self._attachment.connection()[0].model

    @property
    def client(self) -> VLLMClient:
        """The client behind `chat` and `generate`; it follows restarts."""
        with self._lock:
            return self._clients.client

    @property
    def async_client(self) -> AsyncVLLMClient:
        """The same client for asyncio: `await llm.async_client.chat(…)`."""
        with self._lock:
            return self._clients.async_client

    @property
    def openai(self) -> OpenAI:
        """The OpenAI SDK's client, set up for this server, without a time-out of its own."""
        return self._openai_client("OpenAI")  # type: ignore[no-any-return]

    @property
    def async_openai(self) -> AsyncOpenAI:
        """The OpenAI SDK's asynchronous client; the same otherwise."""
        return self._openai_client("AsyncOpenAI")  # type: ignore[no-any-return]

    def _openai_client(self, kind: str) -> Any:
        connection, _ = self._attachment.connection()
        with self._lock:
            return self._clients.openai(kind, connection)

    @property
    def engine(self) -> EngineControl:
        """The control of the server's engine, for all its users: sleep, pause, LoRA adapters, weights."""
        return EngineControl(lambda: self._attachment)

    @property
    def async_engine(self) -> AsyncEngineControl:
        """The same for asyncio: `await llm.async_engine.pause()`."""
        return AsyncEngineControl(self.engine, in_thread)

    def sleep(self, level: int = 1, mode: PauseMode = "keep") -> None:
        """Puts the engine to sleep, for all users of the server; what comes waits. `engine.sleep` has a time limit."""
        self.engine.sleep(level, mode=mode)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Wakes the engine; with `tags` (`["weights"]`, `["kv_cache"]`) that part of it only."""
        self.engine.wake(tags)

    # -- the server ----------------------------------------------------------------------------------------------------

    @property
    def supervised(self) -> bool:
        """False for a server given by URL."""
        return self._settings.attach.base_url is None

    @property
    def started_it(self) -> bool:
        """True if this handle's process was the one that started the server it uses."""
        return self._attachment.started_it

    @property
    def id(self) -> str | None:
        """The instance's short id, as the command line shows it; None for an external server."""
        attachment = self._attachment
        attachment.attach()
        return attachment.id

    def status(self) -> ServerStatus:
        """What the supervisor says now: state, stage, epoch, users, pids."""
        return self._attachment.status()

    def logs(self, lines: int = 100) -> str:
        """The last lines of the server's log, of each replica's. Raises `ConfigError` for an external server."""
        return newest_lines(self.status(), lines)

    def restart(self, timeout: float | None = None) -> ServerStatus:
        """Stops the server and starts it again, each replica of it, for all its users; waits until it is ready."""
        return restart(self._attachment, timeout)

    def pin(self) -> None:
        """Lets the server run without users, until `unpin` or `managed-vllm down`."""
        self._attachment.request("pin")

    def unpin(self) -> None:
        """Takes `pin` back: the server goes with its last user again."""
        self._attachment.request("unpin")

    def stop_server(self) -> None:
        """Stops the server for all its users; they get `ServerStoppedError`. Returns at once."""
        self._attachment.request("stop")

    # -- passing it on -------------------------------------------------------------------------------------------------

    def environ(self) -> dict[str, str]:
        """Environment variables with which a bare `ManagedVLLM()` in a child process attaches to this very server."""
        return environ(self._attachment)

    def __getstate__(self) -> dict[str, Any]:
        attachment = self._attachment
        options = self._settings.attach
        if attachment.known is None and options.spec is None and options.base_url is None:
            attachment.attach()  # which server is meant can only be known here
        return {"settings": self._settings, "known": attachment.known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._set_up(state["settings"], state["known"], None)  # `on_status` stays with the other process

    def __repr__(self) -> str:
        options = self._settings.attach
        where = without_passwords(options.base_url or "") or self._attachment.id or options.name or "not attached"
        return f"<ManagedVLLM {options.model or ''} {where}>"


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a handle was asked for. All of it is pickled with the handle."""

    attach: AttachOptions
    wait: bool
    retry: RetryPolicy | None
    media_ids: bool
    max_in_flight: int


class _Clients:
    """The clients of one attachment, each made when it is first used. The owner holds its lock around every call."""

    def __init__(self, attachment: Attachment, settings: _Settings) -> None:
        self._attachment = attachment
        self._settings = settings
        self._async_client: AsyncVLLMClient | None = None
        self._client: VLLMClient | None = None
        self._openai: dict[str, tuple[Connection, object, Any]] = {}

    @property
    def async_client(self) -> AsyncVLLMClient:
        if self._async_client is None or self._async_client.closed:  # those that we hand out may be closed
            from managed_vllm.client import AsyncVLLMClient

            attachment = self._attachment
            self._async_client = AsyncVLLMClient(
                connection=attachment.connection,
                ready=attachment.ready,
                retry=self._settings.retry,
                media_ids=self._settings.media_ids,
                max_in_flight=self._settings.max_in_flight,
                instance=lambda: attachment.id,
                report=functools.partial(report_deaths, attachment),
                load_adapter=None if attachment.options.base_url else functools.partial(_load_adapter, attachment),
                supervisor=None if attachment.options.base_url else functools.partial(_ask_supervisor, attachment),
                placement=_placement(attachment),
            )
        return self._async_client

    @property
    def client(self) -> VLLMClient:
        if self._client is None or self._client.async_client.closed:
            from managed_vllm.client import VLLMClient

            self._client = VLLMClient.of(self.async_client)
        return self._client

    def openai(self, kind: str, connection: Connection) -> Any:
        """The SDK's client of that class (`OpenAI`, `AsyncOpenAI`), made anew where the connection has changed."""
        kept, sender = self._openai.get(kind), self.async_client.sender
        if kept is not None and kept[:2] == (connection, sender) and not kept[2].is_closed():
            return kept[2]
        from managed_vllm.request import openai_sdk

        client = openai_sdk.make_client(kind, connection, sender)
        self._openai[kind] = (connection, sender, client)
        return client

    def forget_openai(self) -> None:
        """In a forked child: the SDK's connections are the parent's. Our own clients know of the fork themselves."""
        self._openai = {}

    def close(self) -> None:
        if self._async_client is not None:
            self._async_client.close()
        for *_, client in self._openai.values():
            if not hasattr(client, "__aenter__"):  # the other kind is closed by its event loop
                with contextlib.suppress(Exception):
                    client.close()


def _placement(attachment: Attachment) -> MakePlacement | None:
    """How requests find their server, where there may be several; None: there is one."""
    from managed_vllm.request import leased_replicas, watched_servers

    if attachment.options.more_urls:
        return functools.partial(watched_servers.balanced, lambda: attachment.servers)
    return None if attachment.replicas == 1 else functools.partial(leased_replicas.placed, attachment)


async def _load_adapter(attachment: Attachment, name: str, path: str, timeout_s: float | None) -> None:
    """Sees to it that the server has an adapter; most often it does, and nothing is asked."""
    limit_s = _UNBOUNDED_S if timeout_s is None else timeout_s
    control = EngineControl(lambda: attachment)
    await asyncio.wrap_future(in_thread(lambda: control.ensure_lora(name, path, timeout=limit_s), "managed-vllm-lora"))


async def _ask_supervisor(attachment: Attachment, timeout_s: float | None) -> SupervisorMetrics | None:
    """What the supervisor tells of the server; None where it does not answer in time."""
    from managed_vllm.request.server_metrics import SupervisorMetrics

    def ask() -> SupervisorMetrics:
        status = attachment.status()
        assert attachment.known is not None
        return SupervisorMetrics.of(status, restarts_by_cause(attachment.known.instance))

    with contextlib.suppress(ManagedVLLMError, TimeoutError):
        return await asyncio.wait_for(asyncio.wrap_future(in_thread(ask, "managed-vllm-metrics")), timeout_s)
    return None


def spec_of(
    model: str | os.PathLike[str],
    engine_args: Mapping[str, Any],
    *,
    for_training: bool,
    idle_sleep: float | None,
    env: Mapping[str, str] | None,
    python: str | os.PathLike[str] | None,
    command: Sequence[str] | None,
    devices: Literal["auto"] | None,
    cores: int | None,
    replicas: int = 1,
) -> ServerSpec:
    """The server that these arguments of `ManagedVLLM` mean. Raises `ConfigError`."""
    if for_training:
        vllm, folder = installed_vllm(python), vllm_folder(python)
        ours = command is None
        engine_args, env = training.with_preset(engine_args, env, vllm=vllm, folder=folder, has_extension=ours)
    if idle_sleep is not None and command is None:
        engine_args = training.with_idle_sleep(engine_args, vllm=installed_vllm(python))
    return ServerSpec.of(
        model,
        engine_args=engine_args,
        env=env,
        python=python,
        command=command,
        devices=devices,
        cores=cores,
        replicas=replicas,
    )


def _keep_alive_s(given: float | None) -> float:
    if given == math.inf:
        raise ConfigError("keep_alive must be finite; pin() keeps a server until it is stopped", field="keep_alive")
    if given is not None:
        return seconds("keep_alive", given)
    text = os.environ.get(KEEP_ALIVE_VARIABLE) or str(KEEP_ALIVE_S)
    try:
        return seconds("keep_alive", float(text))
    except ValueError:  # of float, and a ConfigError is one
        raise ConfigError(
            f"the variable {KEEP_ALIVE_VARIABLE} is {text!r}, but must be a number of seconds",
            field=KEEP_ALIVE_VARIABLE,
        ) from None


def _checked_max_in_flight(value: object) -> int:
    """Raises `ConfigError` for what is no number of requests."""
    if value is None:
        return MAX_IN_FLIGHT
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"max_in_flight must be 1 or more, a whole number, not {value!r}", field="max_in_flight")
    return value


def _shares(share: object, devices: object) -> bool:
    if share not in (None, "sleep"):
        raise ConfigError(f"share must be 'sleep' or None, not {share!r}", field="share")
    if share is not None and devices is None:
        raise ConfigError("share='sleep' goes with devices='auto': what it shares is what it has taken", field="share")
    return share is not None


def _warm(given: bool | Literal["auto"] | None, command: Sequence[str] | None) -> bool | Literal["auto"]:
    if given is True and command is not None:
        raise ConfigError("warm=True is for vLLM's own server: a command= is always launched plainly", field="warm")
    if given is not None:
        return given
    text = os.environ.get(WARM_VARIABLE) or "auto"
    if text not in WARM_WORDS:
        raise ConfigError(
            f"the variable {WARM_VARIABLE} is {text!r}, but must be one of {', '.join(WARM_WORDS)}",
            field=WARM_VARIABLE,
        )
    return False if command is not None else WARM_WORDS[text]
