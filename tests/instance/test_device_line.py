"""`devices="auto"` from end to end: servers take devices, wait in line for them, keep them, and give them back.

The stand-in notices by itself if it shares a device: it locks a file of the device's name for as long as it lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gpus
import psutil
import pytest
import standin
from device_user import INSTANCES, use
from fake_gpus import MIB, FakeGpus
from processes import HANG_S, eventually, is_live, sigkill

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState, variables
from managed_vllm.errors import DeviceError, DevicesBusyError
from managed_vllm.instance import directory


@pytest.fixture
def gpus(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpus]:
    """Two GPUs, and a directory of places of the test's own."""
    for name in variables.DEVICE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANAGED_VLLM_DEVICES_DIR", str(tmp_path / "devices"))
    (tmp_path / "used").mkdir()
    found = fake_gpus.installed(tmp_path, monkeypatch)
    found.are(2)
    yield found
    sys.modules.pop("pynvml", None)
    assert overlaps(tmp_path) == []


def overlaps(folder: Path) -> list[str]:
    """Which devices two servers had at once."""
    return [path.name for path in (folder / "used").glob("*-twice")]


def server(folder: Path, model: str, **options: Any) -> ManagedVLLM:
    given: dict[str, Any] = {"keep_alive": 0, "progress": False, "devices": "auto", **options}
    env = standin.orders(used=str(folder / "used"))
    return ManagedVLLM(model, command=standin.command(), env={**env, **given.pop("env", {})}, **given)


def environment_of(llm: ManagedVLLM) -> dict[str, str]:
    return psutil.Process(llm.status().server_pid).environ()


def waits(llm: ManagedVLLM) -> str:
    """What one that waits in line says; empty while it does not."""
    status = llm.status()
    return status.detail if status.stage == "waiting" else ""


def test_each_server_has_its_own_gpus_and_the_third_waits(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "a") as first, server(tmp_path, "b") as second:
        assert (first.status().devices, second.status().devices) == (("GPU 0",), ("GPU 1",))
        assert environment_of(second)["CUDA_VISIBLE_DEVICES"] == "1"
        assert environment_of(second)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        with server(tmp_path, "c", wait=False) as third:
            third.start()
            said = eventually(lambda: waits(third), "it waits")
            assert said.startswith("for 1 GPU; ")
            for llm, device in ((first, "GPU 0"), (second, "GPU 1")):
                pid = llm.status().supervisor_pid
                assert f"{device} held by instance {instance_of(llm)} of user" in said
                assert f"pid {pid}, since " in said
            first.close()
            assert third.wait_ready(HANG_S).devices == ("GPU 0",)
            third.close()


def instance_of(llm: ManagedVLLM) -> str:
    return llm.environ()["MANAGED_VLLM_ATTACH"]


def test_all_or_none(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "a") as first, server(tmp_path, "b", tensor_parallel_size=2, wait=False) as both:
        both.start()
        assert eventually(lambda: waits(both), "it waits").startswith("for 1 of 2 GPUs; GPU 0 held by ")
        with server(tmp_path, "c", wait=False) as later:
            later.start()
            said = eventually(lambda: waits(later), "the one that came later does not pass")
            assert "before us instance " in said
            first.close()
            assert both.wait_ready(HANG_S).devices == ("GPU 0", "GPU 1")
            assert environment_of(both)["CUDA_VISIBLE_DEVICES"] == "0,1"
            assert waits(later)
            both.close()
            later.wait_ready(HANG_S)


def test_an_error_names_who_has_them(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "a", tensor_parallel_size=2) as first:
        with pytest.raises(DevicesBusyError, match="raise wait_for_devices=") as refused:
            server(tmp_path, "b", wait_for_devices=0).start()
        assert isinstance(refused.value, TimeoutError)
        assert len(refused.value.holders) == 1
        assert f"GPU 0, GPU 1 held by instance {instance_of(first)}" in refused.value.holders[0]
        with pytest.raises(DeviceError, match="needs 3 GPUs, and may use GPU 0, GPU 1"):
            server(tmp_path, "c", tensor_parallel_size=3).start()


def test_a_gpu_that_others_use_is_waited_for(gpus: FakeGpus, tmp_path: Path) -> None:
    for index in (0, 1):
        gpus.set(index, used=60_000 * MIB)
    with server(tmp_path, "a", wait=False) as llm:
        llm.start()
        assert "GPU 0 in use by other programs" in eventually(lambda: waits(llm), "it waits")
        gpus.set(1, used=0)
        assert llm.wait_ready(HANG_S).devices == ("GPU 1",)


def test_restarts_keep_the_devices_and_so_does_the_next_supervisor(gpus: FakeGpus, tmp_path: Path) -> None:
    options: dict[str, Any] = {"restart": RestartPolicy(backoff_initial_s=0)}
    with server(tmp_path, "a") as other, server(tmp_path, "b", **options) as llm:
        before = llm.status()
        assert before.devices == ("GPU 1",)
        other.close()
        eventually(lambda: len(directory.instances(Path(os.environ["MANAGED_VLLM_HOME"]))) == 1, "GPU 0 is free")
        sigkill(before.server_pid)
        after = llm.wait_ready(HANG_S, after_epoch=before.epoch)
        assert (after.devices, after.supervisor_pid) == (before.devices, before.supervisor_pid)
        sigkill(after.supervisor_pid)
        eventually(lambda: llm.status().supervisor_pid != after.supervisor_pid, "the next supervisor")
        again = llm.wait_ready(HANG_S)
        assert again.devices == before.devices, "though the first of the pool was free, too"
        assert environment_of(llm)["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_killed_supervisors_device_is_the_next_ones(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "a", tensor_parallel_size=2) as first, server(tmp_path, "b", wait=False) as second:
        second.start()
        eventually(lambda: waits(second), "it waits")
        seen = first.status()
        process = psutil.Process(seen.server_pid)
        sigkill(seen.supervisor_pid)
        second.wait_ready(HANG_S)
        eventually(lambda: not is_live(process), "the first one's server has ended")
        second.close()
        assert first.generate("again")[0].epoch == 2


def test_who_leaves_while_waiting_leaves_nothing(gpus: FakeGpus, tmp_path: Path) -> None:
    with server(tmp_path, "a", tensor_parallel_size=2):
        with server(tmp_path, "b", wait=False) as second:
            second.start()
            eventually(lambda: waits(second), "it waits")
            assert list((tmp_path / "devices").glob("line-*"))
        eventually(lambda: not list((tmp_path / "devices").glob("line-*")), "the ticket is gone")


def test_a_directory_that_can_not_be_used_is_said_so(gpus: FakeGpus, tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices").chmod(0o777)
    with pytest.raises(DeviceError, match="chmod") as refused:
        server(tmp_path, "a").start()
    assert "MANAGED_VLLM_DEVICES_DIR" in refused.value.diagnosis.remedy


def test_cores_where_there_is_no_gpu(gpus: FakeGpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    (tmp_path / "gpus").write_text("null")
    core = min(os.sched_getaffinity(0))
    with server(tmp_path, "a", cores=1) as llm:
        assert llm.status().devices == (f"core {core}",)
        assert environment_of(llm)["VLLM_CPU_OMP_THREADS_BIND"] == str(core)


# -- many --------------------------------------------------------------------------------------------------------------


def supervisors(home: Path) -> list[int]:
    """The supervisors of servers that serve, by their records."""
    records = [instance.read_record() or {} for instance in directory.instances(home)]
    return [record["pid"] for record in records if record.get("state") == ServerState.READY]


def storm(folder: Path, home: Path, *, processes: int, rounds: int, kills: int) -> list[str]:
    """Processes that use four instances over two places, while supervisors are killed; what they have printed."""
    words = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "device_user.py"), str(rounds)]
    orders = json.dumps({"used": str(folder / "used")})
    users = [
        subprocess.Popen([*words, str(seed), orders], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(processes)
    ]
    killer = Killer(home, kills)
    lines: list[str] = []
    try:
        for user in users:
            output, errors = user.communicate(timeout=1500)
            assert user.returncode == 0, errors
            lines += output.splitlines()
    finally:
        killer.end()
        for user in users:
            user.kill()
    # One may have been killed when its last user had just left: its folder waits for the next.
    return lines + [use(number, orders) for number in range(INSTANCES)]


class Killer:
    """Kills supervisors of servers that serve, one after the other, from a thread of its own."""

    def __init__(self, home: Path, kills: int) -> None:
        self._home = home
        self._left = kills
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        order = random.Random(0)
        while self._left and not self._ended.wait(0.3):
            found = supervisors(self._home)
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(order.choice(found or [os.getpid()]))
                if "managed_vllm.supervisor" in " ".join(process.cmdline()):
                    process.kill()
                    self._left -= 1

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def assert_all_served(lines: list[str], uses: int) -> None:
    assert len(lines) == uses
    assert {line.split()[0] for line in lines} == {str(number) for number in range(INSTANCES)}
    assert {line.split(" ", 2)[2] for line in lines} <= {"GPU 0", "GPU 1"}


def test_four_instances_share_two_places(gpus: FakeGpus, home: Path, tmp_path: Path) -> None:
    assert_all_served(storm(tmp_path, home, processes=4, rounds=2, kills=2), 12)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_hundred_rounds_of_eight_processes(gpus: FakeGpus, home: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    lines = storm(tmp_path, home, processes=8, rounds=100, kills=100)
    assert_all_served(lines, 804)
    print(f"{len(lines)} uses in {time.monotonic() - began:.0f} s")
