"""What one supervisor, client, router and store carry; and what breaks first with 10,000 rollouts on 100 nodes.

    python benchmarks/capacity.py                              five minutes; no vLLM is needed
    python benchmarks/capacity.py --quick                      half a minute, with figures that say little
    python benchmarks/capacity.py --page docs/howto/capacity.md --json capacity.json
    python benchmarks/capacity.py --costs capacity.json --file-server 50000 5000    another cluster, same figures

The costs are measured first (`capacity_costs.py`). Then rollouts are played for real, by one process and by several,
and the simulation (`cluster_simulation.py`) says from the costs how long that takes: so far it can be trusted. Then it
says the same of clusters that are not there.

What can't be measured here is given: how long an answer and a step of the environment take (`--model`,
`--environment`), what the file server bears (`--file-server`, `--round-trip`), and the CPU of vLLM's API server for a
turn (`--api-server`; `images.py` measures it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import capacity_costs
import stub_server
from capacity_costs import TURNS, Play
from cluster_simulation import Cluster, Demand, Files, Simulation, Storing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from generated_page import table, with_parts

LINE_KB = 15.6
"""Of an attempt's text, which others read; `stored_runs.py`."""
ANSWER_S = 0.2


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    leases: int = 500
    idle_s: float = 10.0
    requests: int = 4000
    at_once: int = 100
    rounds: int = 40
    checked: int = 96


QUICK = Size(20, 1.0, 200, 10, 3, 8)


@dataclass(frozen=True)
class Case:
    """A small cluster that is there."""

    name: str
    processes: int
    at_once: int
    spread: bool = False


CASES = (
    Case("one process, 16 at once", 1, 16),
    Case("one process, 96 at once", 1, 96),
    Case("three processes, 16 at once each", 3, 16),
    Case("the same, each begins elsewhere", 3, 16, True),
)


# -- measured ----------------------------------------------------------------------------------------------------------


def measured(size: Size) -> dict[str, Any]:
    """All of the costs, by name."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["MANAGED_VLLM_HOME"] = home
        begin = os.getloadavg()[0]
        found: dict[str, Any] = {"cores": os.cpu_count(), "python": platform.python_version()}
        for what, measure in (
            ("storing", lambda: {"storing": _plain(capacity_costs.storing(size.rounds))}),
            ("writers", lambda: {"attempts_per_s": capacity_costs.rates(size.rounds)}),
            ("turns", lambda: capacity_costs.turns(size.at_once)),
            ("requests", lambda: capacity_costs.requests(size.requests)),
            ("leases", lambda: capacity_costs.leases(size.leases, size.idle_s)),
        ):
            began = time.monotonic()
            found |= measure()
            print(f"{what}: measured in {time.monotonic() - began:.0f} s", file=sys.stderr)
        return found | {"load": [begin, os.getloadavg()[0]]}


def _plain(found: dict[str, Storing]) -> dict[str, Any]:
    return {kind: asdict(one) for kind, one in found.items()}


def _machine(costs: dict[str, Any]) -> str:
    begin, end = costs["load"]
    return (
        f"{costs['cores']} cores, Python {costs['python']}, load {begin:.1f} at the beginning and {end:.1f} at the end"
    )


def demand(costs: dict[str, Any], api_server_ms: float) -> Demand:
    """What a rollout asks for, by the costs."""
    kinds = {kind: Storing(**one) for kind, one in costs["storing"].items()}
    return Demand(turn_cpu_ms=costs["turn_cpu_ms"], api_server_ms=api_server_ms, line_kb=LINE_KB, **kinds)


# -- the check ---------------------------------------------------------------------------------------------------------


def checked(costs: dict[str, Any], rollouts: int) -> list[dict[str, Any]]:
    """Each case played for real, and simulated."""
    found = []
    for case in CASES:
        given = Cluster(
            nodes=case.processes,
            at_once=case.at_once,
            rollouts=rollouts * (1 if case.processes == 1 else 2),
            turns=TURNS,
            model_s=ANSWER_S,
            environment_s=0.1,
            files=Files(),
            spread=case.spread,
            constant_model=True,
        )
        played = _played(given)
        foretold = Simulation(given, demand(costs, 0.0)).run()
        found.append(
            {
                "name": case.name,
                "rollouts": given.rollouts,
                "played_s": max(one["seconds"] for one in played),
                "simulated_s": foretold.took_s,
                "played_looks": sum(one["looks"] for one in played),
                "simulated_looks": foretold.looks,
                "load": os.getloadavg()[0],
            }
        )
    return found


def _played(given: Cluster) -> list[dict[str, float]]:
    """By real processes, against one stub of a server."""
    with tempfile.TemporaryDirectory() as folder, stub_server.running(delay_s=ANSWER_S) as address:
        asked = Play(address, given.rollouts, given.at_once, given.environment_s, folder + "/run", given.spread)
        words = [sys.executable, capacity_costs.__file__, "play", json.dumps(vars(asked))]
        playing = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(given.nodes)]
        return [json.loads(one.communicate()[0].splitlines()[-1]) for one in playing]


# -- clusters ----------------------------------------------------------------------------------------------------------


def clusters(given: argparse.Namespace) -> Iterator[tuple[str, Cluster]]:
    """From few nodes to many, and the many with what relieves them, one after the other."""
    operations, megabytes = given.file_server

    def of(nodes: int, **more: Any) -> Cluster:
        return Cluster(
            nodes=nodes,
            at_once=given.at_once,
            rollouts=given.waves * given.at_once * nodes,
            turns=TURNS,
            model_s=given.model,
            environment_s=given.environment,
            files=Files(operations, megabytes, given.round_trip / 1000),
            **more,
        )

    largest, ten = given.nodes, given.nodes // 10
    for nodes in (ten, 3 * ten, largest):
        yield f"{nodes} nodes", of(nodes)
    yield "each begins elsewhere", of(largest, spread=True)
    relieved = of(largest, spread=True, api_servers=2)
    yield "and two API servers a node", relieved
    faster = Files(5 * operations, 5 * megabytes, given.round_trip / 1000)
    yield "and a file server five times as fast", replace(relieved, files=faster)
    tenth = replace(faster, operations_per_s=operations / 2, mb_per_s=megabytes / 2)
    yield f"the same as ten runs of {ten} nodes", replace(of(ten, spread=True, api_servers=2), files=tenth)


def simulated(costs: dict[str, Any], given: argparse.Namespace) -> list[dict[str, Any]]:
    """Each cluster; and how long it takes when nothing has to be waited for."""
    found = []
    for name, cluster in clusters(given):
        at = time.monotonic()
        result = Simulation(cluster, demand(costs, given.api_server)).run()
        print(f"{name}: simulated in {time.monotonic() - at:.0f} s", file=sys.stderr)
        found.append({"name": name, **asdict(result), "ideal_s": _ideal(cluster)})
    return found


def _ideal(cluster: Cluster) -> float:
    nothing = Storing(0.0, 0.0, 0.0, 0.0)
    free = Demand(0.0, 0.0, nothing, nothing, nothing, nothing, nothing, 0.0)
    one = replace(cluster, nodes=1, at_once=cluster.at_once * cluster.nodes, files=Files(), spread=False)
    return Simulation(one, free).run().took_s


# -- the report --------------------------------------------------------------------------------------------------------


def cost_rows(costs: dict[str, Any]) -> list[tuple[str, str]]:
    """What, and what it costs."""
    kinds = {kind: Storing(**one) for kind, one in costs["storing"].items()}
    rows = [
        (
            f"a lease, of the first {costs['leases'] // 5}, and the last of {costs['leases']}",
            f"{costs['lease_first_cpu_ms']:.1f} and {costs['lease_last_cpu_ms']:.1f} ms of the supervisor's",
        ),
        ("a lease, held", f"{costs['lease_idle_cpu_ms_per_s']:.2f} ms a second; {costs['lease_kib']:.0f} KiB"),
        ("a supervisor without them", f"{costs['supervisor_mib']:.0f} MiB"),
        ("a request, in our client", f"{costs['request_cpu_ms']:.2f} ms"),
        *_router_rows(costs),
        ("a turn, in the process that plays it", f"{costs['turn_cpu_ms']:.1f} ms"),
        ("a rollout in flight", f"{costs['episode_kib']:.0f} KiB"),
        *(
            (f"{_NAMES[kind]}", f"{one.cpu_ms:.2f} ms, {one.local_ms:.1f} ms in all; {one.operations:.0f} operations")
            for kind, one in kinds.items()
        ),
        ("an attempt's size", f"{kinds['attempt'].kb:.0f} kB, and {TURNS} screenshots of {kinds['image'].kb:.0f} kB"),
        ("attempts that are stored", ", ".join(_rate(*one) for one in costs["attempts_per_s"].items())),
    ]
    return rows


_NAMES = {
    "claim": "a claim of a rollout",
    "look": "a look at another one's claim",
    "image": "a screenshot, kept and read to be sent",
    "attempt": f"an attempt of {TURNS} turns, stored",
    "refresh": "a look into another writer's log",
}


def _router_rows(costs: dict[str, Any]) -> list[tuple[str, str]]:
    if costs["router_cpu_ms"] is None:
        return [("a request, in the routers", "not measured: vllm-router is not installed")]
    return [
        ("a request, in vllm-router", f"{costs['router_cpu_ms']:.2f} ms"),
        ("a request, in our guard before it", f"{costs['guard_cpu_ms']:.2f} ms"),
        ("a request of 0.8 MB, in our guard", f"{costs['guard_large_cpu_ms']:.1f} ms"),
        ("guard and vllm-router", f"{costs['router_mib']:.0f} MiB"),
    ]


def _rate(writers: str, rate: float) -> str:
    return f"{rate:.0f} a second by {writers} writer{'s' * (writers != '1')}"


def limit_rows(costs: dict[str, Any], given: argparse.Namespace) -> list[tuple[str, ...]]:
    """What one of each carries, by its CPU or its thread, with turns as long as given; its end, and what takes over."""
    turn_s = given.model + given.environment
    kinds = {kind: Storing(**one) for kind, one in costs["storing"].items()}
    operations, megabytes = given.file_server
    rollout = kinds["claim"].operations + TURNS * kinds["image"].operations + kinds["attempt"].operations
    asked_s = rollout / operations + (TURNS * kinds["image"].kb + kinds["attempt"].kb) / 1000 / megabytes
    stored_s = (kinds["claim"].local_ms + kinds["attempt"].local_ms) / 1000

    def carries(what: str, each_s: float, rollout_s: float) -> str:
        return f"{1 / each_s:,.0f} {what} a second: {rollout_s / each_s:,.0f} rollouts at once"

    rows: list[tuple[str, ...]] = [
        (
            "supervisor",
            f"{costs['leases']} leases, of which the last cost {costs['lease_last_cpu_ms']:.0f} ms each",
            "its core: a status names all users, so the more there are the more a further one costs, and a change of "
            "state, which all are told; in the end file descriptors, and further users are refused with that reason",
            "a lease for a process, not for each of its workers; by URL (`base_url=`) none is needed",
        ),
        (
            "client process",
            f"{1000 / costs['request_cpu_ms']:,.0f} requests a second",
            "a core: Python's interpreter lock",
            "more processes, each with a lease of its own",
        ),
        (
            "process that plays",
            carries("turns", costs["turn_cpu_ms"] / 1000, turn_s),
            "the same core",
            "more processes on the node, in one run (`RunStore.join`)",
        ),
        (
            "writer thread, local disk",
            carries("attempts", stored_s, turn_s * TURNS),
            "a process waits for the disk with each attempt",
            "more processes: each writes a log of its own",
        ),
        (
            "API server, turns with images",
            carries("turns", given.api_server / 1000, turn_s),
            "a core of vLLM's API server, which prepares the pictures",
            "`api_server_count=`, or `replicas=`",
        ),
        (
            "file server, without looks",
            carries("rollouts", asked_s, turn_s * TURNS),
            "its operations",
            "a parallel file system, or a run for each group of nodes",
        ),
    ]
    if costs["guard_cpu_ms"] is not None:
        small, large = 1000 / costs["guard_cpu_ms"], 1000 / costs["guard_large_cpu_ms"]
        row = (
            "router in front of replicas",
            f"{small:,.0f} small requests a second, or {large:,.0f} of 0.8 MB",
            "a core of our guard",
            "our clients, which choose for themselves; or a load balancer of yours before several servers",
        )
        rows.insert(2, row)
    return rows


def check_rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            one["name"],
            str(one["rollouts"]),
            f"{one['played_s']:.1f} s",
            f"{one['simulated_s']:.1f} s",
            f"{one['simulated_s'] / one['played_s']:.2f}",
            f"{one['played_looks']:,}",
            f"{one['simulated_looks']:,}",
        )
        for one in found
    ]


CHECK_HEAD = ("", "rollouts", "played in", "simulated", "ratio", "looks, played", "simulated")
CLUSTER_HEAD = (
    "",
    "minutes",
    "at best",
    "all play after",
    "looks",
    "process",
    "writer thread",
    "API servers",
    "file server",
)


def cluster_rows(found: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            one["name"],
            f"{one['took_s'] / 60:.1f}",
            f"{one['ideal_s'] / 60:.1f}",
            "never" if one["filled_s"] is None else f"{one['filled_s']:.0f} s",
            f"{one['looks']:,}",
            *(
                f"{100 * one['loads'][what]:.0f} %"
                for what in ("process", "writer thread", "API servers", "file server")
            ),
        )
        for one in found
    ]


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As columns."""
    widths = [max(len(line[place]) for line in (head, *rows)) for place in range(len(head))]
    for line in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def main() -> int:
    given = _arguments()
    stub_server.raise_open_files()
    size = QUICK if given.quick else Size()
    if given.costs:
        costs = json.loads(given.costs.read_text())
    else:
        costs = measured(size)
        costs["check"] = checked(costs, size.checked)
    if given.json:
        given.json.write_text(json.dumps(costs, indent=2) + "\n")
    found = simulated(costs, given)
    parts: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "costs": (("What", "CPU"), cost_rows(costs)),
        "limits": (("One", "Carries", "Its end", "What takes over"), limit_rows(costs, given)),
        "check": (CHECK_HEAD, check_rows(costs["check"])),
        "clusters": (CLUSTER_HEAD, cluster_rows(found)),
    }
    print(f"{_machine(costs)}\n")
    for head, rows in parts.values():
        show(head, rows)
    if given.page:
        made = {name: table(head, rows) for name, (head, rows) in parts.items()}
        made["machine"] = f"Measured on {_machine(costs)}."
        given.page.write_text(with_parts(given.page.read_text("utf-8"), made), "utf-8")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=float, default=3.0, help="seconds of an answer, in the mean (%(default)s)")
    parser.add_argument("--environment", type=float, default=2.0, help="seconds of a step, in the mean (%(default)s)")
    parser.add_argument("--nodes", type=int, default=100, help="%(default)s")
    parser.add_argument("--at-once", type=int, default=100, help="rollouts at once on a node (%(default)s)")
    parser.add_argument("--waves", type=int, default=2, help="rollouts for each of these places (%(default)s)")
    parser.add_argument(
        "--file-server",
        type=float,
        nargs=2,
        default=(20_000.0, 1000.0),
        metavar=("OPS", "MB"),
        help="what it bears a second (20000 1000)",
    )
    parser.add_argument("--round-trip", type=float, default=0.5, metavar="MS", help="to the file server (%(default)s)")
    parser.add_argument(
        "--api-server", type=float, default=59.0, metavar="MS", help="its CPU for a turn with images (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="measure little")
    parser.add_argument("--costs", type=Path, metavar="FILE", help="figures of another run, in place of measuring")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="write the tables into this page, between its markers"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
