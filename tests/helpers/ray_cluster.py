"""A Ray cluster of several nodes on this machine, on loopback only; as a program it is the cluster: `ray_cluster.py`.

Each node has a state directory of its own (`MANAGED_VLLM_HOME`), so that its workers share a server that is its own,
and the variable `NODE`, its number. The program is told what to do by lines on its standard input; at its end nothing
of the cluster is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from processes import HANG_S, eventually

HELPERS = Path(__file__).resolve().parent
OBJECT_STORE_BYTES = 75 << 20
"""The least that Ray takes."""


class RayCluster:
    """`environment` is for drivers; `home/node-<number>` is where a node's workers begin, with its state directory."""

    def __init__(self, process: subprocess.Popen[str], home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment
        self._process = process
        self.address = self._told()["address"]

    def add(self) -> int:
        """One more node; its number."""
        return int(self._asked("add")["node"])

    def lose(self, node: int) -> None:
        """The node's raylet dies by SIGKILL."""
        self._asked(f"lose {node}")

    def _asked(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise AssertionError("the cluster has ended")


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[RayCluster]:
    """At the end no process and no shared memory of it may be left."""
    with tempfile.TemporaryDirectory(prefix="mvr-") as folder:  # a short path: there are Unix sockets below it
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(HELPERS)]),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "1000",  # a dead node is seen after five failures
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what it does there: no address but that of loopback
        }
        words = [sys.executable, str(HELPERS / "ray_cluster.py"), folder, str(nodes)]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                yield RayCluster(process, Path(folder), environment)
            finally:
                process.communicate()
        assert process.returncode == 0
        eventually(lambda: not left_of(folder), "nothing is left of the cluster")


def left_of(folder: str) -> list[str]:
    """Processes that have the cluster's folder in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
    return found


def main(home: Path, count: int) -> None:
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster()
    nodes: list[Any] = []

    def add() -> None:
        folder = home / f"node-{len(nodes)}"
        folder.mkdir()
        os.chdir(folder)
        variables = {"NODE": str(len(nodes)), "MANAGED_VLLM_HOME": str(folder / "home")}
        nodes.append(
            cluster.add_node(
                wait=False,
                num_cpus=1,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                include_log_monitor=False,
                node_ip_address="127.0.0.1",
                env_vars=variables,
            )
        )
        cluster.wait_for_nodes(timeout=HANG_S)

    for _ in range(count):
        add()
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["add"]:
                add()
                print(json.dumps({"node": len(nodes) - 1}), flush=True)
            case ["lose", number]:
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
                print(json.dumps({}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
