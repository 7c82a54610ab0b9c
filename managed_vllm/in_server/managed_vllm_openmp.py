"""OpenMP in forked processes: thread pools that survive a fork, and the threads and CPUs that vLLM gives a Worker.

libgomp reads its environment when it is loaded, and knows nothing of forks. In a process that was forked after that:

1. A team of threads of the forking thread does not exist in the child, whose next parallel region would wait for it for
   ever. So each fork of a server is preceded by the end of that team (OpenMP 5: `omp_pause_resource_all`); the next
   region makes a new one.
2. vLLM 0.32 sets `OMP_NUM_THREADS` and `GOMP_CPU_AFFINITY` (or `OMP_PLACES`) around the start of a CPU Worker, for a
   Worker that is spawned (`utils/ompmultiprocessing.py`). In a forked one the same is done here: as many threads, each
   on its CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Mapping, Sequence

_PAUSE_HARD = 2
_VARIABLES = ("OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "OMP_PLACES")

_at_load: dict[str, str | None] = {}


def prepare() -> None:
    """Called once, in the image, after torch was imported: from now on forks are safe."""
    _at_load.update(_environment())
    libraries = [ctypes.CDLL(path) for path in _loaded("libgomp")]
    pauses = [library.omp_pause_resource_all for library in libraries if hasattr(library, "omp_pause_resource_all")]

    def end_teams() -> None:
        for pause in pauses:
            pause(_PAUSE_HARD)

    os.register_at_fork(before=end_teams)


def follow_environment() -> None:
    """In a process that was just forked: does what libgomp would have done, had it been loaded only now."""
    asked = _environment()
    if asked == _at_load or "torch" not in sys.modules:
        return
    threads = asked["OMP_NUM_THREADS"]
    if threads is not None and threads.isdigit() and int(threads) > 0:
        sys.modules["torch"].set_num_threads(int(threads))
        cpus = _cpus(asked)
        if cpus:
            _bind(cpus, int(threads))
    _at_load.update(asked)


def _environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in _VARIABLES}


def _cpus(asked: Mapping[str, str | None]) -> list[set[int]]:
    """The CPUs of each thread, in the two forms in which vLLM 0.32 writes them; empty if there is neither."""
    affinity, places = asked["GOMP_CPU_AFFINITY"] or "", asked["OMP_PLACES"] or ""
    if re.fullmatch(r"\d+( \d+)*", affinity):
        return [{int(cpu)} for cpu in affinity.split()]
    if re.fullmatch(r"\{\d+(,\d+)*\}", places):  # one place, in which all threads are
        return [{int(cpu) for cpu in places[1:-1].split(",")}]
    return []


def _bind(cpus: Sequence[set[int]], threads: int) -> None:
    """Starts the team of the calling thread and binds its threads; the caller is the first of them."""
    before = _threads()
    if threads > 1:
        _start_team(threads)
    team = sorted(_threads() - before)
    for number, thread in enumerate(team, start=1):
        _set_affinity(thread, cpus[number % len(cpus)])
    _set_affinity(0, cpus[0])


def _start_team(threads: int) -> None:
    """An empty parallel region: its threads stay for the next one."""
    for path in _loaded("libgomp"):
        if "/torch" in path:
            libgomp, libc = ctypes.CDLL(path), ctypes.CDLL(None)
            libgomp.GOMP_parallel(libc.sched_yield, None, ctypes.c_uint(threads), ctypes.c_uint(0))


def _set_affinity(thread: int, cpus: set[int]) -> None:
    with contextlib.suppress(OSError):  # a CPU that this container may not use: libgomp goes on, too
        os.sched_setaffinity(thread, cpus)


def _threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def _loaded(name: str) -> list[str]:
    """Paths of the shared libraries of this process whose file name begins with `name`."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(None, 5)[5].rstrip("\n") for line in maps if name in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(name))
