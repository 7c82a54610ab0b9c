"""On the machines and in the environments of others: a server is started, shared, restarted, and nothing stays.

Each `Machine` is a way to run a program: as another user, in namespaces of its own, as a step of a batch system, from
cron, in a pod, without standard descriptors. The same program runs in each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import standin
from processes import eventually

import managed_vllm

SITE = Path(psutil.__file__).parents[1]
PACKAGES = [str(Path(managed_vllm.__file__).parents[1]), str(Path(standin.__file__).parent), str(SITE)]
PYTHONS = (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}")
"""Another user may be kept from ours by the folder that it lies in."""

STORY = """
import json, subprocess, sys
from pathlib import Path
report = Path(sys.argv[1])
import standin
from processes import eventually
from managed_vllm import ManagedVLLM
from managed_vllm.instance import directory

SHARE = '''
import standin
from managed_vllm import ManagedVLLM
with ManagedVLLM("stand-in", command=standin.command(), keep_alive=0, progress=False) as llm:
    print(llm.status().server_pid, llm.started_it, llm.generate("from a second process")[0].outputs[0].text[:4])
'''
with ManagedVLLM("stand-in", command=standin.command(), keep_alive=0, progress=False) as llm:
    found = {"pid": llm.status().server_pid, "answer": llm.generate("hi")[0].outputs[0].text[:4]}
    shared = subprocess.run(
        [sys.executable, "-c", SHARE], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    found["shared"] = shared.stdout.decode().split() or shared.stderr.decode()
    llm.restart()
    llm.wait_ready(60)
    found["after"] = llm.status().epoch, llm.generate("hi")[0].outputs[0].text[:4]
# With pids of its own this is their init: whatever else is there is killed when it ends.
eventually(lambda: not directory.instances(directory.state_home()), "it is gone with its last user")
report.write_text(json.dumps(found))
"""


@dataclass(frozen=True)
class Machine:
    """How the program is run there."""

    before: tuple[str, ...] = ()
    """The words before the interpreter's."""
    shell: str = "exec"
    """What a shell does before it, or in place of `exec`."""
    env: Mapping[str, str] = field(default_factory=dict)
    bare: bool = False
    """Nothing of our own environment is there."""
    root: bool = False


UNSHARE = ("unshare", "--fork", "--kill-child")
CRON = {"PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "HOME": "/", "LOGNAME": "root"}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "KUBERNETES_PORT": "tcp://10.0.0.1:443",
    "VLLM_PORT": "tcp://10.0.0.7:8000",
    "VLLM_SERVICE_HOST": "10.0.0.7",
    "VLLM_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "HOME": "/nonexistent",
}
MACHINES = {
    "another user": Machine(("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"), root=True),
    "mounts of its own": Machine((*UNSHARE, "--mount"), root=True),
    "pids of its own": Machine((*UNSHARE, "--pid", "--mount-proc"), root=True),
    "network of its own": Machine((*UNSHARE, "--net"), shell="ip link set lo up; exec", root=True),
    "all of its own": Machine(
        (*UNSHARE, "--mount", "--pid", "--mount-proc", "--net", "--ipc", "--uts"),
        shell="ip link set lo up; exec",
        root=True,
    ),
    "step of a batch system": Machine(
        ("setsid",), env={"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    ),
    "pod": Machine(env=POD),
    "pod, without a name for its user": Machine(
        ("setpriv", "--reuid=54321", "--regid=0", "--clear-groups"), env=POD, root=True
    ),
    "256 descriptors": Machine(shell="ulimit -n 256; exec"),
    "no standard descriptors": Machine(shell="exec 0<&- 1>&- 2>&-; exec"),
    "cron": Machine(env=CRON, bare=True),
    "deep nice and a narrow umask": Machine(("nice", "-n", "15"), shell="umask 0377; exec"),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Open to every user, as /tmp is, which is where the state directory and the report go."""
    made = Path(tempfile.mkdtemp(prefix="mvt-", dir="/tmp"))
    made.chmod(0o1777)
    yield made
    shutil.rmtree(made)


def words(machine: Machine, python: str, code: str, *arguments: str) -> list[str]:
    return [*machine.before, "sh", "-c", f'{machine.shell} "$@"', "sh", python, "-B", "-c", code, *arguments]


def environment(machine: Machine, folder: Path) -> dict[str, str]:
    """State directory and temporary folder are `folder`'s: users of one machine must not meet those of another test."""
    own = {} if machine.bare else {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    home = {"MANAGED_VLLM_HOME": str(folder / "home"), "TMPDIR": str(folder)}
    return {**own, "PYTHONPATH": os.pathsep.join(PACKAGES), **home, **machine.env}


@pytest.mark.parametrize("name", MACHINES)
def test_a_server_is_started_shared_restarted_and_gone(folder: Path, name: str) -> None:
    machine = MACHINES[name]
    if machine.root and os.geteuid() != 0:
        pytest.skip("needs root, to be somebody else")
    if machine.before and subprocess.run([*machine.before, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"can't be had here: {' '.join(machine.before)}")
    if machine.shell.startswith("ip ") and shutil.which("ip") is None:
        pytest.skip("needs `ip` (iproute2), for the loopback of a network of its own")
    report = folder / "report.json"
    variables = environment(machine, folder)
    python = next((python for python in PYTHONS if can_run(machine, python, variables)), None)
    if python is None:
        pytest.skip(f"{name}: none of {', '.join(PYTHONS)} can be run with our packages")
    done = subprocess.run(
        words(machine, python, STORY, str(report)),
        env=variables,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert report.exists(), done.stderr
    found = json.loads(report.read_text())
    assert found["answer"] == "echo"
    assert found["shared"] == [str(found["pid"]), "False", "echo"]
    assert found["after"] == [2, "echo"]
    assert done.returncode == 0, done.stderr
    eventually(lambda: left_in(folder) == [], "nothing is left")


def can_run(machine: Machine, python: str, variables: Mapping[str, str]) -> bool:
    """Ours can be run wherever we stay who we are."""
    if "--clear-groups" not in machine.before:
        return python == sys.executable
    probe = words(machine, python, "import standin, psutil, aiohttp, openai, managed_vllm")
    return subprocess.run(probe, env=variables, cwd="/", capture_output=True, check=False).returncode == 0


def left_in(folder: Path) -> list[str]:
    """Processes that work in the state directory, and what is in there but its token and the caches it keeps."""
    home = folder / "home"
    processes = [
        f"{process.pid} {process.info['name']}"
        for process in psutil.process_iter(["name", "environ"])
        if (process.info["environ"] or {}).get("MANAGED_VLLM_HOME") == str(home)
    ]
    return [*processes, *(path.name for path in home.iterdir() if path.name not in (".token", "cache"))]
