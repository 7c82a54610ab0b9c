"""What is known about a server, as values: its state, stage, connection, and why it is not running.

These cross every border of the package: the control channel, errors, the command line. This module imports
nothing of ours but other values, and nothing beyond the standard library.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from managed_vllm.engine_state import EngineState
from managed_vllm.health import HealthChecks
from managed_vllm.masking import Secret, reveal, without_passwords


class ServerState(enum.StrEnum):
    """Where a server is in its life. `supervisor.Supervisor._move` is the one place that changes it."""

    STARTING = "starting"
    """Launched for the first time, not ready yet; `stage` says how far."""
    READY = "ready"
    """Healthy, lists its model, and has generated a token."""
    SLEEPING = "sleeping"
    """It has given its devices to another server (`share="sleep"`), or is about to; started again when it is used."""
    RESTARTING = "restarting"
    """It crashed or hung, or a restart was asked for; the next epoch is coming up."""
    FAILED = "failed"
    """Given up; `diagnosis` says why."""
    STOPPING = "stopping"
    """Being stopped; a user that wants a server waits until this one is gone."""
    GONE = "gone"
    """Nothing of it is left."""


class Stage(enum.StrEnum):
    """What a starting server is busy with, in the order in which a start goes through them."""

    WAITING = "waiting"
    """It waits in line for free devices. Only with `devices="auto"`; `detail` says who has them."""
    LAUNCHING = "launching"
    """The process was started and has said nothing yet."""
    IMPORTING = "importing"
    """It has said something, and is importing vLLM and torch. EngineCore and each Worker do so again later."""
    CONFIGURING = "configuring"
    """The arguments are parsed; the model's config is read; EngineCore and the Workers are being started."""
    DOWNLOADING = "downloading"
    """The weights are being fetched from the hub, or looked for in its cache. Not passed for a model in a folder."""
    LOADING = "loading"
    """The weights are being read."""
    PROFILING = "profiling"
    """The weights are in memory; the memory left for the KV cache is being measured, then taken."""
    COMPILING = "compiling"
    """torch.compile is at work. Not passed with `enforce_eager`."""
    CAPTURING = "capturing"
    """CUDA graphs are being captured. GPUs only, and not with `enforce_eager`."""
    SERVING = "serving"
    """The engine is ready; the HTTP application is coming up."""
    WARMING_UP = "warming_up"
    """The HTTP application is up; the first token is being generated."""


@dataclass(frozen=True)
class Progress:
    """A stage, and how far it is: `detail` is for people ("3/12 shards", "45%", "max model len 4096") or empty."""

    stage: Stage
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.stage.replace('_', ' ')} ({self.detail})" if self.detail else self.stage.replace("_", " ")


Facts = Mapping[str, int | float | str]


class Cause(enum.StrEnum):
    """Why a server is not running. The class of the error groups these (`error_for`)."""

    # the model can't be had
    MODEL_NOT_FOUND = "model_not_found"
    """No such folder, no such id or revision on the hub."""
    HUB_OFFLINE = "hub_offline"
    """A hub id that is not in the cache, and the hub is switched off or can't be reached."""
    GATED_MODEL = "gated_model"
    """The model's licence must be accepted first, or the token is missing or wrong."""
    NO_CONFIG = "no_config"
    """The folder or repository has no config.json."""
    # the model can't be run
    CORRUPT_WEIGHTS = "corrupt_weights"
    """The weight files are cut off, are git-lfs pointers, or don't fit the config."""
    NO_WEIGHTS = "no_weights"
    """There are no weight files."""
    NO_TOKENIZER = "no_tokenizer"
    """The tokenizer's files are missing. Without any of them vLLM starts, and refuses every text."""
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    """This vLLM (or its transformers) does not know the architecture."""
    # the arguments are wrong
    INVALID_FLAG = "invalid_flag"
    """vLLM's command line refuses an argument (exit 2)."""
    INVALID_ENGINE_ARGUMENT = "invalid_engine_argument"
    """vLLM's configuration refuses a value, or values that don't go together."""
    MAX_MODEL_LEN = "max_model_len"
    """`max_model_len` is over what the model's config allows."""
    TENSOR_PARALLEL_HEADS = "tensor_parallel_heads"
    """`tensor_parallel_size` does not divide the number of attention heads."""
    LORA_NOT_FOUND = "lora_not_found"
    """A LoRA adapter given at the start is not there."""
    CHAT_TEMPLATE = "chat_template"
    """The chat template given is not there, or the model has none."""
    # the address
    PORT_IN_USE = "port_in_use"
    """Something else listens there."""
    BAD_HOST = "bad_host"
    """This machine does not have the address."""
    # memory
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    """The memory left after the weights does not hold one request of `max_model_len`."""
    GPU_MEMORY = "gpu_memory"
    """The GPU's memory does not suffice, or someone else holds it."""
    HOST_MEMORY = "host_memory"
    """The machine's memory does not suffice (CPU backend, or loading)."""
    # devices
    NO_DEVICE = "no_device"
    """vLLM finds no device."""
    TENSOR_PARALLEL_DEVICES = "tensor_parallel_devices"
    """More devices are asked for than there are."""
    NCCL = "nccl"
    """The GPUs can't talk to each other."""
    DEVICES_BUSY = "devices_busy"
    """With `devices="auto"`: not enough were free within `wait_for_devices`."""
    DEVICES_DIRECTORY = "devices_directory"
    """The directory can't be used in which supervisors agree who has which devices."""
    # the program can't be run
    VLLM_MISSING = "vllm_missing"
    """The interpreter has no vLLM."""
    BROKEN_INSTALL = "broken_install"
    """vLLM is installed, but it or something that it needs can't be imported."""
    LAUNCHER_NOT_FOUND = "launcher_not_found"
    """The interpreter or the command does not exist or may not be run."""
    NO_IMAGE = "no_image"
    """`warm=True`, and the server can't be forked from a warm image."""
    DISK_FULL = "disk_full"
    """No space is left on a disk (cache, log, temporary folder)."""
    SHM_FULL = "shm_full"
    """/dev/shm is full or too small, as it is in a container by default."""
    # it died
    ENGINE_TIMEOUT = "engine_timeout"
    """The API server gave up waiting for the engine."""
    ENGINE_DIED = "engine_died"
    """EngineCore disappeared without a word."""
    WORKER_DIED = "worker_died"
    """A Worker disappeared without a word."""
    KILLED = "killed"
    """A signal ended the server, or told it to stop."""
    CRASH_LOOP = "crash_loop"
    """It died or hung too often within the window."""
    # it runs, but does not work
    ENGINE_HUNG = "engine_hung"
    """Its metrics stood still, and one token that was asked for did not come."""
    API_SERVER_HUNG = "api_server_hung"
    """It gave no answer to any HTTP request, or does not listen any more."""
    PROCESS_STOPPED = "process_stopped"
    """One of its processes was stopped by a signal (SIGSTOP) and not continued."""
    ENGINE_BROKEN = "engine_broken"
    """It answers, but each request with a server error (after a failed weight update, for example)."""
    ENGINE_STATE = "engine_state"
    """It was started again, and what users had made of its engine (adapters, weights) can't be put back."""
    WEIGHTS_LOST = "weights_lost"
    """It ended with the weights that a trainer had sent, and no checkpoint has them: they must be sent again."""
    # it took too long
    STARTUP_TIMEOUT = "startup_timeout"
    """Not ready within the limit."""
    STARTUP_SILENCE = "startup_silence"
    """Nothing new in the log for too long, or no answer to the first request."""
    UNKNOWN = "unknown"
    """None of these. `root_line` is all that is known."""


@dataclass(frozen=True)
class Diagnosis:
    """Why a server is not running, and what to do.

    `summary` says what happened, `root_line` is vLLM's own line for it (clean, at most 500 characters), `remedy` what
    to do next. `permanent`: it will not go away by itself, so it is not retried. `facts` are the numbers and names in
    the line, e.g. `{"estimated_max_model_len": 1234}`, so that a program can decide too.
    """

    cause: Cause
    summary: str
    root_line: str = ""
    remedy: str = ""
    permanent: bool = False
    facts: Facts = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "cause": self.cause.value,
            "summary": self.summary,
            "root_line": self.root_line,
            "remedy": self.remedy,
            "permanent": self.permanent,
            "facts": dict(self.facts),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnosis:
        """Back from `to_dict`. A cause that a newer version wrote becomes `unknown`; missing fields are empty."""
        try:
            cause = Cause(data.get("cause", ""))
        except ValueError:
            cause = Cause.UNKNOWN
        facts = data.get("facts")
        return cls(
            cause=cause,
            summary=str(data.get("summary", "")),
            root_line=str(data.get("root_line", "")),
            remedy=str(data.get("remedy", "")),
            permanent=data.get("permanent") is True,
            facts={
                str(name): value
                for name, value in (facts.items() if isinstance(facts, Mapping) else ())
                if isinstance(value, int | float | str)
            },
        )


@dataclass(frozen=True)
class CheckpointFault:
    """One thing that speaks against loading a checkpoint: what was seen, and what to do about it."""

    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Connection:
    """How to reach a server that is ready. `base_url` ends in `/v1`; with `uds`, HTTP goes over that socket path.

    `api_key.reveal()` is the key; it is neither printed nor pickled.
    """

    base_url: str
    api_key: Secret
    model: str
    uds: str | None = None

    def __repr__(self) -> str:
        shown = without_passwords(self.base_url)
        return f"Connection(base_url={shown!r}, api_key={self.api_key}, model={self.model!r}, uds={self.uds!r})"


@dataclass(frozen=True)
class RouterStatus:
    """The router in front of a server's replicas, for clients that are not ours (`managed_vllm.server.router`).

    Attributes:
        pid: of its process, if there is one now.
        base_url: where clients reach it, ending in `/v1`; stays the same for its life. None before its first start.
        ready: it answers there; also while its process is started again, when connections wait a second or two.
        restarts: how often its process was started again.
        reason: why it is not what it should be, else empty; also for good, where this machine can't have one.
    """

    pid: int | None = None
    base_url: str | None = None
    ready: bool = False
    restarts: int = 0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RouterStatus:
        """Back from `to_dict`; fields of a newer version are ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True)
class ServerStatus:
    """Everything known about a server at one moment. Times are seconds since the epoch (Unix time).

    `launch` says how this epoch was started: `"forked"` from the warm image, whose pid is `image_pid`, `"plain"`, or
    `"plain: "` and the reason why it could not be forked. `engine` is what users have made of the engine, `health` what
    the supervisor's checks have shown. `devices` are those that it took with `devices="auto"`, as `("GPU 2", "GPU 3")`.

    `replicas` are the servers of an instance with `replicas=`, in order, each with what concerns it alone; none for a
    single server. Then the rest is said of all of them together: READY while one is, `epoch` is the newest, for epochs
    are counted through all replicas, and `connection` is where everybody is served: by the `router` in front of them.
    """

    state: ServerState
    epoch: int = 0
    stage: str = ""
    detail: str = ""
    started_at: float = 0.0
    ready_at: float | None = None
    connection: Connection | None = None
    diagnosis: Diagnosis | None = None
    log_path: str | None = None
    restarts: int = 0
    launch: str = ""
    users: int = 0
    pinned: bool = False
    server_pid: int | None = None
    supervisor_pid: int | None = None
    image_pid: int | None = None
    engine: EngineState = field(default_factory=EngineState)
    health: HealthChecks = field(default_factory=HealthChecks)
    devices: tuple[str, ...] = ()
    router: RouterStatus | None = None
    replicas: tuple[ServerStatus, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the key inside `connection`: only for the channel, never for a file."""
        data: dict[str, Any] = reveal(asdict(self))
        data["diagnosis"] = self.diagnosis.to_dict() if self.diagnosis else None
        data["engine"] = self.engine.to_dict()
        data["replicas"] = [replica.to_dict() for replica in self.replicas]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ServerStatus:
        """The inverse of `to_dict`; fields of a newer version are ignored."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        known["state"] = ServerState(known["state"])
        if known.get("connection"):
            given = known["connection"]
            known["connection"] = Connection(**{**given, "api_key": Secret(given["api_key"])})
        if known.get("diagnosis"):
            known["diagnosis"] = Diagnosis.from_dict(known["diagnosis"])
        known["devices"] = tuple(known.get("devices", ()))
        known["replicas"] = tuple(map(cls.from_dict, known.get("replicas", ())))
        if "engine" in known:
            known["engine"] = EngineState.from_dict(known["engine"])
        if "health" in known:
            known["health"] = HealthChecks.from_dict(known["health"])
        if known.get("router"):
            known["router"] = RouterStatus.from_dict(known["router"])
        return cls(**known)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and reached by nobody else: `localhost`, 127.0.0.0/8, `::1`, `[::1]`."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return host.lower() in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
