"""Several servers of one instance: started, watched and ended as one, each with what is its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gpus
import psutil
import pytest
import standin
from free_ports import free_port
from processes import INSTANT, eventually, is_live

from managed_vllm import ManagedVLLM, RestartPolicy, ServerState, ServerStatus
from managed_vllm.config import Address, ServerSpec, SupervisorOrder
from managed_vllm.errors import ConfigError, StartupError
from managed_vllm.instance import cleanup
from managed_vllm.instance.directory import Instance
from managed_vllm.policies import SupervisionPolicy
from managed_vllm.server import devices
from managed_vllm.server.device_claim import DeviceClaim


def handle(count: int = 2, *, orders: dict[str, Any] | None = None, **arguments: Any) -> ManagedVLLM:
    env = standin.orders(**(orders or {}))
    return ManagedVLLM(
        "stand-in", command=standin.command(), env=env, replicas=count, keep_alive=INSTANT, progress=False, **arguments
    )


@pytest.fixture
def llm(home: Path) -> Iterator[ManagedVLLM]:
    with handle() as entered:
        yield entered


def all_ready(llm: ManagedVLLM, *, after: int = 0) -> ServerStatus | None:
    """The status once every replica serves, in a life later than `after`; None before."""
    status = llm.status()
    return status if all(one.state is ServerState.READY and one.epoch > after for one in status.replicas) else None


def life_of(one: ServerStatus) -> tuple[object, ...]:
    """What stays as it is as long as a server lives."""
    return one.state, one.epoch, one.server_pid, one.connection, one.restarts


def test_each_has_what_is_its_own(llm: ManagedVLLM, home: Path) -> None:
    status = llm.status()
    assert status.state is ServerState.READY
    assert [one.state for one in status.replicas] == [ServerState.READY] * 2
    assert sorted(one.epoch for one in status.replicas) == [1, 2]
    assert status.epoch == 2
    urls = {one.connection.base_url for one in status.replicas if one.connection}
    assert len(urls) == len({one.server_pid for one in status.replicas}) == 2
    folder = home / str(llm.id)
    assert [one.log_path for one in status.replicas] == [str(folder / f"server-{number}.log") for number in range(2)]
    assert all(Path(str(one.log_path)).stat().st_size for one in status.replicas)
    assert [one.users for one in status.replicas] == [0, 0]
    assert status.users == 1


def test_one_that_is_killed_comes_back_beside_the_other(llm: ManagedVLLM) -> None:
    before = llm.status()
    kept, lost = before.replicas
    states = set()
    os.kill(lost.server_pid or 0, signal.SIGKILL)

    def back() -> ServerStatus | None:
        status = llm.status()
        states.add(status.state)
        one = status.replicas[1]
        return status if one.epoch > before.epoch and one.state is ServerState.READY else None

    after = eventually(back, "the replica is back")
    assert states == {ServerState.READY}
    assert life_of(after.replicas[0]) == life_of(kept)
    assert after.epoch == after.replicas[1].epoch == 3
    assert (after.restarts, after.replicas[1].restarts) == (1, 1)


def test_a_restart_is_one_of_each(llm: ManagedVLLM) -> None:
    before = llm.status()
    llm.restart()
    after = eventually(lambda: all_ready(llm, after=before.epoch), "both are back")
    assert sorted(one.epoch for one in after.replicas) == [3, 4]
    assert after.restarts == 0


def test_one_that_gives_up_leaves_the_others_and_comes_back_when_asked(home: Path) -> None:
    with handle(restart=RestartPolicy(max_restarts=0)) as llm:
        before = llm.status()
        os.kill(before.replicas[1].server_pid or 0, signal.SIGKILL)

        def given_up() -> ServerStatus | None:
            status = llm.status()
            return status if status.replicas[1].state is ServerState.FAILED else None

        found = eventually(given_up, "it has given up")
        assert found.state is ServerState.READY
        assert found.replicas[1].diagnosis is not None
        assert Path(str(found.replicas[1].log_path)).parent == home / "failed"
        llm.restart()
        eventually(lambda: all_ready(llm, after=before.epoch), "both are back")


def test_all_that_have_given_up_are_the_end(home: Path) -> None:
    seen: list[ServerStatus] = []
    with handle(restart=RestartPolicy(max_restarts=0), on_status=seen.append) as llm:
        for one in llm.status().replicas:
            os.kill(one.server_pid or 0, signal.SIGKILL)
        failed = eventually(lambda: [one for one in seen if one.state is ServerState.FAILED], "the instance has failed")
    assert [one.state for one in failed[0].replicas] == [ServerState.FAILED] * 2
    assert failed[0].diagnosis is not None
    assert failed[0].connection is None


def test_a_start_that_fails_is_told_once(home: Path) -> None:
    llm = handle(orders={"exit": 3})
    with pytest.raises(StartupError) as caught:
        llm.start()
    assert caught.value.diagnosis is not None
    llm.close()


def test_a_killed_supervisor_leaves_its_successor_all_of_them(llm: ManagedVLLM) -> None:
    before = llm.status()
    old = [psutil.Process(one.server_pid) for one in before.replicas]
    os.kill(before.supervisor_pid or 0, signal.SIGKILL)
    eventually(lambda: llm.status().supervisor_pid != before.supervisor_pid, "another supervisor")
    after = eventually(lambda: all_ready(llm, after=before.epoch), "both are back")
    assert sorted(one.epoch for one in after.replicas) == [3, 4]
    assert not [process for process in old if is_live(process)]


def test_the_processes_of_one_are_told_from_those_of_the_other(llm: ManagedVLLM, home: Path) -> None:
    instance = Instance(home, str(llm.id))
    status = llm.status()
    for number, one in enumerate(status.replicas):
        found = {process.pid for process in cleanup.marked_processes(instance.of_replica(number))}
        assert one.server_pid in found
        assert status.replicas[1 - number].server_pid not in found
    everything = {process.pid for process in cleanup.marked_processes(instance)}
    assert {one.server_pid for one in status.replicas} <= everything


def test_everybody_else_is_served_by_the_router(llm: ManagedVLLM) -> None:
    status = llm.status()
    assert status.router is not None
    assert status.connection is not None
    assert status.router.ready
    assert status.connection.base_url == status.router.base_url
    assert status.connection.base_url not in {one.connection.base_url for one in status.replicas if one.connection}
    os.kill(status.router.pid or 0, signal.SIGKILL)

    def again() -> bool:
        router = llm.status().router
        return router is not None and router.ready and router.restarts > 0

    eventually(again, "the router is back")
    after = llm.status()
    assert after.connection == status.connection
    assert list(map(life_of, after.replicas)) == list(map(life_of, status.replicas))


def test_the_address_that_is_asked_for_is_the_routers(home: Path) -> None:
    port = free_port()
    with handle(port=port) as llm:
        connection = llm.status().connection
        assert connection is not None
        assert connection.base_url == f"http://127.0.0.1:{port}/v1"
        with handle(port=port) as other:
            assert other.id == llm.id


def test_what_is_made_of_the_engines_is_made_of_all_and_stays(home: Path) -> None:
    with handle(restart=RestartPolicy(max_restarts=0)) as llm:
        llm.engine.pause()
        before = llm.status()
        assert [one.engine.paused for one in before.replicas] == ["keep", "keep"]
        os.kill(before.replicas[0].server_pid or 0, signal.SIGKILL)
        eventually(lambda: llm.status().replicas[0].state is ServerState.FAILED, "it has given up")
        assert llm.engine.is_paused()
        os.kill(before.supervisor_pid or 0, signal.SIGKILL)
        eventually(lambda: llm.status().supervisor_pid != before.supervisor_pid, "another supervisor")
        after = eventually(lambda: all_ready(llm, after=before.epoch), "both are back")
        assert [one.engine.paused for one in after.replicas] == ["keep", "keep"]
        llm.engine.resume()
        assert [one.engine.paused for one in llm.status().replicas] == [None, None]


def test_one_that_had_given_up_comes_back_as_the_others_are(home: Path) -> None:
    with handle(restart=RestartPolicy(max_restarts=0)) as llm:
        before = llm.status()
        os.kill(before.replicas[0].server_pid or 0, signal.SIGKILL)
        eventually(lambda: llm.status().replicas[0].state is ServerState.FAILED, "it has given up")
        llm.engine.pause()
        llm.restart()
        after = eventually(lambda: all_ready(llm, after=before.epoch), "both are back")
        assert [one.engine.paused for one in after.replicas] == ["keep", "keep"]
        llm.engine.resume()
        assert [one.engine.paused for one in llm.status().replicas] == [None, None]


def test_one_that_had_given_up_is_begun_once_however_often_a_restart_is_asked_for(home: Path) -> None:
    with handle(restart=RestartPolicy(max_restarts=0)) as llm, handle(name="other") as other:
        before = llm.status()
        os.kill(before.replicas[0].server_pid or 0, signal.SIGKILL)
        eventually(lambda: llm.status().replicas[0].state is ServerState.FAILED, "it has given up")
        asking = [threading.Thread(target=one.restart) for one in (llm, other, llm)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        after = eventually(lambda: all_ready(llm, after=before.epoch), "both are back")
        pids = {one.server_pid for one in after.replicas}
        # The processes of a server that has just been ended may still be there.
        eventually(lambda: servers(Instance(home, str(llm.id))) == pids, "there is one of each")
        assert {one.server_pid for one in llm.status().replicas} == pids


def servers(instance: Instance) -> set[int]:
    """The pids of an instance's servers."""
    found = set()
    for process in cleanup.marked_processes(instance):
        with contextlib.suppress(psutil.Error):  # it ends at this moment
            if "standin.py" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def test_the_record_has_all_of_them(llm: ManagedVLLM, home: Path) -> None:
    record = Instance(home, str(llm.id)).read_record() or {}
    pids = [one.server_pid for one in llm.status().replicas]
    assert [one["server_pid"] for one in record["replicas"]] == pids
    assert len({one["scratch"] for one in record["replicas"]}) == 2


def test_what_several_can_not_have() -> None:
    with pytest.raises(ConfigError, match="uds"):
        handle(uds=True).start()
    with pytest.raises(ConfigError, match="share"):
        handle(devices="auto", share="sleep").start()
    for wrong in (0, -1, 65, True, "2", 1.5):
        with pytest.raises(ConfigError, match="replicas") as caught:
            ManagedVLLM("stand-in", command=standin.command(), replicas=wrong)  # type: ignore[arg-type]
        assert caught.value.field == "replicas"
    with pytest.raises(ConfigError, match="replicas"):
        ManagedVLLM(replicas=2)


def spec(count: int, **arguments: Any) -> ServerSpec:
    return ServerSpec.of("model", engine_args=arguments, command=["server", "{args}"], replicas=count)


def test_how_many_is_a_part_of_the_identity() -> None:
    assert spec(1).key == ServerSpec.of("model", engine_args={}, command=["server", "{args}"]).key
    assert len({spec(count).key for count in (1, 2, 3)}) == 3
    assert spec(2).differences(spec(3)) == {"replicas": (2, 3)}
    assert ServerSpec.from_dict(spec(3).to_dict()) == spec(3)


# -- devices -----------------------------------------------------------------------------------------------------------


def share(spec: ServerSpec, home: Path, replica: int) -> tuple[Any, dict[str, str]]:
    order = SupervisorOrder(spec=spec, address=Address(), policy=SupervisionPolicy())
    claim = DeviceClaim(order, Instance(home, "model-0123456789", replica), None)
    refused = asyncio.run(claim.take(lambda _: None))
    return refused, dict(claim.taken.variables)


@pytest.mark.parametrize(("replica", "cores"), [(0, "0,1|2,3"), (1, "4,5|6,7")])
def test_cores_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replica: int, cores: str) -> None:
    fake_gpus.installed(tmp_path, monkeypatch)
    (tmp_path / "gpus").write_text("null")
    monkeypatch.setattr(devices, "usable_cores", lambda: list(range(9)))
    refused, variables = share(spec(2, tensor_parallel_size=2), tmp_path, replica)
    assert refused is None
    assert variables == {devices.BOUND_CORES: cores}


def test_cores_are_shared_where_they_are_too_few_or_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.installed(tmp_path, monkeypatch)
    (tmp_path / "gpus").write_text("null")
    monkeypatch.setattr(devices, "usable_cores", lambda: [0])
    assert share(spec(2), tmp_path, 1) == (None, {})
    monkeypatch.setattr(devices, "usable_cores", lambda: [0, 1])
    bound = ServerSpec.of(
        "model", engine_args={}, command=["server", "{args}"], replicas=2, env={devices.BOUND_CORES: "0-1"}
    )
    assert share(bound, tmp_path, 1) == (None, {})


def test_gpus_are_divided_and_must_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus.installed(tmp_path, monkeypatch).are(4)
    refused, variables = share(spec(2, tensor_parallel_size=2), tmp_path, 1)
    assert (refused, variables["CUDA_VISIBLE_DEVICES"]) == (None, "2,3")
    refused, variables = share(spec(3, tensor_parallel_size=2), tmp_path, 1)
    assert refused is not None
    assert "6 GPUs" in refused.summary
    assert variables == {}
