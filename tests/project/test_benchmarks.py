"""The benchmarks: they are run by hand, so a test sees to it that each still fits the package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_each_benchmark_can_be_imported_and_is_in_the_readme() -> None:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    run = subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], cwd=BENCHMARKS, stderr=subprocess.PIPE)
    assert run.returncode == 0, run.stderr.decode()
    readme = (BENCHMARKS / "README.md").read_text()
    assert [name for name in names if f"{name}.py" not in readme] == []


SHORT_OF_FILES = """
from cluster_simulation import Cluster, Demand, Files, Simulation, Storing
nothing, image = Storing(0, 0, 0, 0), Storing(10, 0, 0, 0)
demand = Demand(0, 0, nothing, nothing, image, nothing, nothing, 0)
given = Cluster(3, 10, 60, 5, 0.1, 0.1, Files(100, 1, 0))
found = Simulation(given, demand).run()
print(60 * 5 * 10 / 100, found.took_s, found.loads["file server"])
"""


def test_a_simulated_cluster_is_as_slow_as_the_file_server_that_it_is_short_of() -> None:
    run = subprocess.run([sys.executable, "-c", SHORT_OF_FILES], cwd=BENCHMARKS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    work_s, took_s, load = map(float, run.stdout.split())
    assert work_s <= took_s <= 1.1 * work_s, "it is never idle while something is asked of it"
    assert 0.9 < load <= 1.1, "what is asked before the last claim is done soon after"
