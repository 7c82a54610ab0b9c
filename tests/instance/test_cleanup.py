"""What a server may leave outside of its folder is removed, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

import psutil
import pytest
import standin
from processes import eventually

from managed_vllm import ManagedVLLM
from managed_vllm.in_server import managed_vllm_lifeline as lifeline
from managed_vllm.instance import cleanup, directory
from managed_vllm.instance.directory import Instance


def test_a_segment_that_nobody_maps_is_removed_and_one_in_use_is_not() -> None:
    used = shared_memory.SharedMemory(create=True, size=4096)
    code = (
        "from multiprocessing import shared_memory, resource_tracker; import os\n"
        "s = shared_memory.SharedMemory(create=True, size=4096); print(s.name, flush=True)\n"
        "resource_tracker.unregister(s._name, 'shared_memory'); input(); os._exit(0)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert f"/dev/shm/{name}" in cleanup.shared_memory_of([other.pid])
        paths = [f"/dev/shm/{name}", f"/dev/shm/{used.name}"]
        assert cleanup.remove_shared_memory(paths) == []
        other.communicate("\n")
        assert cleanup.remove_shared_memory(paths) == [f"/dev/shm/{name}"]
        assert Path(f"/dev/shm/{used.name}").exists()
    finally:
        other.kill()
        other.communicate()
        used.close()
        used.unlink()


def named_after(instance: Instance) -> set[str]:
    """What a process of the instance's server has left in /dev/shm, having ended without tidying up."""
    code = (
        "import multiprocessing, os; from multiprocessing import resource_tracker, shared_memory\n"
        "resource_tracker.register = lambda *_: None\n"
        "segment = shared_memory.SharedMemory(create=True, size=4096)\n"
        "semaphore = multiprocessing.get_context('spawn').Lock()\n"
        "print(segment.name, 'sem.' + semaphore._semlock.name[1:], flush=True); os._exit(0)"
    )
    env = {**os.environ, lifeline.MARKER: instance.marker, "PYTHONPATH": str(Path(lifeline.__file__).parent)}
    if instance.replica is not None:
        env[lifeline.REPLICA] = lifeline.replica_value(instance.replica)
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return {f"/dev/shm/{name}" for name in done.stdout.split()}


def test_what_a_server_has_made_is_known_by_its_name_and_goes_with_its_instance(home: Path) -> None:
    whole = Instance(directory.state_home(), "m-0123456789")
    first, second = named_after(whole.of_replica(1)), named_after(whole.of_replica(2))
    neighbour = Instance(whole.home, "n-0123456789")
    others = named_after(neighbour)
    try:
        assert cleanup.named_shared_memory(whole.of_replica(1)) == first
        assert cleanup.named_shared_memory(whole) == first | second
        cleanup.remove_instance(whole)
        assert not any(Path(path).exists() for path in first | second)
        assert all(Path(path).exists() for path in others)
    finally:
        cleanup.remove_instance(neighbour)
    assert not any(Path(path).exists() for path in others)


def test_nothing_outside_of_shared_memory_is_removed_whatever_a_record_says(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.touch()
    paths = [str(mine), f"/dev/shm/../..{mine}", "/dev/shm/", "/dev/shm/..", "", "/dev/shm/no-such"]
    assert cleanup.remove_shared_memory(paths) == []
    assert mine.exists()


def test_a_file_that_a_server_has_mapped_is_not_its_segment(home: Path) -> None:
    weights = Path(f"/dev/shm/weights-of-{os.getpid()}.safetensors")
    old = shared_memory.SharedMemory(create=True, size=4096)
    weights.write_bytes(bytes(4096))
    try:
        assert cleanup.remove_shared_memory([str(weights)]) == []
        env = standin.orders(map=[str(weights), f"/dev/shm/{old.name}"])
        with ManagedVLLM("m", command=standin.command(), env=env, keep_alive=0):
            pass
        eventually(lambda: not directory.instances(home), "gone")
        assert weights.exists()
        assert Path(f"/dev/shm/{old.name}").exists()
    finally:
        weights.unlink()
        old.close()
        old.unlink()


# -- processes ---------------------------------------------------------------------------------------------------------


def sleeper(instance: Instance, *wrapper: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*wrapper, "sleep", "600"], env={**os.environ, lifeline.MARKER: instance.marker})


def is_marked(instance: Instance, process: subprocess.Popen[bytes]) -> bool:
    family = {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    return bool(family & {found.pid for found in cleanup.marked_processes(instance)})


def test_the_same_path_in_another_state_directory_is_not_ours(home: Path) -> None:
    """Two jobs with a /tmp of their own have the same path for different directories."""
    instance = Instance(directory.state_home(), "m-0123456789")
    process = sleeper(instance)
    try:
        eventually(lambda: is_marked(instance, process), "its environment can be read: exec is over")
        shutil.rmtree(home)
        directory.state_home()
        assert not is_marked(instance, process)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", ["--mount", "--pid"])
def test_a_process_in_another_namespace_is_not_ours(home: Path, kind: str) -> None:
    flags = ["unshare", kind, "--fork", "--kill-child"]
    if subprocess.run([*flags, "true"], capture_output=True).returncode:
        pytest.skip(f"this user may not: {' '.join(flags)}")
    instance = Instance(directory.state_home(), "m-0123456789")
    here, there = sleeper(instance), sleeper(instance, *flags)
    try:
        eventually(lambda: psutil.Process(there.pid).children(), "unshare has forked")
        inside = psutil.Process(there.pid).children()[0].pid
        eventually(lambda: Path(f"/proc/{inside}/cmdline").read_bytes() == b"sleep\x00600\x00", "the sleeper runs")
        eventually(lambda: os.fsencode(instance.marker) in Path(f"/proc/{inside}/environ").read_bytes(), "it is marked")
        eventually(lambda: is_marked(instance, here), "this one is known")
        assert inside not in {found.pid for found in cleanup.marked_processes(instance)}
    finally:
        for process in (here, there):
            process.kill()
            process.wait()
