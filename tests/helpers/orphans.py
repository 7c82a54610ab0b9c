"""Scenes in which processes are killed and nobody may clean up: two users, their server, and who of it outlives what.

For `test_real_orphans.py`, where servers are spawned, and `test_real_warm_orphans.py`, where they are forked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from processes import HANG_S, is_live

from managed_vllm.instance import cleanup, directory

VERDICT_S = HANG_S
"""After this long nothing may be alive."""

USER = """
import sys
from managed_vllm import ManagedVLLM, RestartPolicy
warm = sys.argv[1] == "warm"
restart = RestartPolicy() if warm else RestartPolicy(max_restarts=0)
with ManagedVLLM("demo", keep_alive=0, restart=restart, warm=warm) as llm:
    print("ready", flush=True)
    for _ in sys.stdin:
        print(len(llm.generate("Screen:", {"max_tokens": 2, "ignore_eos": True})[0].outputs[0].token_ids), flush=True)
"""


def user(how: str) -> list[str]:
    """The command of a user, whose server is launched "plain" or "warm"."""
    return [sys.executable, "-c", USER, how]


@dataclass
class Scene:
    """Two users and the server that they start."""

    home: Path
    users: list[subprocess.Popen[str]]
    supervisor: int = 0
    server: dict[str, int] = field(default_factory=dict)
    """Pids of the API server, EngineCore and Worker as far as they were seen."""
    known: set[psutil.Process] = field(default_factory=set)

    @property
    def instance(self) -> directory.Instance:
        (instance,) = directory.instances(self.home)
        return instance


@contextlib.contextmanager
def two_users(home: Path, how: str) -> Iterator[Scene]:
    """Starts them; at the end everything of them is ended."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    users: list[subprocess.Popen[str]] = [subprocess.Popen(user(how), **pipes) for _ in range(2)]  # type: ignore[call-overload]
    scene = Scene(home, users)
    try:
        yield scene
    finally:
        for one in users:
            one.kill()
            one.communicate()
        with contextlib.suppress(ProcessLookupError):
            if scene.supervisor:
                os.kill(scene.supervisor, signal.SIGCONT)


def find_supervisor(scene: Scene) -> int:
    """Waits until the supervisor has written its record; returns its pid."""

    def recorded() -> int | None:
        records = [instance.read_record() for instance in directory.instances(scene.home)]
        return next((record["pid"] for record in records if record), None)

    return watch(recorded, "the supervisor wrote its record")


def kill_at_once(victims: list[int], bystanders: list[int]) -> float:
    """Stops the bystanders, kills the victims in the same instant; returns the moment.

    First SIGSTOP for each, then SIGKILL for each, with nothing in between: a stopped process dies of SIGKILL at once,
    and none of them can run an instruction, say as a reaction, after another one's death. Without the stop the one that
    is killed first is dead some microseconds before its watcher is.
    """
    for pid in (*bystanders, *victims):
        os.kill(pid, signal.SIGSTOP)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def children(pid: int) -> list[int]:
    """Children of a process's main thread; one small file, so that it can be watched closely."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def child_of(pid: int, word: bytes = b"--multiprocessing-fork") -> int | None:
    """The child with this in its command line; by default the one that multiprocessing has spawned."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
    return None


def watch(condition: Callable[[], int | bool | None], what: str, *, timeout_s: float = 240.0) -> int:
    """As `eventually`, but looks every half millisecond: a child needs some 30 ms until it has asked for its signal."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.0005)
    return int(value)


def alive(scene: Scene) -> set[psutil.Process]:
    """Everything of the server that lives: by our marker in its environment, or because it was seen before the kill."""
    found = {process for process in scene.known if is_live(process)}
    for instance in directory.instances(scene.home):
        found.update(process for process in cleanup.marked_processes(instance) if is_live(process))
    return found


def survivors(scene: Scene, killed_at: float) -> tuple[float, list[str]]:
    """Waits until nothing is alive, for at most `VERDICT_S`; returns the seconds that it took, and who still is."""
    while True:
        # What was marked right after the kill stays known, should it lose its marker.
        scene.known |= (now := alive(scene))
        passed = time.monotonic() - killed_at
        if not now or passed > VERDICT_S:
            return passed, [f"{process.pid} {' '.join(process.cmdline())[-80:]}" for process in now if is_live(process)]
        time.sleep(0.01)


def leaked(before: set[str]) -> str:
    """Shared memory that is there and was not: said, not judged."""
    return " ".join(sorted(set(os.listdir("/dev/shm")) - before)) or "-"
