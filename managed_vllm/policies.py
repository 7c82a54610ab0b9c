"""What is done when something goes wrong, and after how long: frozen values, and the reasons for their defaults.

`RetryPolicy` is the client's. `RestartPolicy` and `HangPolicy` are the supervisor's, and part of its
`SupervisionPolicy`. All of them are checked when they are made: a wrong number raises `ConfigError`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from managed_vllm.errors import ConfigError
from managed_vllm.status import Cause

MAX_IN_FLIGHT = 4096
"""Requests of one client in flight at once in one event loop, at most, where the caller says nothing else."""


def seconds(name: str, value: object, *, positive: bool = False, endless: bool = False) -> float:
    """The value as a duration. Raises `ConfigError` for what is no number, negative (or 0), or infinite.

    `positive`: 0 is refused. `endless`: `math.inf` stands for never.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ConfigError(f"{name} is a duration in seconds, a number, not {value!r}", field=name)
    if value < 0 or (positive and value == 0):
        raise ConfigError(
            f"{name} must be {'more than 0' if positive else '0 or more'} seconds, not {value}", field=name
        )
    if value == math.inf and not endless:
        raise ConfigError(f"{name} must be a finite number of seconds", field=name)
    return float(value)


def _count(name: str, value: object, least: int, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be {least} ({meaning}) or more, a whole number, not {value!r}", field=name)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and when, a request is sent again after its answer was lost.

    `max_deaths`: how often the server may die under one request, each time before a new token came. Then a
    `DeadlyRequestError` says that the request may be what kills the server. Two: the first death may be anybody's.
    These deaths are not counted by `RestartPolicy`, so that one bad request does not take the server from everybody. A
    requested restart is no death. A resumed generation that brings new tokens each time may go on for as long as the
    server comes back.

    `max_lost`: how many answers in a row may be lost without a new token while the server lives: HTTP 500, 502, 503 or
    504, a broken connection, half an answer, an abort that nobody asked for. A 500 that says the same twice, while
    `/health` is well, is not counted up to here: it comes from the request. `Retry-After` of a 429 or 503 is heeded, up
    to a minute. Twenty take 15 s on average, which is
    longer than the supervisor needs to notice a broken server (up to 10 s, `HangPolicy.stopped_s`); vLLM 0.32 may
    answer for 5 s after a Worker's death before it ends.

    Before the n-th retry in a row the client waits a random time of up to `backoff_initial_s * 2**(n-1)`, at most
    `backoff_max_s` seconds, or until a new epoch is ready, if that is sooner. After a new epoch, each waiting request
    is delayed by a random time of up to `spread_s` seconds, so that they don't all come at the same moment.
    """

    max_deaths: int = 2
    max_lost: int = 20
    backoff_initial_s: float = 0.05
    backoff_max_s: float = 2.0
    spread_s: float = 0.2

    def __post_init__(self) -> None:
        for name in ("max_deaths", "max_lost"):
            _count(name, getattr(self, name), 1, "never sent again")
        for name in ("backoff_initial_s", "backoff_max_s", "spread_s"):
            seconds(name, getattr(self, name), endless=True)


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """When a server that crashed or hung is started again.

    The first restart is at once. Before each further one within the window the supervisor waits, first
    `backoff_initial_s`, then `backoff_factor` times as long each time, at most `backoff_max_s` seconds. More than
    `max_restarts` within `window_s` seconds: the server has failed. Deaths that are laid to one request
    (`DeadlyRequestError`) are left out, up to twice `max_restarts` within the window. A cause that will not go away by
    itself (no such model, invalid argument, does not fit) is never retried.
    `not_retried` names further causes (`managed_vllm.status.Cause`, as text) after which the server is given up at
    once, e.g. `{"worker_died"}`.
    """

    max_restarts: int = 5
    window_s: float = 600.0
    backoff_initial_s: float = 0.5
    backoff_factor: float = 2.0
    backoff_max_s: float = 30.0
    not_retried: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        causes = frozenset(str(cause) for cause in self.not_retried)
        if unknown := causes - frozenset(Cause):
            raise ConfigError(
                f"not_retried: no such cause: {', '.join(sorted(unknown))}; there are: {', '.join(Cause)}",
                field="not_retried",
            )
        object.__setattr__(self, "not_retried", causes)
        _count("max_restarts", self.max_restarts, 0, "never restarted")
        for name in ("window_s", "backoff_initial_s", "backoff_max_s"):
            seconds(name, getattr(self, name), endless=name == "window_s")
        factor: object = self.backoff_factor
        if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
            raise ConfigError("backoff_factor must be a number, 1 or more", field="backoff_factor")

    def delay_s(self, restarts_in_window: int) -> float:
        """Seconds to wait before the next restart, after this many in the window."""
        if restarts_in_window == 0:
            return 0.0
        exponent = min(restarts_in_window - 1, 30)
        return min(self.backoff_max_s, self.backoff_initial_s * self.backoff_factor**exponent)


@dataclass(frozen=True, kw_only=True)
class HangPolicy:
    """When a server that runs, but does nothing, counts as hung and is restarted. All durations in seconds.

    A server whose metrics show any progress of the engine is busy, never hung, however slow it is. Where they have
    stood still for `stall_s`, it is asked for one token; where that does not come within `answer_s`, and nothing has
    moved meanwhile, it is hung. An API server that gives no answer at all, not even to `/health`, is hung after
    `stall_s + answer_s`. A process of the server that is stopped (state T: SIGSTOP), or a port on which nothing listens
    any more, is given `stopped_s`. `math.inf` switches a rule off.

    The defaults: one step of the engine may take long (compiling: up to a minute, a huge prompt on a CPU: minutes), and
    vLLM itself gives one step 300 s (0.32, `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`), so 60 + 180 s stays below that and
    above all that was measured. Nothing stops a process for ten seconds by accident; debuggers use another state.
    """

    stall_s: float = 60.0
    answer_s: float = 180.0
    stopped_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("stall_s", "answer_s", "stopped_s"):
            seconds(name, getattr(self, name), positive=True, endless=True)

    @classmethod
    def never(cls) -> HangPolicy:
        """No server is ever taken for hung: for debugging it."""
        return cls(stall_s=math.inf, answer_s=math.inf, stopped_s=math.inf)


Warm = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class SupervisionPolicy:
    """How long the supervisor waits for its server, and when it starts it again. All durations in seconds.

    `startup_silence_s` bounds the time in which nothing is new in the log and no process of the server uses a CPU,
    reads or writes; `startup_timeout_s` the whole start: a 40-minute load that moves is fine, a stuck one is found.
    `first_request_timeout_s` bounds the one-token request that proves readiness; it may compile kernels. `stop_grace_s`
    is the time between SIGTERM and SIGKILL, and `gpu_release_timeout_s` bounds the wait until the driver has given an
    ended server's GPU memory back; both may be 0. `wait_for_devices_s` bounds the wait in line for free devices
    (`devices="auto"`); 0: there is none, `math.inf`: for ever. `shares`: the server gives its devices to those that
    wait for them while nobody uses it (`share="sleep"`).

    `idle_sleep_s` is the time without a request after which the engine sleeps; `math.inf`: it never does.

    `warm` says whether the server is forked from an image, a process that has vLLM's imports done: `"auto"` where that
    is safe, and else launched plainly; True: a start that can't be forked fails; False: never.
    """

    startup_timeout_s: float = 3600.0
    startup_silence_s: float = 600.0
    first_request_timeout_s: float = 300.0
    stop_grace_s: float = 5.0
    gpu_release_timeout_s: float = 30.0
    wait_for_devices_s: float = 3600.0
    shares: bool = False
    idle_sleep_s: float = math.inf
    warm: Warm = "auto"
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    hang: HangPolicy = field(default_factory=HangPolicy)

    def __post_init__(self) -> None:
        for name in ("startup_timeout_s", "startup_silence_s", "first_request_timeout_s", "idle_sleep_s"):
            seconds(name, getattr(self, name), positive=True, endless=True)
        seconds("wait_for_devices_s", self.wait_for_devices_s, endless=True)
        for name in ("stop_grace_s", "gpu_release_timeout_s"):  # finite: the end of a server must not take for ever
            seconds(name, getattr(self, name))
        if self.shares and self.idle_sleep_s != math.inf:
            raise ConfigError(
                "share='sleep' and idle_sleep= exclude each other: an engine that sleeps has its devices still",
                field="idle_sleep",
            )
        if self.warm not in (True, False, "auto"):
            raise ConfigError(f'warm must be "auto", True or False, not {self.warm!r}', field="warm")

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a lossless round trip with `from_dict`."""
        data = asdict(self)
        data["restart"]["not_retried"] = sorted(self.restart.not_retried)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SupervisionPolicy:
        """The inverse of `to_dict`."""
        restart = {**data["restart"], "not_retried": frozenset(data["restart"]["not_retried"])}
        return cls(**{**data, "restart": RestartPolicy(**restart), "hang": HangPolicy(**data["hang"])})
