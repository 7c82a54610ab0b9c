"""What a start shows to its user, and that nothing depends on whether that can be shown."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import eventually

from managed_vllm import ServerState, ServerStatus
from managed_vllm.instance.channel import Channel, encode
from managed_vllm.standard_error import StandardError

STARTER = """
import os, signal, sys
import standin
from managed_vllm import ManagedVLLM

signal.signal(signal.SIGHUP, signal.SIG_IGN)
if sys.argv[2] == "closed":
    sys.stderr.close()
elif sys.argv[2] == "none":
    sys.stderr = None
command, env = standin.command(), standin.orders(start_s=1.5)
with ManagedVLLM("stand-in", command=command, env=env, keep_alive=0.2, progress=True) as llm:
    outputs = llm.generate(["a", "b"], use_tqdm=True)
    status = llm.status()
    print(status.epoch, status.users, len(outputs), file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("how", ["pipe", "terminal", "closed", "none"])
def test_a_standard_error_that_is_gone_costs_neither_start_nor_lease(home: Path, tmp_path: Path, how: str) -> None:
    ours, theirs = pty.openpty() if how == "terminal" else os.pipe()
    result = tmp_path / "result"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p]), "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", STARTER, str(result), how], stderr=theirs, env=environment) as user:
        os.close(theirs)
        if how == "terminal":
            eventually(lambda: list(home.glob("*/instance.json")), "the start has begun")
        os.close(ours)
        assert user.wait(100) == 0
    assert result.read_text() == "1 1 2\n"


def test_standard_error_takes_what_can_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with open(writing, "w", encoding="ascii") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        stream = StandardError()
        assert not stream.isatty()
        assert stream.fileno() == writing
        os.close(reading)
        print("…", "lost", file=stream, flush=True)
        print("lost as well", file=stream, flush=True)
    with pytest.raises(OSError, match="no descriptor"):
        stream.fileno()


def test_what_looks_on_at_a_channel_does_not_cost_the_lease(caplog: pytest.LogCaptureFixture) -> None:
    def fails(status: ServerStatus) -> None:
        raise SystemExit

    ours, theirs = socket.socketpair(socket.AF_UNIX)
    channel = Channel(ours, on_change=fails)
    for epoch in (1, 2):
        theirs.sendall(encode({"status": ServerStatus(ServerState.READY, epoch=epoch).to_dict()}))
    channel.wait_until(lambda status: status is not None and status.epoch == 2, 60)
    assert not channel.closed
    theirs.close()
    channel.close()
    assert "a listener to the server's status failed" in caplog.text
