"""Who starts the server: one process, and nobody depends on whether it goes on; a failure belongs to its own start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import patient_supervisors
import psutil
import pytest
import standin
from processes import INSTANT, eventually

from managed_vllm import ManagedVLLM, ServerState
from managed_vllm.errors import EngineDiedError, SupervisorError
from managed_vllm.instance import attach, directory

STOPPING = f"""
import sys; sys.path[:0] = [{str(Path(standin.__file__).parent)!r}]
import os, signal, standin
from managed_vllm import ManagedVLLM
from managed_vllm.instance import spawn
run = spawn.NAME
def stopped(*arguments):
    if BEFORE: os.kill(os.getpid(), signal.SIGSTOP)
    found = run(*arguments)
    if not BEFORE: os.kill(os.getpid(), signal.SIGSTOP)
    return found
spawn.NAME = stopped
with ManagedVLLM("m", command=standin.command(), env=standin.orders(), keep_alive={INSTANT}) as llm:
    print(llm.status().server_pid)
"""


@pytest.fixture(autouse=True)
def patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient_supervisors.are_made(tmp_path, monkeypatch)


def server() -> ManagedVLLM:
    return ManagedVLLM("m", command=standin.command(), env=standin.orders(), keep_alive=INSTANT)


def stopped(code: str) -> subprocess.Popen[str]:
    """A starter that has stopped itself."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "it has stopped")
    return process


def test_a_starter_that_is_stopped_when_it_has_spawned_holds_up_nobody(home: Path) -> None:
    starter = stopped(STOPPING.replace("NAME", "_run_starter").replace("BEFORE", "False"))
    with server() as llm:
        pid = llm.status().server_pid
        os.kill(starter.pid, signal.SIGCONT)
        assert int(starter.communicate()[0]) == pid


def test_a_starter_that_is_stopped_before_it_spawns_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "STOPPED_S", 0.0)
    starter = stopped(STOPPING.replace("NAME", "start_supervisor").replace("BEFORE", "True"))
    with pytest.raises(SupervisorError, match=rf"pid {starter.pid} is about to start the server, but is stopped"):
        server().start()
    os.kill(starter.pid, signal.SIGCONT)
    assert int(starter.communicate()[0])


VERSION = "config.PROTOCOL = 99"


@pytest.mark.parametrize(
    "change",
    ["pass", "status.ServerStatus.to_dict = lambda self: {'state': 'dreaming'}"],
    ids=["another number", "unreadable"],
)
def test_a_supervisor_of_another_version_is_said_at_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    patient_supervisors.are_made(tmp_path, monkeypatch, "from managed_vllm import config, status", VERSION, change)
    monkeypatch.setattr(attach, "SUPERVISOR_PATIENCE_S", 3600.0)
    for handle in (server(), ManagedVLLM(keep_alive=0)):  # the one that starts it, and one that finds it
        with pytest.raises(SupervisorError, match="another version of managed_vllm"):
            handle.start()
    [instance] = directory.instances(home)
    record = eventually(instance.read_record, "the supervisor's record")
    os.kill(record["pid"], signal.SIGTERM)  # it never gives a lease


def test_whoever_tries_again_after_a_failed_start_gets_a_start_of_its_own(home: Path, tmp_path: Path) -> None:
    mended, starts = tmp_path / "mended", tmp_path / "starts"
    check = f"echo x >> {starts}; test -e {mended} || {{ echo 'ValueError: no such file'; exit 3; }}"
    wrapped = ["sh", "-c", f'{check}; exec "$@"', "sh", *standin.command()]

    def one_try(**limits: float) -> ServerState:
        with ManagedVLLM("m", command=wrapped, keep_alive=INSTANT, **limits) as llm:  # type: ignore[arg-type]
            return llm.status().state

    for count in (1, 2):
        with pytest.raises(EngineDiedError, match="no such file"):
            one_try()
        assert len(starts.read_text().split()) == count
    mended.touch()
    assert one_try(startup_timeout=1800) is ServerState.READY
