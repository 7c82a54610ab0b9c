"""What follows when the server ends unasked: another start, or none.

In this order:

1. Another process took the port that we had chosen before vLLM could bind it: another port, at once, up to five times.
   That says nothing about the server and is not counted as a crash.
2. A cause that stays, or one that the policy does not retry: no other start.
3. A server that has never been ready and gives a reason: no other start, which would fail in the same way. One that was
   ended from outside (a signal, the OOM killer) gives none, and is started again.
4. More crashes than the policy allows within its window: no other start. Crashes that are laid to one request
   (`managed_vllm.request.deaths`) are not among them, unless there are very many.
5. Else another start, after the policy's back-off.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Collection
from dataclasses import dataclass

from managed_vllm.policies import RestartPolicy
from managed_vllm.server import diagnosis
from managed_vllm.status import Cause, Diagnosis

_LOST_PORTS = 5
_KNOWN_EPOCHS = 256

ENDED_FROM_OUTSIDE = frozenset(
    {Cause.KILLED, Cause.ENGINE_DIED, Cause.WORKER_DIED, Cause.PROCESS_STOPPED, Cause.API_SERVER_HUNG}
)
"""Causes that say nothing about the model or the arguments: the same start may well succeed."""


@dataclass(frozen=True)
class StartAgain:
    """The server is started again, after `delay_s` seconds. `crashed` is False where only the port was lost."""

    delay_s: float
    crashed: bool = True


@dataclass(frozen=True)
class GiveUp:
    """The server has failed; its users get this diagnosis."""

    diagnosis: Diagnosis


@dataclass(frozen=True)
class _Crash:
    """`at` is a time of the monotonic clock."""

    at: float
    epoch: int


class Restarts:
    """Counts the crashes of one server and decides on each; see the module's docstring."""

    def __init__(self, policy: RestartPolicy, *, chooses_port: bool, has_served: bool = False) -> None:
        """`chooses_port`: no user asked for a port. `has_served`: it was ready before its supervisor was killed."""
        self._policy = policy
        self._chooses_port = chooses_port
        self._has_served = has_served
        self._lost_ports = 0
        self._crashes: list[_Crash] = []
        self._forgiven: list[_Crash] = []
        self._died: collections.deque[int] = collections.deque(maxlen=_KNOWN_EPOCHS)

    def record_ready(self) -> None:
        """From now on an end is a crash, not a start that failed."""
        self._has_served = True

    def forgive(self, epochs: Collection[int]) -> list[int]:
        """These epochs ended under one request: leaves their crashes out of the count. Returns those that did crash.

        Twice `max_restarts` crashes within the window are left out, and no more: where every request kills the server,
        it is not the requests. A single death proves nothing, and is counted.
        """
        died = [epoch for epoch in epochs if epoch in self._died]
        laid = [crash for crash in self._crashes if crash.epoch in died] if len(died) > 1 else []
        for crash in laid[: max(0, 2 * self._policy.max_restarts - len(self._forgiven))]:
            self._crashes.remove(crash)
            self._forgiven.append(crash)
        return died

    def decide(self, ended: Diagnosis, now: float | None = None, *, epoch: int = 0) -> StartAgain | GiveUp:
        """What follows this end of an epoch, at `now` (seconds on the monotonic clock; None: now)."""
        now = time.monotonic() if now is None else now
        if ended.cause is Cause.PORT_IN_USE and self._chooses_port and self._lost_ports < _LOST_PORTS:
            self._lost_ports += 1
            return StartAgain(delay_s=0.0, crashed=False)
        policy = self._policy
        self._died.append(epoch)
        if ended.permanent or ended.cause in policy.not_retried or policy.max_restarts == 0:
            return GiveUp(ended)
        if not self._has_served and ended.cause not in ENDED_FROM_OUTSIDE:
            return GiveUp(ended)
        for crashes in (self._crashes, self._forgiven):
            crashes[:] = [crash for crash in crashes if now - crash.at <= policy.window_s]
        count = len(self._crashes)
        if count >= policy.max_restarts:
            return GiveUp(diagnosis.crash_loop(ended, restarts=count, window_s=policy.window_s))
        self._crashes.append(_Crash(now, epoch))
        return StartAgain(policy.delay_s(count))
