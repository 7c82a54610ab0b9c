"""What the library costs where a server runs already: attaching, and importing.

    python benchmarks/attach.py                  seconds, and one start of vLLM

What is measured, and the targets, stand in benchmarks/README.md. Everything runs in a state directory of its own, and
every process that is started here is ended here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from managed_vllm import demo
from managed_vllm.config import ServerSpec, installed_vllm
from managed_vllm.instance import cleanup, directory
from managed_vllm.instance.attach import ATTACH_VARIABLE
from managed_vllm.session import ManagedVLLM

STAND_IN = Path(__file__).resolve().parent.parent / "tests" / "helpers" / "standin.py"

ATTACH_MS = 50.0
IMPORT_MS = 50.0


@dataclass
class Result:
    """One line of the table. `values` are the single measurements, `met` is None where there is no target."""

    what: str
    median: float
    unit: str
    values: list[float]
    target: str = ""
    met: bool | None = None


# -- attaching ---------------------------------------------------------------------------------------------------------

_FRESH = """
import sys, time
from managed_vllm.session import ManagedVLLM
import json
options = json.loads(sys.argv[1])
started = time.perf_counter()
with ManagedVLLM(**options):
    print("took", time.perf_counter() - started)
"""


def attaching(options: dict[str, Any], entries: int, processes: int) -> list[Result]:
    """Milliseconds from `ManagedVLLM(...)` to the first line of the `with` block, while the server runs."""
    again, fresh = [], []
    with ManagedVLLM(**options):
        for _ in range(entries):
            started = time.perf_counter()
            with ManagedVLLM(**options):
                again.append((time.perf_counter() - started) * 1000)
        for _ in range(processes):
            words = [sys.executable, "-c", _FRESH, json.dumps(options)]
            said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            fresh.append(float(said.split()[-1]) * 1000)
    results = []
    for what, values in ((f"attach, {entries} times in one process", again), ("attach, first in a process", fresh)):
        if values:
            median = statistics.median(values)
            results.append(Result(what, median, "ms", values, f"≤ {ATTACH_MS:g} ms", median <= ATTACH_MS))
    if "command" in options:
        # A real server's key contains more than the stand-in's: vLLM's version, the model's defaults.
        keys = []
        for _ in range(10):
            started = time.perf_counter()
            ServerSpec.of("demo", engine_args={})
            keys.append((time.perf_counter() - started) * 1000)
        results.append(Result("a real server's key, on top of it", statistics.median(keys), "ms", keys))
    return results


# -- importing ---------------------------------------------------------------------------------------------------------


def importing(rounds: int = 5) -> list[Result]:
    """Milliseconds of `import managed_vllm`, with all that it pulls in; and of the class, for information."""
    package = [_import_ms("import managed_vllm") for _ in range(rounds)]
    median = statistics.median(package)
    session = [_import_ms("from managed_vllm import ManagedVLLM") for _ in range(rounds)]
    return [
        Result("import managed_vllm", median, "ms", package, f"< {IMPORT_MS:g} ms", median < IMPORT_MS),
        Result("from managed_vllm import ManagedVLLM", statistics.median(session), "ms", session),
    ]


def _import_ms(statement: str) -> float:
    words = [sys.executable, "-X", "importtime", "-c", statement]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    # "import time: <self> | <cumulative> | <name, indented by depth>", in microseconds. Ours at the top level only:
    # what they import in turn is in their cumulative time, and what site imports at every start is not ours.
    lines = re.findall(r"^import time: +\d+ \| +(\d+) \| (managed_vllm\S*)$", said, re.MULTILINE)
    return sum(int(cumulative) for cumulative, _ in lines) / 1000


# -- ending ------------------------------------------------------------------------------------------------------------


def wait_until_gone(instance: directory.Instance, timeout_s: float = 60.0) -> None:
    """Until no process and no folder of the instance is left."""
    deadline = time.monotonic() + timeout_s
    while instance.folder.exists() or cleanup.marked_processes(instance):
        if time.monotonic() > deadline:
            raise SystemExit(f"{instance.id} is still there after {timeout_s:g} s")
        time.sleep(0.05)


@contextlib.contextmanager
def own_state_directory() -> Iterator[None]:
    """A state directory for this run, and none of the variables that would lead us to another server."""
    for name in ("VLLM_SERVER_URL", "VLLM_MODEL_NAME", "VLLM_API_KEY", "MANAGED_VLLM_KEEP_ALIVE", ATTACH_VARIABLE):
        os.environ.pop(name, None)
    before = os.environ.get(directory.HOME_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="mvllm-bench-") as folder:
        os.environ[directory.HOME_VARIABLE] = folder
        try:
            yield
        finally:
            for instance in directory.instances(Path(folder)):
                wait_until_gone(instance)
            os.environ.pop(directory.HOME_VARIABLE)
            if before is not None:
                os.environ[directory.HOME_VARIABLE] = before


# -- the table ---------------------------------------------------------------------------------------------------------


def show(results: list[Result]) -> None:
    print()
    print(f"{'':40} {'median':>11}   {'least':>8} {'most':>8}   target")
    for line in results:
        least, most = min(line.values), max(line.values)
        verdict = {True: "met", False: "NOT MET", None: ""}[line.met]
        figures = f"{line.median:8.2f} {line.unit:<2}   {least:8.2f} {most:8.2f}"
        print(f"{line.what:40} {figures}   {line.target} {verdict}".rstrip())


def main() -> None:
    real = demo.weights_path().is_dir() and installed_vllm() != "vllm missing"
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = "demo" if real else "stand-in"
    parser.add_argument("--server", choices=("demo", "stand-in"), default=default, help="default here: %(default)s")
    parser.add_argument("--entries", type=int, default=50, help="how often one process attaches (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=10, help="how many fresh ones do so (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the measurements there, too")
    arguments = parser.parse_args()

    options: dict[str, Any] = {"model": "demo"}
    if arguments.server == "stand-in":
        options = {"model": "stand-in", "command": [sys.executable, str(STAND_IN), "{args}"]}
    machine = {
        "server": arguments.server,
        "vllm": installed_vllm(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
    }
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    with own_state_directory():
        results = attaching({**options, "progress": False, "keep_alive": 0}, arguments.entries, arguments.processes)
        results += importing()
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
