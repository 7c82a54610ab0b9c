"""What a server may leave outside of its folder is removed, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path

from managed_vllm.instance import cleanup


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


def test_nothing_outside_of_shared_memory_is_removed_whatever_a_record_says(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.touch()
    paths = [str(mine), f"/dev/shm/../..{mine}", "/dev/shm/", "/dev/shm/..", "", "/dev/shm/no-such"]
    assert cleanup.remove_shared_memory(paths) == []
    assert mine.exists()
