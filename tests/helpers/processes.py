"""What the tests ask about processes: a server's tree, who is left of an instance, waiting for a condition."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from managed_vllm import ManagedVLLM
from managed_vllm.instance import cleanup, directory

INSTANT = 0.2
"""A keep_alive for tests that wait for the end."""
HANG_S = 60.0
"""The bound of a wait in a test: what takes longer hangs. What must be quick is shown by the order of events, or in
`benchmarks/`; a busy machine makes everything late."""
REDIRECTING = ("VLLM_SERVER_URL", "VLLM_MODEL_NAME", "VLLM_API_KEY", "MANAGED_VLLM_ATTACH", "MANAGED_VLLM_KEEP_ALIVE")
"""Variables that would lead a test to another server."""


@contextlib.contextmanager
def own_state() -> Iterator[Path]:
    """A state directory of the caller's own; at the end no process, socket, lock or folder may be left in it."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="mvt-") as folder:
        home = Path(folder) / "home"
        patch.setenv("MANAGED_VLLM_HOME", str(home))
        for name in REDIRECTING:
            patch.delenv(name, raising=False)
        try:
            yield home
            assert_nothing_left(home)
        finally:
            if home.exists():
                end_everything(home)


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = HANG_S) -> Any:
    """Waits until the condition is true and returns its value; fails with `what` after the time-out."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def is_live(process: psutil.Process) -> bool:
    """True unless the process is gone or a zombie; a reused pid does not count, psutil compares start times."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def sigkill(pid: int | None) -> None:
    """Kills a process whose pid is known: 0 would stand for the test's own group."""
    assert pid, "there is no such process"
    os.kill(pid, signal.SIGKILL)


def tree_below(pid: int) -> set[psutil.Process]:
    """The process and all its descendants, as far as they live."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return {root, *root.children(recursive=True)}
    return set()


def tree(llm: ManagedVLLM) -> dict[str, psutil.Process]:
    """The real server's processes: API server, EngineCore below it, Worker below that.

    Not by their titles: with `SPT_NOENV=1`, which keeps our marker readable, setproctitle leaves them alone.
    """
    pid = llm.status().server_pid
    assert pid is not None
    named = {"APIServer": psutil.Process(pid)}
    for parent, name in (("APIServer", "EngineCore"), ("EngineCore", "Worker")):
        spawned = [p for p in named[parent].children() if "resource_tracker" not in " ".join(p.cmdline())]
        assert len(spawned) == 1, spawned
        named[name] = spawned[0]
    return named


@contextlib.contextmanager
def engine_on_one_core(llm: ManagedVLLM) -> Iterator[None]:
    """EngineCore and Worker of the real server share one core, so that the API server keeps up with them.

    On two cores the demo model's engine is faster than vLLM's API server, which then comes to nothing else, neither to
    its streams nor to who hangs up, until all is generated (vLLM 0.32: its output handler only waits for new outputs).
    """
    processes = tree(llm)
    before: dict[int, set[int]] = {}
    for name in ("EngineCore", "Worker"):
        for thread in processes[name].threads():
            before[thread.id] = os.sched_getaffinity(thread.id)
            os.sched_setaffinity(thread.id, {min(before[thread.id])})
    try:
        yield
    finally:
        for thread_id, cores in before.items():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(thread_id, cores)


def left_of(home: Path) -> list[str]:
    """Everything of the instances below a state directory that still lives: processes and folders (not kept logs)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            ours = f"MANAGED_VLLM_INSTANCE={home}/".encode() in environ
            of_home = f"MANAGED_VLLM_HOME={home}".encode() in environ.split(b"\0")
            supervisor = "managed_vllm.supervisor" in command and of_home
            if (ours or supervisor) and state != "Z":
                found.append(f"{entry.name} {command[:80]}")
    if home.exists():
        found += [str(path) for path in home.iterdir() if path.name not in ("failed", ".token")]
    return found


def assert_nothing_left(home: Path, timeout_s: float = HANG_S) -> None:
    """Waits until no process, socket, lock or folder of the instances below `home` is left."""
    try:
        eventually(lambda: not left_of(home), "everything gone", timeout_s)
    except AssertionError:
        logs = [path.read_text()[-3000:] for path in home.glob("*/supervisor.log")]
        raise AssertionError("left behind: " + "; ".join(left_of(home)) + "\n" + "\n".join(logs)) from None


def end_everything(home: Path) -> None:
    """For tear-down: whatever a failed test left is ended."""
    for instance in directory.instances(home):
        record = instance.read_record() or {}
        supervisors = [p for p in cleanup.marked_processes(instance)]
        pid = record.get("pid")
        if isinstance(pid, int) and directory.is_alive(instance):
            supervisors.append(psutil.Process(pid))
        cleanup.end_processes(supervisors)
