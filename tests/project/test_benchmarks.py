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
