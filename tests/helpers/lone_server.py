"""A server process without its supervisor: for tests of what the supervisor is made of."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import standin
from processes import eventually

from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance.directory import Instance
from managed_vllm.masking import Secret
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.server import launch
from managed_vllm.server.launch import Launch
from managed_vllm.server.probe import Probe
from managed_vllm.server.process import ServerProcess
from managed_vllm.server.startup_log import StartupLog

LIMIT_S = 60.0
"""After which a scenario hangs."""


@asynccontextmanager
async def spawned(
    folder: Path,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], Any] = lambda _: None,
) -> AsyncIterator[ServerProcess]:
    """A process below `folder`, whose exit is noticed as by the supervisor; nothing of it is left at the end."""
    instance = Instance(folder, "m-0123456789")
    instance.create()
    loop = asyncio.get_running_loop()
    running: list[ServerProcess] = []

    def reap() -> None:
        for process in running:
            process.reap()

    loop.add_signal_handler(signal.SIGCHLD, reap)  # before it is spawned: it may have ended by the next line
    process = ServerProcess.spawn(
        argv,
        env={**(os.environ if env is None else env), lifeline.MARKER: instance.marker},
        cwd=instance.folder,
        instance=instance,
        on_line=on_line,
    )
    running.append(process)
    try:
        yield process
    finally:
        assert await process.kill() == []
        await asyncio.to_thread(process.output.drain)
        loop.remove_signal_handler(signal.SIGCHLD)


@asynccontextmanager
async def launched(folder: Path, **orders: Any) -> AsyncIterator[tuple[Launch, ServerProcess, Probe, StartupLog]]:
    """The stand-in under its orders, and what is needed to watch it."""
    order = SupervisorOrder.first(
        spec=ServerSpec.of("stand-in", engine_args={}, env=standin.orders(**orders), command=standin.command()),
        address=Address(api_key=Secret("key")),
        policy=SupervisionPolicy(),
    )
    prepared = launch.prepare(order, Instance(folder, "m-0123456789"), scratch=folder, last_port=None)
    log = StartupLog()
    async with spawned(folder, prepared.argv, env=prepared.environment, on_line=log.feed) as process:
        probe = Probe(prepared.connection)
        try:
            yield prepared, process, probe, log
        finally:
            await probe.close()


async def until(condition: Callable[[], Any], what: str) -> None:
    """`processes.eventually`, for scenarios."""
    await asyncio.to_thread(eventually, condition, what, LIMIT_S)


async def answered(question: Callable[[], Awaitable[bool]]) -> None:
    """Asks until the answer is True; the scenario's own bound ends it."""
    while True:
        if await question():
            return
        await asyncio.sleep(0.05)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Runs a scenario on an event loop of its own, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await scenario()

    asyncio.run(bounded())
