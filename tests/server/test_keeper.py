"""A server whose program may be anything falls with its supervisor all the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import standin
from processes import INSTANT, eventually, is_live, tree_below

from managed_vllm import ManagedVLLM
from managed_vllm.server import keeper

WRAPPED = '"$@"; exit $?'
WITH_HELPERS = f"sleep 3600 & env -i sleep 3600 & {WRAPPED}"


def server(code: str) -> ManagedVLLM:
    words = ["sh", "-c", code, "sh", *standin.command()]
    return ManagedVLLM("m", command=words, env=standin.orders(tree=True), keep_alive=INSTANT)


@pytest.mark.parametrize("code", [WRAPPED, WITH_HELPERS], ids=["wrapper", "helpers"])
def test_a_wrapped_server_falls_with_its_supervisor(home: Path, code: str) -> None:
    llm = server(code).start()
    status = llm.status()
    assert status.server_pid is not None
    assert status.supervisor_pid is not None
    tree = tree_below(status.server_pid)
    assert len(tree) > 3
    llm.close()
    os.kill(status.supervisor_pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_live, tree)), "nothing of it lives")
    with server(code):  # and clears what is left of the folder
        pass


def test_a_keeper_that_is_killed_is_replaced_for_the_next_epoch_and_ends_with_the_supervisor(home: Path) -> None:
    def keepers(pid: int) -> list[psutil.Process]:
        return [child for child in psutil.Process(pid).children() if keeper.__file__ in child.cmdline()]

    with server(WRAPPED) as llm:
        supervisor = llm.status().supervisor_pid
        assert supervisor is not None
        (first,) = keepers(supervisor)
        first.kill()
        eventually(lambda: not is_live(first), "it is gone")
        llm.restart()
        (second,) = keepers(supervisor)
    eventually(lambda: not is_live(second), "it has ended, too")


def test_what_another_supervisor_has_launched_is_left_alone() -> None:
    ours, theirs = ({"MARK": "m", "SUPERVISOR": pid} for pid in ("1:1", "2:2"))
    processes = [subprocess.Popen(["sleep", "60"], env={**os.environ, **marks}) for marks in (ours, theirs)]
    keeping = subprocess.Popen([sys.executable, "-I", "-S", keeper.__file__], stdin=subprocess.PIPE)
    keeping.communicate(b'{"MARK": "m", "SUPERVISOR": "1:1"}\n')
    assert processes[0].wait() == -signal.SIGKILL
    assert processes[1].poll() is None
    processes[1].kill()
    processes[1].wait()
