"""Rollouts over a Ray cluster: each exactly once, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from counting_world import CountingWorld, tasks
from processes import HANG_S, eventually, is_live
from ray_cluster import HELPERS, RayCluster, ray_cluster

from managed_vllm import ManagedVLLM
from managed_vllm.agent import RunStore, run_on_ray
from managed_vllm.errors import ConfigError

TASKS, N = 32, 2


def test_without_ray_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'managed-vllm\[ray\]'"):
        run_on_ray(tasks(1), lambda: ManagedVLLM("demo"), CountingWorld, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- on a cluster ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="ray is not installed")
    with ray_cluster(nodes=2) as made:
        yield made


class Driver:
    """A driver that plays on the cluster, each worker up to its first resets until `go`; its log as lists of words."""

    def __init__(
        self, cluster: RayCluster, folder: Path, run: str | None = None, count: int = TASKS, **options: Any
    ) -> None:
        self.count = count
        self.run = run or str(folder / "run")
        self.log = folder / "log"
        self.said = folder / f"stderr-{len(list(folder.iterdir()))}"
        self._go = self.said.with_suffix(".go")
        options["go"] = str(self._go)
        words = [cluster.address, self.run, str(self.log), str(count), str(N), json.dumps(options)]
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(HELPERS / "ray_driver.py"), *words],
                env=cluster.environment,
                cwd=cluster.home / "node-0",
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def go(self) -> Driver:
        self._go.touch()
        return self

    def logged(self, what: str) -> list[list[str]]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split()[1:] for line in lines if line.startswith(what)]

    def wait_for_resets_on(self, nodes: set[int], each: int = 3) -> None:
        """Until all of these nodes play, and none of them has come any further."""

        def there() -> bool:
            count = Counter(int(node) for node, _, _ in self.logged("reset"))
            return all(count[node] >= each for node in nodes)

        eventually(there, f"the nodes {nodes} play", 2 * HANG_S)

    def ended(self) -> tuple[int, str]:
        """Exit code and standard error."""
        return self.process.wait(2 * HANG_S), self.said.read_text()

    def assert_ended_well(self) -> None:
        code, err = self.ended()
        assert code == 0, err
        found = json.loads(self.log.with_name("result.json").read_text())
        assert found == [[task.id, rollout, 1.0] for task in tasks(self.count) for rollout in range(N)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def driver(cluster: RayCluster, tmp_path: Path) -> Iterator[Any]:
    """Makes drivers."""
    made: list[Driver] = []

    def make(**options: Any) -> Driver:
        made.append(Driver(cluster, tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.kill()


def assert_each_exactly_once(run: str) -> None:
    with RunStore.open(run) as store:
        oks = Counter(entry.key for entry in store.entries() if entry.ok)
        assert oks == {(task.id, rollout): 1 for task in tasks(TASKS) for rollout in range(N)}
        assert store.duplicates == []
        assert store.damaged == []


@pytest.mark.slow
def test_a_killed_worker_s_rollouts_are_played_by_others_and_each_is_in_the_store_once(driver: Any) -> None:
    playing = driver()
    playing.wait_for_resets_on({0, 1})
    os.kill(int(playing.logged("reset")[-1][1]), signal.SIGKILL)
    playing.go().assert_ended_well()
    assert_each_exactly_once(playing.run)
    servers = {(node, server) for node, _, server in playing.logged("server")}
    assert {node for node, _ in servers} == {"0", "1"}
    assert len(servers) == len({server for _, server in servers}), "no server is that of two nodes"


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along_and_the_next_one_goes_on(driver: Any) -> None:
    killed = driver()
    killed.wait_for_resets_on({0, 1})
    workers = {psutil.Process(int(pid)) for _, pid, _ in killed.logged("reset")}
    killed.kill()
    eventually(lambda: not any(map(is_live, workers)), "Ray has ended the workers")
    driver().go().assert_ended_well()
    assert_each_exactly_once(killed.run)


@pytest.mark.slow
@pytest.mark.soak
def test_a_node_that_dies_costs_no_rollout(cluster: RayCluster, driver: Any) -> None:
    node = cluster.add()
    playing = driver()
    playing.wait_for_resets_on({node}, each=1)
    cluster.lose(node)
    playing.go().assert_ended_well()
    assert_each_exactly_once(playing.run)


@pytest.mark.slow
def test_a_node_without_the_shared_folder_is_named_and_the_others_play_all(driver: Any) -> None:
    playing = driver(run="/proc/self/cwd/run", count=4)  # on each node another one; the driver is on node 0
    told = "all nodes of the cluster must share it"
    eventually(lambda: told in playing.said.read_text(), "the node without it is named", 2 * HANG_S)
    code, err = playing.go().ended()
    assert code == 0, err
    assert {node for node, _, _ in playing.logged("reset")} == {"0"}


@pytest.mark.slow
def test_what_is_wrong_in_every_worker_is_raised_here(driver: Any) -> None:
    failing, unfit = driver(fail="as it was told"), driver(worker_options={"num_gpus": 8})
    code, err = failing.ended()
    assert code == 1
    assert raised(err) == "managed_vllm.errors.ConfigError: as it was told"
    code, err = unfit.ended()
    assert code == 1
    assert "no node of the Ray cluster has what a worker takes: {'CPU': 1, 'GPU': 8}" in raised(err)


def raised(err: str) -> str:
    """What ended a driver: below the last traceback, above what Ray may say of its own end."""
    return next(line for line in reversed(err.splitlines()) if line.startswith("managed_vllm.errors."))
