"""How the first user happens to run is no affair of the server's: signals, descriptors, limits, umask, directory."""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import standin
from processes import HANG_S, INSTANT, eventually, tree_below

from managed_vllm import ManagedVLLM

PATH = [str(Path(standin.__file__).parent)]
START = f"""
import sys; sys.path[:0] = {PATH!r}
import json, os, standin
from managed_vllm import ManagedVLLM
from managed_vllm.instance import directory
from managed_vllm.instance.directory import Instance
with ManagedVLLM("m", command=standin.command(), env=standin.orders(tree=True), keep_alive={INSTANT}) as llm:
    status = llm.status()
    alive = directory.is_alive(Instance(directory.state_home(), llm.id))
    answer = {{"supervisor": status.supervisor_pid, "server": status.server_pid, "alive": alive}}
    for role in ("supervisor", "server"):
        lines = open(f"/proc/{{answer[role]}}/status").read().splitlines()
        answer[role + " status"] = dict(line.split(":", 1) for line in lines)
        answer[role + " limits"] = open(f"/proc/{{answer[role]}}/limits").read()
        answer[role + " nice"] = os.getpriority(os.PRIO_PROCESS, answer[role])
    with open(ANSWER, "w") as file:
        json.dump(answer, file)
"""


def started(tmp_path: Path, before: str = "", **popen: Any) -> dict[str, Any]:
    answer = tmp_path / "answer"
    code = f"ANSWER = {str(answer)!r}\n{before}\n{START}"
    run = subprocess.run([sys.executable, "-c", code], timeout=HANG_S, **popen)
    assert run.returncode == 0
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def test_blocked_signals_of_the_starter_are_not_blocked_in_supervisor_and_server(home: Path, tmp_path: Path) -> None:
    found = started(tmp_path, "import signal; signal.pthread_sigmask(signal.SIG_SETMASK, set(range(1, 32)) - {9, 19})")
    for role in ("supervisor", "server"):
        assert int(found[f"{role} status"]["SigBlk"], 16) == 0


def test_closed_standard_descriptors_do_not_cost_the_lock(home: Path, tmp_path: Path) -> None:
    assert started(tmp_path, "import os\nfor number in (0, 1, 2): os.close(number)")["alive"]


def test_soft_limits_and_priority_of_the_starter_do_not_bind_the_server(home: Path, tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = started(
        tmp_path,
        "import os, resource; os.umask(0); os.chdir('/proc')\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))",
    )
    for role in ("supervisor", "server"):
        [line] = [line for line in found[f"{role} limits"].splitlines() if line.startswith("Max open files")]
        assert line.split()[3] == line.split()[4] == str(hard)
        assert found[f"{role} status"]["Umask"].strip() == "0077"


def test_a_user_with_more_than_a_thousand_open_files_starts_a_server(home: Path, tmp_path: Path) -> None:
    many = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1500, resource.getrlimit(7)[1]))\n"
    assert started(tmp_path, many + "files = [open('/dev/null') for _ in range(1100)]")["alive"]


def test_signals_that_warn_a_whole_job_end_neither_supervisor_nor_server(home: Path) -> None:
    with ManagedVLLM("m", command=standin.command(), env=standin.orders(tree=True), keep_alive=INSTANT) as llm:
        status = llm.status()
        assert status.supervisor_pid is not None
        processes = tree_below(status.supervisor_pid)
        assert len(processes) > 2
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGXCPU, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid, number)
        assert llm.generate("x", {"max_tokens": 2})[0].epoch == status.epoch
        assert tree_below(status.supervisor_pid) == processes


def test_a_stop_from_the_terminal_stops_no_supervisor(home: Path) -> None:
    with ManagedVLLM("m", command=standin.command(), keep_alive=INSTANT) as llm:
        pid = llm.status().supervisor_pid
        assert pid is not None
        os.kill(pid, signal.SIGTSTP)
        assert llm.status().supervisor_pid == pid
        eventually(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED, "runs")


def test_a_supervisor_that_is_told_to_stop_leaves_requests_in_flight_the_grace_that_was_asked_for(
    home: Path, tmp_path: Path
) -> None:
    """A batch system's SIGTERM. The stand-in goes on answering, as vLLM does with `shutdown_timeout`."""
    env = standin.orders(ignore_sigterm=True, faults=str(tmp_path))
    handle = ManagedVLLM("m", command=standin.command(), env=env, keep_alive=0, stop_grace=HANG_S)
    with handle as llm, concurrent.futures.ThreadPoolExecutor() as pool:
        status = llm.status()
        assert status.supervisor_pid is not None
        assert status.server_pid is not None
        (tmp_path / "1-slow").touch()
        answer = pool.submit(llm.generate, "x", {"max_tokens": 4})
        eventually(lambda: (tmp_path / "1-slow.claimed").exists(), "the server is at it")
        os.kill(status.supervisor_pid, signal.SIGTERM)
        eventually(lambda: "stopping" in next(home.glob("*/events.jsonl")).read_text(), "the supervisor has heard it")
        assert answer.result()[0].epoch == 1
        os.kill(status.server_pid, signal.SIGKILL)
