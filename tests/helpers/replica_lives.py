"""Replicas of one instance without its supervisor: stand-in servers, each with its engine, started again when they end.

For tests of what goes to all of them. `Replicas.engine` is the `EveryEngine` over them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import standin
from free_ports import free_port
from processes import HANG_S, eventually

from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.masking import Secret
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.server import engine_parts
from managed_vllm.server.engine import Engine
from managed_vllm.server.every_engine import EveryEngine
from managed_vllm.status import Connection

KEY = Secret("control")


class Replica:
    """One of them: its engine, its server's pid, and how often that was started."""

    def __init__(
        self, number: int, model: Path, record: Mapping[str, Any] | None, on_change: Callable[[], None], **control: Any
    ) -> None:
        self.engine = Engine(record, sleeps=True, on_change=on_change, on_restart=lambda: self._again.set())
        spec = ServerSpec.of(str(model), engine_args={}, env=None, python=None, command=standin.command())
        engine_parts.add_to(self.engine, SupervisorOrder.first(spec, Address(), SupervisionPolicy()))
        self.starts = 0
        self.pid: int | None = None
        self.has_failed = asyncio.Event()
        self._again = asyncio.Event()
        self._begun = asyncio.Event()
        self._stays_dead = False
        self._log = model.parent / f"server-{number}.log"
        self._environment = {**os.environ, **standin.orders(control={"name": str(number), **control})}
        self._port = free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def asked(self) -> list[str]:
        """What its servers were asked to do with their engines, in order."""
        lines = [line.split(" ", 1) for line in self._log.read_text().splitlines()] if self._log.exists() else []
        return [words[-1].partition("?")[0] for words in lines if words[0] in ("CONTROL", "RELOAD")]

    def kill(self, *, for_good: bool = False) -> None:
        """SIGKILL; `for_good`: it is not started again."""
        self._stays_dead = for_good
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)

    def begin_again(self) -> None:
        """One that had failed for good is started once more."""
        self._stays_dead = False
        self._begun.set()

    async def live(self) -> None:
        """Serves, life after life, as a supervisor would have it."""
        while True:
            self._begun.clear()
            while not self._stays_dead and await self._one_life():
                pass
            self.has_failed.set()
            await self._begun.wait()

    async def _one_life(self) -> bool:
        """Whether there may be another one."""
        self._again.clear()
        with self._log.open("a") as log:
            words = [sys.executable, *standin.command()[1:-1], "--port", str(self._port)]
            process = await asyncio.create_subprocess_exec(*words, env=self._environment, stdout=log, stderr=log)
        self.pid, self.starts = process.pid, self.starts + 1
        ends = [asyncio.create_task(process.wait()), asyncio.create_task(self._again.wait())]
        restoring = asyncio.create_task(self._come_up())
        try:
            done, _ = await asyncio.wait({restoring, *ends}, return_when=asyncio.FIRST_COMPLETED)
            if restoring in done and restoring.result() is not None:
                return False
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return True
        finally:
            self.engine.leave()
            for task in (restoring, *ends):
                task.cancel()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _come_up(self) -> object:
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    await client.get(self.url + "/health")
                    break
                await asyncio.sleep(0.02)
        return await self.engine.restore(Connection(f"{self.url}/v1", Secret("the-key"), "m"), KEY)


class Replicas:
    """All of them. `seen` gets what each engine's version was, and the record's, whenever anything changed."""

    def __init__(self, model: Path, controls: list[Mapping[str, Any]], record: Mapping[str, Any] | None) -> None:
        self.seen: list[tuple[tuple[str, ...], str]] = []
        self.least_serving = len(controls)
        self.all = [Replica(n, model, record, self._changed, **control) for n, control in enumerate(controls)]
        self.engine = EveryEngine([one.engine for one in self.all], on_change=self._changed)
        self._watches_serving = False

    def _changed(self) -> None:
        recorded = self.engine.to_record()["engine"]["weight_version"]
        self.seen.append((tuple(one.engine.state.weight_version for one in self.all), recorded))
        if self._watches_serving:
            self.least_serving = min(self.least_serving, self.serving())

    def watch_serving(self) -> None:
        """From now on `least_serving` is how many could answer at the worst moment."""
        self._watches_serving = True

    def serving(self) -> int:
        return sum(one.engine.turn.is_serving and one.engine.state.serves for one in self.all)

    async def call(self, name: str, /, *, user: str = "user", budget_s: float = HANG_S, **arguments: Any) -> Any:
        """The reply's result; its error is an `AssertionError` whose words it is."""
        reply = await self.reply(name, user=user, budget_s=budget_s, **arguments)
        assert reply["ok"], reply
        return reply["result"]

    async def reply(self, name: str, /, *, user: str = "user", budget_s: float = HANG_S, **arguments: Any) -> Any:
        return await self.engine.answer(user, {"call": name, "arguments": arguments, "budget_s": budget_s})

    async def versions(self) -> list[str]:
        """Of answers, one of each replica, once it is there."""
        for one in self.all:
            await one.engine.turn.until_serving()
        return [(await generate(one))["weight_versions"][0]["version"] for one in self.all]


async def generate(replica: Replica) -> dict[str, Any]:
    """The choice of a request's answer."""
    asked = {"model": "stand-in", "prompt": "Hi", "max_tokens": 2, "return_weight_versions": True}
    async with httpx.AsyncClient(trust_env=False, timeout=HANG_S) as client:
        answer = (await client.post(f"{replica.url}/v1/completions", json=asked)).raise_for_status()
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


@contextlib.asynccontextmanager
async def replicas(
    model: Path, *controls: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> AsyncIterator[Replicas]:
    """Two, or as many as there are `controls` (`standin_control.Control`); they are there."""
    found = Replicas(model, list(controls) or [{}, {}], record)
    living = [asyncio.create_task(one.live()) for one in found.all]
    try:
        async with asyncio.timeout(2 * HANG_S):
            for one in found.all:
                await one.engine.turn.until_serving()
            yield found
    finally:
        for task in living:
            task.cancel()
        await asyncio.gather(*living, return_exceptions=True)


async def until(condition: Callable[[], Any], what: str) -> None:
    """`processes.eventually`, for scenarios."""
    await asyncio.to_thread(eventually, condition, what)
