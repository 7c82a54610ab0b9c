"""What a lease, a request, a turn, an attempt, a claim cost, measured on this machine; for `capacity.py`.

CPU is that of the process named, by the kernel's count; memory is PSS, so that what processes share counts once. What
is measured of a process is measured in one of its own: `python benchmarks/capacity_costs.py PART …` prints it as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import router
import stored_runs
import stub_server
from client_memory import distinct, screenshot
from cluster_simulation import Storing
from many_rollouts import Showing
from several_servers import ROUTER, routed

from managed_vllm import AsyncVLLMClient, ManagedVLLM
from managed_vllm.agent import (
    AgentFormat,
    ImageStore,
    Limits,
    RetryRollouts,
    RunStore,
    StepResult,
    StreamingTaskScheduler,
    Task,
)
from managed_vllm.agent.actions import Action, ParsedResponse, Wait
from managed_vllm.agent.prompting import Chat
from managed_vllm.agent.tasks import begun_at

STAND_IN = Path(__file__).resolve().parent.parent / "tests" / "helpers" / "standin.py"
TURNS = stored_runs.TURNS
IN_VIEW = 5
DRAWN = 8
_OTHERS = 9
_TIMES = {"claim": 1, "look": 1, "image": TURNS, "attempt": 1, "refresh": 1 + _OTHERS}
"""Kinds of accesses to the store, and how many there are in a round: a refresh counts for each writer that is read."""


def part(*words: object) -> Any:
    """What a process of its own has measured."""
    done = subprocess.run([sys.executable, __file__, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_s(*processes: psutil.Process) -> float:
    """Seconds of CPU that they have had so far."""
    return float(sum(spent.user + spent.system for spent in (process.cpu_times() for process in processes)))


# -- leases ------------------------------------------------------------------------------------------------------------


def leases(number: int, idle_s: float) -> dict[str, float]:
    """Of the supervisor: the first fifth of many leases that one process takes one after the other, the last fifth, and
    all of them while they are only held."""
    words = [sys.executable, str(STAND_IN), "{args}"]
    handles = [ManagedVLLM("stand-in", command=words, keep_alive=0) for _ in range(number + 1)]
    with handles[0] as first, contextlib.ExitStack() as stack:
        supervisor = psutil.Process(first.status().supervisor_pid or 0)
        memory = supervisor.memory_full_info().pss
        fifths = []
        for begin in range(1, number + 1, number // 5):
            cpu = cpu_s(supervisor)
            for handle in handles[begin : begin + number // 5]:
                stack.enter_context(handle)
            fifths.append((cpu_s(supervisor) - cpu) * 1000 / (number // 5))
        more = supervisor.memory_full_info().pss - memory
        users = first.status().users
        assert users == number + 1, users
        idle = cpu_s(supervisor)
        time.sleep(idle_s)
        held = cpu_s(supervisor) - idle
    return {
        "leases": number,
        "lease_kib": more / 1024 / number,
        "lease_first_cpu_ms": fifths[0],
        "lease_last_cpu_ms": fifths[-1],
        "lease_idle_cpu_ms_per_s": 1000 * held / idle_s / (number + 1),
        "supervisor_mib": memory / 2**20,
    }


# -- requests ----------------------------------------------------------------------------------------------------------


async def _ours(address: str, number: int) -> float:
    """Milliseconds of the client's CPU for each, 256 at once."""
    places = asyncio.Semaphore(256)
    async with AsyncVLLMClient(address, None, stub_server.MODEL) as client:

        async def one() -> None:
            async with places:
                await client.generate("hi", {"max_tokens": 30, "logprobs": 0})

        await one()
        began = time.process_time()
        await asyncio.gather(*(one() for _ in range(number)))
        return (time.process_time() - began) * 1000 / number


async def _theirs(address: str, body: bytes, number: int) -> None:
    """Others' requests, 32 at once, of 64 sessions."""
    headers = {"Authorization": f"Bearer {router.KEY}", "Content-Type": "application/json"}
    places = asyncio.Semaphore(32)
    async with aiohttp.ClientSession() as session:

        async def one(each: int) -> None:
            sticky = {**headers, "X-Session-ID": str(each % 64)}
            async with places, session.post(f"{address}/v1/chat/completions", data=body, headers=sticky) as response:
                await response.read()
                assert response.status == 200, await response.text()

        await asyncio.gather(*map(one, range(number)))


@contextlib.asynccontextmanager
async def _children() -> AsyncIterator[Callable[[], list[psutil.Process]]]:
    """The processes that have been started meanwhile."""
    before = set(psutil.Process().children(recursive=True))
    yield lambda: [each for each in psutil.Process().children(recursive=True) if each not in before]


async def _routers(addresses: list[str], number: int) -> dict[str, float]:
    """CPU per request of vllm-router alone, and of our guard before it; of the guard for bodies that go past it."""
    small, large = router.bodies()["small"], router.bodies()["0.8 MB"]
    found: dict[str, float] = {}

    async def of(name: str, address: str, body: bytes, processes: list[psutil.Process], number: int) -> None:
        await _theirs(address, body, 32)
        before = cpu_s(*processes)
        await _theirs(address, body, number)
        found[name] = (cpu_s(*processes) - before) * 1000 / number

    async with _children() as started:
        with routed(addresses) as address:
            await of("router_cpu_ms", address, small, started(), number)
    async with _children() as started, router.fronted(addresses) as address:
        guard = [each for each in started() if "managed_vllm.server.front" in each.cmdline()]
        assert guard
        await of("guard_cpu_ms", address, small, guard, number)
        await of("guard_large_cpu_ms", address, large, guard, number // 8)
        found["router_mib"] = sum(each.memory_full_info().pss for each in started()) / 2**20
    return found


def requests(number: int) -> dict[str, float | None]:
    """Of the client; and of the routers that a request may pass."""
    names = ("router_cpu_ms", "guard_cpu_ms", "guard_large_cpu_ms", "router_mib")
    with stub_server.running() as one, stub_server.running() as other:
        ours = asyncio.run(_ours(one, number))
        routers = asyncio.run(_routers([one, other], number)) if ROUTER.exists() else {}
    return {"request_cpu_ms": ours, **dict.fromkeys(names), **routers}


# -- what a process plays ----------------------------------------------------------------------------------------------


class Slow(Showing):
    """A step takes its time, exponentially distributed."""

    def __init__(self, drawn: list[bytes], mean_s: float) -> None:
        super().__init__(drawn, TURNS, [])
        self._mean_s = mean_s

    async def step(self, action: Action) -> StepResult:
        await asyncio.sleep(random.expovariate(1 / self._mean_s) if self._mean_s else 0)
        return await super().step(action)


@dataclass(frozen=True)
class Play:
    """What a process is to play. `run`: with others into a run; None: nothing is stored but screenshots."""

    address: str
    rollouts: int
    at_once: int
    environment_s: float
    run: str | None = None
    spread: bool = False


async def _scheduled(asked: Play, drawn: list[bytes], images: ImageStore, store: RunStore | None) -> int:
    tasks = [Task(str(number)) for number in range(asked.rollouts)]
    if asked.spread:
        tasks = begun_at(tasks, random.random())
    async with AsyncVLLMClient(asked.address, None, stub_server.MODEL, media_ids=True) as client:
        scheduler = StreamingTaskScheduler(
            client,
            lambda: Slow(drawn, asked.environment_s),
            max_concurrency=asked.at_once,
            sampling_params={"max_tokens": 30},
            limits=Limits(max_steps=TURNS + 1, max_images=IN_VIEW),
            agent=AgentFormat(Chat(), lambda answer, size: ParsedResponse("", (Wait(),))),
            retry=RetryRollouts(max_attempts=1),
            **({"images": images} if store is None else {"store": store}),
        )
        turns = 0
        async for trajectory in scheduler.run(tasks):
            assert trajectory.ok, trajectory.failure
            turns += len(trajectory.steps)
        return turns


def play(asked: Play) -> dict[str, float]:
    """Plays: seconds, CPU, turns, looks at others' claims, and the most of this process's PSS above the start's."""
    looks = 0
    drawn = [screenshot(seed) for seed in range(DRAWN)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        store = None if asked.run is None else stack.enter_context(RunStore.join(asked.run))
        if store is not None:
            claimed = store.claim

            def claim(task_id: str, rollout: int) -> Any:
                nonlocal looks
                found = claimed(task_id, rollout)
                looks += found[0].name == "HELD"
                return found

            store.claim = claim  # type: ignore[method-assign]
        before, most = _pss(), 0.0
        began, cpu = time.monotonic(), time.process_time()

        async def watched() -> int:
            nonlocal most
            playing = asyncio.create_task(_scheduled(asked, drawn, ImageStore(Path(folder) / "images"), store))
            while not playing.done():
                most = max(most, _pss() - before) if asked.run is None else 0.0
                await asyncio.wait({playing}, timeout=1)
            return playing.result()

        turns = asyncio.run(watched())
        seconds, spent = time.monotonic() - began, time.process_time() - cpu
    return {"turns": turns, "seconds": seconds, "cpu_s": spent, "looks": looks, "memory_kib": most / 1024}


def _pss() -> float:
    return float(psutil.Process().memory_full_info().pss)


def turns(at_once: int) -> dict[str, float]:
    """A turn with five screenshots of 1080p in view, and the memory that an episode holds while all of them wait."""
    with stub_server.running(delay_s=1) as address:
        found = part("play", json.dumps(vars(Play(address, at_once, at_once, 0.0))))
    return {"turn_cpu_ms": 1000 * found["cpu_s"] / found["turns"], "episode_kib": found["memory_kib"] / at_once}


# -- the store ---------------------------------------------------------------------------------------------------------


def accesses(folder: Path, rounds: int, begins: Callable[[str], None]) -> dict[str, list[float]]:
    """Of each kind of access, one after the other: milliseconds, of CPU, and kB that are written."""
    spent: dict[str, list[float]] = {kind: [0.0, 0.0, 0.0] for kind in _TIMES}

    @contextlib.contextmanager
    def access(kind: str, kb: float = 0.0) -> Iterator[None]:
        begins(kind)
        began, cpu = time.monotonic(), time.process_time()
        yield
        found = spent[kind]
        found[0] += (time.monotonic() - began) * 1000
        found[1] += (time.process_time() - cpu) * 1000
        found[2] += kb
        begins("")

    drawn = [screenshot(seed) for seed in range(DRAWN)]
    with contextlib.ExitStack() as stack:
        ours, theirs, *others = (stack.enter_context(RunStore.join(folder / "run")) for _ in range(2 + _OTHERS))
        for number in range(rounds):
            with access("claim"):
                ours.claim(f"t-{number}", 0)
            theirs._next_refresh = float("inf")  # looks alone; what a refresh takes is measured below
            with access("look"):
                theirs.claim(f"t-{number}", 0)
            refs = []
            for turn in range(TURNS):
                data = distinct(drawn[turn % DRAWN], number * TURNS + turn)
                with access("image", len(data) / 1000):
                    refs.append(ours.images.put(data))
                    _ = ours.images.load(refs[-1]).data  # as it is sent
            made = stored_runs.trajectory(number, refs)
            before = _size(folder)
            with access("attempt"):
                ours.append(made)
            spent["attempt"][2] += _size(folder) - before
            for other, store in enumerate(others):
                store.append(stored_runs.trajectory(rounds * (1 + other) + number, refs=()))
            with access("refresh"):
                theirs.refresh()
    return {kind: [value / rounds / _TIMES[kind] for value in found] for kind, found in spent.items()}


def _size(folder: Path) -> float:
    """Of the logs, kB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".jsonl", ".bin")) / 1000


_ASKED = re.compile(
    r"(?P<call>openat|newfstatat|mkdir|rename|link|unlink|utimensat|read|pread64|write|pwrite64|fsync|fdatasync|getdents64|"
    r"close|access)\((?P<rest>.*)"
)


def operations(rounds: int = 20) -> dict[str, float] | None:
    """Operations of each kind of access, counted by strace; None without it.

    Every call that may ask a file server: what its client has in its cache costs fewer.
    """
    if shutil.which("strace") is None:
        return None
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        run = Path(folder) / "stored"
        run.mkdir()
        words = ["strace", "-f", "-y", "-o", str(trace), sys.executable, __file__, "accesses", str(run), str(rounds)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        kind = ""
        with trace.open(errors="replace") as lines:
            for line in lines:
                asked = _ASKED.search(line)
                if asked is None:
                    continue
                if "/begins-" in line:
                    kind = line.partition("/begins-")[2].partition('"')[0]
                elif kind and str(run) in line and not _is_local(asked["call"], line):
                    found[kind] += 1
    return {kind: found[kind] / rounds / _TIMES[kind] for kind in _TIMES}


def _is_local(call: str, line: str) -> bool:
    """Answered without asking: the state of what is open, a read at its end, a folder's entries that were read."""
    return "AT_EMPTY_PATH" in line or (call in ("read", "pread64", "getdents64") and line.rstrip().endswith("= 0"))


def write(run: Path, rounds: int) -> float:
    """As one of a run's writers: seconds for so many attempts, screenshots and claims included."""
    drawn = [screenshot(seed) for seed in range(DRAWN)]
    with RunStore.join(run) as store:
        began = time.monotonic()
        for number in range(rounds):
            task = os.getpid() * 10_000 + number
            store.claim(stored_runs.task_of(task).id, 0)
            shots = [distinct(drawn[turn % DRAWN], task * TURNS + turn) for turn in range(TURNS)]
            store.append(stored_runs.trajectory(task, [store.images.put(shot) for shot in shots]))
        return time.monotonic() - began


def rates(rounds: int) -> dict[str, float]:
    """Attempts a second of one writer, and of several together."""
    found = {}
    for writers in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "write", folder + "/run", str(rounds)]
            began = [subprocess.Popen(words, stdout=subprocess.PIPE) for _ in range(writers)]
            found[str(writers)] = sum(rounds / json.loads(process.communicate()[0]) for process in began)
    return found


OPERATIONS = {"claim": 3.1, "look": 6.0, "image": 12.4, "attempt": 95.8, "refresh": 13.0}
"""Where there is no strace."""


def storing(rounds: int) -> dict[str, Storing]:
    """Of each kind of access."""
    asked = operations() or OPERATIONS
    with tempfile.TemporaryDirectory() as folder:
        spent = part("accesses", folder, rounds)
    return {kind: Storing(asked[kind], kb, local, cpu) for kind, (local, cpu, kb) in spent.items()}


def main() -> int:
    """Entry point of a part."""
    stub_server.raise_open_files()
    what, *rest = sys.argv[1:]
    if what == "play":
        print(json.dumps(play(Play(**json.loads(rest[0])))))
    elif what == "write":
        print(json.dumps(write(Path(rest[0]), int(rest[1]))))
    else:
        print(json.dumps(accesses(Path(rest[0]), int(rest[1]), _say)))
    return 0


def _say(kind: str) -> None:
    """To strace, which sees this call."""
    os.access(f"/begins-{kind}", os.F_OK)


if __name__ == "__main__":
    sys.exit(main())
