"""The watch over a server that is ready, directly; whole servers that hang are in test_hangs."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from lone_server import answered, launched, run, spawned, until
from moved_clock import Clock
from scripted_server import Script, sends
from scripted_server import http as response

from managed_vllm.masking import Secret
from managed_vllm.policies import HangPolicy
from managed_vllm.server import hangs
from managed_vllm.server.hangs import HangWatch, StoppedProcesses
from managed_vllm.server.probe import Probe
from managed_vllm.status import Cause, Connection, Diagnosis

SLOW = HangPolicy(stall_s=3600, answer_s=3600, stopped_s=3600)
"""Whatever is found under this policy was not found by waiting."""
MINUTES = HangPolicy(stall_s=60, answer_s=60, stopped_s=math.inf)
"""For a clock that is moved on, each time that the API server has answered: it can't be late."""


async def ready(probe: Probe) -> None:
    async def generates() -> bool:
        return (await probe.is_up()).ok and (await probe.generates(30)).ok

    await answered(generates)


def generated(signs: str | None) -> float:
    return float(re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", signs or "", re.MULTILINE)[0])


def test_a_stopped_process_is_reported_after_its_time_and_one_that_goes_on_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            at_once = StoppedProcesses(process, HangPolicy(stopped_s=1e-9))
            patient = StoppedProcesses(process, SLOW)
            assert at_once.check() is None
            sleeper = psutil.Process(process.pid)
            sleeper.suspend()
            await until(lambda: sleeper.status() == psutil.STATUS_STOPPED, "it is stopped")
            assert at_once.check() is None  # since when is known from here on
            found = at_once.check()
            assert found is not None
            assert found.cause is Cause.PROCESS_STOPPED
            assert f"pid {process.pid}" in found.summary
            assert patient.check() is None
            sleeper.resume()
            await until(lambda: sleeper.status() != psutil.STATUS_STOPPED, "it goes on")
            assert at_once.check() is None

    run(scenario)


def test_several_short_stops_are_not_added_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            stopped = StoppedProcesses(process, HangPolicy(stopped_s=1e-9))
            sleeper = psutil.Process(process.pid)
            for _ in range(3):
                sleeper.suspend()
                await until(lambda: sleeper.status() == psutil.STATUS_STOPPED, "it is stopped")
                assert stopped.check() is None
                sleeper.resume()
                await until(lambda: sleeper.status() == psutil.STATUS_SLEEPING, "it goes on")

    run(scenario)


def test_503_of_a_server_that_is_not_vllm_is_no_death(tmp_path: Path) -> None:
    busy = Script(*[sends(response(b'{"status": "no slot available"}', 503, headers="Connection: close\r\n"))] * 1000)

    async def scenario() -> None:
        policy = HangPolicy(stall_s=0.1, answer_s=30, stopped_s=math.inf)
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            probe = Probe(Connection(f"{busy.url}/v1", Secret("k"), "m"), is_vllm=False)
            watching = asyncio.create_task(HangWatch(probe, process, policy).until_unwell())

            def asked_for_tokens() -> bool:
                return sum(path == "/v1/completions" for path, _ in busy.requests) > 3

            await until(lambda: asked_for_tokens() or watching.done(), "it was asked again and again")
            assert not watching.done(), watching.result()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await probe.close()
            probe = Probe(Connection(f"{busy.url}/v1", Secret("k"), "m"))
            assert (await HangWatch(probe, process, policy).until_unwell()).cause is Cause.ENGINE_BROKEN
            await probe.close()

    with contextlib.closing(busy):
        run(scenario)


def test_time_in_which_we_did_not_run_is_left_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            stopped = StoppedProcesses(process, HangPolicy(stopped_s=1e-9))
            sleeper = psutil.Process(process.pid)
            sleeper.suspend()
            await until(lambda: sleeper.status() == psutil.STATUS_STOPPED, "it is stopped")
            stopped.check()
            stopped.skip(3600)
            assert stopped.check() is None

    run(scenario)


def test_the_end_of_the_engine_is_found_at_once(tmp_path: Path) -> None:
    found: list[Diagnosis] = []

    async def scenario() -> None:
        async with launched(tmp_path, tree=True) as (_, process, probe, _log):
            await ready(probe)
            await process.record_descendants()
            children = psutil.Process(process.pid).children()
            (engine,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
            watching = asyncio.create_task(HangWatch(probe, process, SLOW).until_unwell())
            engine.kill()
            found.append(await watching)

    run(scenario)
    # Its Worker falls with it, and on a machine that is busy enough it may be all that was seen in time.
    assert found[0].cause in (Cause.ENGINE_DIED, Cause.WORKER_DIED)


def test_an_idle_server_that_answers_is_left_in_peace(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with launched(tmp_path) as (_, process, probe, _log):
            await ready(probe)
            policy = HangPolicy(stall_s=0.2, answer_s=30, stopped_s=math.inf)
            watching = asyncio.create_task(HangWatch(probe, process, policy).until_unwell())
            begun = generated(await probe.signs_of_life())

            async def asked_again_and_again() -> bool:
                return generated(await probe.signs_of_life()) >= begun + 3

            await answered(asked_again_and_again)
            assert not watching.done()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    run(scenario)


# -- with a clock that the test moves on -------------------------------------------------------------------------------


@pytest.fixture
def moves_on(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[float | None], None]:
    """Is told of each look at `/health`, of which there are many in a second."""
    monkeypatch.setattr(hangs, "CHECK_S", 0.05)
    return lambda answered_s: None if answered_s is None else clock.forward(10)


def below(pid: int) -> psutil.Process:
    """The process that multiprocessing has spawned."""
    (found,) = [one for one in psutil.Process(pid).children() if "resource_tracker" not in " ".join(one.cmdline())]
    return found


@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_a_frozen_engine_is_found_by_its_metrics_without_any_request(
    tmp_path: Path, moves_on: Callable[[float | None], None], victim: str
) -> None:
    async def scenario() -> None:
        async with launched(tmp_path, tree=True) as (_, process, probe, _log):
            await ready(probe)
            engine = below(process.pid)
            (engine if victim == "EngineCore" else below(engine.pid)).suspend()
            found = await HangWatch(probe, process, MINUTES, on_health=moves_on).until_unwell()
            assert found.cause is Cause.ENGINE_HUNG, found

    asyncio.run(scenario())


def test_a_frozen_api_server_is_found_by_its_silence(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hangs, "CHECK_S", 0.05)

    async def scenario() -> None:
        async with launched(tmp_path) as (_, process, probe, _log):
            await ready(probe)
            psutil.Process(process.pid).suspend()
            watch = HangWatch(probe, process, MINUTES, on_health=lambda _: clock.forward(200))
            assert (await watch.until_unwell()).cause is Cause.API_SERVER_HUNG

    asyncio.run(scenario())


def test_a_paused_engine_is_not_hung(tmp_path: Path, moves_on: Callable[[float | None], None]) -> None:
    async def scenario() -> None:
        async with launched(tmp_path, tree=True, paused=True) as (_, process, probe, _log):
            await ready(probe)
            worker = below(below(process.pid).pid)
            worker.suspend()  # it looks the same: nothing moves, and what comes waits
            watching = asyncio.create_task(HangWatch(probe, process, MINUTES, on_health=moves_on).until_unwell())

            async def was_asked_twice() -> bool:
                assert not watching.done(), watching.result()
                return sum("CONTROL /is_paused" in line for line in list(process.output.lines)) >= 2

            await answered(was_asked_twice)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            worker.resume()
            assert (await probe.generates(30)).ok

    asyncio.run(scenario())


@contextlib.contextmanager
def busy_server() -> Iterator[tuple[str, list[str]]]:
    """A server whose engine has moved at each look at its metrics, and which generates nothing; what it was asked."""
    steps, asked = itertools.count(), list[str]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = f'vllm:iteration_tokens_total_count{{engine="0"}} {next(steps)}\n'.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            asked.append(self.path)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def test_a_busy_server_is_never_taken_for_hung_nor_asked_for_a_token(
    tmp_path: Path, moves_on: Callable[[float | None], None]
) -> None:
    async def scenario(url: str, asked: list[str]) -> None:
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            probe = Probe(Connection(url, Secret("k"), "m"))
            watching = asyncio.create_task(HangWatch(probe, process, MINUTES, on_health=moves_on).until_unwell())

            async def was_looked_at_for_long() -> bool:
                assert not watching.done(), watching.result()
                return asked.count("/metrics") > 30  # five minutes

            await answered(was_looked_at_for_long)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await probe.close()

    with busy_server() as (url, asked):
        asyncio.run(scenario(url, asked))
    assert set(asked) == {"/health", "/metrics"}
