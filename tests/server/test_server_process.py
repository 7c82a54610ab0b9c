"""One process tree: its output is read, its end noticed, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
from free_ports import free_port
from lone_server import LIMIT_S, launched, run, spawned, until
from processes import HANG_S, is_live

from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.server import process as server_process
from managed_vllm.server.process import ServerProcess


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def line_that_begins(process: ServerProcess, text: str) -> str:
    await until(lambda: any(line.startswith(text) for line in list(process.output.lines)), f"it said {text!r}")
    return next(line for line in process.output.lines if line.startswith(text))


def test_the_exit_and_all_of_the_output_are_known(tmp_path: Path) -> None:
    heard: list[str] = []

    async def scenario() -> None:
        code = "import sys; print('one\\r\\ntwo'); print('three', file=sys.stderr, end=''); sys.exit(3)"
        async with spawned(tmp_path, python(code), on_line=heard.append) as process:
            await process.exited.wait()
            await until(partial(_has_heard, heard, 3), "all of it has come")
            assert process.returncode == 3
            assert sorted(process.output.lines) == ["one", "three", "two"]
            assert sorted(heard) == sorted(process.output.lines)

    run(scenario)
    assert "three" in Instance(tmp_path, "m-0123456789").server_log.read_text()


ENGINE = """
import os, time

def is_told(name):
    while not os.path.exists(f"{FOLDER}/{name}"):
        time.sleep(0.01)
    os._exit(0)

if os.fork() == 0:
    open("/proc/self/comm", "w").write("VLLM::EngineCore")
    if os.fork() == 0:
        is_told("program")  # has yet to run it
    os.wait()
    is_told("engine")
time.sleep(3600)
"""


def test_the_end_of_what_an_engine_has_forked_is_not_taken_for_the_engines(tmp_path: Path) -> None:
    async def named_alike(process: ServerProcess, count: int) -> None:
        def found() -> bool:
            names = [Path(f"/proc/{one.pid}/comm").read_text().strip() for one in process.processes()[1:]]
            return names == ["VLLM::EngineCor"] * count

        async with asyncio.timeout(LIMIT_S):
            while not found():
                await process.record_descendants()
                await asyncio.sleep(0.01)
        await process.record_descendants()

    async def scenario() -> None:
        async with spawned(tmp_path, python(ENGINE.replace("{FOLDER}", str(tmp_path)))) as process:
            await named_alike(process, 2)
            for name, told in (("program", set()), ("engine", {"VLLM::EngineCor"})):
                (tmp_path / name).touch()
                await process.child_ended.wait()
                process.child_ended.clear()
                assert process.ended_names - {""} == told

    run(scenario)


def steps(folder: Path, *lines: str) -> list[str]:
    """A program that says each line when the file of its number appears in the folder."""
    return python(
        "import os, time\n"
        f"for n, line in enumerate({lines!r}):\n"
        f"    while not os.path.exists(f'{folder}/{{n}}'): time.sleep(0.01)\n"
        "    print(line, flush=True)\n"
        "time.sleep(60)"
    )


def _has_heard(heard: list[str], count: int) -> bool:
    return len(heard) == count


def test_a_line_that_is_only_repeated_with_another_time_is_no_news(tmp_path: Path) -> None:
    heard: list[str] = []

    async def scenario() -> None:
        waiting = "INFO 11-23 10:00:0{} [core_client.py:1] Waiting for 1 local core engine proc"
        argv = steps(tmp_path, waiting.format(1), waiting.format(2), waiting.format(3), "something else")
        async with spawned(tmp_path, argv, on_line=heard.append) as process:
            news = []
            for number in range(4):
                (tmp_path / str(number)).touch()
                await until(partial(_has_heard, heard, number + 1), "the line has come")
                news.append(process.output.last_new_line_at)
            assert news[0] == news[1] == news[2] < news[3]

    run(scenario)


def test_output_after_the_start_is_kept_but_not_read_out(tmp_path: Path) -> None:
    heard: list[str] = []

    async def scenario() -> None:
        async with spawned(tmp_path, steps(tmp_path, "early", "late"), on_line=heard.append) as process:
            (tmp_path / "0").touch()
            await until(lambda: heard == ["early"], "the first line has come")
            process.output.end_of_startup()
            (tmp_path / "1").touch()
            await until(lambda: list(process.output.lines) == ["early", "late"], "the second line has come")
            await process.kill()
            await asyncio.to_thread(process.output.drain)

    run(scenario)
    assert heard == ["early"]


def test_a_program_that_can_not_be_run_is_an_error_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(FileNotFoundError):
            async with spawned(tmp_path, [str(tmp_path / "no such program")]):
                pass

    run(scenario)


def test_sigterm_is_enough_for_whoever_hears_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('up', flush=True)"
        async with spawned(tmp_path, python(f"{code}\ntime.sleep(60)")) as process:
            await line_that_begins(process, "up")
            assert await process.stop(grace_s=30) == []
            assert process.returncode == 7

    run(scenario)


def test_whoever_is_deaf_is_killed_after_the_grace(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
        async with spawned(tmp_path, python(code)) as process:
            await line_that_begins(process, "up")
            assert await process.stop(grace_s=0.1) == []
            assert process.returncode == -9

    run(scenario)


def test_nothing_is_left_not_even_what_hides_in_a_session_of_its_own(tmp_path: Path) -> None:
    hidden: list[psutil.Process] = []
    code = (
        "import os, signal, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    signal.signal(15, signal.SIG_IGN)\n"
        "    print('hidden', os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )

    async def scenario() -> None:
        async with spawned(tmp_path, python(code)) as process:
            pid = int((await line_that_begins(process, "hidden")).split()[1])
            hidden.append(psutil.Process(pid))
            assert await process.kill() == []
            assert not is_live(hidden[0])

    run(scenario)
    assert cleanup.marked_processes(Instance(tmp_path, "m-0123456789")) == []


def test_resource_trackers_have_the_time_to_tidy_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_process, "TRACKER_S", HANG_S)
    caplog.set_level(logging.INFO, server_process.__name__)
    noted = tmp_path / "segments"

    async def scenario() -> None:
        async with launched(tmp_path, tree=True, shm=str(noted)) as (_, process, _probe, _log):
            await until(lambda: noted.exists() and noted.read_text().endswith("\n"), "the Worker has its segment")
            assert await process.stop(grace_s=HANG_S) == []

    run(scenario)
    assert not Path(noted.read_text().strip()).exists()
    assert "removed shared memory" not in caplog.text


def test_the_end_of_a_process_below_it_is_noticed(tmp_path: Path) -> None:
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print('child', child.pid, flush=True)\n"
        "child.wait()\n"
        "time.sleep(60)"
    )

    async def scenario() -> None:
        async with spawned(tmp_path, python(code)) as process:
            child = psutil.Process(int((await line_that_begins(process, "child")).split()[1]))
            await process.record_descendants()
            assert process.processes() == [psutil.Process(process.pid), child]
            assert not process.child_ended.is_set()
            child.kill()
            await process.child_ended.wait()
            assert process.processes() == [psutil.Process(process.pid)]
            assert process.pids_ever == {process.pid, child.pid}

    run(scenario)


def test_who_listens_on_a_port_is_known(tmp_path: Path) -> None:
    code = (
        "import socket, time\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "print('port', listener.getsockname()[1], flush=True)\n"
        "time.sleep(60)"
    )

    async def scenario() -> None:
        async with spawned(tmp_path, python(code)) as process:
            port = int((await line_that_begins(process, "port")).split()[1])
            assert process.owns_port(port) is True
            stranger = free_port()
            with contextlib.closing(socket.create_server(("127.0.0.1", stranger))):
                assert process.owns_port(stranger) is False
            assert process.owns_port(stranger) is None

    run(scenario)
