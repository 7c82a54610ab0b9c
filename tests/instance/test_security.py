"""What another Unix user of the machine can't do. Needs root, to act as that user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import standin
from processes import INSTANT

from managed_vllm import ManagedVLLM

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")

NOBODY = 65534


def as_nobody(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code as the user nobody, with the system's interpreter and an empty environment."""
    python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
    return subprocess.run(
        [python, "-I", "-c", code, *arguments],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        env={},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_nobody_can_neither_read_files_nor_environments_nor_see_the_key(home: Path) -> None:
    home.parent.chmod(0o755)
    with ManagedVLLM("stand-in", command=standin.command(), keep_alive=INSTANT) as llm:
        status = llm.status()
        code = """
import os, sys
home, *pids = sys.argv[1:]
def attempt(what):
    try: what(); print("REACHED")
    except OSError as error: print(type(error).__name__)
attempt(lambda: os.listdir(home))
for pid in pids: attempt(lambda: open(f"/proc/{pid}/environ").read() or 1/0)
for pid in os.listdir("/proc"):
    if pid.isdigit():
        try: print(open(f"/proc/{pid}/cmdline").read())
        except OSError: pass
"""
        found = as_nobody(code, str(home), str(status.server_pid), str(status.supervisor_pid))
        assert found.returncode == 0, found.stderr
        assert found.stdout.splitlines()[:3] == ["PermissionError"] * 3
        assert llm.api_key not in found.stdout


def test_the_control_socket_refuses_another_uid_even_if_it_can_be_reached(home: Path) -> None:
    home.parent.chmod(0o755)
    with ManagedVLLM("stand-in", command=standin.command(), keep_alive=INSTANT) as llm:
        folder = home / str(llm.id)
        home.chmod(0o711)
        folder.chmod(0o711)
        (folder / "control.sock").chmod(0o777)
        code = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.settimeout(10); s.connect(sys.argv[1])
try:
    s.sendall(b'{"op": "status", "id": 1}\\n'); print("answer", s.recv(1000))
except OSError: print("answer", b"")
"""
        found = as_nobody(code, str(folder / "control.sock"))
        assert found.stdout.strip() == "answer b''", found.stderr
        home.chmod(0o700)
        folder.chmod(0o700)
        assert llm.status().users == 1


def test_a_socket_planted_by_another_user_is_not_trusted(home: Path) -> None:
    home.parent.chmod(0o755)
    with ManagedVLLM("stand-in", command=standin.command(), keep_alive=0) as llm:
        name = str(llm.id)
    # Whatever lies in a folder that belongs to somebody else is refused as a whole.
    from processes import assert_nothing_left

    assert_nothing_left(home)
    (home / name).mkdir(mode=0o700)
    os.chown(home / name, NOBODY, NOBODY)
    from managed_vllm.errors import StateDirectoryError

    with (
        pytest.raises(StateDirectoryError, match="belongs to uid"),
        ManagedVLLM("stand-in", command=standin.command(), keep_alive=0),
    ):
        pass
    (home / name).rmdir()
