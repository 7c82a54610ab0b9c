"""Runs one server for long: `python tests/chaos/soak.py --minutes 30`, or `--real`. What must hold of its supervisor:

1. It stays under 60 MB (RSS), and does not grow: the most in the last third of the time is at most `GROWTH_BYTES` above
   the most in the first third, of all of it and of what is its own (anonymous; PSS and USS depend on who else runs).
2. When all has become quiet, it has no more descriptors and processes than before, and no thread beyond its pool.
3. Its logs are bounded: events.jsonl, supervisor.log, server.log, each with one older file.
4. Every answer is right, or a typed error; and there are answers.

Meanwhile clients come and go (some are killed), requests meet faults, weights are updated (one in five from a
checkpoint that must be refused), adapters are loaded and unloaded, restarts are asked for. All that happens once before
the measuring begins: what the supervisor imports for it then is no growth.

The supervisor itself is not killed here: it would begin anew. `run.py` kills it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(_TESTS), str(_TESTS / "helpers")) if path not in sys.path]

import standin
from demo_checkpoints import copy_of_demo, edit_json, make_adapter
from processes import HANG_S, eventually, own_state, tree

from managed_vllm import HangPolicy, ManagedVLLM, ManagedVLLMError, RestartPolicy, ServerState
from managed_vllm.errors import CheckpointError
from managed_vllm.server import event_log, supervisor_log

MEMORY_BYTES, GROWTH_BYTES = 60 << 20, 3 << 20
_MORE_DESCRIPTORS = 2
_LOG_BYTES = {
    "events.jsonl": event_log.KEPT_BYTES + (64 << 10),
    "supervisor.log": supervisor_log.KEPT_BYTES + (1 << 20),
    "server.log": (32 << 20) + (1 << 20),
    "image.log": 1 << 20,
}
"""The most that a file may have, and its older one."""
_POOL = min(32, (os.cpu_count() or 1) + 4)
"""Threads that an event loop keeps once it has needed them."""
_RESTART = RestartPolicy(max_restarts=10_000, backoff_initial_s=0.05, backoff_max_s=0.2)
_HANG = HangPolicy(stall_s=2.0, answer_s=3.0, stopped_s=2.0)
_FAULTS = (
    *("crash", "500", "crash-engine", "truncated", "503", "crash-worker", "abort", "streamerror", "hang-engine"),
    *("garbage", "halfstream", "hang-api", "slow"),
)
_LOOK_S = 1.0
_EVERY_S = {"visit": 3.0, "fault": 4.0, "update": 5.0, "adapter": 7.0, "restart": 61.0}


@dataclass(frozen=True)
class Scene:
    """A server, and what can be done to it. `faults` never ends."""

    llm: ManagedVLLM
    faults: Iterator[Callable[[], object]]
    good: Sequence[Path]
    bad: Path
    adapter: Path


def standin_scene(folder: Path, *, floods: bool) -> Scene:
    """The stand-in, with its faults on command; if `floods`, one in forty is 100 MB for the log."""
    (folder / "faults").mkdir()
    (folder / "adapter").mkdir()

    def faults() -> Iterator[Callable[[], object]]:
        for number in itertools.count():
            kind = "flood" if floods and number % 40 == 39 else _FAULTS[number % len(_FAULTS)]
            yield (folder / "faults" / f"{number}-{kind}").touch

    llm = ManagedVLLM(
        "stand-in",
        command=standin.command(),
        env=standin.orders(tree=True, faults=str(folder / "faults")),
        keep_alive=0,
        restart=_RESTART,
        hang=_HANG,
    )
    return Scene(llm, faults(), *_checkpoints(folder), folder / "adapter")


def real_scene(folder: Path) -> Scene:
    """The real vLLM with the embedded model; its processes are killed."""
    llm = ManagedVLLM("demo", enable_lora=True, max_lora_rank=8, keep_alive=0, restart=_RESTART)

    def kill(name: str) -> None:
        with contextlib.suppress(psutil.Error, AssertionError):  # it is just being started
            tree(llm)[name].send_signal(signal.SIGKILL)

    def faults() -> Iterator[Callable[[], object]]:
        for name in itertools.cycle(("EngineCore", "APIServer", "Worker")):
            yield lambda name=name: kill(name)  # type: ignore[misc]

    return Scene(llm, faults(), *_checkpoints(folder), make_adapter(folder / "adapter"))


def _checkpoints(folder: Path) -> tuple[Sequence[Path], Path]:
    good = [copy_of_demo(folder / name) for name in ("a", "b")]
    bad = copy_of_demo(folder / "bad")
    edit_json(bad / "config.json", vocab_size=1)
    return good, bad


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The supervisor at one moment; `processes` are those below it."""

    at: float
    rss: int
    anonymous: int
    descriptors: int
    threads: int
    processes: int


def sample(supervisor: psutil.Process) -> Sample:
    return Sample(
        time.monotonic(),
        supervisor.memory_info().rss,
        _anonymous(supervisor.pid),
        supervisor.num_fds(),
        supervisor.num_threads(),
        len(supervisor.children(recursive=True)),
    )


def _anonymous(pid: int) -> int:
    """Bytes of memory that no file is behind."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in rollup.splitlines() if line.startswith("Anonymous:")).split()[1]) << 10


@dataclass
class Report:
    """What a soak has shown."""

    samples: list[Sample] = field(default_factory=list)
    quiet: list[Sample] = field(default_factory=list)
    """Before and after."""
    logs: Mapping[str, int] = field(default_factory=dict)
    restarts: int = 0
    did: collections.Counter[str] = field(default_factory=collections.Counter)
    answered: int = 0
    broken: list[str] = field(default_factory=list)

    def thirds(self, what: Callable[[Sample], int]) -> tuple[int, int]:
        """The most in the first and in the last third."""
        size = max(1, len(self.samples) // 3)
        return max(map(what, self.samples[:size])), max(map(what, self.samples[-size:]))

    def kept(self, after: Sample) -> list[str]:
        """What the supervisor has not let go of."""
        before, found = self.quiet[0], []
        if after.descriptors > before.descriptors + _MORE_DESCRIPTORS:
            found.append(f"{before.descriptors} descriptors became {after.descriptors}")
        if after.processes > before.processes:
            found.append(f"{before.processes} processes became {after.processes}")
        if after.threads > before.threads + _POOL:
            found.append(f"{before.threads} threads became {after.threads}")
        return found

    def violations(self) -> list[str]:
        """What should hold and does not; see the module's docstring."""
        found = list(self.broken)
        for name, what in (("RSS", lambda one: one.rss), ("anonymous memory", lambda one: one.anonymous)):
            first, last = self.thirds(what)
            if max(map(what, self.samples)) > MEMORY_BYTES:
                found.append(f"{name} of {max(map(what, self.samples)):,} bytes")
            if last - first > GROWTH_BYTES:
                found.append(f"{name} grew from {first:,} to {last:,} bytes")
        found += self.kept(self.quiet[1])
        for name, size in self.logs.items():
            if size > _LOG_BYTES[name.removesuffix(".1")]:
                found.append(f"{name} has {size:,} bytes")
        return found if self.answered else [*found, "nothing was answered"]

    def text(self) -> str:
        """For people."""
        thirds = {
            "RSS, MB": self.thirds(lambda one: one.rss >> 10),
            "anonymous, MB": self.thirds(lambda one: one.anonymous >> 10),
        }
        lines = [f"{len(self.samples)} looks, {self.answered} answers, {self.restarts} restarts; {dict(self.did)}"]
        for name, (first, last) in thirds.items():
            lines.append(f"{name}: at most {first / 1024:.1f} in the first third, {last / 1024:.1f} in the last")
        tenth = max(1, len(self.samples) // 10)
        tenths = [max(one.rss for one in self.samples[at : at + tenth]) for at in range(0, len(self.samples), tenth)]
        lines.append(f"RSS, MB, by tenths: {' '.join(f'{size / 2**20:.1f}' for size in tenths)}")
        before, after = self.quiet
        for name in ("rss", "descriptors", "threads", "processes"):
            lines.append(f"{name}, quiet: {getattr(before, name):,} before, {getattr(after, name):,} after")
        lines += [f"{name}: {size:,} bytes" for name, size in sorted(self.logs.items())]
        return "\n".join(lines)


# -- the run -----------------------------------------------------------------------------------------------------------


class Soak:
    """One run over a scene."""

    def __init__(self, scene: Scene, seed: int = 0) -> None:
        self._scene = scene
        self._rng = random.Random(seed)
        self._seeds = itertools.count(seed)
        self._visitors: list[tuple[subprocess.Popen[str], float]] = []
        self._updates = itertools.count()
        self.report = Report()

    def run(self, seconds: float) -> Report:
        """All of it, in a state directory that is the environment's."""
        llm, report = self._scene.llm, self.report
        with llm:
            for _ in range(len(_FAULTS)):
                self._do("fault")
                self._ask()
            for what in ("visit", "update", "update", "adapter", "adapter", "restart"):
                self._do(what)
            self._see_off_all()
            report.quiet.append(self._quiet())
            self._go_on(seconds)
            self._see_off_all()
            report.quiet.append(self._quiet())
            with contextlib.suppress(
                AssertionError
            ):  # a connection that is just being closed, a process that just ends
                eventually(lambda: not report.kept(sample(self._supervisor())), "it has let go")
                report.quiet[1] = sample(self._supervisor())
            status = llm.status()
            report.restarts = status.restarts
            folder = Path(str(status.log_path)).parent
            logs = [path for path in folder.iterdir() if path.name.removesuffix(".1") in _LOG_BYTES]
            report.logs = {path.name: path.stat().st_size for path in logs}
        return report

    def _supervisor(self) -> psutil.Process:
        return psutil.Process(self._scene.llm.status().supervisor_pid or 0)

    def _quiet(self) -> Sample:
        llm = self._scene.llm
        while True:
            eventually(lambda: (llm.wait_ready(HANG_S).state, llm.status().users) == (ServerState.READY, 1), "quiet")
            for _ in range(50):  # a fault that is still ordered, or a process that is just ending
                self._ask()
            epoch, found, status = llm.wait_ready(HANG_S).epoch, sample(self._supervisor()), llm.status()
            if (status.state, status.epoch) == (ServerState.READY, epoch):  # else it was being started meanwhile
                return found

    def _ask(self) -> None:
        try:
            self._scene.llm.generate("quiet", {"max_tokens": 2}, timeout=HANG_S)
        except ManagedVLLMError as error:
            self.report.did[type(error).__name__] += 1

    def _go_on(self, seconds: float) -> None:
        until, supervisor = time.monotonic() + seconds, self._supervisor()
        due = {what: time.monotonic() + every_s for what, every_s in _EVERY_S.items()}
        while time.monotonic() < until:
            for what in [what for what, at in due.items() if at <= time.monotonic()]:
                self._do(what)
                due[what] = time.monotonic() + _EVERY_S[what]
            self._see_off(wait=False)
            self.report.samples.append(sample(supervisor))
            time.sleep(_LOOK_S)

    def _do(self, what: str) -> None:
        self.report.did[what] += 1
        acts: dict[str, Callable[[], object]] = {
            "visit": self._visit,
            "fault": lambda: next(self._scene.faults)(),
            "update": self._update,
            "adapter": self._adapter,
            "restart": lambda: self._scene.llm.restart(timeout=HANG_S),
        }
        try:
            acts[what]()
        except ManagedVLLMError as error:
            self.report.did[f"{what}: {type(error).__name__}"] += 1

    def _update(self) -> None:
        number = next(self._updates)
        engine = self._scene.llm.engine
        if number % 5 != 1:
            engine.update_weights(self._scene.good[number % 2], version=f"step-{number}", timeout=HANG_S)
            return
        try:
            engine.update_weights(self._scene.bad, timeout=HANG_S)
            self.report.broken.append("a bad checkpoint was taken")
        except CheckpointError:
            pass

    def _adapter(self) -> None:
        engine = self._scene.llm.engine
        if "soak" in engine.loras():
            engine.unload_lora("soak")
        else:
            engine.load_lora("soak", self._scene.adapter)

    # -- visitors ------------------------------------------------------------------------------------------------------

    def _visit(self) -> None:
        seconds = self._rng.uniform(2, 8)
        words = [sys.executable, str(Path(__file__).with_name("visitor.py")), str(next(self._seeds)), f"{seconds:.1f}"]
        environment = {**os.environ, **self._scene.llm.environ(), "MANAGED_VLLM_KEEP_ALIVE": "0"}
        visitor = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
        killed_at = time.monotonic() + (self._rng.uniform(1, 4) if self._rng.random() < 0.2 else 10 * HANG_S)
        self._visitors.append((visitor, killed_at))

    def _see_off(self, *, wait: bool) -> None:
        """Takes the word of those that have ended; kills those whose time it is."""
        staying = []
        for visitor, killed_at in self._visitors:
            if time.monotonic() > killed_at:
                visitor.kill()
            elif not wait and visitor.poll() is None:
                staying.append((visitor, killed_at))
                continue
            self._take_word(visitor)
        self._visitors = staying

    def _see_off_all(self) -> None:
        self._see_off(wait=True)

    def _take_word(self, visitor: subprocess.Popen[str]) -> None:
        try:
            said, _ = visitor.communicate(timeout=3 * HANG_S)
        except subprocess.TimeoutExpired:
            visitor.kill()
            visitor.communicate()
            self.report.broken.append("a visitor hangs")
            return
        if visitor.returncode == -signal.SIGKILL:
            self.report.did["killed visitors"] += 1
        elif visitor.returncode != 0 or not said:
            self.report.broken.append(f"a visitor ended with {visitor.returncode}")
        else:
            word: dict[str, Any] = json.loads(said.splitlines()[-1])
            self.report.answered += word["answered"]
            self.report.did.update(word["errors"])
            self.report.broken += word["broken"]


def main() -> int:
    """The exit code is 1 if something that must hold did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--real", action="store_true", help="the real vLLM with the embedded model")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with own_state() as home:
        folder = home.parent / "soak"
        folder.mkdir()
        scene = real_scene(folder) if given.real else standin_scene(folder, floods=True)
        report = Soak(scene, given.seed).run(60 * given.minutes)
    print(report.text())
    for line in report.violations():
        print(f"BROKEN: {line}")
    return int(bool(report.violations()))


if __name__ == "__main__":
    sys.exit(main())
