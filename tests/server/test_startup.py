"""A start is over when one token was generated, or it is known why none will be."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from free_ports import free_port
from lone_server import answered, launched, run, spawned, until
from moved_clock import Clock
from scripted_server import Script, hangs, says

from managed_vllm.masking import Secret
from managed_vllm.policies import HangPolicy, SupervisionPolicy
from managed_vllm.server import startup
from managed_vllm.server.activity import Activity
from managed_vllm.server.probe import Probe
from managed_vllm.server.process import ServerProcess
from managed_vllm.server.startup import StartupWatch
from managed_vllm.server.startup_log import StartupLog
from managed_vllm.status import Cause, Connection, Progress, Stage

PATIENT = SupervisionPolicy(hang=HangPolicy.never())


@asynccontextmanager
async def watched(
    folder: Path, policy: SupervisionPolicy = PATIENT, **orders: Any
) -> AsyncIterator[tuple[StartupWatch, list[Progress], psutil.Process]]:
    """A watch over the start of the stand-in, what it has shown, and the server's process."""
    shown: list[Progress] = []
    async with launched(folder, **orders) as (prepared, process, probe, log):
        watch = StartupWatch(
            probe,
            process,
            log,
            policy,
            port=prepared.port,
            may_listen_elsewhere=False,
            on_progress=shown.append,
        )
        yield watch, shown, psutil.Process(process.pid)


def test_ready_means_a_token_was_generated(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with watched(tmp_path) as (watch, shown, _):
            assert await watch.until_ready() is None
            assert shown == [Progress(Stage.WARMING_UP)]

    run(scenario)


def test_a_start_without_a_word_is_silent(tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = dataclasses.replace(PATIENT, startup_silence_s=0.2)
        async with watched(tmp_path, policy, silent=True) as (watch, shown, _):
            found = await watch.until_ready()
            assert found is not None
            assert found.cause is Cause.STARTUP_SILENCE
            assert shown == []

    run(scenario)


def test_a_start_that_moves_is_not_silent_but_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import itertools, time\nfor n in itertools.count(): print('line', n, flush=True); time.sleep(0.05)"
        policy = dataclasses.replace(PATIENT, startup_silence_s=30, startup_timeout_s=0.5)
        async with spawned(tmp_path, [sys.executable, "-c", code]) as process:
            probe = Probe(Connection("http://127.0.0.1:1/v1", Secret(""), "m"))
            watch = StartupWatch(
                probe, process, StartupLog(), policy, port=1, may_listen_elsewhere=False, on_progress=lambda _: None
            )
            found = await watch.until_ready()
            await probe.close()
            assert found is not None
            assert found.cause is Cause.STARTUP_TIMEOUT

    run(scenario)


@pytest.mark.parametrize(
    "work",
    [
        "with open('out', 'wb', 0) as file:\n    while True: file.write(bytes(8192)); time.sleep(0.1)",
        "while True: sum(range(10**5))",
        "while True: subprocess.run([sys.executable, '-S', '-c', 'sum(range(10**7))'])",
    ],
    ids=["bytes", "CPU", "CPU of short-lived children"],
)
def test_whatever_a_process_does_is_seen(tmp_path: Path, work: str) -> None:
    async def scenario() -> None:
        async with spawned(tmp_path, [sys.executable, "-c", f"import subprocess, sys, time\n{work}"]) as process:
            activity = Activity(process)
            activity.moved()
            for _ in range(3):
                await answered(lambda: _looked(process, activity))

    run(scenario)


def test_a_start_that_works_without_a_word_is_not_silent(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "CHECK_S", 0.1)

    async def scenario() -> None:
        policy = dataclasses.replace(PATIENT, startup_silence_s=40, startup_timeout_s=3600)
        async with spawned(tmp_path, [sys.executable, "-c", "while True: sum(range(10**5))"]) as process:
            probe = Probe(Connection("http://127.0.0.1:1/v1", Secret(""), "m"))
            watch = StartupWatch(
                probe, process, StartupLog(), policy, port=1, may_listen_elsewhere=False, on_progress=lambda _: None
            )
            watching = asyncio.create_task(watch.until_ready())
            for _ in range(3):
                await works(psutil.Process(process.pid))
                assert not watching.done(), watching.result()
                clock.forward(25)
            clock.forward(3600)
            found = await watching
            await probe.close()
            assert found is not None
            assert found.cause is Cause.STARTUP_TIMEOUT

    asyncio.run(scenario())


async def works(process: psutil.Process) -> None:
    """Returns once the process has worked long enough for several looks at it."""
    until_s = sum(process.cpu_times()[:2]) + 0.3

    async def has_worked() -> bool:
        return sum(process.cpu_times()[:2]) > until_s

    await answered(has_worked)


def test_a_start_that_only_repeats_itself_is_silent(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "CHECK_S", 0.1)
    says = "INFO 11-23 10:00:{n:02d} [core_client.py:1] Waiting for 1 local core engine proc"

    async def scenario() -> None:
        policy = dataclasses.replace(PATIENT, startup_silence_s=100, startup_timeout_s=400)
        async with launched(tmp_path, chatter=says) as (prepared, process, probe, log):
            watch = StartupWatch(
                probe,
                process,
                log,
                policy,
                port=prepared.port,
                may_listen_elsewhere=False,
                on_progress=lambda _: None,
            )
            watching = asyncio.create_task(watch.until_ready())
            for _ in range(5):
                await says_more(process)
                clock.forward(60)  # what it says is never as old as that
            found = await watching
            assert found is not None
            assert found.cause is Cause.STARTUP_SILENCE

    asyncio.run(scenario())


async def says_more(process: ServerProcess) -> None:
    """Returns once the process has said another two lines."""
    count = len(process.output.lines) + 2

    async def has_said_more() -> bool:
        return len(process.output.lines) >= count

    await answered(has_said_more)


async def _looked(process: ServerProcess, activity: Activity) -> bool:
    await process.record_descendants()
    return activity.moved()


def test_a_process_that_only_waits_does_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import time\nprint('up', flush=True)\nwhile True: time.sleep(0.1)"
        lines: list[str] = []
        async with spawned(tmp_path, [sys.executable, "-c", code], on_line=lines.append) as process:
            await until(lambda: lines, "it waits")
            activity = Activity(process)
            activity.moved()
            await asyncio.sleep(1.0)
            assert not activity.moved()

    run(scenario)


def test_a_stranger_on_the_port_is_never_asked_for_anything(tmp_path: Path) -> None:
    """It took the port before vLLM could: it answers like a server, and must get neither key nor prompt."""
    stranger = Script(says({"data": [{"id": "m"}]}))

    async def scenario() -> None:
        policy = dataclasses.replace(PATIENT, startup_silence_s=0.5)
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            probe = Probe(Connection(f"{stranger.url}/v1", Secret("the-key"), "m"))
            port = int(stranger.url.rpartition(":")[2])
            watch = StartupWatch(
                probe, process, StartupLog(), policy, port=port, may_listen_elsewhere=True, on_progress=lambda _: None
            )
            found = await watch.until_ready()
            await probe.close()
            assert found is not None
            assert found.cause is Cause.STARTUP_SILENCE

    with contextlib.closing(stranger):
        run(scenario)
        assert {path for path, _ in stranger.requests} == {"/health"}


def test_a_first_request_that_is_not_answered_has_a_limit_of_its_own(tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = dataclasses.replace(PATIENT, first_request_timeout_s=0.5)
        async with watched(tmp_path, policy, token_s=3600, say=["up"]) as (watch, _, _process):
            found = await watch.until_ready()
            assert found is not None
            assert "first_request_timeout" in found.remedy

    run(scenario)


def test_a_first_request_that_is_refused_is_diagnosed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with launched(tmp_path) as (prepared, process, _probe, log):
            probe = Probe(dataclasses.replace(prepared.connection, model="another"))
            watch = StartupWatch(
                probe, process, log, PATIENT, port=prepared.port, may_listen_elsewhere=False, on_progress=lambda _: None
            )
            found = await watch.until_ready()
            await probe.close()
            assert found is not None
            assert "does not list 'another'" in found.root_line

    run(scenario)


def test_a_process_that_is_stopped_is_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        policy = SupervisionPolicy(hang=HangPolicy(stopped_s=0.2))
        async with watched(tmp_path, policy, start_s=3600) as (watch, _, process):
            process.suspend()
            found = await watch.until_ready()
            assert found is not None
            assert found.cause is Cause.PROCESS_STOPPED

    run(scenario)


def test_a_watch_that_is_cancelled_leaves_no_request_behind(tmp_path: Path) -> None:
    server = Script(says({}), says({"data": [{"id": "m"}]}), hangs)

    async def scenario() -> None:
        async with spawned(tmp_path, ["sleep", "60"]) as process:
            probe = Probe(Connection(f"{server.url}/v1", Secret("k"), "m"))
            watch = StartupWatch(
                probe, process, StartupLog(), PATIENT, port=None, may_listen_elsewhere=False, on_progress=lambda _: None
            )
            watching = asyncio.create_task(watch.until_ready())
            await until(lambda: len(server.requests) == 3, "the token is asked for")
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await until(lambda: server.hung_up, "the request is given up")
            await probe.close()

    with contextlib.closing(server):
        run(scenario)


def test_a_listener_that_can_not_be_seen_counts_only_where_it_may_be(tmp_path: Path) -> None:
    """With `command=` the server may live in a container of its own, where its sockets are not seen from here."""

    async def scenario() -> None:
        async with launched(tmp_path) as (prepared, process, probe, log):
            unseen = free_port()
            elsewhere = StartupWatch(
                probe, process, log, PATIENT, port=unseen, may_listen_elsewhere=True, on_progress=lambda _: None
            )
            assert await elsewhere.until_ready() is None
            hasty = dataclasses.replace(PATIENT, startup_silence_s=0.5)
            here = StartupWatch(
                probe, process, log, hasty, port=unseen, may_listen_elsewhere=False, on_progress=lambda _: None
            )
            found = await here.until_ready()
            assert found is not None
            assert found.cause is Cause.STARTUP_SILENCE
            assert prepared.port != unseen

    run(scenario)
