"""Whether a server that was launched becomes ready; the counterpart of `managed_vllm.server.hangs`.

The exit of the server is not detected here: the kernel reports it to the supervisor. What is detected, in this order:

1. The whole start takes longer than `startup_timeout_s`; or for `startup_silence_s` nothing new is in the log, and no
   process of the server does anything: a download may be silent.
2. A process is stopped (state T) for `stopped_s`.
3. `/health` answers, on a port that is really our server's. Then it must list its model and generate one token, in
   `first_request_timeout_s`; no silence counts meanwhile. Only that proves that it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from managed_vllm.policies import SupervisionPolicy
from managed_vllm.server import diagnosis
from managed_vllm.server.activity import Activity
from managed_vllm.server.hangs import StoppedProcesses
from managed_vllm.server.probe import Probe
from managed_vllm.server.process import ServerProcess, listeners_can_be_seen
from managed_vllm.server.startup_log import StartupLog
from managed_vllm.status import Diagnosis, Progress, Stage

_POLL_S = 0.05
CHECK_S = 1.0


class StartupWatch:
    """Watches one start; see the module's docstring."""

    def __init__(
        self,
        probe: Probe,
        process: ServerProcess,
        startup_log: StartupLog,
        policy: SupervisionPolicy,
        *,
        port: int | None,
        may_listen_elsewhere: bool,
        on_progress: Callable[[Progress], None],
        began_at: float | None = None,
    ) -> None:
        """`startup_log` is fed from the server's output elsewhere; `port` is the TCP port that it will serve, if any.

        `may_listen_elsewhere`: the process may be a wrapper around a server in another container. `began_at`: when the
        start began, on the monotonic clock; None: now.
        """
        self._probe = probe
        self._process = process
        self._startup_log = startup_log
        self._policy = policy
        self._port = port
        self._may_listen_elsewhere = may_listen_elsewhere
        self._on_progress = on_progress
        self._stopped = StoppedProcesses(process, policy.hang)
        self._activity = Activity(process)
        self._moved_at = self._checked_at = time.monotonic()
        self._began_at = self._moved_at if began_at is None else began_at
        self._progress = startup_log.progress
        self._first_request: asyncio.Task[Diagnosis | None] | None = None

    async def until_ready(self) -> Diagnosis | None:
        """Returns None once the server has generated a token, else why it will not. Cancel it when the server ends."""
        try:
            while True:
                if found := self._too_slow() or await self._check_processes():
                    return found
                request = self._first_request
                if request is None:
                    await self._ask_if_up()
                elif request.done():
                    return await self._judge(request.result())
                await self._pause()
        finally:
            if self._first_request is not None:
                self._first_request.cancel()
                await asyncio.gather(self._first_request, return_exceptions=True)

    def _too_slow(self) -> Diagnosis | None:
        now = time.monotonic()
        if self._startup_log.progress != self._progress:
            self._moved_at, self._progress = now, self._startup_log.progress
        self._moved_at = max(self._moved_at, self._process.output.last_new_line_at)
        policy = self._policy
        if now - self._began_at > policy.startup_timeout_s:
            return diagnosis.timed_out(self._progress, limit_s=policy.startup_timeout_s, silent=False)
        if self._first_request is None and now - self._moved_at > policy.startup_silence_s:
            return diagnosis.timed_out(self._progress, limit_s=policy.startup_silence_s, silent=True)
        return None

    async def _check_processes(self) -> Diagnosis | None:
        if time.monotonic() - self._checked_at <= CHECK_S:
            return None
        self._checked_at = time.monotonic()
        await self._process.record_descendants()
        if self._activity.moved():
            self._moved_at = time.monotonic()
        return self._stopped.check()

    async def _ask_if_up(self) -> None:
        """Begins the first request if the server is up."""
        if (await self._probe.is_up(2.0)).ok and await self._port_is_ours():
            self._on_progress(Progress(Stage.WARMING_UP))
            self._first_request = asyncio.create_task(self._list_and_generate())

    async def _port_is_ours(self) -> bool:
        """False if another process took the port before vLLM could: it must not get our key and prompts."""
        if self._port is None:
            return True
        owns = await asyncio.to_thread(self._process.owns_port, self._port)
        if owns is None:
            return self._may_listen_elsewhere or not await asyncio.to_thread(listeners_can_be_seen)
        return owns

    async def _list_and_generate(self) -> Diagnosis | None:
        for question in (self._probe.serves_model, self._probe.generates):
            answer = await question(self._policy.first_request_timeout_s)
            if not answer.ok:
                return diagnosis.diagnose_first_request(answer.status, answer.body)
        return None

    async def _judge(self, refused: Diagnosis | None) -> Diagnosis | None:
        if refused is not None:
            # An error may be the first sign of a crash, and the log of a crash says more than the error: if the server
            # exits now, our caller diagnoses the exit and drops what we return.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.exited.wait(), 1.0)
        return refused

    async def _pause(self) -> None:
        if self._first_request is None:
            await asyncio.sleep(_POLL_S)
        else:
            await asyncio.wait({self._first_request}, timeout=CHECK_S)
