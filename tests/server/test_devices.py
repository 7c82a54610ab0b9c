"""What `devices="auto"` may take: the GPUs or cores that the starter has, how many, and how the server is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fake_gpus
import pytest
from fake_gpus import MIB, FakeGpus

from managed_vllm import ManagedVLLM, variables
from managed_vllm.config import ServerSpec
from managed_vllm.errors import ConfigError
from managed_vllm.server import devices


@pytest.fixture(autouse=True)
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*variables.DEVICE_VARIABLES, "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    found = fake_gpus.installed(tmp_path, monkeypatch)
    found.are(4)
    return found


@pytest.fixture
def no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.installed(tmp_path, monkeypatch)
    (tmp_path / "gpus").write_text("null")


def spec(cores: int | None = None, **engine_args: Any) -> ServerSpec:
    return ServerSpec.of("m", engine_args=engine_args, command=["x", "{port}"], devices="auto", cores=cores)


def labels(pool: devices.Pool) -> list[str]:
    return [device.label for device in pool.devices]


# -- GPUs --------------------------------------------------------------------------------------------------------------


def test_a_gpu_for_each_worker(gpus: FakeGpus) -> None:
    assert devices.pool(spec()).wanted == 1
    pool = devices.pool(spec(tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=3))
    assert (pool.kind, pool.wanted) == ("GPU", 12)
    assert devices.pool(spec(data_parallel_size=8, data_parallel_size_local=2)).wanted == 2
    assert labels(pool) == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]


def test_the_server_is_told_by_indices_in_the_order_of_the_bus(gpus: FakeGpus) -> None:
    pool = devices.pool(spec(tensor_parallel_size=2))
    told = pool.variables([pool.devices[3].place, pool.devices[1].place])
    assert told == {"CUDA_VISIBLE_DEVICES": "1,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("2,0", ["GPU 2", "GPU 0"]),
        ("GPU-00000003,1", ["GPU 3", "GPU 1"]),
        ("1,-1,2", ["GPU 1"]),  # as CUDA reads it
        ("1,1", ["GPU 1"]),
        ("7", []),
        ("GPU-0000000", []),  # the beginning of several
    ],
)
def test_only_those_that_the_starter_sees(
    gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch, visible: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = devices.visible_gpus(spec().cuda_devices)
    assert [device.label for device in found or []] == seen


def test_who_named_uuids_gets_uuids(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000003,GPU-00000001")
    pool = devices.pool(spec())
    assert pool.variables([pool.devices[0].place])["CUDA_VISIBLE_DEVICES"] == "GPU-00000003"
    assert pool.devices[0].place == "GPU-00000003-aaaa", "the place goes by the whole UUID"


def test_those_that_a_cgroup_hides_are_none(gpus: FakeGpus) -> None:
    gpus.set(0, hidden=True)
    assert labels(devices.pool(spec())) == ["GPU 1", "GPU 2", "GPU 3"]


def test_parts_of_a_divided_gpu_are_devices_of_their_own(gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.set(0, parts=["MIG-1111", "MIG-2222"])
    pool = devices.pool(spec())
    assert [device.place for device in pool.devices[:3]] == ["MIG-1111", "MIG-2222", "GPU-00000001-aaaa"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2222,MIG-1111")
    assert [device.word for device in devices.pool(spec()).devices] == ["MIG-2222", "MIG-1111"]
    assert len(devices.pool(spec(tensor_parallel_size=2)).devices) == 1, "CUDA gives one part to a process"


def test_one_whose_memory_is_in_use_is_not_free(gpus: FakeGpus) -> None:
    gpus.set(1, used=500 * MIB)  # a desktop, an idle context
    gpus.set(2, used=9000 * MIB)
    assert [devices.is_free(device.place) for device in devices.pool(spec()).devices] == [True, True, False, True]


def test_a_vllm_for_gpus_gets_none_where_there_are_none(no_gpus: None) -> None:
    asked = ServerSpec.from_dict({**spec().to_dict(), "command": None, "vllm": "vllm 0.32.0"})
    pool = devices.pool(asked)
    assert (pool.kind, list(pool.devices)) == ("GPU", [])


# -- cores -------------------------------------------------------------------------------------------------------------


def test_cores_where_there_is_no_gpu(no_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_cores", lambda: [3, 4, 5, 6, 7])
    pool = devices.pool(spec())
    assert (pool.kind, pool.wanted, labels(pool)[0]) == ("core", 5, "core 3")
    assert devices.pool(spec(tensor_parallel_size=2)).wanted == 4
    pool = devices.pool(spec(cores=2, tensor_parallel_size=2))
    assert pool.wanted == 4
    told = pool.variables(["core-7", "core-3", "core-4", "core-6"])
    assert told == {"VLLM_CPU_OMP_THREADS_BIND": "3,4|6,7"}


def test_a_vllm_for_cpus_takes_cores_beside_gpus(gpus: FakeGpus) -> None:
    asked = ServerSpec.from_dict({**spec().to_dict(), "vllm": "vllm-cpu 0.32.0"})
    assert devices.pool(asked).kind == "core"


def test_no_more_cores_than_the_cgroup_has_the_quota_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(reversed(range(64))))
    assert devices.usable_cores(tmp_path) == list(range(64))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert len(devices.usable_cores(tmp_path)) == 64
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert devices.usable_cores(tmp_path) == [0, 1]
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert devices.usable_cores(tmp_path) == [0]
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert len(devices.usable_cores(tmp_path)) == 3


# -- asking ------------------------------------------------------------------------------------------------------------


def test_it_is_a_part_of_what_is_shared() -> None:
    plain = ServerSpec.of("m", engine_args={}, command=["x", "{port}"])
    assert len({plain.key, spec().key, spec(cores=1).key, spec(cores=2).key}) == 4
    assert plain.differences(spec()) == {"devices": (None, "auto")}
    assert ServerSpec.from_dict(spec(cores=2).to_dict()) == spec(cores=2)


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"devices": "0,1"}, "devices", "CUDA_VISIBLE_DEVICES"),
        ({"devices": 2}, "devices", "'auto' or None"),
        ({"cores": 2}, "cores", "devices='auto'"),
        ({"devices": "auto", "cores": 0}, "cores", "1 or more"),
        ({"devices": "auto", "cores": True}, "cores", "whole number"),
        ({"devices": "auto", "nnodes": 2}, "devices", "this machine"),
        ({"devices": "auto", "distributed_executor_backend": "ray"}, "devices", "Ray"),
        ({"devices": "auto", "env": {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}}, "devices", "VLLM_CPU_OMP_THREADS_BIND"),
        ({"devices": "auto", "wait_for_devices": -1}, "wait_for_devices_s", "0 or more"),
    ],
)
def test_what_is_wrong_or_contradicts_itself_is_refused(options: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        ManagedVLLM("m", command=["x", "{port}"], **options)
    assert refused.value.field == field


def test_not_for_a_server_that_somebody_else_runs() -> None:
    with pytest.raises(ConfigError, match="devices="):
        ManagedVLLM(base_url="http://127.0.0.1:1", devices="auto")
    with pytest.raises(ConfigError, match="model="):
        ManagedVLLM(devices="auto")
