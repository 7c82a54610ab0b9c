"""Whether a server that was ready still works: broken, hung, or merely busy.

The exit of the API server is not detected here: the kernel reports it to the supervisor. What is detected, in this
order:

1. The engine is dead: the kernel reports the end of EngineCore or a Worker, or `/health` answers 503, twice in a row.
   (Of a server that is not vLLM, 503 says that it is busy, or loads something, and nothing more.) It is asked every two
   seconds, and at once when the kernel reports the end of another of the server's processes.
2. A process is stopped (state T), or the port refuses connections, for `stopped_s`.
3. The API server gives no answer to anything for `stall_s + answer_s`.
4. The engine's metrics do not change for `stall_s`; then one token is requested. The engine hangs if the token does
   not come within `answer_s` and the metrics still do not change, unless it was paused or put to sleep by request. So a
   busy server gets no such request and is never restarted, however slow it is. The rule covers an idle server, too: a
   frozen engine accepts nothing, so that neither its gauges nor `/health` would ever show that (vLLM 0.32).
5. Each of three such requests is answered with a server error.

Time in which the supervisor itself did not run (a suspended machine, a frozen container) does not count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from managed_vllm.policies import HangPolicy
from managed_vllm.server import diagnosis
from managed_vllm.server.probe import Answer, Probe
from managed_vllm.server.process import ServerProcess
from managed_vllm.status import Cause, Diagnosis

CHECK_S = 2.0
_METRICS_S = 10.0
_SHOWN_WITHIN_S = 6.0
"""vLLM 0.32 shows the death of a Worker within 0.3 s if it is busy, within 5 s if it is idle."""
_SUSPENDED_S = 5.0
"""A check that is later than this was held up by a suspended machine or a frozen container."""
_ENGINE_CORE, _WORKER = "VLLM::EngineCor", "VLLM::Worker"
"""Names, as the kernel cuts them, of processes without which vLLM 0.32 serves nothing, whichever of several ends."""
_FALL_S = 0.1
_ERRORS_IN_A_ROW = 3
_WITHOUT_METRICS = 3
"""Without vLLM's metrics a busy server can't be distinguished from a hung one: it gets `answer_s` this many times."""


class StoppedProcesses:
    """Which processes of a server are stopped by a signal, and since when."""

    def __init__(self, process: ServerProcess, policy: HangPolicy) -> None:
        self._process = process
        self._policy = policy
        self._since: dict[psutil.Process, tuple[float, object]] = {}

    def skip(self, seconds: float) -> None:
        """Leaves out of account that this much time has passed."""
        self._since = {process: (since + seconds, ran) for process, (since, ran) in self._since.items()}

    def check(self) -> Diagnosis | None:
        """A diagnosis once a process has been stopped for `stopped_s` without a break: it has not run since."""
        now = time.monotonic()
        stopped = [process for process in self._process.processes() if _state(process) == psutil.STATUS_STOPPED]
        before, self._since = self._since, {}
        for process in stopped:
            ran = _has_run(process)
            known = before.get(process)
            self._since[process] = known if known is not None and known[1] == ran else (now, ran)
        for process, (since, _) in self._since.items():
            if now - since >= self._policy.stopped_s:
                detail = f"pid {process.pid} for {now - since:.0f} s"
                return diagnosis.unwell(Cause.PROCESS_STOPPED, detail)
        return None


@dataclass(frozen=True)
class _Pace:
    """Seconds between two looks at the server and at its metrics, and for how long these stand still unasked."""

    check_s: float
    metrics_s: float
    quiet_s: float

    @classmethod
    def of(cls, policy: HangPolicy) -> _Pace:
        shortest = min(policy.stall_s, policy.answer_s, policy.stopped_s)
        check_s = min(CHECK_S, max(0.05, shortest / 4))
        metrics_s = min(_METRICS_S, max(check_s, policy.stall_s / 4))
        # A change is seen up to one reading late, and the request follows up to one check later: `stall_s` must hold.
        return cls(check_s, metrics_s, max(policy.stall_s - metrics_s - check_s, policy.stall_s / 4))


class HangWatch:
    """Watches one server that is ready; see the module's docstring."""

    def __init__(
        self,
        probe: Probe,
        process: ServerProcess,
        policy: HangPolicy,
        may_stand_still: Callable[[], bool] = lambda: False,
        on_health: Callable[[float | None], None] = lambda _: None,
    ) -> None:
        """`may_stand_still` says whether the engine is paused or asleep by our own doing.

        `on_health` is called after each check, with the seconds until `/health` was answered; None: it was not.
        """
        self._probe = probe
        self._process = process
        self._policy = policy
        self._may_stand_still = may_stand_still
        self._on_health = on_health
        self._pace = _Pace.of(policy)
        self._stopped = StoppedProcesses(process, policy)
        self._answered_at = self._moved_at = self._metrics_at = self._asked_at = time.monotonic()
        self._refused_since: float | None = None
        self._signs: str | None = None
        self._token_request: asyncio.Task[Answer] | None = None
        self._failures: list[Answer] = []

    async def until_unwell(self) -> Diagnosis:
        """Returns when the server does not work any more, with the reason. Cancel it when the server has ended."""
        try:
            while True:
                found = await self._check_after_exit() if await self._wait_for_next_check() else None
                found = found or await self._check()
                if found is not None:
                    return found
        finally:
            await self._cancel_token_request()

    async def _wait_for_next_check(self) -> bool:
        """Waits until the next check is due; True if it comes early because a process of the server has ended."""
        planned = time.monotonic() + self._pace.check_s
        ended = self._process.child_ended
        ending = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait(
                {ending, *({self._token_request} if self._token_request else ())},
                timeout=self._pace.check_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ending.cancel()
        late = time.monotonic() - planned
        if late > _SUSPENDED_S:  # we did not run, so the server probably did not either
            self._skip(late)
        if ended.is_set():
            ended.clear()
            return True
        return False

    def _skip(self, seconds: float) -> None:
        self._answered_at += seconds
        self._moved_at += seconds
        self._asked_at += seconds
        self._stopped.skip(seconds)
        if self._refused_since is not None:
            self._refused_since += seconds

    async def _check_after_exit(self) -> Diagnosis | None:
        """A process has ended. EngineCore and Workers are known by name; of others `/health` will tell soon."""
        if found := await self._if_an_engine_process_ended():
            return found
        until = time.monotonic() + _SHOWN_WITHIN_S
        while time.monotonic() < until:
            if found := await self._if_dead(await self._probe.is_up(1.0)):
                return found
            await asyncio.sleep(0.1)
        return None

    async def _if_an_engine_process_ended(self) -> Diagnosis | None:
        if name := await self._engine_process_that_ended():
            await asyncio.to_thread(self._process.output.catch_up)
            return await asyncio.to_thread(diagnosis.engine_process_ended, name, list(self._process.output.lines))
        return None

    async def _engine_process_that_ended(self) -> str | None:
        """The name of the EngineCore or else Worker that ended, if one has.

        Workers fall with their EngineCore, and the kernel may report them first: it is waited for a moment.
        """
        until = time.monotonic() + _FALL_S
        while ended := [name for name in self._process.ended_names if name.startswith((_ENGINE_CORE, _WORKER))]:
            name = min(ended)  # in the alphabet, too, EngineCore comes first
            if name.startswith(_ENGINE_CORE) or time.monotonic() > until:
                return name
            await asyncio.sleep(0.01)
        return None

    async def _if_dead(self, health: Answer) -> Diagnosis | None:
        """The reason, if `/health` says that the engine is dead."""
        if health.status != 503 or not await self._speaks_as_vllm():
            return None
        if ended := await self._if_an_engine_process_ended():
            return ended  # it may have done so while `/health` was asked
        found = await asyncio.to_thread(diagnosis.diagnose, list(self._process.output.lines), returncode=None)
        if found.cause is not Cause.UNKNOWN:
            return found
        return diagnosis.unwell(Cause.ENGINE_BROKEN, "HTTP 503 on /health: the engine is dead")

    async def _speaks_as_vllm(self) -> bool:
        if not self._probe.is_vllm and self._signs is None:
            await self._read_metrics()
        return self._probe.is_vllm or self._signs is not None

    async def _check(self) -> Diagnosis | None:
        await self._process.record_descendants()
        if found := self._stopped.check():
            return found
        asked_at = time.monotonic()
        health = await self._probe.is_up(max(1.0, self._pace.check_s))
        now = time.monotonic()
        self._on_health(None if health.status is None else now - asked_at)
        if health.status == 503:
            # One such answer is too little to kill a server for.
            await asyncio.sleep(0.25)
            if found := await self._if_dead(await self._probe.is_up(1.0)):
                return found
        if health.status is not None:
            if now - self._answered_at > max(self._policy.answer_s / 4, 3 * self._pace.check_s, 2.0):
                # The API server was blocked and never passed our request on to the engine: send another one.
                await self._cancel_token_request()
            self._answered_at = now
        self._refused_since = (self._refused_since or now) if health.refused else None
        if self._refused_since is not None and now - self._refused_since >= self._policy.stopped_s:
            return diagnosis.unwell(Cause.API_SERVER_HUNG, f"nothing listens any more ({health.body})")
        unanswered = now - self._answered_at
        if unanswered >= self._policy.stall_s + self._policy.answer_s - self._pace.check_s:
            return diagnosis.unwell(Cause.API_SERVER_HUNG, f"no answer to any request for {unanswered:.0f} s")
        if health.status is None:
            return None  # the API server is slow or hung: of the engine nothing can be learnt through it
        return await self._check_engine()

    async def _check_engine(self) -> Diagnosis | None:
        if self._may_stand_still():
            await self._cancel_token_request()
            self._failures.clear()
            self._moved_at = time.monotonic()
            return None
        request = self._token_request
        if request is not None and request.done():
            self._token_request = None
            return await self._judge(request.result())
        now = time.monotonic()
        if now - self._metrics_at >= self._pace.metrics_s:
            self._metrics_at = now
            await self._read_metrics()
        if self._token_request is None and now - self._moved_at >= self._pace.quiet_s:
            self._asked_at = now
            self._token_request = asyncio.create_task(self._probe.generates(min(self._policy.answer_s, 86_400.0)))
        return None

    async def _read_metrics(self) -> None:
        """Notes whether the engine has moved since the last reading. If it has, it has recovered from what failed."""
        signs = await self._probe.signs_of_life(max(2.0, self._pace.check_s))
        moved = signs is not None and signs != self._signs
        if signs is not None:
            self._signs = signs
        if moved:
            self._moved_at = time.monotonic()
            self._failures.clear()

    async def _judge(self, answer: Answer) -> Diagnosis | None:
        """What the request for one token has shown."""
        refused_for_now = answer.status == 503 and not await self._speaks_as_vllm()
        answered = answer.ok or refused_for_now or (answer.status is not None and answer.status < 500)
        await self._read_metrics()
        # A change just after we asked may be no more than our own request entering the queue.
        moved = self._moved_at > self._asked_at + min(2.0, self._policy.answer_s / 2)
        if answered or moved or await self._probe.is_paused_or_asleep():
            self._failures.clear()
        else:
            self._failures.append(answer)
            limit = _ERRORS_IN_A_ROW if answer.status is not None else self._unanswered_limit
            if len(self._failures) < limit:
                return None  # the next request follows at once
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
    def _unanswered_limit(self) -> int:
        return 1 if self._signs is not None else _WITHOUT_METRICS

    async def _cancel_token_request(self) -> None:
        request, self._token_request = self._token_request, None
        if request is not None:
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)


def _has_run(process: psutil.Process) -> object:
    """Something that changes whenever the process has run: it is put off the CPU again each time."""
    try:
        return process.num_ctx_switches()
    except NotImplementedError:  # gVisor
        return None
    except psutil.Error:
        return None


def _state(process: psutil.Process) -> str | None:
    try:
        return process.status()
    except psutil.Error:
        return None
