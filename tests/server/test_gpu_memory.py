"""GPU memory of a server that is gone. NVML is a module of the same calls, fed from a file."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import fake_gpus
import pytest
import standin
from processes import HANG_S, eventually

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState
from managed_vllm.server import gpu_memory

_NVML = """
import json, os
from types import SimpleNamespace
def _state(): return json.load(open(os.environ["FAKE_NVML"]))
def nvmlInit():
    if _state() is None: raise RuntimeError("driver not loaded")
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(_state())
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetMemoryInfo(handle): return SimpleNamespace(used=_state()[handle]["used"])
def nvmlDeviceGetComputeRunningProcesses(handle):
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in _state()[handle]["held"]]
"""
MIB = 1 << 20


class Gpus:
    """The state that the NVML of the test tells."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, *devices: tuple[int, list[tuple[int, int]]]) -> None:
        """For each device its used bytes, and who holds how many of them."""
        state = [{"used": used, "held": held} for used, held in devices]
        temporary = self._path.with_suffix(".new")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._path)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    (tmp_path / "pynvml.py").write_text(_NVML)
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "state"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    fake_gpus.forget_with(monkeypatch)
    return Gpus(tmp_path / "state")


def test_without_nvml_there_is_nothing_to_wait_for(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(os.environ["FAKE_NVML"]).write_text("null")
    assert gpu_memory.used_memory(None) is None
    assert gpu_memory.wait_until_released(None, {1}, None, 5) == ""


def test_waits_until_the_driver_has_let_go_of_the_processes_and_the_memory(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_memory, "SETTLED_S", HANG_S)
    gpus.say((100 * MIB, []), (500 * MIB, [(1, 400 * MIB)]))
    before = gpu_memory.used_memory("0")
    assert before == gpu_memory.GpuMemory({0: 100 * MIB})
    gpus.say((9000 * MIB, [(77, 8900 * MIB)]), (500 * MIB, [(1, 400 * MIB)]))
    done: list[str] = []
    waiting = threading.Thread(target=lambda: done.append(gpu_memory.wait_until_released(before, {77}, "0", HANG_S)))
    waiting.start()
    time.sleep(0.3)
    assert not done
    gpus.say((9000 * MIB, []), (500 * MIB, [(1, 400 * MIB)]))  # not listed any more, but not released either
    time.sleep(0.3)
    assert not done
    gpus.say((150 * MIB, []), (500 * MIB, [(1, 400 * MIB)]))
    waiting.join(HANG_S)
    assert done == [""]


def test_the_wait_is_bounded_and_names_who_holds_the_memory(gpus: Gpus) -> None:
    gpus.say((100 * MIB, []))
    before = gpu_memory.used_memory(None)
    gpus.say((9000 * MIB, [(os.getpid(), 8900 * MIB)]))
    text = gpu_memory.wait_until_released(before, {os.getpid()}, None, 0.5)
    assert f"GPU 0: pid {os.getpid()}" in text
    assert "8900 MiB" in text


def test_the_next_start_waits_for_the_memory_of_the_last_one(gpus: Gpus, home: Path) -> None:
    gpus.say((100 * MIB, []))
    llm = ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(),
        keep_alive=0,
        restart=RestartPolicy(backoff_initial_s=0),
    )
    with llm:
        pid = llm.status().server_pid
        assert pid is not None
        gpus.say((9000 * MIB, [(pid, 8900 * MIB)]))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: llm.status().state is ServerState.RESTARTING, "the crash was noticed")
        time.sleep(1.0)  # the next start would have been over by now
        assert llm.status().epoch == 1
        gpus.say((120 * MIB, []))
        assert llm.wait_ready(HANG_S, after_epoch=1).epoch == 2
