"""What follows when the server ends unasked: another start, or none.

In this order:

1. Another process took the port that we had chosen before vLLM could bind it: another port, at once, up to five times.
   That says nothing about the server and is not counted as a crash.
2. A cause that stays, or one that the policy does not retry: no other start.
3. A server that has never been ready and gives a reason: no other start, which would fail in the same way. One that was
   ended from outside (a signal, the OOM killer) gives none, and is started again.
4. More crashes than the policy allows within its window: no other start.
5. Else another start, after the policy's back-off.
"""

from __future__ import annotations

import collections
import time
from dataclasses import dataclass

from managed_vllm.policies import RestartPolicy
from managed_vllm.server import diagnosis
from managed_vllm.status import Cause, Diagnosis

_LOST_PORTS = 5

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


class Restarts:
    """Counts the crashes of one server and decides on each; see the module's docstring."""

    def __init__(self, policy: RestartPolicy, *, chooses_port: bool, has_served: bool) -> None:
        """`chooses_port`: no user asked for a port. `has_served`: it was ready before its supervisor was killed."""
        self._policy = policy
        self._chooses_port = chooses_port
        self._has_served = has_served
        self._lost_ports = 0
        self._crashes: collections.deque[float] = collections.deque()

    def record_ready(self) -> None:
        """From now on an end is a crash, not a start that failed."""
        self._has_served = True

    def decide(self, ended: Diagnosis, now: float | None = None) -> StartAgain | GiveUp:
        """What follows this end, at `now` (seconds on the monotonic clock; None: now)."""
        now = time.monotonic() if now is None else now
        if ended.cause is Cause.PORT_IN_USE and self._chooses_port and self._lost_ports < _LOST_PORTS:
            self._lost_ports += 1
            return StartAgain(delay_s=0.0, crashed=False)
        policy = self._policy
        if ended.permanent or ended.cause in policy.not_retried or policy.max_restarts == 0:
            return GiveUp(ended)
        if not self._has_served and ended.cause not in ENDED_FROM_OUTSIDE:
            return GiveUp(ended)
        while self._crashes and now - self._crashes[0] > policy.window_s:
            self._crashes.popleft()
        crashes = len(self._crashes)
        if crashes >= policy.max_restarts:
            return GiveUp(diagnosis.crash_loop(ended, restarts=crashes, window_s=policy.window_s))
        self._crashes.append(now)
        return StartAgain(policy.delay_s(crashes))
