"""Whether a server that was ready still works: broken, hung, or merely busy.

The end of the API server is not found here: the kernel tells the supervisor of it. What is found, in this order:

1. The engine is dead: `/health` answers 503, and once more after a moment. It is asked every two seconds, and at once
   when one of the server's processes has ended, of which the kernel tells as well.
2. A process is stopped (state T), or nobody listens any more, for `stopped_s`.
3. The API server gives no answer to anything for `stall_s + answer_s`.
4. The engine's metrics stand still for `stall_s`; then it is asked for one token. It hangs if that does not come within
   `answer_s` and nothing has moved meanwhile, unless it was paused or put to sleep by request. So a busy server is
   never asked, and never restarted, however slow it is. The rule holds for an idle server, too: a frozen engine takes
   in nothing, so that neither its gauges nor `/health` would ever show it (vLLM 0.32).
5. Each of three such requests is answered with a server error.

Time in which the supervisor itself did not run (a suspended machine, a frozen container) does not count.
"""

from __future__ import annotations

import asyncio
import time

import psutil

from managed_vllm.policies import HangPolicy
from managed_vllm.server import diagnosis
from managed_vllm.server.probe import Answer, Probe
from managed_vllm.server.process import ServerProcess
from managed_vllm.status import Cause, Diagnosis

_LOOK_S = 2.0
_METRICS_S = 10.0
_AFTER_A_DEATH_S = 6.0
"""vLLM 0.32 shows the death of a Worker within 0.3 s if it is busy, within 5 s if it is idle."""
_ERRORS_IN_A_ROW = 3
_WITHOUT_METRICS = 3
"""A server without vLLM's metrics can't be told from a busy one: it gets as many times `answer_s`."""


class StoppedProcesses:
    """Which processes of a server are stopped by a signal, and since when."""

    def __init__(self, process: ServerProcess, policy: HangPolicy) -> None:
        self._process = process
        self._policy = policy
        self._since: dict[psutil.Process, float] = {}

    def shift(self, seconds: float) -> None:
        """Forgets that time passed."""
        self._since = {process: since + seconds for process, since in self._since.items()}

    def look(self) -> Diagnosis | None:
        """A diagnosis once a process has been stopped for `stopped_s`."""
        now = time.monotonic()
        stopped = [process for process in self._process.processes() if _state(process) == psutil.STATUS_STOPPED]
        self._since = {process: self._since.get(process, now) for process in stopped}
        for process, since in self._since.items():
            if now - since >= self._policy.stopped_s:
                detail = f"pid {process.pid} for {now - since:.0f} s"
                return diagnosis.unwell(Cause.PROCESS_STOPPED, detail)
        return None


class HangWatch:
    """Watches one server that is ready; see the module's docstring."""

    def __init__(self, probe: Probe, process: ServerProcess, policy: HangPolicy) -> None:
        self._probe = probe
        self._process = process
        self._policy = policy
        shortest = min(policy.stall_s, policy.answer_s, policy.stopped_s)
        self._look_s = min(_LOOK_S, max(0.05, shortest / 4))
        self._metrics_s = min(_METRICS_S, max(self._look_s, policy.stall_s / 4))
        # A move is seen up to one look at the metrics late, and asked about one look later: the limit still holds.
        self._quiet_s = max(policy.stall_s - self._metrics_s - self._look_s, policy.stall_s / 4)
        self._stopped = StoppedProcesses(process, policy)
        self._answered_at = self._moved_at = self._metrics_at = self._asked_at = time.monotonic()
        self._refused_since: float | None = None
        self._signs: str | None = None
        self._asking: asyncio.Task[Answer] | None = None
        self._failures: list[Answer] = []

    async def until_unwell(self) -> Diagnosis:
        """Returns when the server does not work any more, with the reason. Cancel it when the server has ended."""
        try:
            while True:
                found = await self._after_a_death() if await self._child_ended(self._look_s) else None
                found = found or await self._look()
                if found is not None:
                    return found
        finally:
            await self._stop_asking()

    async def _child_ended(self, wait_s: float) -> bool:
        """Waits for the next look, which comes early when a process has ended or the token asked for has come."""
        planned = time.monotonic() + wait_s
        ended = self._process.child_ended
        ending = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait(
                {ending, *({self._asking} if self._asking else ())},
                timeout=wait_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ending.cancel()
        late = time.monotonic() - planned
        if late > 5.0:
            self._shift(late)
        if ended.is_set():
            ended.clear()
            return True
        return False

    def _shift(self, seconds: float) -> None:
        self._answered_at += seconds
        self._moved_at += seconds
        self._asked_at += seconds
        self._stopped.shift(seconds)
        if self._refused_since is not None:
            self._refused_since += seconds

    async def _after_a_death(self) -> Diagnosis | None:
        """One of the processes is gone. Most are helpers; of the engine's or a worker's end `/health` tells soon."""
        until = time.monotonic() + _AFTER_A_DEATH_S
        while time.monotonic() < until:
            if found := self._dead(await self._probe.is_up(1.0)):
                return found
            await asyncio.sleep(0.1)
        return None

    def _dead(self, health: Answer) -> Diagnosis | None:
        if health.status != 503:
            return None
        found = diagnosis.diagnose(list(self._process.lines), returncode=None)
        if found.cause is not Cause.UNKNOWN:
            return found
        return diagnosis.unwell(Cause.ENGINE_BROKEN, "HTTP 503 on /health: the engine is dead")

    async def _look(self) -> Diagnosis | None:
        await self._process.record_descendants()
        if found := self._stopped.look():
            return found
        health = await self._probe.is_up(max(1.0, self._look_s))
        now = time.monotonic()
        if health.status == 503:
            await asyncio.sleep(0.25)
            if found := self._dead(await self._probe.is_up(1.0)):
                return found
        if health.status is not None:
            if now - self._answered_at > max(self._policy.answer_s / 4, 3 * self._look_s, 2.0):
                # An API server that was blocked has kept the request for itself: ask anew.
                await self._stop_asking()
            self._answered_at = now
        self._refused_since = (self._refused_since or now) if health.refused else None
        if self._refused_since is not None and now - self._refused_since >= self._policy.stopped_s:
            return diagnosis.unwell(Cause.API_SERVER_HUNG, f"nothing listens any more ({health.body})")
        unanswered = now - self._answered_at
        if unanswered >= self._policy.stall_s + self._policy.answer_s - self._look_s:
            return diagnosis.unwell(Cause.API_SERVER_HUNG, f"no answer to any request for {unanswered:.0f} s")
        if health.status is None:
            return None
        return await self._look_at_the_engine()

    async def _look_at_the_engine(self) -> Diagnosis | None:
        asking = self._asking
        if asking is not None and asking.done():
            self._asking = None
            return await self._judge(asking.result())
        now = time.monotonic()
        if now - self._metrics_at >= self._metrics_s:
            self._metrics_at = now
            await self._has_moved()
        if self._asking is None and now - self._moved_at >= self._quiet_s:
            self._asked_at = now
            self._asking = asyncio.create_task(self._probe.generates(min(self._policy.answer_s, 86_400.0)))
        return None

    async def _has_moved(self) -> bool:
        signs = await self._probe.signs_of_life(max(2.0, self._look_s))
        moved = signs is not None and signs != self._signs
        if signs is not None:
            self._signs = signs
        if moved:
            self._moved_at = time.monotonic()
            self._failures.clear()
        return moved

    async def _judge(self, answer: Answer) -> Diagnosis | None:
        """What the request for one token has shown."""
        answered = answer.ok or (answer.status is not None and answer.status < 500)
        await self._has_moved()
        # Our own request may have been taken in, and be all that has moved.
        moved = self._moved_at > self._asked_at + min(2.0, self._policy.answer_s / 2)
        if answered or moved or await self._probe.rests():
            self._failures.clear()
        else:
            self._failures.append(answer)
            enough = _ERRORS_IN_A_ROW if answer.status is not None else self._patience
            if len(self._failures) < enough:
                return None  # it is asked again at once
            if answer.status is not None:
                return diagnosis.unwell(Cause.ENGINE_BROKEN, f"HTTP {answer.status}: {answer.body[:300]}")
            waited = time.monotonic() - min(self._moved_at, self._asked_at)
            return diagnosis.unwell(
                Cause.ENGINE_HUNG,
                f"nothing has moved for {waited:.0f} s, and one token asked for did not come within "
                f"{self._policy.answer_s:g} s",
            )
        self._moved_at = time.monotonic()
        return None

    @property
    def _patience(self) -> int:
        return 1 if self._signs is not None else _WITHOUT_METRICS

    async def _stop_asking(self) -> None:
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


def _state(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.Error:
        return None
